"""The ops of an engine as plugins: which there are, and what builder and loader must do."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matexport_plugins
from matexport.errors import MissingError, UsageError
from matexport.manifest import file_digest
from matexport_plugins.tensorrt_plugins import NAMESPACE, VERSION

PLUGINS = ("none", "cuda", "triton")
LOAD = {
    "embedded": "set runtime.engine_host_code_allowed = True: the library is in the engine",
    "library": "call trt.get_plugin_registry().load_library({name!r}) first",
    "triton": "call matexport_plugins.tensorrt_plugins.register(trt) first",
}


@dataclass(frozen=True)
class Plugins:
    """The plugins of an engine.

    Attributes:
        kind: "cuda", a library of ours, or "triton", which Python registers.
        library: the library; None for Triton.
        embed: whether the library goes into the engine, rather than beside it.
        in_place: whether states are written over those before them.
    """

    kind: str
    library: Path | None
    embed: bool
    in_place: bool

    def job(self) -> dict[str, Any]:
        """What the builder's process is told."""
        libraries = [str(self.library)] if self.library else []
        return {"libraries": libraries, "python": not libraries, "embed": self.embed, "in_place": self.in_place}

    def put_beside(self, folder: Path) -> list[str]:
        """Copies into an engine's folder what has to go along; returns names."""
        if self.library is None or self.embed:
            return []
        shutil.copyfile(self.library, folder / self.library.name)
        return [self.library.name]

    def describe(self, ops: list[str]) -> dict[str, Any]:
        """The plugins as the engine's manifest has them; `ops` are those that it needs."""
        named = [{"name": name, "version": VERSION, "namespace": NAMESPACE} for name in ops]
        if self.library is None:
            origin = {"package": f"matexport-plugins {matexport_plugins.__version__}", "sha256": _sources_digest()}
            return {"kind": self.kind, "ops": named, **origin, "embedded": False, "load": LOAD["triton"]}
        load = LOAD["embedded" if self.embed else "library"].format(name=self.library.name)
        origin = {"library": self.library.name, "sha256": file_digest(self.library)}
        host_code = {"engine_host_code_allowed": True} if self.embed else {}
        return {"kind": self.kind, "ops": named, **origin, "embedded": self.embed, **host_code, "load": load}


def choose_plugins(kind: str, *, embed: bool = False, in_place: bool = False) -> Plugins | None:
    """The plugins of that kind, as this installation has them; None for "none".

    Raises:
        UsageError: there is no such kind, or it cannot be embedded or write in place.
        MissingError: the library was not built.
    """
    if kind not in PLUGINS:
        raise UsageError(f"unknown plugin {kind!r}", fix=f"one of {', '.join(PLUGINS)}")
    if kind != "cuda" and (embed or in_place):
        what = "goes into no engine" if embed else "writes no state in place"
        raise UsageError(f"plugin {kind!r} {what}", fix="use --plugin cuda")
    if kind == "none":
        return None
    if kind == "triton":
        return Plugins(kind, None, embed, in_place)
    library = matexport_plugins.trt_library()
    if library is None:
        what = "the library of TensorRT plugins is not in this installation: there was no nvcc when it was made"
        fix = (
            "install matexport-plugins again beside an nvcc of CUDA 12.8 or newer (MATEXPORT_CUDA=1 makes its absence"
            " an error), or use --plugin triton, or --plugin none"
        )
        raise MissingError(what, fix=fix)
    return Plugins(kind, library, embed, in_place)


def _sources_digest() -> str:
    """Of all that a plugin in Python is made of."""
    digest = hashlib.sha256()
    root = Path(matexport_plugins.__file__).parent
    for path in sorted(
        [*root.glob("tensorrt_plugins.py"), *root.glob("*/tensorrt_plugin.py"), *root.glob("*/triton_*.py")]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()
