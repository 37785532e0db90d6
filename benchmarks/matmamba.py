"""MatMamba's layer and whole models on ONNX Runtime's CPU: our form against every other way to write the same model.

Outputs are verified first: the layer against its equations in float64, vision against PyTorch. Then all ways run
interleaved, as in scan.py: in each round each way once, and ratios are those of one round, a rival's time over ours.

    layer    one mixer of LM-130M (projections, convolution, scan, gate and norm; 768 wide), states in and out, without
             a mask: prompts at full width, single steps at every nested width. Also the share of its time that scan
             and convolution take, by ONNX Runtime's profile.
    vision   Vision-35M (20 layers, 197 tokens), batches of 1 and 4
    model    LM-130M as `matexport bench` measures it: forms, and quantised

Ways: `ours` is form custom with our kernels; `contrib form` and `stock form` are the same export in the other forms;
`LinearAttention` is form contrib with that operator as it is, not padded to the head dims that it is fast for.

    python benchmarks/matmamba.py                       # seven minutes, 3 GB of disk
    python benchmarks/matmamba.py --only layer --mobius FOLDER     # mobius-onnx, from pip install --target FOLDER
    python benchmarks/matmamba.py --only                # what was measured before

Results: benchmarks/results/matmamba-CPU.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import matmamba_ways
import measuring
import scan
import scan_ways
from matmamba_ways import CONTRIB, PLAIN, STOCK, Layer
from measuring import say, spread
from scan_ways import OURS

import matexport as mx
from matexport.dims import Dims
from matexport.runtimes import bench
from matexport.slice_table import Row

WIDTHS, LENGTHS = {"full": 768, "half": 384, "quarter": 192, "eighth": 96}, (196, 512)
BATCHES = (1, 4)
METHODS = ("int8", "int8-block", "int4-block")


def measure_layer(folder: Path, threads: int, rounds: int, mobius: str | None) -> dict[str, Any]:
    source, found = matmamba_ways.layer_source(folder), {}
    for width, channels in WIDTHS.items():
        layer = Layer(mx.plan(source, Row(width, mamba=Dims(fill=channels))))
        for length in (1, *LENGTHS) if width == "full" else (1, 512):
            inputs = layer.inputs(length)
            ways = layer.ways(inputs, threads, mobius)
            key = f"layer {width} T={length} threads={threads}"
            found[key] = scan.measure(ways, layer.reference(inputs), rounds, key)
            if length > 1:
                found[key]["share"] = share(layer, inputs, threads)
    return found


def share(layer: Layer, inputs: dict[str, Any], threads: int) -> dict[str, float]:
    """Of the time in all operators of our form, what each kind of operator takes."""
    path = matmamba_ways.profile(layer.model("custom"), inputs, threads)
    took: Counter[str] = Counter()
    for event in json.loads(path.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            took[event["args"]["op_name"]] += event["dur"]
    path.unlink()
    whole = sum(took.values())
    return {name: float(f"{time / whole:.3g}") for name, time in took.most_common() if time > whole / 100}


def measure_vision(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    source, found = matmamba_ways.vision_source(folder / "source"), {}
    planned = mx.plan(source)
    oracle = planned.family.load_oracle(planned.checkpoint, planned.plan.layers, None)
    files = {}
    for way, form in ((OURS, "custom"), (CONTRIB, "contrib"), (STOCK, "stock")):
        mx.export_onnx(planned, folder / form, form=form)
        files[way] = folder / form / "model.onnx"
    with matmamba_ways.plain_attention():
        mx.export_onnx(planned, folder / "plain", form="contrib")
        files[PLAIN] = folder / "plain" / "model.onnx"
    for batch in BATCHES:
        inputs = planned.family.sample_inputs(planned.checkpoint.config, batch, 0)
        ways = {way: scan_ways.ort_way(str(file), inputs, threads, ours=way == OURS) for way, file in files.items()}
        ways["PyTorch"] = scan_ways.torch_way(lambda **images: matmamba_ways.tensors(oracle(images)), inputs, threads)
        key = f"vision batch={batch} threads={threads}"
        found[key] = scan.measure(ways, (oracle(inputs)["logits"],), rounds, key, slow=1)
        seconds = found[key]["seconds"]
        found[key]["images/s over ours"] = {way: float(f"{seconds[OURS] / seconds[way]:.3g}") for way in ways}
    return found


def measure_model(folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Rates over those of our form in fp32; bytes of the weights over its; the largest difference of the logits."""
    source = matmamba_ways.language_source(folder / "source")
    exports = {OURS: {}, CONTRIB: {"form": "contrib"}, **{method: {"quantize": method} for method in METHODS}}
    for name, options in exports.items():
        mx.export_onnx(source, folder / name, **options)
    models = [folder / name / "model.onnx" for name in exports]
    losses = matmamba_ways.losses(models)
    if losses[1]["max_rel"] > 1e-4:
        sys.exit(f"{CONTRIB}: logits are off by {losses[1]['max_rel']:.1e}")
    measured = bench.measure(models, lengths=(128, 512), batches=(), rounds=rounds, threads=threads, progress=say)
    whole = (models[0].parent / "model.onnx_data").stat().st_size
    found = {}
    for name, each, loss in zip(exports, measured, losses, strict=True):
        rates = {
            what: spread([a / b for a, b in zip(values, measured[0]["rates"][what], strict=True)])
            for what, values in each["rates"].items()
        }
        size = (folder / name / "model.onnx_data").stat().st_size
        found[name] = {"bytes": float(f"{size / whole:.3g}"), "loss": loss, "rates over ours in fp32": rates}
    return {f"model threads={threads}": found}


