"""Builds a TensorRT-RTX engine with plugins. Run as a program by tests/tensorrt/test_plugin.py: TensorRT may abort.

One argument, JSON: `model` (ONNX file), `plugins` (libraries), `profiles`; optionally `engine` (where to write it),
`embed` (libraries go into the engine), `aliased` (preview feature for aliased I/O), `targets` (compute capabilities).
Prints JSON: `bytes` of the engine or null, `messages`, `creators` (name, version, namespace) that the libraries bring.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

from matexport.tensorrt.child import make_log


def main(job: dict[str, Any]) -> dict[str, Any]:
    log = make_log(trt)
    registry = trt.get_plugin_registry()
    before = {(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators}
    for library in job["plugins"]:
        registry.load_library(library)
    creators = {(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators} - before
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    engine, outputs = None, {}
    if parser.parse_from_file(job["model"]):
        for i in range(network.num_outputs):
            output = network.get_output(i)
            outputs[output.name] = [str(output.dtype).removeprefix("DataType."), list(output.shape)]
        config = builder.create_builder_config()
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, job.get("aliased", False))
        if job.get("embed"):
            config.plugins_to_serialize = job["plugins"]
        if job.get("targets"):
            config.num_compute_capabilities = len(job["targets"])
            for i, target in enumerate(job["targets"]):
                config.set_compute_capability(trt.ComputeCapability(target), i)
        profile = builder.create_optimization_profile()
        for name, shapes in job["profiles"].items():
            profile.set_shape(name, *map(tuple, shapes))
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
    else:
        log.messages += [parser.get_error(i).desc() for i in range(parser.num_errors)]
    if engine is not None and "engine" in job:
        Path(job["engine"]).write_bytes(bytes(engine))
    size = None if engine is None else engine.nbytes
    return {"bytes": size, "messages": log.messages, "creators": sorted(creators), "outputs": outputs}


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
