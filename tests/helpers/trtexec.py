"""What trtexec does of what our kits ask of it, with ONNX Runtime in place of a GPU. Run as a program named trtexec.

Options, their order, file names, messages and exit codes follow its source (samples/common/sampleOptions.cpp and
sampleInference.cpp of TensorRT 10.3, 10.16 and 11.1). An engine is a JSON file. From the environment: TRTEXEC_VERSION,
101600 by default; TRTEXEC_FAULT, `OUTPUT:WHAT`: what goes wrong with an output: a factor, or `nan` in one place.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

FLAGS = {"--skipInference", "--stronglyTyped", "--noTF32", "--dumpRawBindingsToFile"}
VALUES = {
    "--onnx", "--saveEngine", "--loadEngine", "--profile", "--minShapes", "--optShapes", "--maxShapes", "--shapes",
    "--useProfile", "--loadInputs", "--iterations", "--warmUp", "--duration", "--timingCacheFile", "--dynamicPlugins",
    "--setPluginsToSerialize",
}  # fmt: skip
NEW = {"--loadRefOutputs", "--accuracyAlgorithm", "--accuracyThreshold"}  # since 11.1
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int64": "int64", "int32": "int32", "bool": "bool"}


def fail(text: str) -> NoReturn:
    print(f"[11/28/2025-12:00:00] [E] {text}\n&&&& FAILED TensorRT.trtexec")
    raise SystemExit(1)


def main(version: int, arguments: list[str]) -> None:
    print(f"&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # trtexec {' '.join(arguments)}")
    known = FLAGS | VALUES | (NEW if version >= 110100 else set())
    if "--help" in arguments:
        print("\n".join(f"  {name}  does something" for name in sorted(known)))
        return
    options = [(name, value) for name, _, value in (argument.partition("=") for argument in arguments)]
    for name, value in options:
        if name not in known or bool(value) == (name in FLAGS):
            fail(f"Unknown option: {name} {value}")
    found = dict(options)
    if "--loadEngine" in found:
        run(version, found)
    else:
        build(version, options)
    print(f"&&&& PASSED TensorRT.trtexec [TensorRT v{version}]")


def build(version: int, options: list[tuple[str, str]]) -> None:
    import onnx

    found = dict(options)
    model = Path(found["--onnx"])
    try:
        inputs = [i.name for i in onnx.load(model).graph.input]
    except Exception as e:  # of protobuf, or of the weights beside it
        fail(f"Failed to parse onnx file: {e}")
    if "--skipInference" not in found:
        fail("the stub runs no inference while it builds")
    profiles: list[dict[str, list[tuple[int, ...]]]] = []
    for i, (name, value) in enumerate(options):
        if name == "--profile":
            if int(value) != len(profiles):
                fail("Optimization profile index cannot be the same.")
            behind = dict(options[i + 1 : i + 4])
            if behind.keys() != {"--minShapes", "--optShapes", "--maxShapes"}:
                fail(f"Found invalid or missing shape spec at profile index {value}. ")
            shapes = [pairs(behind[f"--{kind}Shapes"]) for kind in ("min", "opt", "max")]
            profiles.append({i: [dims(each[i]) for each in shapes] for i in inputs})
    for profile in profiles:
        for i, (low, best, high) in profile.items():
            if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
                fail(f"profile of {i}: not min <= opt <= max")
    cache = found.get("--timingCacheFile")
    if cache:
        Path(cache).write_text(f"timings of {version}")
    fused = model.name == "model.fused.onnx"  # the same function, but ONNX Runtime takes inputs by position
    if fused and not Path(found.get("--dynamicPlugins", "")).is_file():
        fail("Plugin not found, are the plugin name, version, and namespace correct?")
    computed = model.with_name("model.onnx") if fused else model
    engine = {
        "version": version, "model": str(computed.resolve()), "profiles": profiles,
        "strong": version >= 110000 or "--stronglyTyped" in found, "tf32": "--noTF32" not in found,
        "plugins": found.get("--dynamicPlugins"),
    }  # fmt: skip
    Path(found["--saveEngine"]).write_text(json.dumps(engine))


def run(version: int, found: dict[str, str]) -> None:
    import numpy as np

    engine = json.loads(Path(found["--loadEngine"]).read_text())
    if engine["version"] != version:
        fail("The engine plan file is not compatible with this version of TensorRT")
    if engine["plugins"] and "--dynamicPlugins" not in found:
        fail("Plugin not found, are the plugin name, version, and namespace correct?")
    index = int(found.get("--useProfile", 0))
    if index >= len(engine["profiles"]):
        fail(f"Selected profile index {index} exceeds the number of profiles that the engine holds. ")
    profile, shapes, files = engine["profiles"][index], pairs(found["--shapes"]), pairs(found["--loadInputs"])
    given = {}
    for name, dtype in read_inputs(Path(engine["model"])).items():
        shape = dims(shapes[name])
        low, _, high = profile[name]
        if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            fail(f"Set dimension {list(shape)} for tensor {name} does not satisfy any optimization profiles.")
        if name not in files:  # trtexec makes random ones
            given[name] = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
        else:
            given[name] = read(Path(files[name]), dtype, shape)
    outputs = with_fault(infer(Path(engine["model"]), given))
    wrong = "--loadRefOutputs" in found and not agree(outputs, found)
    if "--dumpRawBindingsToFile" in found:
        for kind, arrays in (("input", given), ("output", outputs)):
            for name, array in arrays.items():
                where = ".".join([name, kind, *map(str, array.shape), TYPES[array.dtype.name], "raw"])
                Path(where).write_bytes(array.tobytes())
    if wrong:
        fail("Accuracy validation FAILED: one or more tensors exceeded the threshold.")


def agree(outputs: dict[str, Any], found: dict[str, str]) -> bool:
    """trtexec's own comparison, which lets pass what is not a number, and leaves bfloat16 out."""
    import numpy as np

    threshold, good = float(found.get("--accuracyThreshold", 0)), True
    if threshold <= 0:
        fail("--accuracyThreshold (with a positive value) is required when --loadRefOutputs or --refPair is set.")
    if found["--accuracyAlgorithm"] != "cos":
        fail("the stub knows cos only")
    for name, file in pairs(found["--loadRefOutputs"]).items():
        a = outputs[name].astype(np.float64).ravel()
        b = read(Path(file), outputs[name].dtype, outputs[name].shape).astype(np.float64).ravel()
        loss = 1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        if outputs[name].dtype.name != "bfloat16" and loss >= threshold:
            good = False
    return good


