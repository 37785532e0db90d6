"""Plans and graphs to ONNX files."""

from matexport.onnx.export import write_onnx

__all__ = ["write_onnx"]
