# Two commands do everything on a bare machine: `make demo` and `make test`. Each installs what it needs into .venv first.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.12 || command -v python3.13 || command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PYTHONUNBUFFERED = 1
export MPLBACKEND = agg

.PHONY: demo test check-clean notebooks pytest lab figures gpu install clean

install: $(STAMP)

$(STAMP): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "shipnb needs Python 3.11, 3.12 or 3.13; found: $$($(PYTHON) --version 2>&1). Say which with: make PYTHON=/path/to/python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)  ## the main job on the embedded sample; under 10 minutes on 2 cores after the install
	$(BIN)/shipnb study --name demo -f nbs/params/demo.yaml

test: $(STAMP) check-clean notebooks pytest  ## everything CI checks; under 25 minutes on 2 cores

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

gpu: $(STAMP)  ## the cells that need a GPU, the slow ones, and the benchmarks
	$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu needs a CUDA device; torch sees none")'
	$(BIN)/nbdev_test --n_workers 1 --flags 'cuda slow' --do_print
	$(BIN)/shipnb run benchmarks --out runs/gpu/benchmarks --force

clean:  ## remove what can be made again: the sample, caches, default runs; named runs and the environment stay
	rm -rf data/sample runs/cache runs/default runs/quick .pytest_cache .ruff_cache .hypothesis build *.egg-info
