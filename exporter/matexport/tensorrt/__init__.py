"""TensorRT engines, built in a process of their own; and kits, with which they are built on other machines."""

from matexport.tensorrt.build import build_engine, require_builder
from matexport.tensorrt.fused import fused_model
from matexport.tensorrt.kit import refuse_for_kits, write_kit
from matexport.tensorrt.plugins import PLUGINS, choose_plugins
from matexport.tensorrt.profiles import Profile, profiles, profiles_json
from matexport.tensorrt.ptx import CAPABILITIES, write_ptx
from matexport.tensorrt.source import open_source

__all__ = [
    "CAPABILITIES", "PLUGINS", "Profile", "build_engine", "choose_plugins", "fused_model", "open_source", "profiles",
    "profiles_json", "refuse_for_kits", "require_builder", "write_kit", "write_ptx",
]  # fmt: skip
