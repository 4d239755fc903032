# Everything from a bare machine with Python 3.11+ and make: `make demo`, `make test`.
PYTHON ?= python3
# The release that the records were measured with; any torch >= 2.11 works: make install TORCH="torch>=2.11"
TORCH ?= torch==2.13.0
BIN := .venv/bin
RUN := $(BIN)/python

.PHONY: install demo test test-all lint docs bench bench-gpu evidence report clean

install: .venv/.installed

.venv/.installed: pyproject.toml scripts/torchvision_on_cpu.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tokenry needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "uv>=0.5" "$(TORCH)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable . --group dev
	$(RUN) scripts/torchvision_on_cpu.py
	@touch $@

demo: install
	$(BIN)/tokenry demo --out report

report: install
	$(BIN)/tokenry report --out report --run report/runs

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(RUN) --summarize-errors
	$(BIN)/lint-imports

# Two workers of one thread each; lint first, because it is quick.
test: lint
	$(RUN) -m pytest -n 2 --dist loadgroup -m "not slow"

test-all: lint
	$(RUN) -m pytest -n 2 --dist loadgroup

docs: install
	$(BIN)/tokenry report --out docs/gallery
	$(BIN)/mkdocs build --strict --site-dir site

# Longer measurements on this machine. benchmarks/*_reference.py need a checkout of the authors' code and are run by hand.
bench: install
	$(RUN) benchmarks/decoding.py
	$(RUN) benchmarks/kvcache.py --small
	$(RUN) benchmarks/forecasting.py table

# On a machine with a GPU, from the source tree, with that machine's own python: nothing is installed.
bench-gpu:
	for script in benchmarks/*_gpu.py; do PYTHONPATH=src $(PYTHON) $$script || exit 1; done

# For maintainers: run the tests and the claims, and write the project's records.
evidence: install
	$(RUN) scripts/record_evidence.py

clean:
	rm -rf .venv report site build dist
