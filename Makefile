# `make demo` and `make test` do all the set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
UV := $(BIN)/python libs/core/alveary_core/uv.py
PACKAGES := libs/contracts libs/core libs/sdk $(sort $(wildcard services/*))
DATA ?=
EPOCHS ?= 2

.PHONY: bench-scale compose-init compose-up compose-demo compose-down install demo test lint baseline bench bench-cli bench-containers bench-files bench-logs generate lock clean format docs

# A stamp whose environment was emptied or moved since is not believed.
ifeq ($(and $(wildcard $(BIN)/alveary),$(wildcard $(VENV)/lib/python*/site-packages/torch)),)
$(shell rm -f $(VENV)/.installed)
endif

install: $(VENV)/.installed

# uv.py runs uv with this machine's pip settings (index, find-links, constraints, certificates).
$(VENV)/.installed: requirements.txt $(addsuffix /pyproject.toml,$(PACKAGES))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^uv==' requirements.txt)"
	$(UV) pip install --python $(BIN)/python -r requirements.txt
	$(UV) pip install --python $(BIN)/python --quiet --no-build-isolation --no-deps $(foreach p,$(PACKAGES),-e $(p))
	touch $@

demo: install
	PATH="$(BIN):$$PATH" tools/demo.sh "$(DATA)" "$(EPOCHS)"

test: install
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit tests/integration tests/e2e tests/chaos
	tests/docker.sh

# Faults for MINUTES while runs are under way, then everything is looked at. The same SEED makes the same faults and runs.
MINUTES ?= 10
SEED ?= 1
.PHONY: chaos
chaos: install
	cd tests && $(BIN)/python -m chaos.trial --minutes $(MINUTES) --seed $(SEED)

# For everyday work: no docker, no root, under two minutes on two quiet cores. Four at once, as many of them wait.
.PHONY: test-fast
test-fast: install
	$(BIN)/python -m pytest -q -n 4 --dist worksteal -m "not slow" tests/unit tests/integration

# What users have: the guard of event loops costs time, and belongs to tests.
bench bench-cli bench-files bench-files-large bench-live bench-logs bench-scale: export ALVEARY_GUARD_LOOP := 0
bench bench-cli bench-files bench-files-large bench-live bench-logs bench-scale: export ALVEARY_TRAINER_GUARD_LOOP := 0
bench: install
	$(BIN)/python tests/bench/bench.py
	$(BIN)/python tests/bench/scheduler.py

bench-cli: install
	$(BIN)/python tests/bench/cli.py

bench-logs: install
	$(BIN)/python tests/bench/logs.py

bench-files: install
	$(BIN)/python tests/bench/files.py

# A run with 60,000 outputs and one of 12 GB, which takes some 40 GB of disk; prints the longest delay of an event loop.
.PHONY: bench-files-large
bench-files-large: install
	$(BIN)/python tests/bench/files.py --small 0 --outputs 60000 --gib 12

# The same through the whole stack: 10 million points of a run, and 100,000 final runs, compacted and read again.
.PHONY: bench-live
bench-live: install
	cd tests && $(BIN)/python -m bench.live $(LIVE)

# What grows with what: SCALE="runs --runs 1000000" measures one part.
bench-scale: install
	$(BIN)/python tests/bench/scale.py $(SCALE)

bench-containers: install
	$(BIN)/python tests/bench/containers.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && $(BIN)/buf lint && $(BIN)/buf format --diff --exit-code
	cd protos && $(BIN)/buf breaking --against $(BASELINE)
	$(BIN)/python tools/generate.py --check
	$(BIN)/python tools/build_docs.py

# What `make lint` holds the protos to: fields and names that clients, event logs and archives know. Only a release changes it.
BASELINE := baseline.binpb
baseline: install
	cd protos && $(BIN)/buf build --exclude-source-info -o $(BASELINE)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cd protos && $(BIN)/buf format -w

generate: install
	$(BIN)/python tools/generate.py

# The docs site, into site/. Fails on broken links. The generator has an environment of its own, .venv-docs.
docs: install
	$(BIN)/python tools/build_docs.py

compose-init: install
	$(BIN)/python tools/compose_init.py $(COMPOSE_INIT)

compose-up: compose-init
	tools/compose.sh up

compose-demo: install
	tools/compose.sh demo "$(DATA)" "$(EPOCHS)"

compose-down:
	tools/compose.sh down

lock:
	$(UV) pip compile requirements.in -o requirements.txt --no-annotate --no-header
	$(UV) pip compile requirements-docs.in -o requirements-docs.txt --no-annotate --no-header

clean:
	rm -rf $(VENV) .venv-generate .venv-docs .demo site docs/reference/[c-z]*.md
