"""The custom ops of matexport: Mamba2Scan and CausalConv1d, each with its specification beside it."""

from pathlib import Path

__version__ = "0.1.0"


def ort_library(*, cuda: bool = False) -> Path | None:
    """The library of custom ops for ONNX Runtime, for `SessionOptions.register_custom_ops_library`.

    Args:
        cuda: the one whose ops run on NVIDIA GPUs too. It holds the ops for the CPU as well, since ONNX Runtime takes a
            domain of ops from one library only: register this one or the other.

    Returns:
        Its path, or None if this installation was built without native code (`MATEXPORT_NATIVE=0`, or no compiler;
        for CUDA `MATEXPORT_CUDA=0`, or no nvcc).
    """
    return _library("matexport_cuda" if cuda else "matexport_ort")


def trt_library() -> Path | None:
    """The library of TensorRT plugins, for `IPluginRegistry.load_library` or `trtexec --dynamicPlugins`.

    Returns:
        Its path, or None if this installation was built without CUDA (`MATEXPORT_CUDA=0`, or no nvcc).
    """
    return _library("matexport_cuda")


def trt_sources() -> dict[str, Path]:
    """The sources of the TensorRT plugins in CUDA, by their place below a folder: for machines that compile them.

    `nvcc -shared native/cuda_library.cu native/trt_plugin.cc` makes the library; of TensorRT nothing is needed.
    """
    headers = ("cuda_mma.h", "cuda_shim.h", "cuda_types.h", "matexport_cuda.h", "trt_abi.h")
    names = ["causal_conv1d/cuda.h", *(f"mamba2_scan/cuda{part}.h" for part in ("", "_chunks", "_steps"))]
    names += [f"native/{name}" for name in ("cuda_library.cu", "trt_plugin.cc", *headers)]
    return {name: next(p for p in (Path(folder, name) for folder in __path__) if p.is_file()) for name in names}


def _library(name: str) -> Path | None:
    # an editable installation has two folders: that of the sources and that of what was built
    for folder in __path__:
        for path in sorted(Path(folder, "native").glob(f"lib{name}.*")):
            return path
    return None
