"""The Triton kernels of a model as PTX, one folder for each compute capability, with what a launcher has to know."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matexport.errors import InputError, MissingError
from matexport.manifest import FILE, describe_file, json_bytes, manifest_bytes
from matexport.staging import staged_folder

CAPABILITIES = (80, 86, 87, 89, 90, 100, 120)
KERNELS = "kernels.json"


def write_ptx(
    model: Any,
    output: Path,
    *,
    capabilities: Sequence[int],
    described: Mapping[str, Any],
    where: str,
    force: bool = False,
    inputs: Sequence[Path] = (),
    progress: Callable[[int], None] = lambda capability: None,
) -> dict[str, Any]:
    """Compiles the kernels of every op in a model, for any length and, where there are states, for one step.

    Args:
        model: an ONNX model of form `custom` (a ModelProto); its weights are not read.
        capabilities: 90 for 9.0.
        described: what the manifest says of the model.
        where: what errors name.
        progress: called with each compute capability before its kernels are compiled.

    Returns:
        The manifest.
    Raises:
        MissingError: Triton or PyTorch is not installed.
        InputError: the model has none of our ops, or sizes that the kernels do not take.
    """
    for package in ("torch", "triton"):
        if importlib.util.find_spec(package) is None:
            raise MissingError(f"PTX needs {package}, which is not installed", fix=f"pip install {package}")
    import triton

    from matexport_plugins import aot, tensorrt_aot

    unknown = [number for number in capabilities if number not in aot.PTX_ISA]
    if unknown:
        known = ", ".join(map(str, aot.PTX_ISA))
        raise InputError(f"no PTX for compute capability {unknown[0]}", where=where, fix=f"one of {known}")
    nodes = [node for node in model.graph.node if node.domain == tensorrt_aot.DOMAIN]
    if not nodes:
        raise InputError("has none of our ops", where=where, fix="export it with: matexport onnx --form custom")
    shapes, modes = tensorrt_aot.shapes_of(model), {"prefill": False}
    if any(value.name in node.input for node in nodes for value in model.graph.input):
        modes["step"] = True
    with staged_folder(output, force=force, inputs=inputs) as folder:
        files: dict[str, dict[str, Any]] = {}
        for capability in capabilities:
            progress(capability)
            place = folder / f"sm_{capability}"
            place.mkdir()
            compiled: dict[str, dict[str, Any]] = {}
            listed = []
            for node in nodes:
                entry: dict[str, Any] = {"node": node.name, "op": node.op_type}
                for mode, step in modes.items():
                    try:
                        launches = tensorrt_aot.launches_of(node, shapes, capability=capability, step=step)
                        for launch in launches:
                            if launch.name not in compiled:
                                compiled[launch.name] = _compile(launch, capability, place)
                    except (ValueError, NotImplementedError, RuntimeError) as e:
                        raise InputError(str(e), where=where, fix="use --plugin cuda or --plugin none") from e
                    entry[mode] = [launch.name for launch in launches]
                listed.append(entry)
            about = {
                "compute_capability": capability,
                "triton": triton.__version__,
                "nodes": listed,
                "kernels": compiled,
            }
            (place / KERNELS).write_bytes(json_bytes(about))
            files |= {path.relative_to(folder).as_posix(): describe_file(path) for path in sorted(place.iterdir())}
        manifest = {"kind": "ptx", **described, "capabilities": list(capabilities), "files": files}
        (folder / FILE).write_bytes(manifest_bytes(manifest))
    return manifest


def _compile(launch: Any, capability: int, folder: Path) -> dict[str, Any]:
    """Writes one kernel's PTX and returns its entry. Raises as `compile_kernel` does, and where it would not run."""
    from matexport_plugins import aot

    kernel = aot.compile_kernel(launch, capability)
    if kernel.shared > 1024 * aot.SHARED_MEMORY[capability]:
        raise ValueError(f"{kernel.name} needs {kernel.shared} bytes of shared memory, more than sm_{capability} has")
    path = folder / f"{launch.name}.ptx"
    path.write_text(kernel.ptx)
    about = {k: v for k, v in asdict(kernel).items() if k not in ("ptx", "cubin", "hidden", "compute_capability")}
    return {"file": path.name, **about}
