"""TensorRT engines: built by TensorRT-RTX on any machine, in a process of their own."""

from matexport.tensorrt.build import build_engine, require_builder
from matexport.tensorrt.fused import fused_model
from matexport.tensorrt.plugins import PLUGINS, choose_plugins
from matexport.tensorrt.profiles import Profile
from matexport.tensorrt.ptx import CAPABILITIES, write_ptx

__all__ = [
    "CAPABILITIES", "PLUGINS", "Profile", "build_engine", "choose_plugins", "fused_model", "require_builder",
    "write_ptx",
]  # fmt: skip
