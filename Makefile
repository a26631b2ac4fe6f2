# Two commands do everything on a bare machine: `make demo` and `make test`. Each installs what it needs into .venv first.
SHELL := /bin/bash
# the first interpreter that runs, is 3.11 to 3.13, and can make an environment (a name on the PATH may be a shim that does not)
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONUNBUFFERED = 1
export MPLBACKEND = agg

.PHONY: demo test check-clean notebooks pytest lab figures gpu install clean

install: $(STAMP)

$(STAMP): settings.ini setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "shipnb needs Python 3.11, 3.12 or 3.13 with venv; none was found. Say which with: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)  ## the main job on the embedded sample; under 10 minutes on 2 cores after the install
	$(BIN)/shipnb study --name demo -f nbs/params/demo.yaml

test: $(STAMP) check-clean notebooks pytest  ## everything CI checks; under 30 minutes on 2 free cores

check-clean:  ## notebooks are clean and the package is what they export
	$(BIN)/python tests/check_generated.py
	$(BIN)/ruff check

notebooks:  ## every notebook runs from top to bottom (one at a time: the trainings use both cores)
	$(BIN)/nbdev_test --n_workers 1 --do_print

pytest:
	$(BIN)/python -m pytest -q

lab: $(STAMP)  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=. nbs

figures: $(STAMP)  ## re-run the published notebooks in place and stamp them
	$(BIN)/shipnb figures

gpu: $(STAMP)  ## what needs a GPU: those cells, the benchmarks, a training of real size; results in OUT (runs/gpu)
	PYTHON=$(BIN)/python PATH="$(CURDIR)/$(BIN):$$PATH" tests/gpu.sh

clean:  ## remove what can be made again: the sample, caches, default runs; named runs and the environment stay
	rm -rf data/sample runs/cache runs/default runs/figures runs/quick .pytest_cache .ruff_cache .hypothesis build *.egg-info
