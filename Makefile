# Set-up, tests and the quickstart. Nothing is needed but Python 3.11+, a C compiler and a package index.
PYTHON ?= python3
BIN := .venv/bin
# uv does not read pip's configuration; where pip is told of a folder of wheels, uv is too, else it takes torch's CPU index.
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
TORCH :=
else
TORCH := --torch-backend cpu
endif
export RAY_USAGE_STATS_ENABLED := 0
# a run starts a dozen Python processes: half of their imports would be compiling, anew in each where bytecode is not written
export UV_COMPILE_BYTECODE := 1

.PHONY: quickstart smoke test soak unit lint format docs browser setup requirements clean

quickstart: .venv/.ready
	$(BIN)/ctrlray pipeline

smoke: .venv/.ready
	$(BIN)/ctrlray pipeline smoke

setup: .venv/.ready

.venv/.ready: requirements/cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
	$(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH) -r requirements/cpu.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	$(BIN)/python -m compileall -q ctrlray
	touch $@

unit: .venv/.ready
	$(BIN)/python -m pytest

test: .venv/.ready
	$(BIN)/python -m pytest -m "not gpu and not soak" --durations=15

soak: .venv/.ready
	$(BIN)/python -m pytest -m soak --durations=0

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.ready
	$(BIN)/ruff check --fix .

# the site, into site/; strict: a broken link or a page without a place fails
docs: .venv/.ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# what drives Chromium in the tests of pages
browser: .venv/.ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --group browser

requirements:
	$(BIN)/uv pip compile pyproject.toml --extra cpu --group dev --no-header --no-annotate --python-version 3.11 $(TORCH) -q -o requirements/cpu.txt
	env -u UV_FIND_LINKS $(BIN)/uv pip compile pyproject.toml --extra gpu --group dev --no-header --no-annotate --python-version 3.11 -q -o requirements/gpu.txt

clean:
	rm -rf .venv build dist *.egg-info
