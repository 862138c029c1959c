# make demo         fine-tune the bundled base and look at the result
# make test         run the tests
# make conformance  run PEFT's own tests on DiffFit
# make style        check formatting, lint and types (make format mends the first two)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test conformance style format clean

demo: .venv/installed
	$(BIN)/python examples/emoji/demo.py

test: .venv/installed
	$(BIN)/python -m pytest -q

conformance: .venv/installed
	$(BIN)/python tests/conformance/run.py

style: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[examples,dev]"
	touch $@

clean:
	rm -rf .venv demo runs
