# `make demo` and `make test` set everything up; they need only Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo quick test lint docs proof memory test-triton bench bench-compare baselines clean

demo: $(VENV)/.runtime  ## detect blood cells on four sample images
	$(BIN)/yolov7 predict

TESTS ?= tests/kernels tests/reference

quick: lint  ## ruff, mypy and some tests, under a minute: make quick TESTS=tests/train
	$(BIN)/pytest -n 2 --dist worksteal -m "not aot" $(TESTS)

test: lint  ## ruff, mypy, and every test: plain with ahead-of-time compilation, then interpreted
	$(BIN)/pytest -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist worksteal -m interpreter tests/kernels

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

MINUTES ?= 5

proof: $(VENV)/.dev  ## what takes long: hostile inputs and threads for MINUTES each, every launch
	$(BIN)/python -m tests.proof.fuzz --minutes $(MINUTES)
	$(BIN)/python -m tests.proof.soak --minutes $(MINUTES)
	$(BIN)/pytest -n 2 --dist worksteal -m proof tests/kernels
	$(MAKE) memory

# ttsem wants Python 3.12 and Triton 3.8, and asks for a PyTorch that it does not need.
PYTHON_MEMORY ?= python3.12

memory: .venv-memory/.done  ## the kernels under ttsem (every access) and sentryward (barriers)
	.venv-memory/bin/python -m tests.proof.memory
	.venv-memory/bin/python -m tests.proof.barriers

.venv-memory/.done: pyproject.toml constraints.txt
	$(PYTHON_MEMORY) -m venv .venv-memory
	.venv-memory/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	.venv-memory/bin/pip install --quiet --no-deps triton==3.8.0 ttsem==0.1.0 sentryward==0.1.1
	touch $@

# The kernel jobs under another Triton: make test-triton TRITON=3.6.0
test-triton:
	$(MAKE) VENV=.venv-triton-$(TRITON) .venv-triton-$(TRITON)/.dev
	.venv-triton-$(TRITON)/bin/pip install --quiet --no-deps triton==$(TRITON) \
	  $(if $(filter 3.6.%,$(TRITON)),'numpy<2.4')  # its interpreter needs it
	.venv-triton-$(TRITON)/bin/pytest -n 2 -m aot tests/kernels
	TRITON_INTERPRET=1 .venv-triton-$(TRITON)/bin/pytest -n 2 -m interpreter tests/kernels

bench: $(VENV)/.dev  ## time everything beside its baselines; ARGS=--save keeps the results
	$(BIN)/python -m pytest bench --benchmark-quiet $(ARGS)

bench-compare: $(VENV)/.dev  ## is this tree faster or slower than BASE, a git ref?
	$(BIN)/python -m bench.compare $(BASE)

baselines: $(VENV)/.dev  ## rewrite the tables that compiled kernels are compared with
	for file in sm_90:1 sm_90:32 sm_80:1 sm_89:1 sm_100:1 sm_120:1; do \
	  target=$${file%:*}; batch=$${file#*:}; \
	  $(BIN)/yolov7 aot --target $$target --variant yolov7 --batch $$batch \
	  --json bench/baselines/aot-$$target-yolov7-batch$$batch.json || exit 1; done

$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build dist *.egg-info runs
