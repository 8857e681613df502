# Each target makes what it needs; `make setup` makes .venv with the package in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OTHER := .venv-integrations
OTHER_BIN := $(OTHER)/bin
OTHER_TORCH := $(OTHER)/.torch
OTHER_READY := $(OTHER)/.ready
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*)

.PHONY: setup demo test test-integrations bench bench-networks gpu-check lint clean

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

# The newest torch and the frameworks, with the package installed there as users install it.
$(OTHER_TORCH):
	$(PYTHON) -m venv $(OTHER)
	$(OTHER_BIN)/pip install -q torch torchvision "setuptools>=77" wheel ninja numpy
	touch $@

$(OTHER_READY): $(OTHER_TORCH) pyproject.toml setup.py $(SOURCES) $(shell find contrastseg_fast -name "*.py")
	rm -rf $(OTHER)/build/lib*
	printf '[build]\nbuild_base = $(OTHER)/build\n' > $(OTHER)/build.cfg
	DIST_EXTRA_CONFIG=$(OTHER)/build.cfg CONTRASTSEG_FAST_REQUIRE_EXTENSION=1 \
		$(OTHER_BIN)/pip install -q --no-build-isolation ".[integrations]"
	touch $@

# Without the repository on the path, so that tests import the installed package.
test-integrations: $(OTHER_READY)
	PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/tests $(OTHER_BIN)/pytest -o pythonpath= -o testpaths=tests \
		--ignore tests/test_benchmarks.py --ignore tests/gpu/test_timing.py $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

# Where the frameworks are, whose networks are measured; the extension is that of `make setup`.
bench-networks: $(READY) $(OTHER_READY)
	$(OTHER_BIN)/python -m benchmarks --networks $(ARGS)

gpu-check: $(READY)
	$(BIN)/python scripts/gpu_check.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build *.egg-info contrastseg_fast/*.so
