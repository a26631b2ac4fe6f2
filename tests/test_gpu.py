"""tests/gpu.sh, where there is no GPU: what it says, what it would run."""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def gpu(arguments, **environment):
    """tests/gpu.sh, as a person calls it."""
    return subprocess.run([ROOT/"tests"/"gpu.sh", *arguments], env=os.environ | environment, text=True, capture_output=True)


def test_the_gpu_script_says_in_one_sentence_what_it_lacks(tmp_path):
    made = gpu([], PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="", OUT=str(tmp_path/"out"))
    assert made.returncode == 2 and re.fullmatch(r"tests/gpu.sh needs a CUDA device; torch in \S+ sees none\n", made.stderr) and not made.stdout and not (tmp_path/"out").exists()
    made = gpu(["frog"], PYTHON=sys.executable)
    assert made.returncode == 2 and made.stderr == "unknown part 'frog': cells, benchmarks, fleet or all\n"


def test_the_gpu_script_installs_once_and_runs_its_parts(tmp_path):
    """With a stand-in for Python that claims a GPU and writes down what it is asked."""
    (tmp_path/"wheels").mkdir(), (tmp_path/"wheels"/"a-1-py3-none-any.whl").write_bytes(b"")
    (tmp_path/"python").write_text(f'#!/bin/sh\nfor o in "$@"; do :; done\necho "$1 $2 $3 $4 | $o | $PYTHONPATH" | tr "\\n" " " >>{tmp_path}/asked; echo >>{tmp_path}/asked\n[ "$2" = pip ] && mkdir -p {tmp_path}/site\nexit 0\n')
    (tmp_path/"python").chmod(0o755)
    options = dict(PYTHON=str(tmp_path/"python"), OUT=str(tmp_path/"out"), SITE=str(tmp_path/"site"))
    for part in ("cells", "benchmarks"): assert gpu(["-w", str(tmp_path/"wheels"), part], **options).returncode == 0
    asked = (tmp_path/"asked").read_text().splitlines()
    assert sum(" pip install" in o for o in asked) == 1 and "--no-index" in (ROOT/"tests"/"gpu.sh").read_text()
    with_cells = sorted(o.name for o in (ROOT/"nbs").glob("*.ipynb") if '"#| cuda' in o.read_text(encoding="utf-8"))
    assert [o.split("|")[1].strip() for o in asked if "nbdev_test" in o] == [f"nbs/{o}" for o in with_cells] and with_cells
    assert f"{ROOT}:{tmp_path}/site" in asked[-1] and "shipnb.runs import main" in asked[-1] and "| true |" in asked[-1]      # run benchmarks ... -p publish true
    assert {o.name for o in (tmp_path/"out").iterdir()} == {"machine.json", "cells.log", "benchmarks.log", "benchmarks.json", "benchmarks.png"}
