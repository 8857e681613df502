# Each target makes what it needs; `make setup` makes .venv with the package in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OTHER := .venv-integrations
OTHER_READY := $(OTHER)/.ready
VERSION := newest
override VERSION := $(or $(VERSION),newest)
TORCH := .venv-torch-$(VERSION)
TORCH_READY := $(TORCH)/.ready
SOURCES := $(shell find csrc -type f)
INSTALLED := pyproject.toml setup.py $(SOURCES) $(shell find contrastseg_fast -name "*.py")

.PHONY: setup demo test aot test-torch test-integrations bench bench-networks gpu-check lint clean

setup: $(READY)

$(READY): pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "torch==2.13.0" "setuptools>=77" wheel ninja numpy
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/python -m contrastseg_fast.experiments.demo $(ARGS)

# A process for every core, each with one thread; the tests of a file share a process, and what it compiled.
# ARGS="-n0" keeps all in one process, for a debugger.
PARALLEL := -n auto --dist loadfile

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# An environment $(1) with the packages $(2) and what builds this one.
define make-environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install -q $(2) "setuptools>=77" wheel ninja
	touch $(1)/.torch
endef

# The package with its extra $(2), in the environment $(1) as users install it.
define install-package
	rm -rf $(1)/build/lib*
	printf '[build]\nbuild_base = $(1)/build\n' > $(1)/build.cfg
	DIST_EXTRA_CONFIG=$(1)/build.cfg CONTRASTSEG_FAST_REQUIRE_EXTENSION=1 \
		$(1)/bin/pip install -q --no-build-isolation ".[$(2)]"
	touch $(1)/.ready
endef

# The tests in the environment $(1), without the repository on the path, so that they import the installed package.
define test-package
	OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/tests $(1)/bin/pytest $(PARALLEL) \
		-o pythonpath= -o testpaths=tests \
		--ignore tests/test_benchmarks.py --ignore tests/gpu/test_timing.py $(ARGS)
endef

# The interpreter of Triton 3.6, which torch 2.11 needs, fails with numpy 2.4.
$(TORCH)/.torch:
	$(call make-environment,$(TORCH),$(if $(filter newest,$(VERSION)),torch,"torch==$(VERSION)") \
		$(if $(filter 2.11.%,$(VERSION)),"numpy<2.4",numpy))

$(TORCH_READY): $(TORCH)/.torch $(INSTALLED)
	$(call install-package,$(TORCH),dev)

test-torch: $(TORCH_READY)
	$(call test-package,$(TORCH))

# The newest torch and the frameworks.
$(OTHER)/.torch:
	$(call make-environment,$(OTHER),numpy torch torchvision)

$(OTHER_READY): $(OTHER)/.torch $(INSTALLED)
	$(call install-package,$(OTHER),integrations)

test-integrations: $(OTHER_READY)
	$(call test-package,$(OTHER))

# Every launch of the tests and benchmarks compiled for all cards, by the oldest Triton and the newest.
aot: aot-3.6.0 aot-newest

.PRECIOUS: .venv-triton-%/.torch
.venv-triton-%/.torch:
	$(call make-environment,.venv-triton-$*,"torch==2.13.0" numpy pytest \
		$(if $(filter newest,$*),triton,"triton==$*"))

aot-%: .venv-triton-%/.torch
	CONTRASTSEG_FAST_AOT=all .venv-triton-$*/bin/python -m pytest tests/test_ahead_of_time.py $(ARGS)

bench: $(READY)
	$(BIN)/python -m benchmarks $(ARGS)

# Where the frameworks are, whose networks are measured; the extension is that of `make setup`.
bench-networks: $(READY) $(OTHER_READY)
	$(OTHER)/bin/python -m benchmarks --networks $(ARGS)

gpu-check: $(READY)
	$(BIN)/python scripts/gpu_check.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build *.egg-info contrastseg_fast/*.so
