# Each target makes what it needs; `make setup` makes .venv with the package in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)

.PHONY: setup demo test bench lint clean

setup: $(READY)

$(READY): pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "torch==2.13.0" "setuptools>=77" wheel ninja numpy
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/python -m contrastseg_fast.experiments.demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build *.egg-info contrastseg_fast/*.so
