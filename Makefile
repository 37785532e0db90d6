# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NATIVE := plugins/CMakeLists.txt $(wildcard plugins/matexport_plugins/*/*.cc plugins/matexport_plugins/*/*.h)

.PHONY: help demo test check lint types docs train gpu clean

help:
	@echo "make demo    set up .venv, then slice, export, build and verify the bundled model"
	@echo "make test    set up .venv, then run all tests"
	@echo "make check   lint, types, all tests (with the commands of the documentation)"
	@echo "make gpu     on a machine with an NVIDIA GPU: tests/gpu and benchmarks/gpu_scan.py with $(PYTHON); OUT=FOLDER"
	@echo "make train   train the bundled model again (five seeds, about 25 minutes)"

$(STAMP): pyproject.toml plugins/pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ./plugins -e '.[torch,ort,rtx,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/digits/demo.py demo-out

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m pytest -q tests/docs

check: lint types test

train: $(STAMP)
	$(BIN)/python examples/digits/train.py
	$(BIN)/python examples/digits/measure.py

# With the Python at hand, since machines with a GPU bring their own PyTorch: no .venv, nothing is installed.
OUT ?= benchmarks/results
gpu:
	@$(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null || { \
	  echo "make gpu: needs an NVIDIA GPU, and a CUDA build of PyTorch in $(PYTHON) (PYTHON=... names another one)" >&2; exit 5; }
	mkdir -p $(OUT)
	PYTHONPATH=exporter:plugins timeout 240 $(PYTHON) -m pytest -q tests/gpu --junitxml=$(OUT)/tests-gpu.xml \
	  $$($(PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null); tests=$$?; \
	$(PYTHON) benchmarks/gpu_scan.py --out $(OUT) --seconds 180 && exit $$tests

clean:
	rm -rf $(VENV) demo-out build .mypy_cache .pytest_cache .ruff_cache .hypothesis
