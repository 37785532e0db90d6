"""Gemma 3n in ONNX at scale, and against other ways to get it there.

The checkpoints are synthetic: random bf16 of sensible sizes in the released names and shapes.

- Writing the row E2.49B of E4B: the graph alone (put beside the weights that it uses); the row in bf16, with no
  conversion, against a copy of the same bytes that is synced too; and in int4, after which this machine loads it and
  generates a few tokens. Peak memory is VmHWM of the process.
- Quantising a matrix against ONNX Runtime's own quantiser, and a whole model against what users call.
- At an eighth of the width: `torch.onnx.export(dynamo=True)` of transformers' class, for the same row; and mobius-onnx,
  for models of one FFN width without sparse or sharing layers and soft cap, which it has not. Its graphs for the
  provider `cpu` are right only if no layer has a window.

Everything is verified first. Speeds are taken in turns, each model in a process of its own that each round opens anew.

    pip install --target RIVALS --no-deps mobius-onnx onnxscript onnx-shape-inference
    python benchmarks/export_gemma3n.py --rivals RIVALS --keep FOLDER      # 36 GB of disk, a quarter of an hour
    python benchmarks/export_gemma3n.py --rivals RIVALS --quick            # the same in small, three minutes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_gemma3n_ways as ways
import measuring
import numpy as np
from export import quantising
from slice_gemma3n import FFN_ROW, SHARD, Model, sensible, write_source

from matexport.dims import Dims
from matexport.slice_table import Row

LIMITS = {"graph_seconds": 2.0, "peak_mib": 600, "speed_of_copy": 0.5, "quantise": 2.0}
PROMPT, STEPS = 16, 4
TOLERANCE = 2e-3  # of the largest logit, in fp32 after 35 random layers; a wrong mask or base is above 0.1
Times = dict[str, Any]


# ------------------------------------------------------------------------------------ child processes
def child(rivals: str, name: str, *arguments: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": rivals, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--child", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(name: str, *arguments: str) -> None:
    """In the child: one way, or a part of our own."""
    if name == "export":
        source, output, options = arguments[0], arguments[1], json.loads(arguments[2])
        measuring.report(lambda: export(source, Path(output), **options))
    elif name == "graph":
        from matexport import api

        measuring.report(lambda: api.export_in_place(arguments[0], force=True))
    elif name == "copy":
        measuring.report(lambda: measuring.copy_folder(Path(arguments[0]), Path(arguments[1])))
    elif name == "generate":
        generate(Path(arguments[0]))
    else:
        measuring.report(getattr(ways, name)(*arguments))


def export(source: str, output: Path, *, row: str | None = None, capped: bool = True, **options: Any) -> None:
    from matexport import api

    planned = api.plan(source, row)
    if not capped:
        planned = replace(
            planned, plan=replace(planned.plan, config={**planned.plan.config, "final_logit_softcapping": None})
        )
    api.export_onnx(planned, output, **options)
    measuring.sync_folder(output)


def generate(folder: Path) -> None:
    """Loads a model and prints its tokens, how far single steps are from all at once, and peak memory."""
    import time

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 262_144, (1, PROMPT + STEPS))
    started = time.perf_counter()
    steps = ways.onnx_logits(folder / "model.onnx", ids, PROMPT)
    seconds = time.perf_counter() - started
    whole = ways.onnx_logits(folder / "model.onnx", ids, ids.shape[1])
    if not np.isfinite(whole).all():
        sys.exit("logits are not finite")
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    found = {"tokens": steps[0, PROMPT - 1 :].argmax(-1).tolist(), "error": error(steps, whole)}
    print(json.dumps({**found, "load_and_run_seconds": round(seconds, 1), "peak_mib": int(peak.split()[1]) // 1024}))


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(f"{np.abs(got - want).max() / np.abs(want).max():.2g}")


# ------------------------------------------------------------------------------------------- writing
def writing(folder: Path, divisor: int, runs: int) -> Times:
    model = Model(divisor)
    source, ready, out = folder / f"E4B-{divisor}-sensible", folder / "ready", folder / "out"
    write_source(source, model.config(), SHARD // divisor, sensible)
    (source / "slices.csv").write_text(f'name,FFN Hidden Dims\n{FFN_ROW},"{model.row(FFN_ROW)[1]}"\n')
    plain, fewer = ({"row": FFN_ROW, **more} for more in ({"dtype": "bfloat16"}, {"quantize": "int4-block"}))
    for path in (ready, out):
        shutil.rmtree(path, ignore_errors=True)
    child("", "export", str(source), str(ready), json.dumps(plain))
    check_weights(source, ready, model)
    graph = [child("", "graph", str(source)) for _ in range(runs)]
    for name in ("model.onnx", "model.onnx.json"):
        (source / name).unlink()
    files, ratios, peaks = measuring.files_of(source, ready), [], []
    for k in range(runs):
        measuring.say(f"writing: round {k + 1} of {runs}")
        found = {}
        for name, arguments in (("copy", [ready, out]), ("export", [source, out, json.dumps(plain)])):
            command = [sys.executable, __file__, "--child", name, *map(str, arguments)]
            found[name] = measuring.run(command, out, cold=files)
        ratios.append(found["copy"]["seconds"] / found["export"]["seconds"])
        peaks.append(found["export"]["peak_mib"])
    nbytes = {"bfloat16": (ready / "model.onnx_data").stat().st_size}
    shutil.rmtree(ready)
    measuring.say("writing: int4")
    command = [sys.executable, __file__, "--child", "export", str(source), str(out), json.dumps(fewer)]
    int4 = measuring.run(command, out, cold=measuring.files_of(source))
    check_weights(source, out, model)
    nbytes["int4-block"] = (out / "model.onnx_data").stat().st_size
    ran = child("", "generate", str(out))
    shutil.rmtree(out)
    return {
        "model": f"E4B, width over {divisor}", "row": FFN_ROW, "bytes": nbytes,
        "graph_time_over_limit": measuring.spread([g["seconds"] / LIMITS["graph_seconds"] for g in graph]),
        "graph_peak_mib": round(max(g["peak_mib"] for g in graph)),
        "speed_of_copy": measuring.spread(ratios), "peak_mib": round(max(peaks)),
        "int4_seconds": round(int4["seconds"], 1), "int4_peak_mib": round(int4["peak_mib"]), "int4_runs": ran,
    }  # fmt: skip


def check_weights(source: Path, output: Path, model: Model) -> None:
    """Some rows of every weight against NumPy views of the source; those in fewer bits may be a step off."""
    import onnx

    from matexport.checkpoint import open_checkpoint

    held, (_, widths) = open_checkpoint(source).tensors, model.row(FFN_ROW)
    initializers = onnx.load(output / "model.onnx", load_external_data=False).graph.initializer
    external = [i for i in initializers if i.external_data]
    places = {i.name: {e.key: e.value for e in i.external_data} | {"dims": i.dims} for i in external}
    halves = {i.name for i in external if i.data_type == onnx.TensorProto.BFLOAT16}

    def stored(name: str, dtype: Any) -> np.ndarray:
        place = places[name]
        return np.memmap(output / place["location"], dtype, "r", int(place["offset"]), tuple(place["dims"]))

    checked = {name.removesuffix(".codes").removesuffix(".scales") for name in places}
    if checked < {name for name in held if ".layers." in name and ".k_" not in name and ".v_" not in name}:
        sys.exit("weights are missing")
    for name in checked:
        tensor = held[name]
        want = np.memmap(tensor.file, np.uint16, "r", tensor.start, tensor.shape)
        if ".mlp." in name:
            width = widths[int(name.split(".layers.")[1].split(".")[0])]
            want = want[:, :width] if "down_proj" in name else want[:width]
        some = np.unique(np.linspace(0, len(want) - 1, 5).astype(int))
        values = (want[some].astype(np.uint32) << 16).view(np.float32)
        if name in places:
            kind, expected = (np.uint16, want[some]) if name in halves else (np.float32, values)
            right = np.array_equal(stored(name, kind)[some], expected)
        else:
            codes, scales = stored(f"{name}.codes", np.uint8)[some], stored(f"{name}.scales", np.float32)[some]
            numbers = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1).astype(np.float32) - 8
            off = np.abs((numbers * scales[..., None]).reshape(len(some), -1)[:, : values.shape[1]] - values)
            steps = np.repeat(np.abs(scales), 32, 1)[:, : values.shape[1]]
            right = bool((off <= 1.001 * steps).all() and (off <= 0.501 * steps).mean() > 0.95)
        if not right:
            sys.exit(f"{name} is wrong")


# -------------------------------------------------------------------------------------------- rivals
def compared(folder: Path, divisor: int, layers: int, runs: int, rivals: str) -> Times:
    config = Model(divisor).config(text_only=True)
    for key in ("layer_types", "intermediate_size", "activation_sparsity_pattern"):
        config[key] = config[key][:layers]
    config |= {
        "num_hidden_layers": layers, "num_kv_shared_layers": 15 * layers // 35, "final_logit_softcapping": 30.0,
        "vocab_size": config["vocab_size_per_layer_input"],  # mobius looks every id up in the per-layer table
    }  # fmt: skip
    source = folder / "narrow"
    write_source(source, config, SHARD, sensible)
    return {
        "model": f"E4B, width over {divisor}, {layers} layers, float32",
        "trace": against_trace(folder, source, config, runs, rivals),
        "mobius": {
            kind: against_mobius(folder, source, config, kind, provider, runs, rivals)
            for kind, provider in (("sliding and full layers", "default"), ("full layers", "cpu"))
        },
    }


def against_trace(folder: Path, source: Path, config: dict[str, Any], runs: int, rivals: str) -> Times:
    """The row E2.49B, whose middle layers are wide."""
    from matexport import api

    layers, width = config["num_hidden_layers"], config["intermediate_size"][0]
    wide = range(20 * layers // 35, 25 * layers // 35)
    row = Row("E2.49B", ffn=Dims(head=tuple(width if i in wide else width // 2 for i in range(layers))))
    api.plan(source, row).write(folder / "slice")
    made = {}
    for name, form in (("ours", "contrib"), ("stock", "stock")):
        made[name] = child("", "export", str(folder / "slice"), str(folder / name), json.dumps({"form": form}))
    measuring.say("torch.onnx.export")
    made["trace"] = child(rivals, "trace", str(folder / "slice"), str(folder / "trace"))
    found = timed(folder, folder / "slice", list(made), runs, capped=True)
    measuring.say("quantising a model")
    int4 = json.dumps({"quantize": "int4-block"})
    quick = child("", "export", str(folder / "slice"), str(folder / "int4"), int4)
    slow = child(rivals, "quantizer", str(folder / "trace" / "model.onnx"), str(folder / "their-int4"))
    sizes = {name: sum(path.stat().st_size for path in (folder / name).iterdir()) for name in ("int4", "their-int4")}
    return found | {
        "export_time_of_trace_over_ours": round(made["trace"]["seconds"] / made["ours"]["seconds"], 1),
        "export_peak_mib": {name: round(measured["peak_mib"]) for name, measured in made.items()},
        "int4_of_a_model_time_over_ours": round(slow["seconds"] / quick["seconds"], 1),
        "int4_peak_mib": {"ours": round(quick["peak_mib"]), "onnxruntime's": round(slow["peak_mib"])},
        "int4_bytes": {"ours": sizes["int4"], "onnxruntime's": sizes["their-int4"]},
        "int4_loss": loss(folder),
    }  # fmt: skip


def loss(folder: Path) -> Times:
    """KL and top-1 of the int4 model against float32, on random tokens and random weights: the worst case."""
    from matexport.parity.comparison import compare

    ids = np.random.default_rng(2).integers(0, 262_144, (1, 64))
    got, want = (ways.onnx_logits(folder / name / "model.onnx", ids, 64) for name in ("int4", "ours"))
    found = compare("logits", "loss", got, want)
    return {"kl": found.kl, "top1": found.top1}


def against_mobius(
    folder: Path, source: Path, config: dict[str, Any], kind: str, provider: str, runs: int, rivals: str
) -> Times:
    """The whole model, with no sparse or sharing layers, and ours without soft cap, as mobius has none."""
    layers, uniform = config["num_hidden_layers"], folder / f"uniform-{provider}"
    uniform.mkdir()
    types = ["full_attention"] * layers if kind == "full layers" else config["layer_types"]
    plain = {"activation_sparsity_pattern": [0.0] * layers, "num_kv_shared_layers": 0, "layer_types": types}
    (uniform / "config.json").write_text(json.dumps({**config, **plain}))
    for path in source.glob("*.safetensors*"):
        (uniform / path.name).symlink_to(path.resolve())
    made = {}
    for name, form in (("ours", "contrib"), ("stock", "stock")):
        shutil.rmtree(folder / name)
        options = json.dumps({"form": form, "capped": False})
        made[name] = child("", "export", str(uniform), str(folder / name), options)
    measuring.say(f"mobius-onnx, {provider}")
    shutil.rmtree(folder / "mobius", ignore_errors=True)
    made["mobius"] = child(rivals, "mobius", str(uniform), str(folder / "mobius"), provider)
    found = timed(folder, uniform, list(made), runs, capped=False)
    return {
        "provider": provider, **found,
        "export_time_of_mobius_over_ours": round(made["mobius"]["seconds"] / made["ours"]["seconds"], 1),
        "export_peak_mib": {name: round(measured["peak_mib"]) for name, measured in made.items()},
    }  # fmt: skip


def timed(folder: Path, source: Path, names: list[str], runs: int, *, capped: bool) -> Times:
    """Verifies models against transformers, prompt and steps; then speeds of the first over those of the others."""
    import onnx

    from matexport.runtimes.bench import measure

    ids = np.random.default_rng(1).integers(0, 262_144, (2, PROMPT + STEPS))
    want, errors, nodes = ways.torch_logits(str(source), ids, capped=capped), {}, {}
    for name in names:
        measuring.say(f"verifying {name}")
        model = folder / name / "model.onnx"
        errors[name] = error(ways.onnx_logits(model, ids, PROMPT), want)
        if errors[name] > TOLERANCE:
            sys.exit(f"{name} is {errors[name]:.1g} of the largest logit off")
        graph = onnx.load(model, load_external_data=False).graph
        counts = Counter(node.domain for node in graph.node if node.op_type != "Constant")
        nodes[name] = {"nodes": sum(counts.values()), "contrib": counts["com.microsoft"]}
    ratios: dict[str, dict[str, list[float]]] = {other: {} for other in names[1:]}
    for k in range(runs):  # opened again each time: one process may be luckier than another in where its memory lies
        measuring.say(f"speeds: round {k + 1} of {runs}")
        turned = [*names[k % len(names) :], *names[: k % len(names)]]
        found = measure([folder / n / "model.onnx" for n in turned], lengths=[128], batches=[], rounds=2, threads=2)
        rates = {name: measured["rates"] for name, measured in zip(turned, found, strict=True)}
        for other, kinds in ratios.items():
            for what, theirs in rates[other].items():
                own = rates[names[0]][what]
                kinds.setdefault(what, []).extend(a / b for a, b in zip(own, theirs, strict=True))
    speeds = {
        other: {what: measuring.spread(values) for what, values in kinds.items()} for other, kinds in ratios.items()
    }
    return {"error_of_transformers": errors, "graph": nodes, "speed_of_ours_over": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there, and leave the sources for other runs")
    parser.add_argument("--rivals", metavar="FOLDER", default="", help="where mobius-onnx and onnxscript are")
    parser.add_argument("--quick", action="store_true", help="an eighth of the width, few layers: writes no results")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run(*args.child)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    report = {"runs": args.runs, "machine": measuring.machine(args.keep or Path.cwd())}
    report["versions"] = measuring.versions("matexport", "numpy", "onnx", "onnxruntime", "torch", "transformers")
    report["quantising"] = quantising(args.runs, 16384, 2048)
    sizes = (16, 10) if args.quick else (8, 35)
    with tempfile.TemporaryDirectory(dir=args.keep or ".") as temporary:
        report["rivals"] = compared(Path(temporary), *sizes, args.runs, args.rivals)
    measuring.say(json.dumps(report, indent=1))  # what there is, if the disk is too small for the rest
    with tempfile.TemporaryDirectory(dir=args.keep or ".") as temporary:
        report["writing"] = writing(args.keep or Path(temporary), 8 if args.quick else 1, 2 if args.quick else 3)
    print(json.dumps(report, indent=1))
    if not args.quick:
        measuring.say(f"written: {measuring.write_results('export-gemma3n.json', report)}")


if __name__ == "__main__":
    main()
