# make demo: from raw text to a mixed, trained model.  make test: all tests.  make check: lint, types, layers, spelling.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# The build of PyTorch; pip options may follow it, for example to choose the CPU build.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check env clean

demo: $(READY)
	$(BIN)/megamix corpus data/text
	$(BIN)/megamix prepare data/text --out data/mini-pile --tokenizer train:1024
	$(BIN)/megamix train configs/demo.yaml
	$(BIN)/megamix inspect runs/demo
	$(BIN)/megamix plot runs/demo

# Two at a time, file by file in the order of tests/conftest.py: the longest first.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell megamix kernels configs slurm tests README.md DECISIONS.md CHANGELOG.md

env: $(READY)

# torch first and by itself: with the other packages, pip would pick a torch of its own choice.
$(READY): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) data runs build *.egg-info
