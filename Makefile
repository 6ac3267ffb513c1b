# make demo: train the demo team and write its report.  make test: the fast tests.  make test-all: the slow ones too.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# torch is asked for by its exact version first: that is a CPU build where one is at hand, and an open range may bring gigabytes of CUDA
TORCH := torch==2.13.0
WORKERS ?= 2

.PHONY: demo vote test test-all lint setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ccpo needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,data,gym,tensorboard,plots,ray]'
	touch $(READY)

demo: setup
	$(BIN)/ccpo train demo --set run.dir=runs/demo --set run.overwrite=true
	$(BIN)/ccpo report runs/demo

vote: setup
	$(BIN)/ccpo train vote --set run.dir=runs/vote --set run.overwrite=true
	$(BIN)/ccpo report runs/vote

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov=ccpo.credit --cov=ccpo.losses --cov=ccpo.teams --cov-report=term --cov-fail-under=95 --durations=25

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs dist build
