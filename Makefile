# `make demo` and `make test` do all their own set-up: a virtual environment in .venv, pinned versions.
PYTHON ?= python3
TIER ?= nano-steps
BIN := .venv/bin

.PHONY: demo test test-all check clean

demo: .venv/installed
	$(BIN)/nanogpt-env play --tier $(TIER) --agent ladder --output demo-output

test: .venv/installed check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# the full matrix of attacks on top, some hours the first time; goes on where it stopped
test-all: test
	$(BIN)/python benchmarks/attack_matrix.py

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy nanogpt_env gpu_backend examples benchmarks

.venv/installed: pyproject.toml constraints.txt
	@echo "Setting up .venv. PyTorch is large; README, 'Install', says how to get the small CPU build."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo-output dist .mypy_cache .ruff_cache .pytest_cache
