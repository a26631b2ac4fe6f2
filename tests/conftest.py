"""Shared by the tests: a headless figure backend, and the folder of real images when CI or a person names it."""
import os
from pathlib import Path

import hypothesis
import matplotlib
import pytest

matplotlib.use("agg")
# how long an example takes to make says how busy the machine is, not whether the code is right
hypothesis.settings.register_profile("shared machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets; tests that need it skip without `SHIPNB_REAL_DATA`."""
    folder = os.environ.get("SHIPNB_REAL_DATA")
    if not folder: pytest.skip("SHIPNB_REAL_DATA is not set: no real images here")
    return Path(folder)


STYLE = {name: value for name, value in matplotlib.rcParams.items() if not name.startswith(("backend", "interactive"))}


@pytest.fixture(autouse=True)
def plain_style():
    """Figures look as matplotlib makes them, whatever style a notebook's cells have set in a test before."""
    dict.update(matplotlib.rcParams, STYLE)
