# make train   everything from a fresh machine: environment, then 10 episodes of PPO
# make test    the quick checks; make test-slow: the long ones
# make test-lowest: the quick checks with the lowest versions that are allowed
# make picture the house as a picture, docs/architecture.svg, from the imports
# make bench   speed and memory, into benchmarks/RESULTS.md; make bench-learning: what is learned
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-slow test-lowest picture bench bench-learning clean

train: .venv/.installed
	$(BIN)/co2lightning fit --config ppo.yaml --episodes 10
	@echo "To go on: source $(BIN)/activate; then, say, co2lightning test PPO"

test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# pyright beside pytest, whose processes wait now and then; heard only if it finds something.
	@mkdir -p .pytest_cache; \
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python \
	  > .pytest_cache/pyright.txt 2>&1 & typed=$$!; \
	$(BIN)/pytest -n 2 --dist worksteal; tested=$$?; \
	wait $$typed || { cat .pytest_cache/pyright.txt >&2; exit 1; }; exit $$tested

test-slow: .venv/.installed-dev
	$(BIN)/pytest -n 2 --dist worksteal -m "slow or learning"

# constraints.txt, which that one test is about, is not what is installed here.
test-lowest: .venv-lowest/.installed
	.venv-lowest/bin/pytest -n 2 --dist worksteal \
	  --deselect tests/unit/test_packaging.py::test_constraints_name_all_that_gets_installed

picture: .venv/.installed
	$(BIN)/python docs/picture.py

bench: .venv/.installed-bench
	$(BIN)/python benchmarks/results.py

bench-learning: .venv/.installed-bench
	$(BIN)/python benchmarks/sites.py
	$(BIN)/python benchmarks/stable_baselines.py

clean:
	rm -rf .venv .venv-lowest build dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# An install that was cut leaves no stamp, so the next make does it again.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "co2lightning needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	touch $@

.venv/.installed-bench: .venv/.installed-dev
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@
