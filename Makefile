# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
NATIVE := plugins/CMakeLists.txt plugins/cuda.cmake $(wildcard plugins/matexport_plugins/*/*.cc \
          plugins/matexport_plugins/*/*.cu plugins/matexport_plugins/*/*.h)

# with the newest, which constraints.txt names, all that the library of custom ops is tested in
ONNXRUNTIMES := 1.20.1 1.23.2 1.25.1 1.28.0

.PHONY: help demo test check lint types docs onnxruntimes web train gpu clean

help:
	@echo "make demo    set up .venv, then slice, export, build and verify the bundled model"
	@echo "make test    set up .venv, then run all tests"
	@echo "make check   lint, types, all tests (with the commands of the documentation, older ONNX Runtimes, a browser)"
	@echo "make gpu     on a machine with an NVIDIA GPU: tests/gpu and benchmarks/gpu_scan.py with $(PYTHON); OUT=FOLDER"
	@echo "make train   train the bundled model again (five seeds, about 25 minutes)"

$(STAMP): pyproject.toml plugins/pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ./plugins -e '.[torch,ort,rtx,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/digits/demo.py demo-out

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini benchmarks

docs: $(STAMP)
	$(BIN)/python -m pytest -q tests/docs

# each into a folder of its own, which tests/plugins/test_versions.py looks for
onnxruntimes: $(STAMP)
	@for version in $(ONNXRUNTIMES); do \
	  test -d build/onnxruntime/$$version && continue; \
	  rm -rf build/onnxruntime.part; \
	  if $(BIN)/python -m pip install -q --no-deps --target build/onnxruntime.part onnxruntime==$$version; then \
	    mkdir -p build/onnxruntime && mv build/onnxruntime.part build/onnxruntime/$$version; \
	  else echo "onnxruntime $$version cannot be installed: its tests will be LEFT OUT"; fi; \
	done

# what tests/web needs: Chromium and Node.js from the system, and the packages of tests/web/package-lock.json; no script
# of a package is run
WEB := build/web
web:
	@if ! command -v chromium >/dev/null || ! command -v npm >/dev/null; then \
	  echo "chromium or npm is not installed: the browser tests will be LEFT OUT"; \
	elif ! cmp -s tests/web/package-lock.json $(WEB)/package-lock.json; then \
	  rm -rf $(WEB) && mkdir -p $(WEB) && cp tests/web/package.json $(WEB) && \
	  (cd $(WEB) && cp ../../tests/web/package-lock.json . && npm ci --ignore-scripts --no-audit --no-fund) || \
	  { rm -rf $(WEB); echo "npm cannot install their packages: the browser tests will be LEFT OUT"; }; \
	fi

check: lint types onnxruntimes web test

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
