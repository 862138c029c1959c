# make demo         fine-tune the bundled base and look at the result
# make test         run the tests
# make test-lowest  run them on the lowest versions of PEFT and Diffusers that are supported
# make test-app     run those of the app in a browser: it needs Debian's chromium
# make conformance  run PEFT's own tests on DiffFit
# make bench        run a short form of most benchmarks, and say which targets are met
# make mutants      break the code in two thousand ways, and list those that no test notices (long; not in CI)
# make style        check formatting, lint, types and docs/api.md (make format mends the first two and the last)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-lowest test-app conformance bench mutants style format clean

demo: .venv/demo-installed
	$(BIN)/python examples/avatars/demo.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8

test-lowest: .venv-lowest/installed
	OMP_NUM_THREADS=1 DIFFFIT_TEST_SEQUENCES=50 .venv-lowest/bin/python -m pytest -q -n logical --maxprocesses 8

test-app: .venv-app/installed
	.venv-app/bin/python -m pytest -q tests/test_app.py

conformance: .venv/installed
	$(BIN)/python tests/conformance/run.py

bench: .venv/installed
	set -e; for name in parameters training_speed latent_cache inference scale_factors quality resolution; do \
		$(BIN)/python examples/benchmarks/$$name.py --short; done
	$(BIN)/python examples/benchmarks/report.py --short

# In two rounds: the fastest tests, which notice most mutants, and then all tests on what they leave. `mutmut show NAME`
# shows one of those listed; those that no test can notice are in tests/mutants.md.
MUTMUT := OMP_NUM_THREADS=1 DIFFFIT_TEST_SEQUENCES=5 $(BIN)/mutmut
mutants: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[mutation]"
	DIFFFIT_MUTATION_SECONDS=3 $(MUTMUT) run
	$(MUTMUT) run $$($(BIN)/mutmut results | sed -n 's/: survived$$//p')
	$(BIN)/mutmut results

style: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/api.py --check

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python docs/api.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# what the demo needs, and no more
.venv/demo-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[avatars]"
	touch $@

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q -c constraints-lowest.txt -e ".[examples,test]"
	touch $@

# Gradio takes an older Pillow than constraints.txt names
.venv-app/installed: pyproject.toml
	$(PYTHON) -m venv .venv-app
	.venv-app/bin/python -m pip install -q torch==2.13.0
	.venv-app/bin/python -m pip install -q -e ".[app,test]" playwright
	touch $@

clean:
	rm -rf .venv .venv-lowest .venv-app demo mutants runs
