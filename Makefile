# bursar: `make` lists the targets. Everything runs in .venv, made on first use from Python alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check format lint types floors docs site bench browser clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-8s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,test,docs]'
	@touch $@

demo: $(STAMP)  ## set up, then run the main job: the notes' Cruncher, the notes' 70B run, and a real model
	$(BIN)/bursar step cruncher
	$(BIN)/bursar run --params 70B --tokens 15T --on 1024xh100-sxm --mfu 0.5
	$(BIN)/bursar step gpt2 --precision bf16-mixed --on h100-sxm

test: $(STAMP)  ## set up, then run the tests, the doctests and the READMEs' code
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: lint types floors site test  ## what CI runs: format, lint, types, import floors, the docs site, tests

format: $(STAMP)  ## rewrite the code in the house format
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

lint: $(STAMP)  ## format and lint, changing nothing
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks

types: $(STAMP)  ## strict types
	$(BIN)/mypy

floors: $(STAMP)  ## a module imports from lower floors only; torch stays on the top ones
	$(BIN)/python -m pytest tests/test_floors.py

docs: $(STAMP)  ## write the outputs in the READMEs and in docs/ anew
	$(BIN)/python tests/test_readme.py
	$(BIN)/python tests/test_pages.py
	$(BIN)/python tests/test_notebook.py
	BURSAR_SCREENSHOTS=docs/images $(BIN)/python -m pytest tests/test_browser.py -k pictures

browser:  ## install Debian's Chromium for the browser tests, where that may be done; else they are skipped
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
	  echo "no chromium, and it cannot be installed here: the browser tests will be skipped"

site: $(STAMP)  ## build the docs site into build/site; a broken link fails
	$(BIN)/python tests/docs_site.py

bench: $(STAMP)  ## print the benchmark tables
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/trace.py
	$(BIN)/python benchmarks/train_overhead.py 2

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
