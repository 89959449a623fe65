# make test, fuzz, bench, check, gpu: each sets up what it needs first.
#   PYTHON=python3.12  the interpreter to build the environment from
#   VENV=.venv         the environment, a folder in the checkout; VENV=system installs nothing and uses what PYTHON holds
#   TRITON=3.6.0       another Triton, in an environment of its own over .venv
#   JOBS=2             test processes
#   OUT=dir ARGS=...   bench, gpu: where results go; bench: further arguments
#   N=1000             fuzz: how many calls of each kind, and models
#   STAGE=models       gpu: some stages of tests, operators, blocks, models, tuning
#   EMULATE=H200       gpu: on an emulated one, tiny; its times mean nothing
#   GPU=H200 ARGS=...  emulate: which GPU, H200,early for asynchrony that ends at once; which tests
#   FASTCONV_COMMIT=   gpu: what is measured, if there is no .git to ask
SHELL = bash
PYTHON ?= python3
VENV ?= .venv$(TRITON:%=-triton-%)
JOBS ?= $(shell n=$$(nproc); echo $$((n < 16 ? n : 16)))
N ?= 1000
export PYTHON VENV TRITON JOBS

ifeq ($(VENV),system)
RUN = "$(PYTHON)"
override TRITON =
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
RUN = "$(VENV)/bin/python"
endif
# one thread a process: the processes already fill the cores
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS)

COMPILED = tests/kernels/test_compile.py tests/kernels/test_launch.py tests/api/test_warmup.py \
	-k "sm_90 and not variants or launch or warmup"

.PHONY: setup test test-fast test-compile test-slow test-tiles fuzz same-binaries emulate bench check gpu
.DEFAULT_GOAL = test
.NOTPARALLEL:

setup:
	@$(if $(TRITON),VENV=.venv TRITON= .ci/setup)
	@.ci/setup

test: test-fast test-compile test-slow

# another Triton runs a sample of what depends on it most
test-fast: setup
	@.ci/stage "fast tests" env TRITON_INTERPRET=1 $(PYTEST) -m "not compile and not slow" \
		$(if $(TRITON),tests/kernels --sample)

test-compile: setup
	@.ci/stage "compile tests" env -u TRITON_INTERPRET $(PYTEST) -m "compile and not slow" $(if $(TRITON),$(COMPILED))

# every tile of the bulk copies' spaces, chosen by a network or not, on more GPUs: for a change of a kernel or a space
test-tiles: setup
	@.ci/stage "tiles" env -u TRITON_INTERPRET $(PYTEST) -m "compile and slow"

test-slow: setup
	@.ci/stage "slow tests" env TRITON_INTERPRET=1 $(PYTEST) -m "slow and not compile"

# random calls of every operator and random models, new ones each time; a failure ends with lines to paste
fuzz: setup
	@FASTCONV_FUZZ=$(N) TRITON_INTERPRET=1 $(PYTEST) tests/fuzz

# whether a refactoring compiles to what BASE did: ten to twenty minutes a commit
same-binaries: setup
	@env -u TRITON_INTERPRET $(RUN) benchmarks/tools/same_binaries.py $(BASE) $(ARGS)

# tests that need a GPU, on an emulated one (tests/emulator)
emulate: setup
	@.ci/stage "emulated $(or $(GPU),H200)" env -u TRITON_INTERPRET FASTCONV_DEVICE=tests.emulator:$(or $(GPU),H200) \
		$(PYTEST) -m "not compile" $(ARGS)

bench: setup
	@$(RUN) -m fastconv bench $(if $(OUT),--out "$(OUT)") $(ARGS)

check: setup
	@.ci/stage format $(RUN) -m ruff format --check .
	@.ci/stage lint $(RUN) -m ruff check .
	@.ci/stage types $(RUN) -m mypy

gpu: setup
	@OUT="$(or $(OUT),out/gpu)" STAGE="$(STAGE)" EMULATE="$(EMULATE)" .ci/gpu $(RUN)
