# Everything runs in .venv, which the first target creates; PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test lint types docs unit clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Parallax needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# On a laptop's cores one thread a process, unless OMP_NUM_THREADS says otherwise. Ctrl-C reaches the command at work,
# which make waits for; a shell in between might not, so there is none.
demo: export OMP_NUM_THREADS ?= 1
demo: NUM_PROCESSES = $(shell $(BIN)/python -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')
demo: $(INSTALLED)
	$(BIN)/python -m sharding.build --dataset demo --split train test --out data/demo
	$(BIN)/torchrun --standalone --nproc_per_node=$(NUM_PROCESSES) -m train.pretrain --config configs/demo.yaml \
		data.shards=data/demo/train run.dir=runs/demo
	$(BIN)/python -m train.evaluate --checkpoint runs/demo --test data/demo/test --protocol knn linear --untrained
	$(BIN)/python -m train.report runs/demo
	@echo 'The table above: percent of the test images; chance is 10.'
	@echo 'Look at runs/demo/report.html: curves, health, what the encoder saw.'
	@echo 'TensorBoard: tensorboard --logdir runs/demo/tensorboard'

test: lint types docs unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# The site, in build/site. A dead link or anchor fails, but not with --quiet: it drops the warnings that --strict counts.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# By two workers, each of which takes a file of tests at a time, so that what a file shares is made once. One thread each:
# torch's wait for one another at every operation, which on a busy machine takes many times as long.
unit: export OMP_NUM_THREADS = 1
unit: $(INSTALLED)
	$(BIN)/python -m pytest -p no:cacheprovider --numprocesses=2 --dist=loadfile --no-loadscope-reorder

clean:
	rm -rf .venv build data/demo runs/demo
