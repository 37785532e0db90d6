"""TensorRT engines: built by TensorRT-RTX on any machine, in a process of their own."""

from matexport.tensorrt.build import build_engine
from matexport.tensorrt.plugins import PLUGINS, choose_plugins
from matexport.tensorrt.profiles import Profile

__all__ = ["PLUGINS", "Profile", "build_engine", "choose_plugins"]