def pairs(text: str) -> dict[str, str]:
    """`name:value,name:value`."""
    return {name: value for name, _, value in (item.rpartition(":") for item in text.split(","))}


def dims(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def read(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    import numpy as np

    if not path.is_file():
        fail(f"Cannot open file {path}!")
    size = math.prod(shape) * np.dtype(dtype).itemsize or 1  # a byte is kept for what is empty
    if path.stat().st_size not in (size, 2 * size):
        fail(f"Unexpected file size for input file: {path}. Note: Input binding size is: {size} bytes")
    return np.frombuffer(path.read_bytes()[:size], dtype).reshape(shape)


def session(model: Path) -> Any:
    import onnxruntime as ort

    import matexport_plugins

    options = ort.SessionOptions()
    options.log_severity_level = 3
    library = matexport_plugins.ort_library()
    if library:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def read_inputs(model: Path) -> dict[str, Any]:
    import ml_dtypes
    import numpy as np

    special = {"float": "float32"}
    names = ((i.name, i.type.removeprefix("tensor(").removesuffix(")")) for i in session(model).get_inputs())
    return {name: np.dtype(getattr(ml_dtypes, kind, special.get(kind, kind))) for name, kind in names}


def infer(model: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    opened = session(model)
    return dict(zip([o.name for o in opened.get_outputs()], opened.run(None, inputs), strict=True))


def with_fault(outputs: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    name, _, what = os.environ.get("TRTEXEC_FAULT", "").partition(":")
    if name in outputs and what == "nan":
        outputs[name].ravel()[-1] = np.nan
    elif name in outputs:
        outputs[name] = (outputs[name] * float(what)).astype(outputs[name].dtype)
    return outputs


if __name__ == "__main__":
    main(int(os.environ.get("TRTEXEC_VERSION", 101600)), sys.argv[1:])
