# Every target does its own set-up on a fresh machine: Python 3.11 or newer, git and a C++ compiler are all it takes.
# Without a compiler the reference kernels are used, and the installation says so.
#
#   make demo       a minute: what happens to densenet121, that its numbers stay, and what it and resnet50 win here
#   make test       the test-suite (WORKERS=4: four tests at a time)
#   make zoo        every torchvision model with a batch norm, two whole ones interpreted, whole commands (WORKERS=4: four at a time)
#   make zoo-float32   those of them in float32 that make zoo has in float64 alone
#   make lint       ruff, codespell, the contract on imports, and mypy on the installed wheel
#   make mutations  plants faults in passes, nodes and kernels, one at a time, and says which guard notices each (ARGS: some of them)
#   make sanitize   the kernel tests under the address and undefined-behaviour sanitizers
#   make bench      timings against eager
#   make fuzz       100,000 spoiled calls of the CPU kernels, in child processes (ARGS="--cases 1000 --seed 1")
#   make cuda       every CUDA kernel compiled for every supported part (no GPU needed): registers, spills, shared memory
#   make cuda-oldest   the same, and the interpreted tests, with the oldest PyTorch and Triton, in a venv of their own (ARGS: other tests)
#   make cuda-models   whole models through the CUDA kernels in Triton's interpreter: a part of make zoo (no GPU needed)
#   make cuda-emulated   the interpreted tests on the code that is compiled for a part (PART=90), run by an emulator of its instructions; hours
#   make cuda-steps    what the training steps of four models launch on a GPU, and their least time there, counted (no GPU needed; minutes)
#   make gpu        checks and times everything on the GPU at hand
#   make integrations   the how-tos that need other libraries: Lightning, Accelerate, transformers, timm
#   make docs       the documentation as a site in docs/_build/html; fails at any warning
#   make wheel      a wheel and a source distribution in dist/, the wheel installed and checked where there is no compiler
#   make clean      remove .venv, .venv-oldest and everything that was built
#
# ARGS reaches the command behind a target: make test ARGS="tests/passes -x"

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Another set-up beside it, of other versions: make VENV=.venv-other PIN='torch==2.12.*' test
VENV := .venv
PIN :=
BIN := $(VENV)/bin
KERNELS := bnrestructure/kernels/cpu
KERNEL_SOURCES := $(wildcard $(KERNELS)/src/*.cpp $(KERNELS)/src/*.h) $(KERNELS)/build.py
ARGS ?=

PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: help demo test zoo zoo-float32 integrations docs wheel lint mutations sanitize fuzz bench cuda cuda-oldest cuda-models cuda-emulated cuda-steps gpu clean setup

help:
	@sed -n 's/^#   //p' Makefile

# --- set-up -----------------------------------------------------------------------------------------------------------

setup: $(VENV)/.ready

# PYTHON names an interpreter; otherwise the first one on the path that is new enough.
$(BIN)/python:
	@for python in $${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then echo "make: no Python 3.11 or newer found; name one with PYTHON=/path/to/python make ..." >&2; exit 1; fi; \
	echo "Creating $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); echo "make: $$found cannot create a venv (on Debian: apt install python3-venv)" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml setup.py | $(BIN)/python
	@echo "Installing bnrestructure and its dependencies into $(VENV) (PyTorch is large: minutes the first time)"
	@$(PIP) install --editable '.[test]' $(foreach pin,$(PIN),'$(pin)')
	@$(BIN)/python -c 'from bnrestructure.kernels.registry import unavailable_reason as why; \
	    reason = why("cpu"); reason and print("The slow reference kernels will be used on the CPU:", reason)'
	@touch $@

# The installation has compiled the kernels; sources that were changed since are compiled here, and only those.
$(VENV)/.ready: $(KERNEL_SOURCES) $(VENV)/.installed
	@if [ -n "$$(find $(KERNEL_SOURCES) -newer $(VENV)/.installed)" ]; then $(BIN)/python -m $(subst /,.,$(KERNELS)).build; fi
	@touch $@

$(VENV)/.tools: $(VENV)/.ready
	@echo "Installing the development tools"
	@$(EXTRA) dev | $(PIP) install --requirement /dev/stdin
	@touch $@

# --- what it does -----------------------------------------------------------------------------------------------------

demo: $(VENV)/.ready
	@$(BIN)/python examples/demo.py $(ARGS)

# Two tests at a time with one thread each: most of the work is Python's. The zoo's largest models go one after another (memory).
WORKERS ?= 2

test: $(VENV)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not zoo and not float32 and not integrations and not whole" -n $(WORKERS) --dist worksteal --durations=10 $(ARGS)

zoo: $(VENV)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "zoo or whole" -n $(WORKERS) --dist loadgroup --durations=10 $(ARGS)

zoo-float32: $(VENV)/.ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m float32 -n $(WORKERS) --dist loadgroup --durations=10 $(ARGS)

# Packages of an extra, beside what is there already.
EXTRA = $(BIN)/python -c 'import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")'

$(VENV)/.integrations $(VENV)/.docs: $(VENV)/.ready
	@echo "Installing the packages of the extra $(subst .,,$(notdir $@))"
	@$(EXTRA) $(subst .,,$(notdir $@)) | grep -v '^bnrestructure' | $(PIP) install --requirement /dev/stdin
	@touch $@

integrations: $(VENV)/.integrations
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m integrations $(ARGS)

docs: $(VENV)/.docs
	@OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),2) MPLBACKEND=agg $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet \
	    -b html docs docs/_build/html $(ARGS)
	@$(BIN)/python -m sphinx --fail-on-warning --quiet -b linkcheck docs docs/_build/linkcheck
	@echo "docs/_build/html/index.html"

mutations: $(VENV)/.ready
	@$(BIN)/python -m tests.mutations $(ARGS)

bench: $(VENV)/.ready
	@$(BIN)/bnrestructure bench $(or $(ARGS),densenet121)

fuzz: $(VENV)/.ready
	@$(BIN)/python tests/kernels/fuzz_boundary.py $(ARGS)

cuda: $(VENV)/.ready
	@$(BIN)/python -m bnrestructure.kernels.cuda.compile_ahead $(ARGS)

# What pyproject.toml asks for at least; Triton and torchvision follow from it (2.11: Triton 3.6, whose interpreter fails on
# every loop with NumPy 2.4 and newer: "only 0-dimensional arrays can be converted to Python scalars").
OLDEST := torch==2.11.* numpy<2.4

cuda-oldest:
	@$(MAKE) VENV=.venv-oldest PIN='$(OLDEST)' ARGS= cuda
	@$(MAKE) VENV=.venv-oldest PIN='$(OLDEST)' ARGS='$(or $(ARGS),tests/cuda)' test

cuda-models: $(VENV)/.ready
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/cuda/interpreted -m whole $(ARGS)

cuda-emulated: $(VENV)/.ready
	@BNR_EMULATED_PART=$(or $(PART),90) $(BIN)/python -m pytest tests/cuda/interpreted -m "not whole" -n $(WORKERS) $(ARGS)

cuda-steps: $(VENV)/.ready
	@$(BIN)/python -m benchmarks.cuda_code $(ARGS)

gpu: $(VENV)/.ready
	@$(BIN)/python benchmarks/gpu $(ARGS)

# What a venv that borrows from this one puts into a .pth file.
BORROWED := import sys; print(*(path for path in sys.path if path.endswith("site-packages")), sep="\n")

# The wheel as a stranger gets it: in a venv of its own, which borrows PyTorch, with nothing on the path but that venv.
WHEEL := $(VENV)/wheel

wheel: $(VENV)/.tools
	@rm -rf dist build/lib* $(WHEEL)
	@BNRESTRUCTURE_REQUIRE_KERNELS=1 $(BIN)/python -m build --outdir dist .
	@$(BIN)/python -m venv --without-pip $(WHEEL)
	@site=$$($(WHEEL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	$(PIP) install --no-deps --target "$$site" dist/*.whl; \
	$(BIN)/python -c '$(BORROWED)' > "$$site/borrowed.pth"
	@root=$$PWD; cd "$$(mktemp -d)"; export PATH="$$root/$(WHEEL)/bin"; \
	python "$$root/.ci/check_wheel.py" && python -m bnrestructure.cli.main doctor
	@ls -l dist

# mypy reads the wheel as a user's installation has it, from outside the tree: the folders passes/ and patterns/ only become
# bnrestructure.passes and bnrestructure.patterns there. The wheel goes into a venv of its own that borrows .venv's packages,
# and needs no compiled kernels (CXX=false).
LINT := $(VENV)/lint

lint: $(VENV)/.tools
	@$(BIN)/ruff check .
	@$(BIN)/codespell
	@rm -rf $(LINT) build/lib* && mkdir -p $(LINT)
	@CXX=false $(PIP) wheel --no-deps --wheel-dir $(LINT)/dist .
	@$(BIN)/python -m venv --without-pip $(LINT)/venv
	@site=$$($(LINT)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	$(BIN)/python -c '$(BORROWED)' > "$$site/borrowed.pth"; \
	$(PIP) install --no-deps --target "$$site" $(LINT)/dist/*.whl
	@root=$$PWD; site=$$($(LINT)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); cd "$$(mktemp -d)"; \
	PYTHONPATH="$$site" "$$root/$(BIN)/lint-imports" --no-cache "$$root/pyproject.toml" | sed -n '/^Analyzed/,$$p'; \
	"$$root/$(BIN)/mypy" --config-file "$$root/pyproject.toml" --cache-dir "$$root/.mypy_cache" \
	    --python-executable "$$root/$(LINT)/venv/bin/python" --package bnrestructure | sed 's|^.*/site-packages/||'

# The interpreter is not built with the sanitizers, so their runtimes are loaded first; leaks would be the interpreter's own.
# Without a library that loads the tests would all be skipped: that is an error here.
sanitize: $(VENV)/.ready
	@$(BIN)/python -m $(subst /,.,$(KERNELS)).build --sanitize
	@compiler=$${CXX:-c++}; \
	export LD_PRELOAD="$$($$compiler -print-file-name=libasan.so) $$($$compiler -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 BNRESTRUCTURE_CPU_SANITIZE=1; \
	$(BIN)/python -c 'from bnrestructure.kernels.cpu import library; library.load()'; \
	$(BIN)/python -m pytest tests/kernels $(ARGS)

clean:
	@rm -rf docs/_build docs/generated docs/gallery
	@rm -rf $(VENV) .venv-oldest build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@rm -rf $(KERNELS)/_objects $(KERNELS)/*.so
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
