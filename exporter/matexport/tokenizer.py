"""Tokenizer files for checkpoints that name none: which ones, and the special ids that they define."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from matexport.checkpoint import read_json
from matexport.errors import InputError

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
MAX_FILE = 256 << 20


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer, by name. Raises InputError if there are none."""
    paths = (
        sorted(p for p in folder.iterdir() if any(fnmatch(p.name, f) for f in TOKENIZER_FILES))
        if folder.is_dir()
        else []
    )
    if not paths:
        raise InputError("holds no tokenizer files", where=str(folder), fix="give a folder with tokenizer.json")
    return {path.name: path.read_bytes() for path in paths if path.is_file() and path.stat().st_size <= MAX_FILE}


def special_ids(folder: Path) -> dict[str, int]:
    """`pad_token_id`, `bos_token_id` and `eos_token_id`, as far as the tokenizer's JSON files define them."""
    ids: dict[str, int] = {}
    if (folder / "tokenizer.json").is_file():
        for token in read_json(folder / "tokenizer.json", MAX_FILE).get("added_tokens") or []:
            ids[token["content"]] = int(token["id"])
    if not (folder / "tokenizer_config.json").is_file():
        return {}
    config = read_json(folder / "tokenizer_config.json", MAX_FILE)
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        ids[token["content"]] = int(number)
    names = {f"{kind}_token_id": _content(config.get(f"{kind}_token")) for kind in ("pad", "bos", "eos")}
    return {key: ids[name] for key, name in names.items() if name in ids}


def _content(token: Any) -> Any:
    """A special token is written as its text or as an object with its text."""
    return token.get("content") if isinstance(token, dict) else token
