# make demo    distil, evaluate, publish, serve and show (QUICK=1: the short form)
# make test    lint, then every test that is not slow
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

BIN := .venv/bin
PYTEST_ARGS ?=

# A build user may have no home; caches (uv, matplotlib, torch) then live beside the environment.
ifneq ($(shell test -n "$$HOME" && test -w "$$HOME" && echo yes),yes)
export HOME := $(CURDIR)/.venv/home
endif
# One thread per process: on small machines two often lose (docs/design.md, 12).
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: help setup demo test test-all lint format protos clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: ## Create .venv and install everything into it; done by the other targets too
	@.ci/setup

demo: setup ## Distil, evaluate, publish, serve, show; QUICK=1 for the short form
	$(BIN)/sdxs demo $(if $(filter-out 0,$(QUICK)),--quick)

# Both are run, whatever the first one found; pytest's summary comes last.
define lint_and_test
	failed=0
	$(MAKE) --no-print-directory lint || failed=1
	$(BIN)/pytest $(1) $(PYTEST_ARGS) || failed=1
	exit $$failed
endef

test: setup ## Lint and every test that is not slow
	@$(call lint_and_test,-m "not slow")

test-all: setup ## Lint and every test
	@$(call lint_and_test)

lint: setup ## Formatting, lint, types, import directions, protobuf style and compatibility
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against protos/released.binpb

format: setup ## Format and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: setup ## Regenerate the stubs after a change to protos/; refuses what would break clients
	$(BIN)/buf format --write
	$(BIN)/buf lint
	$(BIN)/buf breaking --against protos/released.binpb
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. --grpc_python_out=. $$(cd protos && ls sdxs/v1/*.proto)
	$(BIN)/buf build --exclude-source-info -o protos/released.binpb

clean: ## Remove what builds and runs left behind, .venv included
	rm -rf .venv out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
