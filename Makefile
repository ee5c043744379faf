# Every target sets up what it needs. Works with GNU make 3.81 and Python 3.11 or newer.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q install
LOCK := uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header -q
LOCKS := afterglow/sandbox/locks

.PHONY: help setup demo serve test test-all chaos bench lint format docs lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: .venv/.serve ## a virtual environment with what serving needs

demo: .venv/.demo .venv/.sandbox ## a server, the official client, and a whole story
	@$(BIN)/afterglow demo

serve: .venv/.serve ## the server, at http://127.0.0.1:8000/v1
	@exec $(BIN)/afterglow serve

test: .venv/.dev .venv/.sandbox ## the tests to run before every commit (under two minutes)
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

# Half of the time these wait: for processes, for clocks, for a database.
WAITING = $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) * 3 + 1) / 2 )))
# What these test has little to do with the database, or is held against Postgres in tests/contracts.
SAME_ON_POSTGRES = $(foreach name,azure_and_models code_interpreter connections errors file_search headers_and_access \
	health hostile images inspection mcp metrics sdk_helpers traces,--ignore tests/api/test_$(name).py)
test-all: test ## all tests, with the slow kinds; those of the API on Postgres, too
	$(BIN)/python -m pytest -m slow -n $(WAITING) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" --database postgres tests/api $(SAME_ON_POSTGRES)

SEEDS ?= 1-5
chaos: .venv/.dev ## processes and databases that are killed, by the seed: `make chaos SEEDS=1-20`
	$(BIN)/python -m tests.chaos $(SEEDS)

bench: .venv/.serve ## the figures this server owes, measured here (under five minutes)
	$(BIN)/python -m bench.run

lint: .venv/.dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.serve ## write the pages of docs/ that come from the code
	$(BIN)/python docs/generate.py

lock: ## resolve the dependencies anew (needs uv)
	printf "hatchling\neditables\n" | $(LOCK) - -o locks/build.txt
	$(LOCK) pyproject.toml -o locks/serve.txt
	$(LOCK) --extra demo -c locks/serve.txt pyproject.toml -o locks/demo.txt
	$(LOCK) --extra demo --extra mcp --extra otel --group dev -c locks/demo.txt pyproject.toml -o locks/dev.txt
	cd $(LOCKS) && $(LOCK) --only-binary :all: base.in -o base.txt
	cd $(LOCKS) && $(LOCK) --only-binary :all: -c base.txt standard.in -o standard.txt
	cd $(LOCKS) && $(LOCK) --only-binary :all: -c standard.txt full.in -o full.txt

clean: ## remove what the targets above have made
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/results

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Afterglow needs Python 3.11 or newer, and found none. Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew install python"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing. Debian, Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv

# The lock files are installed with their hashes; the project itself is installed beside them, from this folder.
.venv/.serve: .venv/bin/python locks/serve.txt pyproject.toml
	@echo "Installing what serving needs …"
	@$(PIP) --require-hashes -r locks/build.txt
	@$(PIP) --require-hashes -r locks/serve.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

.venv/.demo: .venv/.serve locks/demo.txt
	@echo "Installing the official client, for the demo …"
	@$(PIP) --require-hashes -r locks/demo.txt
	@touch $@

.venv/.dev: .venv/.serve locks/dev.txt
	@echo "Installing what tests and lint need …"
	@$(PIP) --require-hashes -r locks/dev.txt
	@touch $@

# What model-written code may import, in an environment of its own that the server finds by itself.
.venv/.sandbox: .venv/.serve $(LOCKS)/base.txt
	@$(BIN)/afterglow sandbox setup && touch $@ || echo "Without them the code interpreter is off."
