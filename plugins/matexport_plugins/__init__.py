"""The custom ops of matexport: Mamba2Scan and CausalConv1d, each with its specification beside it."""

from pathlib import Path

__version__ = "0.1.0"


def ort_library() -> Path | None:
    """The library of custom ops for ONNX Runtime, for `SessionOptions.register_custom_ops_library`.

    Returns:
        Its path, or None if this installation was built without native code (`MATEXPORT_NATIVE=0`, or no compiler).
    """
    # an editable installation has two folders: that of the sources and that of what was built
    for folder in __path__:
        for path in sorted(Path(folder, "native").glob("libmatexport_ort.*")):
            return path
    return None
