"""Plans and graphs to ONNX files."""

from matexport.onnx.export import write_bundle, write_in_place, write_onnx

__all__ = ["write_bundle", "write_in_place", "write_onnx"]
