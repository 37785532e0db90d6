"""Builds one TensorRT-RTX engine. Run as a program by build.py: it imports nothing of matexport."""

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
    """Parses `model`, builds with `profiles` and writes `engine`."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    engine = None
    if parser.parse_from_file(job["model"]):
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        for name, shapes in job["profiles"].items():
            profile.set_shape(name, *map(tuple, shapes))
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
    else:
        log.messages += [parser.get_error(i).desc() for i in range(parser.num_errors)]
    if engine is not None:
        Path(job["engine"]).write_bytes(bytes(engine))
    return {"ok": engine is not None, "messages": log.messages, "flavour": "TensorRT-RTX", "version": trt.__version__}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    Path(job["result"]).write_text(json.dumps(build(job)))
