"""The manifest `matexport.json` beside every artefact: what it is, of what it was made, and digests.

It holds no time and no path, so that the same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from matexport.checkpoint import Checkpoint, read_json
from matexport.errors import InputError
from matexport.planning import Plan, PlannedTensor, compose
from matexport.version import __version__

FILE = "matexport.json"
BUNDLE = "onnx-bundle"  # the kind of an elastic bundle
MAX_MANIFEST = 64 << 20


def describe_slice(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """The part of a manifest that every artefact of a slice shares: family, row, layers and source.

    If the source is itself a slice, `origin` says the same relative to the checkpoint that it was cut from.
    """
    described: dict[str, Any] = {
        "matexport": __version__,
        "family": plan.family,
        "slice": {
            "name": plan.name,
            "layers": [{"source": layer.source, "width": layer.width} for layer in plan.layers],
            "skipped": list(plan.skipped),
            "options": list(plan.options),
            "dtype": plan.dtype,
            "parameters": plan.parameters,
            "notes": list(plan.notes),
        },
        "source": describe_source(checkpoint),
    }
    if (checkpoint.path / FILE).is_file():
        origin = _origin(plan, read_manifest(checkpoint.path), str(checkpoint.path))
        described["origin"] = origin
    return described


def _origin(plan: Plan, manifest: dict[str, Any], where: str) -> dict[str, Any] | None:
    """What a plan is, relative to the origin of its source, whose manifest is given; None after two casts."""
    base = manifest.get("origin", manifest)
    views = kept_tensors(base, "tensors", where)
    try:
        options, dtype = base["slice"].get("options", []), base["slice"].get("dtype")
        if dtype and plan.dtype:
            return None
        layers, skipped = base["slice"]["layers"], base["slice"]["skipped"]
        record = {
            "name": plan.name,
            "layers": [{"source": layers[layer.source]["source"], "width": layer.width} for layer in plan.layers],
            "skipped": sorted([*skipped, *(layers[i]["source"] for i in plan.skipped)]),
            "options": list(dict.fromkeys([*options, *plan.options])),
            "dtype": plan.dtype or dtype,
        }
        tensors = {
            name: replace(tensor, view=compose(tensor.view, views[tensor.view.source].view)).to_json()
            for name, tensor in plan.tensors.items()
        }
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise InputError(f"manifest does not fit the checkpoint: {e!r}", where=where, fix="slice it again") from None
    return {"slice": record, "source": base["source"], "tensors": tensors}


def describe_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """What identifies a source without reading its weights: sizes, digests of config and of each file's layout."""
    return {
        "name": checkpoint.name,
        **({"revision": checkpoint.remote.commit} if checkpoint.remote else {}),
        "config_sha256": file_digest(checkpoint.path / "config.json"),
        "files": {
            file.name: {"bytes": checkpoint.size_of(file), "layout_sha256": _layout_digest(checkpoint, file)}
            for file in checkpoint.files
        },
    }


def _layout_digest(checkpoint: Checkpoint, file: Path) -> str:
    """SHA-256 over name, dtype, shape and offset of every tensor in one file."""
    table = [(t.name, t.dtype, t.shape, t.start) for t in checkpoint.tensors.values() if t.file == file]
    return hashlib.sha256(json.dumps(sorted(table)).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Size and digest, as `files` of a manifest lists them."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def json_bytes(value: Any) -> bytes:
    """JSON as we write it: indented, keys in the order given, a newline at the end."""
    return (json.dumps(value, indent=2) + "\n").encode()


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """A manifest as JSON: one line for each tensor and file."""

    def text(value: Any, indent: str, depth: int) -> str:
        if not isinstance(value, dict) or not value or depth == 0:
            return json.dumps(value)
        lines = (f"{indent}  {json.dumps(key)}: {text(item, indent + '  ', depth - 1)}" for key, item in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"

    return (text(manifest, "", 2) + "\n").encode()


def manifest_path(artefact: Path) -> Path:
    """Where the manifest of an artefact is: in its folder, or beside a single file."""
    return artefact.with_name(artefact.name + ".json") if artefact.suffix == ".onnx" else artefact / FILE


def read_manifest(artefact: Path) -> dict[str, Any]:
    """The manifest of an artefact.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    path = manifest_path(artefact)
    if not path.is_file():
        raise InputError(f"has no manifest ({path.name})", where=str(artefact), fix="give what matexport wrote")
    manifest = read_json(path, MAX_MANIFEST)
    files = manifest.get("files")
    sound = isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values())
    if not isinstance(manifest.get("kind"), str) or not sound:
        raise InputError("is not a manifest of matexport", where=str(path), fix="write the artefact again")
    return manifest


def file_problems(artefact: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """For every file of an artefact what is wrong with it; empty text if it is the one that was written."""
    folder, found = manifest_path(artefact).parent, {}
    for name, entry in manifest["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
            found[name] = "the file is missing"
        elif path.stat().st_size != entry.get("bytes") or _differs(path, entry.get("sha256")):
            found[name] = "was changed after it was written"
        else:
            found[name] = ""
    if artefact.is_dir():
        known = {*manifest["files"], FILE, *_in_place(folder), *_made_later(manifest)}
        for place in {folder, *((folder / name).parent for name in manifest["files"] if found[name] == "")}:
            names = [p.relative_to(folder).as_posix() for p in place.iterdir()]
            strangers = (n for n in names if n not in known and not any(k.startswith(f"{n}/") for k in known))
            found |= dict.fromkeys(strangers, "is not one of the files that were written")
    return found


def _made_later(manifest: dict[str, Any]) -> list[str]:
    """What the scripts of a kit make in its folder."""
    names = manifest.get("made_there", [])
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _in_place(folder: Path) -> list[str]:
    """A model that was put beside the weights of a checkpoint, and its manifest, which says so."""
    model = folder / "model.onnx"
    try:
        found = read_manifest(model).get("in_place") is True
    except InputError:
        return []
    return [model.name, manifest_path(model).name] if found else []


def _differs(path: Path, sha256: object) -> bool:
    """Whether a file has another digest than was noted; none was for what was written with `--no-digest`."""
    return sha256 is not None and file_digest(path) != sha256


def kept_tensors(manifest: dict[str, Any], key: str, where: str) -> dict[str, PlannedTensor]:
    """The views that a manifest records under `key`. Raises InputError."""
    try:
        return {name: PlannedTensor.from_json(entry) for name, entry in manifest[key].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(f"'{key}' cannot be read: {e!r}", where=where, fix="write the artefact again") from None
