#!/usr/bin/env bash
# Compiles the TensorRT plugins for @MACHINE@: @LIBRARY@. Needs an nvcc that knows @ARCHITECTURE@, and nothing of TensorRT.
set -euo pipefail
cd "$(dirname "$0")"

nvcc=${NVCC:-$(command -v nvcc || true)}
nvcc=${nvcc:-/usr/local/cuda/bin/nvcc}
if [ ! -x "$(command -v "$nvcc")" ]; then
  echo "nvcc is not found. It comes with CUDA; say where it is: NVCC=/path/to/nvcc $0" >&2
  exit 5
fi
"$nvcc" -std=c++17 -O3 -arch=@ARCHITECTURE@ -shared -cudart static -Xcompiler -fPIC,-fvisibility=hidden \
  native/cuda_library.cu native/trt_plugin.cc -o @LIBRARY@.part
mv @LIBRARY@.part @LIBRARY@
