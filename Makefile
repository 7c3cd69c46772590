# Everything runs in .venv, which the first target creates; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test lint types docs unit unit-train unit-others clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Parallax needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m train.demo

test: lint types docs unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# The site, in build/site. A dead link or anchor fails, but not with --quiet: it drops the warnings that --strict counts.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Two halves at once, whose dots mingle; each prints its own summary. One thread each: torch's wait for one another at
# every operation, which on a busy machine takes many times as long.
unit-train unit-others: export OMP_NUM_THREADS = 1
unit: $(INSTALLED)
	$(MAKE) --jobs=2 --keep-going unit-train unit-others

unit-train: $(INSTALLED)
	$(BIN)/python -m pytest -p no:cacheprovider tests/train

unit-others: $(INSTALLED)
	$(BIN)/python -m pytest -p no:cacheprovider tests --ignore=tests/train

clean:
	rm -rf .venv build data/demo runs/demo
