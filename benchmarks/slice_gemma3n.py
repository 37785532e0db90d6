"""Synthetic Gemma 3n E4B checkpoints: their source, the bytes that a row needs, and whether an output is right.

What a slice must hold is said here a second time, in NumPy views of the files: of matexport only the source's names,
shapes and config.json are used.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from slice_gemma3n_ways import DOWN, GATE, PROJECTION, TABLE, UP

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "tests" / "helpers"))
import gemma  # noqa: E402
from matexport.families.gemma3n.config import text_only_config  # noqa: E402

SHARD = 5_000_000_000  # bytes of tensors a file at most, as released
PIECE = 64 << 20
FFN_ROW, E2B_ROW, WHOLE_ROW = "Config for E2.49B (block-level)", "Config for official E2B Model", "Whole layers"
SKIPPED = (20, 21, 22, 23, 24)
ROWS = {  # name -> skipped layers, FFN widths of the kept ones
    FFN_ROW: ((), [8192] * 20 + [16384] * 5 + [8192] * 10),
    E2B_ROW: (SKIPPED, [8192] * 30),
    WHOLE_ROW: (SKIPPED, [16384] * 30),  # for mergekit
}
DEAD = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")  # of the sharing layers


Shapes = dict[str, tuple[int, ...]]
Blocks = Callable[[Shapes, np.random.Generator], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Model:
    """A width of E4B: `divisor` 1 is the released one."""

    divisor: int

    def config(self, *, text_only: bool = False) -> dict[str, Any]:
        """config.json in the released keys."""
        config: dict[str, Any] = gemma.e4b_config()
        text = config["text_config"]
        for key in ("hidden_size", "hidden_size_per_layer_input", "head_dim", "laurel_rank"):
            text[key] //= self.divisor
        text["intermediate_size"] = [width // self.divisor for width in text["intermediate_size"]]
        return text_only_config(config) if text_only else config

    def row(self, name: str) -> tuple[list[int], list[int]]:
        """Kept layers and their FFN widths."""
        skipped, widths = ROWS[name]
        return [i for i in range(35) if i not in skipped], [width // self.divisor for width in widths]

    @property
    def per_layer(self) -> int:
        """Columns that a layer has in the per-layer table."""
        return 256 // self.divisor


# ------------------------------------------------------------------------------------------- the source
def make_source(folder: Path, model: Model, *, text_only: bool = False) -> Path:
    """The language model's tensors, random finite bf16; a folder that is complete is taken as it is."""
    write_source(folder, model.config(text_only=text_only), SHARD // model.divisor, random_bits)
    if model.divisor > 1:  # the released table would not fit
        _write_table(folder / "slices.csv", model)
    return folder


def write_source(folder: Path, config: dict[str, Any], shard: int, blocks: Blocks) -> None:
    """The tensors of a config.json in files of at most `shard` bytes; a folder that is complete is left as it is."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        measuring.say(f"source: {folder} is there")
        return
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in gemma.shapes(config).items():
        nbytes = 2 * int(np.prod(shape))
        if name in gemma.TOWERS:
            continue
        if size + nbytes > shard and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    rng, weight_map, total = np.random.default_rng(0), {}, 0
    for k, group in enumerate(groups, 1):
        file = f"model-{k:05d}-of-{len(groups):05d}.safetensors"
        measuring.say(f"source: {folder / file}")
        total += _write(folder / file, group, blocks(group, rng))
        weight_map |= dict.fromkeys(group, file)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def random_bits(shapes: Shapes, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Random finite bf16, below 2, as uint16."""
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    for start in range(0, count, PIECE // 2):  # bit 14 is clear
        yield rng.integers(0, 1 << 16, min(PIECE // 2, count - start), dtype=np.uint16) & 0xBFFF


def sensible(shapes: Shapes, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """bf16, as uint16, with which rounding is amplified no more than in a trained model. The same numbers recur.

    Scores before the softmax are of order one, and a layer changes the stream by less than its size.
    """
    normal = rng.standard_normal(PIECE // 4, np.float32)
    for name, shape in shapes.items():
        vector, count = len(shape) == 1, int(np.prod(shape))
        scale = 0.1 if vector or "_coefs" in name else shape[-1] ** -0.5
        size = (
            shape[0] ** -0.25 if name.endswith(("q_norm.weight", "k_norm.weight")) else 0.3 if ".post_" in name else 1
        )
        for start in range(0, count, len(normal) // 2):
            length = min(count - start, len(normal) // 2)
            first = int(rng.integers(len(normal) - length))
            values = normal[first : first + length] * np.float32(scale) + np.float32("norm" in name)
            values *= np.float32(size)
            yield (values.view(np.uint32) >> 16).astype(np.uint16)


def _write(path: Path, shapes: Shapes, blocks: Iterator[np.ndarray]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for block in blocks:
            f.write(block.data)
    return end


def _write_table(path: Path, model: Model) -> None:
    """The released table with its widths divided, and the row for mergekit."""
    text = (REPOSITORY / "slices" / "gemma3n.csv").read_text()
    lines = list(csv.DictReader(re.sub(r"\[(\d+)\]", lambda m: f"[{int(m[1]) // model.divisor}]", text).splitlines()))
    skipped, widths = ROWS[WHOLE_ROW]
    whole = {"name": WHOLE_ROW, "FFN Hidden Dims": [w // model.divisor for w in widths], "Layers Skipped": [*skipped]}
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(lines[0]))
        writer.writeheader()
        writer.writerows([*lines, whole])


# ------------------------------------------------------------------------------------------ the outputs
def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder as a view of its file."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(path, np.uint8, "r")
        length = int(raw[:8].view("<u8")[0])
        header = json.loads(bytes(raw[8 : 8 + length]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            assert entry["dtype"] == "BF16", name
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = raw[begin:end].view(np.uint16).reshape(entry["shape"])
    return found


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    step = max(1, PIECE // max(1, a.nbytes // max(1, len(a))))
    return all(np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, len(a), step))


def check_ours(output: Path, source: Path, model: Model, row: str) -> None:
    """Compares every tensor with its view of the source."""
    mine, theirs = tensors(output), tensors(source)
    kept, widths = model.row(row)
    expected = set()
    for name in theirs:
        layer, _ = _layer(name)
        if layer is None:
            expected.add(name)
        elif layer in kept:
            expected.add(name.replace(f"layers.{layer}.", f"layers.{kept.index(layer)}."))
    _must(mine.keys() == expected, f"{row}: names differ")
    for name, tensor in mine.items():
        _must(all(equal(a, b) for a, b in _parts(name, tensor, theirs, kept, widths, model)), f"{row}: {name} differs")


def check_digests(output: Path) -> None:
    """Compares every digest in the manifest with its file."""
    for file, entry in json.loads((output / "matexport.json").read_text())["files"].items():
        with (output / file).open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        _must(digest == entry["sha256"], f"the digest of {output / file} in the manifest is that of other bytes")


def _parts(
    name: str, tensor: np.ndarray, theirs: dict[str, np.ndarray], kept: list[int], widths: list[int], model: Model
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of views that must be equal: together all of an output's tensor."""
    new, rest = _layer(name)
    p = model.per_layer
    if new is not None:
        full = theirs[name.replace(f"layers.{new}.", f"layers.{kept[new]}.")]
        if rest in (GATE, UP):
            full = full[: widths[new]]
        elif rest == DOWN:
            full = full[:, : widths[new]]
        yield tensor, full
    elif name.endswith(TABLE):
        _must(tensor.shape[1] == len(kept) * p, f"{name} has shape {tensor.shape}")
        for i, layer in enumerate(kept):
            yield tensor[:, i * p : (i + 1) * p], theirs[name][:, layer * p : (layer + 1) * p]
    elif name.endswith(PROJECTION):
        _must(tensor.shape[0] == len(kept) * p, f"{name} has shape {tensor.shape}")
        for i, layer in enumerate(kept):
            yield tensor[i * p : (i + 1) * p], theirs[name][layer * p : (layer + 1) * p]
    else:
        yield tensor, theirs[name]


def check_rival(way: str, output: Path, ours: Path, source: Path, model: Model, row: str) -> None:
    """Compares a rival's output with ours, tensor by tensor."""
    mine = {_text_name(name): tensor for name, tensor in tensors(ours).items()}
    rival = {_text_name(name): tensor for name, tensor in tensors(output).items()}
    kept, _ = model.row(row)
    first = sum(i < 20 for i in kept)
    dead = {f"model.layers.{i}.{rest}" for i in range(first, len(kept)) for rest in DEAD}
    allowed = dead if way == "transformers" else set()  # its model has no parameters for them
    _must(mine.keys() - rival.keys() == allowed and rival.keys() <= mine.keys(), f"{way}, {row}: names differ")
    if way == "mergekit":  # leaves the per-layer tables as they are
        whole = {_text_name(name): tensor for name, tensor in tensors(source).items()}
        mine |= {name: whole[name] for name in mine if name.endswith((TABLE, PROJECTION))}
    for name, tensor in rival.items():
        _must(equal(tensor, mine[name]), f"{way}, {row}: {name} differs")


def same_files(a: Path, b: Path) -> None:
    """Weights and config of two outputs are the same bytes."""
    for name in ("model.safetensors", "config.json"):
        with (a / name).open("rb") as f, (b / name).open("rb") as g:
            _must(hashlib.file_digest(f, "sha256").digest() == hashlib.file_digest(g, "sha256").digest(), name)


def _layer(name: str) -> tuple[int | None, str]:
    match = re.search(r"\.layers\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def _text_name(name: str) -> str:
    return name.replace("model.language_model.", "model.")


def _must(right: bool, what: str) -> None:
    if not right:
        sys.exit(f"outputs are wrong: {what}")


# ------------------------------------------------------------------------------------- bytes of a row
def needed(source: Path, model: Model, row: str) -> tuple[int, int]:
    """Bytes of the source that a row consists of, and bytes of the whole pages that hold them."""
    kept, widths = model.row(row)
    wanted = pages = 0
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        marks = np.zeros(path.stat().st_size // measuring.PAGE + 2, np.int64)
        for name, entry in header.items():
            begins, count = _runs(name, entry["shape"], kept, widths, model)
            if not count:
                continue
            first = 8 + length + entry["data_offsets"][0] + 2 * begins
            np.add.at(marks, first // measuring.PAGE, 1)
            np.add.at(marks, (first + 2 * count - 1) // measuring.PAGE + 1, -1)
            wanted += 2 * count * len(begins)
        pages += int((marks.cumsum() > 0).sum())
    return wanted, pages * measuring.PAGE


def _runs(name: str, shape: list[int], kept: list[int], widths: list[int], model: Model) -> tuple[np.ndarray, int]:
    """First elements and length of the runs of a tensor that a row takes."""
    layer, rest = _layer(name)
    p = model.per_layer
    if layer is not None and layer not in kept:
        return np.zeros(0, np.int64), 0
    if layer is not None and rest in (GATE, UP):
        return np.zeros(1, np.int64), widths[kept.index(layer)] * shape[1]
    if layer is not None and rest == DOWN:
        return np.arange(shape[0]) * shape[1], widths[kept.index(layer)]
    if name.endswith(TABLE):
        return (np.arange(shape[0])[:, None] * shape[1] + np.array(kept) * p).reshape(-1), p
    if name.endswith(PROJECTION):
        return np.array(kept) * p * shape[1], p * shape[1]
    return np.zeros(1, np.int64), int(np.prod(shape))
