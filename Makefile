# make demo: from raw text to a mixed, trained model.  make test: all tests.  make check: lint, types, layers, spelling.
# make evidence: mixing rules against static mixtures, over seeds, sizes and corpora.  make evidence-short: a part of it.
# make compat: a part of the tests with the oldest and the newest packages that setup.py allows.
# make docs: pages of the public API, in build/docs.
# make gpu: the loss kernels' acceptance on this machine's GPU, half an hour.  make clean: removes the environments, data
# and runs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# The build of PyTorch; pip options may follow it, for example to choose the CPU build.
TORCH ?= torch==2.13.0
# The triton that the CUDA builds of this PyTorch ask for: one lock serves machines with and without GPUs.
TRITON ?= triton==3.7.1
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo evidence evidence-short gpu mini-pile workshop test check compat docs env lock newest clean

demo: mini-pile
	$(BIN)/megamix train configs/demo.yaml
	$(BIN)/megamix train configs/demo_static.yaml
	$(BIN)/megamix plot runs/demo
	$(BIN)/megamix inspect runs/demo
	$(BIN)/megamix compare runs/demo_static runs/demo

# SHORT. The same command goes on after an interruption; ARGS are for each arena, for example ARGS="--at-once 8".
evidence: mini-pile workshop
	for name in mini-pile workshop workshop-traps mini-pile-swarm mini-pile-2m workshop-2m mini-pile-1600 workshop-1600; do \
	  $(BIN)/megamix arena configs/evidence/$$name.yaml $(ARGS) || exit; \
	done

evidence-short: mini-pile
	$(BIN)/megamix arena configs/evidence/short.yaml $(ARGS)

# A peer that cannot be installed here is a row without figures. ARGS are for the script, for example ARGS="--minutes 60".
gpu: $(READY)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH) --editable ".[bench]"
	$(BIN)/python kernels/bench/acceptance.py --out runs/acceptance $(ARGS)

mini-pile: $(READY)
	$(BIN)/megamix corpus data/text
	$(BIN)/megamix prepare data/text --out data/mini-pile --tokenizer train:1024

workshop: $(READY)
	$(BIN)/megamix corpus data/workshop-text --name workshop
	$(BIN)/megamix prepare data/workshop-text --out data/workshop --tokenizer train:1024

# File by file in the order of tests/conftest.py, the longest first; three at a time for two cores, because tests with Slurm
# mostly wait for it.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/codespell megamix kernels configs slurm tests *.md

# The public API, from its docstrings, in one folder without other files than its own.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	rm -rf build/docs
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/docs build/docs

env: $(READY)

# torch first and by itself: with the other packages, pip would pick a torch of its own choice.
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $@

# The newest versions that setup.py allows, written down: what every environment above consists of. PyTorch is not
# among them, because its builds differ from machine to machine; nor are hashes, which pip refuses in constraints.
lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet $(TORCH) "$(TRITON)"
	echo "$(TRITON)" >$(VENV)-lock/constraints.txt
	$(VENV)-lock/bin/python -m pip install --quiet --constraint $(VENV)-lock/constraints.txt --editable ".[all,dev]"
	$(VENV)-lock/bin/python -m pip freeze --quiet --all --exclude-editable | grep -vE '^(pip|torch|nvidia-.*|cuda-.*)==' >constraints.txt
	rm -rf $(VENV)-lock

# A part of the tests against the newest of everything; prints what is newer than the lock and how they went, and
# never fails.
newest: $(READY)
	PYTHON=$(BIN)/python .ci/newest

# The oldest packages in an environment of their own, with Python 3.10 where there is one; then the newest.
compat: newest
	.ci/oldest

# Everything that is made here: also all data and runs.
clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest data runs build *.egg-info
