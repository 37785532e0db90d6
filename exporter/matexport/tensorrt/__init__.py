"""TensorRT engines: built by TensorRT-RTX on any machine, in a process of their own."""

from matexport.tensorrt.build import Profile, build_engine

__all__ = ["Profile", "build_engine"]
