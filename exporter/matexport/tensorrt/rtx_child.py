"""Builds one TensorRT-RTX engine. Run as a program by build.py: it imports nothing of matexport.

Plugins, where the job has any: libraries that the registry loads, or those that our Python registers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt


class Log(trt.ILogger):
    """Keeps the error messages; the first one says what was wrong."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.messages.append(text.strip())


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Parses `model`, builds with `profiles` for GPUs of `capabilities` (86 is 8.6), and writes `engine`."""
    log = Log()
    plugins = job.get("plugins") or {"libraries": [], "python": False, "embed": False, "in_place": False}
    for library in plugins["libraries"]:
        trt.get_plugin_registry().load_library(library)
    if plugins["python"]:
        from matexport_plugins.tensorrt_plugins import register

        register(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    engine, inputs, outputs = None, {}, {}
    # weights lie beside the file at `weights`, which a model that was changed for plugins is not
    if parser.parse(Path(job["model"]).read_bytes(), job["weights"]):
        inputs = {tensor.name: describe(tensor) for tensor in map(network.get_input, range(network.num_inputs))}
        outputs = {tensor.name: describe(tensor) for tensor in map(network.get_output, range(network.num_outputs))}
        engine = builder.build_serialized_network(network, configure(builder, job, plugins))
    else:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        log.messages[:0] = [f"{e.node_operator()} {e.node_name()}: {e.desc()}".lstrip(" :") for e in errors]
    if engine is not None:
        Path(job["engine"]).write_bytes(bytes(engine))
    return {
        "ok": engine is not None, "messages": log.messages, "flavour": "TensorRT-RTX", "version": trt.__version__,
        "inputs": inputs, "outputs": outputs,
    }  # fmt: skip


def configure(builder: Any, job: dict[str, Any], plugins: dict[str, Any]) -> Any:
    """The builder's configuration: profiles, GPUs, and what plugins ask for."""
    config = builder.create_builder_config()
    if plugins["in_place"]:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if plugins["embed"]:
        config.plugins_to_serialize = plugins["libraries"]
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *map(tuple, sizes))
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(job["capabilities"])
    for i, number in enumerate(job["capabilities"]):
        config.set_compute_capability(trt.ComputeCapability(number), i)
    return config


def describe(tensor: Any) -> dict[str, Any]:
    """Type and shape of an input or output as the builder sees it; a dynamic axis is -1."""
    return {"dtype": tensor.dtype.name.lower(), "shape": list(tensor.shape)}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    Path(job["result"]).write_text(json.dumps(build(job)))
