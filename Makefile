# make pretrain    set up everything, pre-train a small CR-Net on real text, show what it learned
# make test        set up everything, run the test-suite
# make test-long     the test-suite with its long cases
# make test-quantize   add torchao, run the tests of weights in 8 and 4 bits
# make test-oldest   set up the oldest versions that pyproject.toml allows, run the tests that lean most on other packages
# make test-peft   set up everything, run PEFT's own test-suite on LoR2C (ARGS="decoder custom" for some of it)
# make test-transformers   set up everything, run transformers' common model tests on our models (ARGS="llama" for some)
# make lint types  style and type checks
#
# PYTHON=python3.12 make pretrain   picks another interpreter (3.11 or newer)
# make pretrain ARGS="--overwrite --max_steps 100"   passes options on to `crosslayer pretrain`

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# In the order of the files, the longest first, so that no worker waits for them at the end.
PYTEST = $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
OLDEST = .venv-oldest
# Those that lean most on other packages.
OLDEST_TESTS = $(patsubst %,tests/unit/test_%.py,private registration config cli lor2c_adapter model data_fit bench)
RUN = runs/crnet_python_library
ARGS ?= $(if $(wildcard $(RUN)/run.json),--resume)

.PHONY: pretrain test test-long test-fast test-quantize test-oldest test-peft test-transformers lint types check clean

pretrain: $(READY)
	@echo "== Pre-training a CR-Net on the Python standard library's own text (a few minutes on two CPU cores)"
	@$(BIN)/crosslayer pretrain --recipe crnet_python_library --output_dir $(RUN) $(ARGS)

test: $(READY)
	@echo "== Running all tests but the long ones"
	@$(PYTEST) -m "not long" tests/unit/test_resume.py tests

test-long: $(READY)
	@echo "== Running all tests"
	@$(PYTEST)

test-fast: $(READY)
	@$(PYTEST) -m "not slow and not long"

# Whoever has torchao waits for it whenever transformers is imported: the other tests are quicker without.
test-quantize: $(READY)
	@echo "== Testing weights in 8 and 4 bits"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[quantize]"
	@$(PYTEST) tests/unit/test_quantization.py tests/integration/test_compiled_decoding.py -k quantiz

test-oldest: ARGS =
test-oldest: $(OLDEST)/.ready
	@echo "== Testing with the oldest versions that pyproject.toml allows"
	@$(OLDEST)/bin/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile -m "not slow" $(or $(ARGS),$(OLDEST_TESTS))

test-peft: ARGS =
test-peft: $(READY)
	@echo "== Running PEFT's own test-suite on LoR2C"
	@$(BIN)/python tests/peft_suite/run.py $(ARGS)

test-transformers: ARGS =
test-transformers: $(READY)
	@echo "== Running transformers' own model tests on CR-Net"
	@$(BIN)/python tests/transformers_suite/run.py $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) $(OLDEST) build .pytest_cache .mypy_cache .ruff_cache src/*.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crosslayer needs Python 3.11 or newer; this is %s. Name one: make PYTHON=python3.12" % sys.version.split()[0] or 0)'
	@echo "== Setting up the virtual environment $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,track]"
	@touch $@

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	@echo "== Setting up the virtual environment $(OLDEST) (once)"
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable ".[dev]"
	@touch $@
