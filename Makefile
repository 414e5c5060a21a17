# Everything a user or CI does. `make demo` and `make test` set up .venv with the pinned packages when it is not there.
# the first of these that runs: a version manager's shim can be there without the version
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint format docs

demo: .venv/installed
	DS_ACCELERATOR=$${DS_ACCELERATOR:-cpu} $(BIN)/distill pipeline configs/demo.yaml --launch configs/accelerate/two_cpus_zero2.yaml

# a process a core, at most four: each takes up to 2 GB. Each begins with a part of the files in order, for their
# fixtures, and takes from another's when it is done
test: .venv/installed
	$(BIN)/pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the reference of fields and commands, then the site, into site/
docs: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m distill.commandline.reference docs/reference.md
	$(BIN)/mkdocs build --strict

.venv/installed: constraints.txt setup.cfg
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"python is {v[0]}.{v[1]}, but 3.11 or 3.12 is needed; run make PYTHON=/path/to/python3.11") if v not in ((3, 11), (3, 12)) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@
