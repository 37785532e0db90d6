"""The ways to cut a Gemma 3n checkpoint, each run in a process of its own.

Each function imports what it needs and returns the work that is timed: from a path to a synced output.
A job says what to cut: `source`, `output`, `ready` (our own output, which `copy` copies), the `row`'s name for
ours, and the layers `kept` with their FFN `widths` for those who have no slice tables.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring

Work = Callable[[], None]
Job = dict[str, Any]

GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
TABLE, PROJECTION = "embed_tokens_per_layer.weight", "per_layer_model_projection.weight"


def prepared(way: str, job: Job) -> Work:
    """The work of one way, for `measuring.report`."""
    return {
        "ours": lambda: ours(job, digest=False),
        "ours+sha256": lambda: ours(job, digest=True),
        "copy": lambda: lambda: measuring.copy_folder(Path(job["ready"]), Path(job["output"])),
        "transformers": lambda: transformers_model(job),
        "get_slice": lambda: get_slice(job),
        "mergekit": lambda: mergekit(job),
    }[way]()


def ours(job: Job, *, digest: bool) -> Work:
    """Headers are read, the plan made and the folder written in the clock: all that `matexport slice` does."""
    from matexport import api

    for lazy in ("ml_dtypes", "matexport.families.gemma3n"):
        importlib.import_module(lazy)
    return lambda: api.plan(job["source"], job["row"]).write(job["output"], digest=digest)


def transformers_model(job: Job) -> Work:
    """Loads the model, narrows its FFNs, drops layers and what the per-layer tables hold of them, saves it."""
    import torch
    from transformers import Gemma3nForCausalLM

    kept, widths, output = job["kept"], job["widths"], Path(job["output"])

    @torch.no_grad()
    def work() -> None:
        model: Any = Gemma3nForCausalLM.from_pretrained(job["source"], dtype=torch.bfloat16)
        inner, config = model.model, model.config
        p, n, sharing = config.hidden_size_per_layer_input, config.num_hidden_layers, config.num_kv_shared_layers
        inner.layers = torch.nn.ModuleList([inner.layers[i] for i in kept])
        for layer, width in zip(inner.layers, widths, strict=True):
            for linear, axis in ((layer.mlp.gate_proj, 0), (layer.mlp.up_proj, 0), (layer.mlp.down_proj, 1)):
                if linear.weight.shape[axis] != width:
                    linear.weight = torch.nn.Parameter(linear.weight.narrow(axis, 0, width).contiguous())
        if len(kept) < n:
            table, projection = inner.embed_tokens_per_layer, inner.per_layer_model_projection
            rows = table.weight.shape[0]
            table.weight = torch.nn.Parameter(table.weight.view(rows, n, p)[:, kept].reshape(rows, -1))
            cut = projection.weight.view(n, p, -1)[kept]
            projection.weight = torch.nn.Parameter(cut.reshape(len(kept) * p, -1))
        config.num_hidden_layers = len(kept)
        config.num_kv_shared_layers = sum(i >= n - sharing for i in kept)
        config.layer_types = [config.layer_types[i] for i in kept]
        config.activation_sparsity_pattern = [config.activation_sparsity_pattern[i] for i in kept]
        config.intermediate_size = widths
        model.save_pretrained(output)
        measuring.sync_folder(output)

    return work


def get_slice(job: Job) -> Work:
    """A script with the safetensors library: only what is kept is read, all of it is held, one file is written."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    source, output, kept = Path(job["source"]), Path(job["output"]), job["kept"]
    widths, index = dict(zip(kept, job["widths"], strict=True)), {layer: i for i, layer in enumerate(kept)}
    p, layers = job["per_layer"], job["layers"]
    starts = [i for i in kept if i - 1 not in kept]
    blocks = [(a * p, next(b for b in range(a, layers + 1) if b not in kept) * p) for a in starts]

    def work() -> None:
        found = {}
        for path in sorted(source.glob("*.safetensors")):
            with safe_open(path, "pt") as f:
                for name in f.keys():  # noqa: SIM118 (it is no mapping)
                    match = re.search(r"layers\.(\d+)\.(.+)", name)
                    if match and int(match[1]) not in index:
                        continue
                    if match:
                        layer, part = int(match[1]), match[2]
                        new = name.replace(f"layers.{layer}.", f"layers.{index[layer]}.")
                        if part in (GATE, UP):
                            found[new] = f.get_slice(name)[: widths[layer]]
                        elif part == DOWN:
                            found[new] = f.get_slice(name)[:, : widths[layer]].contiguous()
                        else:
                            found[new] = f.get_tensor(name)
                    elif name.endswith(TABLE) and len(kept) < layers:
                        found[name] = torch.cat([f.get_slice(name)[:, a:b] for a, b in blocks], 1)
                    elif name.endswith(PROJECTION) and len(kept) < layers:
                        found[name] = torch.cat([f.get_slice(name)[a:b] for a, b in blocks])
                    else:
                        found[name] = f.get_tensor(name)
        output.mkdir()
        save_file(found, output / "model.safetensors", metadata={"format": "pt"})
        measuring.sync_folder(output)

    return work


def mergekit(job: Job) -> Work:
    """Passthrough of whole layers: each group of modules with its own slices."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    kept, model, output = job["kept"], {"model": job["source"]}, Path(job["output"])
    starts = [i for i in kept if i - 1 not in kept]
    ranges = [[a, next(b for b in range(a, job["layers"] + 1) if b not in kept)] for a in starts]
    config = {
        "merge_method": "passthrough",
        "dtype": "bfloat16",
        "modules": {
            "model.layers": {"slices": [{"sources": [{**model, "layer_range": r}]} for r in ranges]},
            **{f"model.altup_{part}projections": {"models": [model]} for part in ("", "unembed_")},
            "default": {"models": [model]},
        },
    }
    options = {
        "lazy_unpickle": True, "copy_tokenizer": False, "write_model_card": False, "quiet": True,
        "out_shard_size": 5_000_000_000,
    }  # fmt: skip
    text = yaml.safe_dump(config)

    def work() -> None:
        merge = MergeConfiguration.model_validate(yaml.safe_load(text))
        run_merge(merge, str(output), options=MergeOptions(**options))
        measuring.sync_folder(output)

    return work
