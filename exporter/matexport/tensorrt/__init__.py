"""TensorRT engines: built by TensorRT-RTX on any machine, in a process of their own."""

from matexport.tensorrt.build import build_engine, require_builder
from matexport.tensorrt.profiles import Profile

__all__ = ["Profile", "build_engine", "require_builder"]
