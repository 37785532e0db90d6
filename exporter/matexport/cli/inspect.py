"""`matexport inspect`."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import click

from matexport.checkpoint import Checkpoint, open_checkpoint
from matexport.cli.common import (
    echo_json,
    format_option,
    hint,
    human_bytes,
    model_option,
    pickle_option,
    shape_ranges,
)
from matexport.errors import CheckpointError, MissingError, printable
from matexport.families import family_of
from matexport.families.rows import WHOLE
from matexport.manifest import manifest_path, read_manifest
from matexport.runtimes.tensorrt import require_engine


@click.command()
@model_option
@pickle_option
@format_option
def command(model: str, allow_pickle: bool, style: str) -> None:
    """Says what a checkpoint, an ONNX folder, an engine or a kit is, and where it came from.

    \b
    Examples:
      matexport inspect -m checkpoint
      matexport inspect -m half-onnx --format json
    """
    remote = None if Path(model).exists() else open_checkpoint(model, allow_pickle=allow_pickle)
    path = remote.path if remote else Path(model)
    manifest = read_manifest(path) if manifest_path(path).is_file() else None
    found = _artefact(path, manifest) if manifest else {"kind": "checkpoint"}
    if found["kind"] == "checkpoint":
        found |= _checkpoint(remote or open_checkpoint(path, allow_pickle=allow_pickle))
    if style == "json":
        echo_json(found)
    else:
        _show(_shortened(found))
    if "damage" in found:
        hint("slice", "-m", model, "--repair", "-o", "OUTPUT")
    elif found["kind"] == "checkpoint" and manifest is None:
        hint("slices", "-m", model)
    elif found["kind"] != "ptx":
        hint("verify", "-m", model, "--source", "SOURCE")


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    family = family_of(checkpoint)
    damage = family.damage(checkpoint)
    known = {"damage": list(damage)} if damage else {}
    loaders = [verdict.to_json() for verdict in family.loaders(checkpoint)]
    try:
        plan = family.plan_slice(checkpoint, WHOLE, None)
    except CheckpointError:
        if not damage:
            raise
        return {"family": family.NAME, "tensors": len(checkpoint.tensors), **known, "loaders": loaders}
    return {
        "family": plan.family,
        "layers": len(plan.layers),
        "widths": [layer.width for layer in plan.layers],
        "dtypes": sorted({tensor.dtype for tensor in plan.tensors.values()}),
        "tensors": len(plan.tensors),
        "parameters": plan.parameters,
        "model_parameters": plan.model_parameters,
        "effective_parameters": plan.effective_parameters,
        "bytes": plan.nbytes,
        "packaged_table": family.packaged_table(checkpoint),
        **known,
        "loaders": loaders,
    }


def _artefact(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says, without the tensors."""
    keys = (
        "kind", "matexport", "family", "slice", "source", "target", "form", "dtype", "quantize", "plugins", "aliases",
        "tensorrt", "capabilities", "precisions", "profiles", "files",
    )  # fmt: skip
    found = {key: manifest[key] for key in keys if key in manifest}
    if manifest["kind"] == "engine":
        found["runs_here"] = _runs_here(path, manifest)
    if manifest["kind"] == "kit":
        found["to_build"] = f"run build.sh and verify.sh on the machine it is for ({manifest.get('target')})"
    if manifest["kind"] == "onnx":
        found["runs_here"] = _installed("onnxruntime")
    return found


def _runs_here(path: Path, manifest: dict[str, Any]) -> str:
    """Whether an engine fits this machine; it is not loaded."""
    try:
        return f"yes: {require_engine(path, manifest)}"
    except MissingError as e:
        return f"no: {e.what}"


def _installed(package: str) -> str:
    try:
        return f"yes: {package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no: {package} is not installed"


def _shortened(found: dict[str, Any]) -> dict[str, Any]:
    """For people: ranges of shapes in a line, inputs and files that are many counted."""
    short = dict(found)
    if isinstance(found.get("profiles"), dict):
        short["profiles"] = {name: shape_ranges(profile) for name, profile in found["profiles"].items()}
    if len(found.get("files", {})) > 6:
        size = human_bytes(sum(int(entry.get("bytes", 0)) for entry in found["files"].values()))
        short["files"] = f"{len(found['files'])}, {size}"
    return short


def _show(found: dict[str, Any], indent: str = "") -> None:
    for key, value in found.items():
        if key == "loaders":
            click.echo("loads in:")
            for entry in value:
                click.echo(f"  {entry['loader']}: " + ("yes" if entry["takes"] else f"no, {entry['reason']}"))
            continue
        if isinstance(value, dict):
            click.echo(f"{indent}{printable(str(key))}:")
            _show(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            parts = (", ".join(f"{k} {v}" for k, v in item.items()) for item in value)
            click.echo(f"{indent}{key}: " + printable("; ".join(parts)))
        else:
            text = human_bytes(value) if key == "bytes" else f"{value:,}" if isinstance(value, int) else str(value)
            click.echo(f"{indent}{printable(str(key))}: {printable(text)}")