# ------------------------------------------------------------------------------------------- targets
def targets(results: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """What is asked for: (where, of what, at least, measured), for all that was measured."""
    found = []
    for threads in (1, 2):
        key = f"layer full T=512 threads={threads}"
        if key in results:
            found.append((key, PLAIN, 2.5, results[key]["ratio"][PLAIN]["median"]))
            ours = sum(results[key]["share"].get(op, 0) for op in ("Mamba2Scan", "CausalConv1d"))
            found.append((key, "share of all but scan and convolution", 0.8, round(1 - ours, 3)))
        for width in WIDTHS:
            key = f"layer {width} T=1 threads={threads}"
            if key in results:
                best = results[key]["best rival"]
                found.append((key, f"step, {best}", 1.0, results[key]["ratio"][best]["median"]))
    return found


def show(results: dict[str, Any]) -> None:
    """Tables in Markdown, and every target with what was measured, the worst first."""
    rows = {key: found for key, found in results.items() if "ratio" in found}
    ways = list(dict.fromkeys(way for found in rows.values() for way in found["ratio"]))
    if rows:
        print("| |", " | ".join([*ways, "scan and convolution"]), "|")
        print("|---" * (len(ways) + 2), "|", sep="")
    for key, found in rows.items():
        cells = [_range(found["ratio"][way]) if way in found["ratio"] else "" for way in ways]
        share = found.get("share", {})
        part = share.get("Mamba2Scan", 0) + share.get("CausalConv1d", 0)
        print(f"| {key} |", " | ".join([*cells, f"{part:.0%}" if share else ""]), "|")
    for key, found in results.items():
        if "ratio" not in found:
            print(f"\n{key}")
            for name, each in found.items():
                rates = "; ".join(f"{what} {_range(r)}" for what, r in each["rates over ours in fp32"].items())
                print(f"  {name}: bytes {each['bytes']}, {rates}, loss {each['loss']}")
    print()
    for key, what, limit, value in sorted(targets(results), key=lambda row: row[3] / row[2]):
        print(f"{'met   ' if value >= limit else 'MISSED'} {key}: {what} {value}, at least {limit}")


def _range(values: dict[str, float]) -> str:
    return f"{values['median']} ({values['min']} to {values['max']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("layer", "vision", "model")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--threads", nargs="*", type=int, default=(1, 2), help="1 2 by default")
    parser.add_argument("--quick", action="store_true", help="three rounds; writes nothing")
    parser.add_argument("--mobius", metavar="FOLDER", help="where mobius-onnx and what it needs were installed")
    args = parser.parse_args()
    if args.mobius:
        sys.path.append(args.mobius)
    path, rounds = Path(__file__).parent / "results" / f"matmamba-{measuring.cpu()}.json", 3 if args.quick else 7
    versions = measuring.versions("numpy", "onnxruntime", "torch", "mobius-onnx")
    content = {"machine": measuring.machine(Path.cwd()), "versions": versions, "results": {}}
    if path.exists() and not args.quick:
        earlier = json.loads(path.read_text())
        if all(earlier["versions"][name] == versions[name] for name in ("onnxruntime", "torch")):
            content["results"] = earlier["results"]
            if not args.mobius:  # what was measured against it stays
                content["versions"] = earlier["versions"]
    for part in args.only:
        for threads in args.threads:
            with tempfile.TemporaryDirectory() as folder:
                if part == "layer":
                    content["results"] |= measure_layer(Path(folder), threads, rounds, args.mobius)
                elif part == "vision":
                    content["results"] |= measure_vision(Path(folder), threads, rounds)
                else:
                    content["results"] |= measure_model(Path(folder), threads, rounds)
            if not args.quick:
                measuring.write_results(path.name, content)
    show(content["results"])


if __name__ == "__main__":
    main()
