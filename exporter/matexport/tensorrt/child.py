"""Builds one engine, with TensorRT or TensorRT-RTX. Run as a program by build.py: it imports nothing of matexport.

Plugins, where the job has any, are in libraries that the registry loads, or those that our Python registers.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Parses `model`, builds with `profiles`, and writes `engine`.

    Of a job: weights lie beside the file `weights`, which a model that was changed for plugins does not. `module` is
    that of the library, whose two flavours have the same interface. `capabilities` are those of the GPUs that
    TensorRT-RTX builds for (86 is 8.6); without them it is the GPU at hand. `tf32`: whether products of float32 may be
    rounded to TF32. `timing_cache`: a file, read if it is there and fits, and written.
    """
    trt = importlib.import_module(job["module"])
    log, notes = make_log(trt), []
    plugins = job.get("plugins") or {"libraries": [], "python": False, "embed": False, "in_place": False}
    for library in plugins["libraries"]:
        trt.get_plugin_registry().load_library(library)
    if plugins["python"]:
        from matexport_plugins.tensorrt_plugins import register

        register(trt)
    builder = trt.Builder(log)
    # the default since 11; before, the types in the model would be suggestions
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    engine, inputs, outputs = None, {}, {}
    if parser.parse(Path(job["model"]).read_bytes(), job.get("weights", job["model"])):
        inputs = {tensor.name: describe(tensor) for tensor in map(network.get_input, range(network.num_inputs))}
        outputs = {tensor.name: describe(tensor) for tensor in map(network.get_output, range(network.num_outputs))}
        config = configure(trt, builder, job)
        if plugins["in_place"]:
            config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        if plugins["embed"]:
            config.plugins_to_serialize = plugins["libraries"]
        if job.get("timing_cache"):
            notes += read_timing_cache(config, Path(job["timing_cache"]))
            log.messages.clear()  # what TensorRT says of a cache that does not fit is no reason for a failure
        engine = builder.build_serialized_network(network, config)
        if engine is not None and job.get("timing_cache"):
            write_timing_cache(config, Path(job["timing_cache"]))
    else:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        log.messages[:0] = [f"{e.node_operator()} {e.node_name()}: {e.desc()}".lstrip(" :") for e in errors]
    if engine is not None:
        Path(job["engine"]).write_bytes(bytes(engine))
    return {
        "ok": engine is not None, "messages": log.messages, "notes": notes, "version": trt.__version__,
        "inputs": inputs, "outputs": outputs,
    }  # fmt: skip


def make_log(trt: Any) -> Any:
    """A logger that keeps the error messages; the first one says what was wrong."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages.append(text.strip())

    return Log()


def configure(trt: Any, builder: Any, job: dict[str, Any]) -> Any:
    """The builder's configuration: profiles, GPUs, precision."""
    config = builder.create_builder_config()
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *map(tuple, sizes))
        config.add_optimization_profile(profile)
    if job["capabilities"]:
        config.num_compute_capabilities = len(job["capabilities"])
    for i, number in enumerate(job["capabilities"]):
        config.set_compute_capability(trt.ComputeCapability(number), i)
    if not job.get("tf32", True):
        config.clear_flag(trt.BuilderFlag.TF32)
    return config


def read_timing_cache(config: Any, path: Path) -> list[str]:
    """Gives the builder the timings of earlier builds, and says so if they are of another version or GPU."""
    notes = []
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        notes.append(f"timing cache {path.name} is of another version or GPU: it is ignored, and replaced")
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return notes


def write_timing_cache(config: Any, path: Path) -> None:
    """Keeps the timings, in one step: two builds may share the file."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(bytes(config.get_timing_cache().serialize()))
    part.replace(path)


def describe(tensor: Any) -> dict[str, Any]:
    """Type and shape of an input or output as the builder sees it; a dynamic axis is -1."""
    return {"dtype": tensor.dtype.name.lower(), "shape": list(tensor.shape)}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    Path(job["result"]).write_text(json.dumps(build(job)))
