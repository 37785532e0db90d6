"""Writing ONNX graphs down: a builder, the Mamba ops in standard operators. Knows no model and no file."""
