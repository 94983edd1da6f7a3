# Everything sets itself up: a virtual environment in the checkout, with the versions of constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: quickstart test check check-native check-refusals coverage fuzz format bench bench-report lock clean
.DEFAULT_GOAL := quickstart

PIN    := --constraint constraints.txt --constraint constraints-dev.txt

# The TPM bindings compile against Debian's libtss2-dev; where that is missing, their tests skip with a reason.
$(STAMP): pyproject.toml constraints.txt constraints-dev.txt $(wildcard native/*.* native/levels/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIN) torch
	$(BIN)/python -m pip install --quiet $(PIN) --editable ".[dev,quickstart]"
	if pkg-config --exists tss2-esys 2>/dev/null; then $(BIN)/python -m pip install --quiet $(PIN) tpm2-pytss; fi
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

coverage: $(STAMP)  ## branch coverage of the trusted packages, which must be whole
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup --cov=cloister.attest --cov=cloister.channel --cov=cloister.enclave \
	  --cov=cloister.wire --cov=cloister.errors --cov=cloister.ring --cov=cloister.pad --cov=cloister.offload --cov-branch --cov-report=term-missing:skip-covered --cov-fail-under=100 \
	  tests/unit tests/adversary tests/property tests/vectors tests/fuzz tests/e2e/test_swtpm.py

check-native: $(STAMP)  ## the kernels' tests on a build that watches every access to memory; minutes
	$(BIN)/python -m tests.sanitizers.run_sanitized

check-refusals: $(STAMP)  ## remove each check of the trusted packages in turn: its test must notice; minutes
	$(BIN)/python tests/refusals/remove_checks.py

fuzz: $(STAMP)  ## a million cases over every parser of bytes from outside; minutes
	$(BIN)/python -m tests.fuzz.parsers

bench: $(STAMP)  ## every figure in README and docs; writes bench/results/*.csv
	for script in bench/[a-z]*.py; do [ $$script = bench/report.py ] && continue; $(BIN)/python $$script || exit 1; done
	$(BIN)/python bench/method2_vs_flower.py --data quickstart
	for data in hoc druglib; do $(BIN)/python bench/method1_vs_flower.py --data $$data || exit 1; done

bench-report: $(STAMP)
	@$(BIN)/python -m bench.report

lock:  ## resolve every dependency anew; then read the difference and run the tests
	$(PYTHON) -m venv .lock
	.lock/bin/python -m pip install --quiet torch==2.13.0
	.lock/bin/python -m pip install --quiet ".[quickstart,s3,dp,evaluate]"
	sed -i '/^torch==/q' src/cloister/constraints.txt
	.lock/bin/python -m pip freeze --exclude torch --exclude cloister >> src/cloister/constraints.txt
	.lock/bin/python -m pip install --quiet --constraint constraints.txt ".[dev]"
	sed -i 1q constraints-dev.txt
	.lock/bin/python -m pip freeze --exclude torch --exclude cloister | grep -vxFf constraints.txt >> constraints-dev.txt
	rm -rf .lock

clean:
	rm -rf $(VENV) build runs .pytest_cache .ruff_cache .hypothesis
