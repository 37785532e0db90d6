"""CausalConv1d: depthwise causal convolution and SiLU. See README.md for equations, shapes and states."""
