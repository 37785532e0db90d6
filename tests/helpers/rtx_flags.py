"""Asks TensorRT-RTX's builder for what it may refuse. Run as a program, with the environment of `rtx_environment`.

Arguments: a model, and a JSON list of requests, {"flags": [names], "capabilities": [numbers]}. Prints for each of them
null where an engine was built, and else the first message.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

from matexport.tensorrt.child import make_log


def build(model: bytes, request: dict[str, Any]) -> str | None:
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        return [*log.messages, *(parser.get_error(i).desc() for i in range(parser.num_errors))][0]
    config = builder.create_builder_config()
    for name in request.get("flags", []):
        config.set_flag(getattr(trt.BuilderFlag, name))
    capabilities = request.get("capabilities", [])
    config.num_compute_capabilities = len(capabilities)
    try:
        for i, number in enumerate(capabilities):
            config.set_compute_capability(trt.ComputeCapability(number), i)
    except ValueError as e:  # the binding knows no such number
        return str(e)
    engine = builder.build_serialized_network(network, config)
    return None if engine is not None else (log.messages or ["no message"])[0]


if __name__ == "__main__":
    found = [build(Path(sys.argv[1]).read_bytes(), request) for request in json.loads(sys.argv[2])]
    print(json.dumps(found))
