# Everything lives in one folder; each target sets up what it needs and does nothing twice.
PYTHON ?= python3
# STACK=current takes today's torch, Triton, transformers and fla, in .venv-current (docs/stacks.md).
STACK ?= default
ifeq ($(STACK),default)
VENV := .venv
INSTALL = -c constraints.txt -e '.[dev]'
LOCK := constraints.txt
else ifeq ($(STACK),current)
VENV := .venv-current
# Composer's own pins exclude these versions: the whole list is installed as it is.
INSTALL = --no-deps -r constraints-current.txt -e .
LOCK := constraints-current.txt
# The list is the whole of what is installed: constraints that a machine has for all its users would contradict it.
export PIP_CONSTRAINT := $(LOCK)
else
$(error STACK=$(STACK): there is "default" and "current")
endif
BIN := $(VENV)/bin
# Packages are compiled when they are first imported, and once: without this set, every process compiles all of torch again.
export PYTHONDONTWRITEBYTECODE :=

# What depends on the versions of torch, Triton, transformers and fla the most: patches, parity, checkpoints, resuming, export,
# generation, parallelism.
CORE := tests/upstream tests/cpu tests/text tests/export tests/checkpoint/test_checkpoint.py tests/train/test_resume.py \
	tests/train/test_parallelism.py tests/train/test_tensor.py tests/use/test_generate.py tests/test_earlier.py

.PHONY: help setup quickstart tune test test-core test-faults test-keys lint docs bench gpu clean

help:
	@echo "make quickstart  text -> shards -> training -> evaluation -> export -> a sample, on this machine in minutes"
	@echo "make tune        examples -> rows -> tuning of the quickstart's model -> export -> answers and their scores"
	@echo "make test        run the tests"
	@echo "make test-core   those that depend on the versions of torch, Triton, transformers and fla the most"
	@echo "make test-faults  the tests that kill processes for minutes"
	@echo "make test-keys   see every key's test fail while the key is forgotten (tests/keys.json)"
	@echo "make lint        ruff (rules and format) and mypy"
	@echo "make bench       time training, data, start-up, checkpoints, decoding, serving and conversion, each against another"
	@echo "make gpu         on a machine with a GPU: its tests, parity, exact resumption, speed and memory, for 9 minutes at most"
	@echo "make docs        write docs/configuration.md from the code"
	@echo "make setup       install everything into $(VENV) (the other targets do it themselves)"
	@echo "STACK=current    with any of them: today's torch, Triton, transformers and fla (docs/stacks.md), in .venv-current"
	@echo "make clean       delete what these made (data/quickstart, runs/gla_tiny, data/tune, runs/sft_tiny)"

setup: $(VENV)/.done

# Packages are laid out without byte-compiling all of them: what is used is compiled when it is first imported.
$(VENV)/.done: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(INSTALL)
	@touch $@

quickstart: setup
	$(BIN)/python recipes/quickstart.py

tune: setup
	$(BIN)/python recipes/tune.py

# Most of the time goes into imports, which keep one core busy: two tests at once, each on one core.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-core: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(CORE)

test-faults: setup
	OMP_NUM_THREADS=1 FLAME_COMPOSER_FAULTS=1 $(BIN)/python -m pytest -m faults

test-keys: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.prove_keys

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -c "from flame_composer.reference import write; write()"

bench: setup
	$(BIN)/python recipes/benchmark.py all

# REHEARSE=1 runs the same commands without a GPU, on small models.
gpu: setup
	$(BIN)/python recipes/benchmark.py gpu $(if $(REHEARSE),rehearse=true)

clean:
	rm -rf data/quickstart runs/gla_tiny data/tune runs/sft_tiny
