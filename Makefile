# make demo   environment, install, the embedded study to its tuning log
# make test   everything that is checked: lint, types, import contracts, tests

PYTHON ?= python3
BIN := .venv/bin
# Threads that spin while they wait slow every process on a small machine.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-long test-slow simulate check audit lock install clean gpu-check gpu-wheels

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: install
	$(BIN)/python -m search.run --study rsicap_mini
	$(BIN)/python -m search.report --study rsicap_mini

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Three processes on two cores: tests wait for other processes and databases a quarter of the time (7:56, with two 9:57;
# on a slower machine 11:50, with four 12:14). Bytecode is kept, also where the environment says not to: programs under
# test compile our modules anew otherwise, for a second each.
test: check
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

# Tests of five seconds of processor and more, and further cases of tests that have a quick one. CI runs them after
# `make test`, which is to take less than ten minutes from a fresh clone. Types and lint beside the tests instead of
# before them saved nothing.
test-long: install
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -m 'long and not slow' -n 2

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'slow or long' -n 2 --dist loadfile --timeout 1800

# Schedules of faults drawn from seeds 0, 1, ...: `make simulate SEEDS=5000 FIRST=1000`. One that breaks a promise is
# printed with its seed, and comes again with it.
SEEDS ?= 1000
FIRST ?= 0
simulate: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.simulation --seeds $(SEEDS) --first $(FIRST)

# Known vulnerabilities of the pinned versions; fails if one cannot be looked up, as behind a mirror without pypi.org's
# API. In an environment of its own: pip-audit needs pins of its own.
audit: .venv-audit/installed
	.venv-audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

.venv-audit/installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet 'pip-audit>=2.9'
	touch $@

# The versions of constraints.txt with the hashes of their files: `pip install --require-hashes --no-deps -r
# requirements.lock` installs nothing else. To be made again whenever constraints.txt changes; a test compares them.
lock: .venv-lock/installed
	.venv-lock/bin/uv pip compile constraints.txt --no-deps --generate-hashes --no-annotate --quiet \
		--output-file requirements.lock

.venv-lock/installed:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet 'uv>=0.9'
	touch $@

# The product on a GPU at the real size, at most 8 minutes (docs/gpu.md): with the machine's own Python where that has
# torch, for it has CUDA. Without a GPU it is a rehearsal on the embedded model.
GPU_PYTHON ?= $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo $(PYTHON) || echo $(BIN)/python)

gpu-check:
	$(if $(findstring $(BIN),$(GPU_PYTHON)),$(MAKE) install)
	$(GPU_PYTHON) -m tests.benchmarks.gpu --json gpu-check.json

# What that machine lacks, for Python 3.12 on Linux, into a folder that git ignores: it may have no network.
gpu-wheels: install
	$(BIN)/python -m tests.benchmarks.gpu.wheels

clean:
	rm -rf .venv .venv-audit .venv-lock .gpu-wheels build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
