"""ONNX export of MatMamba language models: time and memory of writing, and of opening another row of an elastic bundle.

The source is synthetic: random fp32 safetensors in the released names and shapes. What is written:

    row         the row `quarter`, its weights streamed into a file
    in place    the whole model's graph beside the source's own weights
    bundle      the rows full, half, quarter and eighth, one weights file
    copy        shutil.copyfile of the bundle

Before anything is timed, the bytes of every weight of every graph are compared with NumPy views of the source. Each
way then runs in a process of its own, in turns; the clock starts after Python has and covers the imports, and stops
when all is synced. Peak memory is VmHWM.

Then, in one process, a session is opened for each row of the bundle, one after the other, with
`session.disable_prepacking` and our kernels; `added` is anonymous memory (RssAnon) after over before, over the bytes of
the row's weights. Models of up to a gigabyte also run, prompts of 512 tokens and steps, in three ways in turns: the
row's own export, and the bundle's graph, with and without prepacking. Their logits are compared first.

    python benchmarks/export.py                   # 1.4B: 48 layers, 18 GB of disk
    python benchmarks/export.py --model 130M      # 24 layers, 2 GB of disk
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measuring
from measuring import say, spread
from slice_matmamba import HEADS, SIZES, STATE, shapes

ROWS = ("full", "half", "quarter", "eighth")
WAYS = ("row", "in place", "bundle", "copy")
PEAK, GRAPH, OPEN, ADDED = 400, 2.0, {24: 0.1, 48: 0.2}, 0.05  # MiB; seconds; seconds by layers; share of the weights
RUNS_UP_TO = 1 << 30  # bytes of a model that is also run


def make_source(folder: Path, model: str) -> Path:
    """A checkpoint with values that a trained one could have: nothing overflows, and no state dies out."""
    import numpy as np

    d, layers = SIZES[model]
    folder.mkdir(parents=True)
    config = {
        "d_model": d, "d_intermediate": 0, "n_layer": layers, "vocab_size": 50277, "ssm_cfg": {}, "attn_layer_idx": [],
        "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in shapes(d, layers).items():
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes(d, layers).items():
            values = rng.standard_normal(shape, dtype=np.float32)
            if "norm" in name or name.endswith(".D"):
                values = 1 + 0.2 * values
            elif name.endswith("_log"):
                values = np.log(1 + 15 * rng.random(shape, dtype=np.float32))
            elif name.endswith("dt_bias"):
                values -= 3
            else:
                values *= 0.5 if "conv1d" in name else shape[-1] ** -0.5
            f.write(values.astype(np.float32).tobytes())
    return folder


# ------------------------------------------------------------------------------------- writing, one process each
def write(way: str, source: Path, output: Path, ready: Path) -> None:
    import matexport as mx

    if way == "row":
        mx.export_onnx(mx.plan(source, "quarter"), output)
    elif way == "in place":
        mx.export_in_place(mx.plan(source), force=True)
    elif way == "bundle":
        mx.export_bundle([mx.plan(source, row) for row in ROWS], output)
    else:
        measuring.copy_folder(ready, output)


# ---------------------------------------------------------------------------------------------------- verifying
def check_graph(model: Path, source: Path, row: str, *, elastic: bool = False) -> int:
    """Compares every external weight of a graph with a view of the source; returns how many there are."""
    import numpy as np
    import onnx
    from safetensors import safe_open

    graph = onnx.load(model, load_external_data=False).graph
    external = [i for i in graph.initializer if i.external_data]
    with safe_open(source / "model.safetensors", "np") as f:
        known = set(f.keys())
        for initializer in external:
            place = {entry.key: entry.value for entry in initializer.external_data}
            stem, _, part = initializer.name.replace("embeddings", "embedding").partition("weight.")
            name = stem + ("weight" if part else "")
            if name not in known:  # a part of a bias
                name, _, part = name.rpartition(".")
            shape = tuple(initializer.dims)
            want = view(np.asarray(f.get_tensor(name)), name, part, 2 ** ROWS.index(row))
            stored = np.memmap(
                model.with_name(place["location"]), np.float32, "r", int(place["offset"]), int(np.prod(shape))
            )
            if elastic and initializer.name.endswith("out_proj.weight"):
                want = want.T
            if shape != want.shape or not np.array_equal(stored.reshape(shape), want):
                sys.exit(f"{model}: {initializer.name} differs from the source")
    return len(external)


def view(full: Any, name: str, part: str, level: int) -> Any:
    """What a narrower model has of a tensor (MatMamba paper, section 3.1), or a bundle's part of that."""
    import numpy as np

    if ".mixer." not in name:
        return full
    kind = name.split(".mixer.")[1]
    if kind == "out_proj.weight":
        return full[:, : full.shape[1] // level]
    if kind not in ("in_proj.weight", "conv1d.weight", "conv1d.bias"):
        return full[: len(full) // level]
    if kind == "in_proj.weight":
        d_inner = (len(full) - 2 * STATE - HEADS) // 2
        w = d_inner // level
        z, x, bc, dt = np.split(full, [d_inner, 2 * d_inner, 2 * d_inner + 2 * STATE])
        parts = {"z": [z[:w]], "bcx": [bc, x[:w]], "dt": [dt[: HEADS // level]]}
        return np.concatenate(parts.get(part, [z[:w], x[:w], bc, dt[: HEADS // level]]))
    w = (len(full) - 2 * STATE) // level
    x, bc = full[:w], full[-2 * STATE :]
    return np.concatenate([bc, x] if part else [x, bc])


# ------------------------------------------------------------------------------------------------------ running
def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])


def session(model: Path, *, mapped: bool) -> Any:
    import onnxruntime as ort

    import matexport_plugins

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.disable_prepacking", str(int(mapped)))
    if library := matexport_plugins.ort_library():
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def switch(job: dict[str, Any]) -> dict[str, Any]:
    """Opens every row, and the first one again; runs between them show that nothing is put off."""
    import onnxruntime  # noqa: F401  its import is not a session's time

    folder, kept, found = Path(job["bundle"]), [], {}
    for name in (*ROWS, "full again"):
        model = folder / f"{name.split()[0]}.onnx"
        before, start = anonymous(), time.perf_counter()
        kept.append(session(model, mapped=job["mapped"]))
        seconds = time.perf_counter() - start
        found[name] = {"seconds": seconds, "added": anonymous() - before}
    return found


def feed(opened: Any, length: int) -> dict[str, Any]:
    import numpy as np

    ids = np.random.default_rng(length).integers(0, 50277, (1, length))
    states = {i.name: np.zeros([1, *i.shape[1:]], np.float32) for i in opened.get_inputs() if i.name.startswith("past")}
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **states}


def run_rows(job: dict[str, Any]) -> dict[str, Any]:
    """For some rows, seconds of a prompt and of a step, in three ways in turns; what each session added is with it."""
    import numpy as np

    found: dict[str, Any] = {}
    for row, own in job["own"].items():
        opened = {
            "own": session(Path(own, "model.onnx"), mapped=False),
            "prepacked": session(Path(job["bundle"], f"{row}.onnx"), mapped=False),
            "mapped": session(Path(job["bundle"], f"{row}.onnx"), mapped=True),
        }
        differ = dict.fromkeys(("prepacked", "mapped"), 0.0)
        for length in (512, 1):
            logits = {way: s.run(["logits"], feed(s, length))[0] for way, s in opened.items()}
            for way in differ:
                worst = np.abs(logits[way] - logits["own"]).max() / np.abs(logits["own"]).max()
                differ[way] = max(differ[way], float(f"{worst:.2g}"))
                if not worst <= 1e-5:  # other kernels sum in another order
                    sys.exit(f"{row}: {way} differs from its own export by {worst:.2g}")
        found[row] = {"differ": differ, **{way: {"512": [], "1": []} for way in opened}}
        for _ in range(job["rounds"]):
            for length, repeat in (("512", 1), ("1", 10)):
                for way, s in opened.items():
                    inputs = feed(s, int(length))
                    times = []
                    for _ in range(repeat):
                        start = time.perf_counter()
                        s.run(None, inputs)
                        times.append(time.perf_counter() - start)
                    found[row][way][length].append(statistics.median(times))
    return found


ONE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"switch": switch, "run": run_rows}


# --------------------------------------------------------------------------------------------------- the parent
class Bench:
    """One model; everything it writes is in `folder`."""

    def __init__(self, folder: Path, model: str, runs: int):
        self.folder, self.model, self.runs = folder, model, runs
        self.layers = SIZES[model][1]
        self.limits: list[dict[str, Any]] = []

    def child(self, what: str, job: dict[str, Any]) -> Any:
        return measuring.run([sys.executable, __file__, "--one", what, json.dumps(job)], self.folder / "nothing")

    def limit(self, what: str, measured: float, limit: float) -> None:
        self.limits.append({"what": what, "measured": measured, "at most": limit, "met": bool(measured <= limit)})

    def once(self, way: str, source: Path, output: Path, ready: Path) -> Any:
        job = {"way": way, "source": str(source), "output": str(output), "ready": str(ready)}
        warm = measuring.files_of(source, *([ready] if way == "copy" else []))
        return measuring.run([sys.executable, __file__, "--one", "write", json.dumps(job)], output, warm=warm)

    def writing(self, source: Path, ready: Path) -> dict[str, Any]:
        out = self.folder / "out"
        say("verifying")
        self.once("bundle", source, ready, ready)
        self.once("row", source, out, ready)
        self.once("in place", source, self.folder / "nothing", ready)
        checked = check_graph(out / "model.onnx", source, "quarter") + check_graph(
            source / "model.onnx", source, "full"
        )
        checked += sum(check_graph(ready / f"{row}.onnx", source, row, elastic=True) for row in ROWS)
        runs = measuring.rounds(WAYS, self.runs, lambda way: self.once(way, source, out, ready), "writing")
        shutil.rmtree(out, ignore_errors=True)  # the last way may write none
        found: dict[str, Any] = {"weights_compared_with_the_source": checked}
        found["bundle_bytes"] = (ready / "model.onnx_data").stat().st_size
        found["bundle_bytes_over_source"] = round(
            found["bundle_bytes"] / (source / "model.safetensors").stat().st_size, 4
        )
        found["graph_bytes"] = {row: (ready / f"{row}.onnx").stat().st_size for row in ROWS}
        found["peak_mib"] = {way: round(max(r["peak_mib"] for r in measured)) for way, measured in runs.items()}
        found["bundle_time_over_copy"] = measuring.ratios(runs, "bundle", "copy")
        found["in_place_time_over_limit"] = spread([r["seconds"] / GRAPH for r in runs["in place"]])
        for way in WAYS[:-1]:
            self.limit(f"peak MiB of {way}", found["peak_mib"][way], PEAK)
        self.limit(f"time of in place over {GRAPH:g} s", found["in_place_time_over_limit"]["median"], 1.0)
        return found

    def switching(self, ready: Path, mapped: bool) -> dict[str, Any]:
        """Opening rows: times over the first one's, memory over the weights of each."""
        job = {"bundle": str(ready), "mapped": mapped}
        runs = measuring.rounds(("switch",), 2 * self.runs + 1, lambda _: self.child("switch", job), f"{mapped=}")[
            "switch"
        ]
        most = OPEN[self.layers]
        found: dict[str, Any] = {}
        for name in runs[0]:
            opened: list[Any] = [run[name] for run in runs]
            first: list[Any] = [run["full"] for run in runs]
            weights = weight_bytes(ready / f"{name.split()[0]}.onnx")
            found[name] = {
                "time_over_first": spread([a["seconds"] / b["seconds"] for a, b in zip(opened, first, strict=True)]),
                "time_over_limit": spread([run["seconds"] / most for run in opened]),
                "added_over_weights": spread([run["added"] / weights for run in opened]),
            }
            if mapped and name != "full":
                time_over = found[name]["time_over_limit"]["median"]
                self.limit(f"opening {name}: time over {most:g} s", time_over, 1.0)
                self.limit(f"opening {name}: memory added", found[name]["added_over_weights"]["median"], ADDED)
        return found

    def running(self, source: Path, ready: Path) -> dict[str, Any]:
        """How fast rows run: times over those of the row's own export."""
        own = {row: self.folder / f"own-{row}" for row in ("full", "quarter")}
        import matexport as mx

        for row, folder in own.items():
            mx.export_onnx(mx.plan(source, row), folder)
        job = {"bundle": str(ready), "own": {row: str(path) for row, path in own.items()}, "rounds": 4 * self.runs}
        say("running")
        measured = self.child("run", job)
        return {
            row: {
                "max_rel_from_own": ways["differ"],
            }
            | {
                name: {way: ratios(ways[way][length], ways[base][length]) for way, base in PAIRS}
                for name, length in (("prompt of 512", "512"), ("step", "1"))
            }
            for row, ways in measured.items()
        }

    def benchmark(self) -> dict[str, Any]:
        source, ready = make_source(self.folder / "source", self.model), self.folder / "ready"
        packages = ("matexport", "numpy", "onnx", "onnx-ir", "onnxruntime")
        report: dict[str, Any] = {
            "model": self.model,
            "runs": self.runs,
            "source_bytes": (source / "model.safetensors").stat().st_size,
            "machine": measuring.machine(self.folder),
            "versions": measuring.versions(*packages),
            "writing": self.writing(source, ready),
            "opening, mapped": self.switching(ready, mapped=True),
        }
        if report["source_bytes"] <= RUNS_UP_TO:
            report["opening, prepacked"] = self.switching(ready, mapped=False)
            report["running"] = self.running(source, ready)
        return {**report, "limits": self.limits}


PAIRS = (("prepacked", "own"), ("mapped", "prepacked"))  # the first's time over the second's


def ratios(above: list[float], below: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def weight_bytes(model: Path) -> int:
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    places = ({entry.key: entry.value for entry in i.external_data} for i in graph.initializer)
    return sum(int(place["length"]) for place in places if place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="1.4B")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, job = arguments.one[0], json.loads(arguments.one[1])
        if what == "write":
            measuring.report(partial(write, job["way"], *(Path(job[key]) for key in ("source", "output", "ready"))))
        else:
            print(json.dumps(ONE[what](job)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = Bench(Path(folder), arguments.model, arguments.runs).benchmark()
    print(measuring.write_results(f"export-{arguments.model}.json", found))
    for limit in found["limits"]:
        say(
            f"{'met' if limit['met'] else 'NOT MET'}: {limit['what']}: {limit['measured']} (at most {limit['at most']})"
        )


if __name__ == "__main__":
    main()
