"""Plans and graphs to ONNX files."""

from matexport.onnx.export import model_without_weights, write_bundle, write_in_place, write_onnx

__all__ = ["model_without_weights", "write_bundle", "write_in_place", "write_onnx"]
