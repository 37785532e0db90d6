"""TensorRT engines, built in a process of their own; and kits, with which they are built on other machines."""

from matexport.tensorrt.build import build_engine, require_builder
from matexport.tensorrt.kit import write_kit
from matexport.tensorrt.profiles import Profile

__all__ = ["Profile", "build_engine", "require_builder", "write_kit"]
