# Everything sets itself up: a virtual environment in the checkout, with the versions of constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: quickstart test check format bench bench-report clean
.DEFAULT_GOAL := quickstart

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,quickstart]"
	touch $@

quickstart: $(STAMP)  ## three hospitals tune one medical coder together; about two minutes
	$(BIN)/cloister quickstart

test: $(STAMP)  ## every test, real processes included
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(STAMP)  ## style, types, import floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## every figure in README and docs; writes bench/results/*.csv
	for script in bench/[a-z]*.py; do [ $$script = bench/report.py ] && continue; $(BIN)/python $$script || exit 1; done

bench-report: $(STAMP)
	@$(BIN)/python -m bench.report

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
