"""TensorRT engines, built in a process of their own; and kits, with which they are built on other machines."""

from matexport.tensorrt.build import build_engine, require_builder
from matexport.tensorrt.fused import fused_model
from matexport.tensorrt.kit import refuse_for_kits, write_kit
from matexport.tensorrt.plugins import PLUGINS, choose_plugins
from matexport.tensorrt.profiles import Profile
from matexport.tensorrt.ptx import CAPABILITIES, write_ptx

__all__ = [
    "CAPABILITIES", "PLUGINS", "Profile", "build_engine", "choose_plugins", "fused_model", "refuse_for_kits",
    "require_builder", "write_kit", "write_ptx",
]  # fmt: skip
