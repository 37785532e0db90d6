"""Slicing at scale: Gemma 3n E4B's language model against a copy of the same bytes and against other tools.

The source is synthetic: random bf16 in the released names, shapes, shards and config.json, at the released width or,
for quick runs and for all rivals, at an eighth of it (hidden, per-layer and head widths, FFNs). Rows: one that cuts
FFNs only, one that also skips layers, and one of whole layers, the only cut that mergekit knows.

    ours            matexport, digests off; `ours+sha256` with the digest of every file
    copy            shutil.copyfile of each file that ours wrote
    transformers    from_pretrained(dtype=bfloat16), parameters narrowed, layers dropped, save_pretrained
    get_slice       safe_open().get_slice and save_file: weights only
    mergekit        run_merge(passthrough), from text-only names; it leaves the per-layer tables uncut

Outputs are verified first: ours against NumPy views of the source, the rivals' against ours. Then all ways run
interleaved, each in a process of its own and right after a run of the copy. The clock starts after imports and stops
when every file of the output and its folder are synced to the disk; reading headers, planning, loading and saving are
inside. Before every run, old writes are synced, then source and ready output are read into the page cache (warm) or
dropped from it (cold; what a hypervisor caches stays). Every time is taken as a multiple of that of the copy before
it; `copy` among the ways is the copy against itself: how far the disk lets a ratio be trusted. Peak memory is VmHWM,
with the pages of mapped files.

    python benchmarks/slice.py                                   # E4B at an eighth: 4 GB of disk
    python benchmarks/slice.py --mergekit /path/to/python        # the interpreter that has mergekit
    python benchmarks/slice.py --model E4B                       # ours and the copy, cold: 36 GB of disk
    python benchmarks/slice.py --model 1.4B                      # a MatMamba-LM, see slice_matmamba.py: 8 GB
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import slice_gemma3n_ways
import slice_matmamba
from measuring import Runs, ratios, say, spread

DIVISORS = {"E4B/8": 8, "E4B": 1}
RIVALS = ("transformers", "get_slice")
OURS = ("ours", "ours+sha256")
LIMITS = {"ours": 0.8, "ours+sha256": 0.5, "transformers": 3.0, "peak_mib": 256, "read": 1.02}
COMMANDS = {  # what it runs, seconds it may take
    "slices": (["slices", "-m", "SOURCE"], 0.5),
    "--dry-run": (["slice", "-m", "SOURCE", "-s", "official E2B", "--dry-run"], 0.5),
    "--help": (["--help"], 0.15),
}


class Bench:
    """One width of E4B; outputs go to `folder`."""

    def __init__(self, folder: Path, sources: Path, name: str, runs: int, mergekit: str | None):
        from slice_gemma3n import Model

        self.folder, self.sources, self.name, self.runs, self.mergekit = folder, sources, name, runs, mergekit
        self.model = Model(DIVISORS[name])
        self.small = self.model.divisor > 1
        self.limits: list[dict[str, Any]] = []

    def once(self, way: str, row: str, source: Path, output: Path, ready: Path, *, cold: bool = False) -> Any:
        """One run of one way; the digests of every output that has some are checked."""
        from slice_gemma3n import check_digests

        kept, widths = self.model.row(row)
        job = {
            "kind": "gemma3n", "source": str(source), "output": str(output), "ready": str(ready), "row": row,
            "kept": kept, "widths": widths, "layers": 35, "per_layer": self.model.per_layer,
        }  # fmt: skip
        python = [self.mergekit, "-B"] if way == "mergekit" and self.mergekit else [sys.executable]
        files = measuring.files_of(source, *([ready] if ready.exists() else []))
        command = [*python, __file__, "--one", way, json.dumps(job)]
        measured = measuring.run(command, output, **({"cold": files} if cold else {"warm": files}))
        if way == "ours+sha256":
            check_digests(output)
        return measured

    def verify(self, row: str, rivals: tuple[str, ...], source: Path, ready: Path) -> list[str]:
        """Writes `ready`, our output, and compares it with the source and with every rival's. Says what was done."""
        from slice_gemma3n import check_ours, check_rival, same_files

        say(f"{row}: verifying")
        out = self.folder / "out"
        self.once("ours+sha256", row, source, ready, out)
        check_ours(ready, source, self.model, row)
        done = [
            "every tensor equals the view of the source",
            "in every run, every digest in the manifest equals its file's",
        ]
        for way in ("ours", *rivals):
            say(f"{row}: verifying against {way}")
            self.once(way, row, source, out, ready)
            if way == "ours":
                same_files(out, ready)
                done.append("weights without digests are the same bytes")
                continue
            check_rival(way, out, ready, source, self.model, row)
            done.append(f"every tensor equals {way}'s")
        shutil.rmtree(out)
        return done

    def row(self, row: str, ways: tuple[str, ...], source: Path) -> dict[str, Any]:
        """Verifies and measures one row."""
        from slice_gemma3n import needed

        ready, out = self.folder / "ready", self.folder / "out"
        found: dict[str, Any] = {"verified": self.verify(row, tuple(w for w in ways if w in NOTES), source, ready)}
        wanted, pages = needed(source, self.model, row)
        found |= {
            "output_bytes": sum(path.stat().st_size for path in ready.iterdir()),
            "bytes_needed": wanted,
            "bytes_needed_in_whole_pages": pages,
            "notes": {way: NOTES[way] for way in ways if NOTES.get(way)},
        }
        for state in ("warm", "cold") if self.small else ("cold",):
            cold = state == "cold"
            once = partial(self.once, row=row, source=source, output=out, ready=ready, cold=cold)
            runs = measuring.rounds_against("copy", ways, self.runs, once, f"{row}, {state}")
            shutil.rmtree(out)
            found[state] = {way: self._way(way, runs, wanted, pages, cold) for way in ways}
            self._judge(f"{row}, {state}", found[state], cold)
        shutil.rmtree(ready)
        return found

    def _way(self, way: str, runs: Runs, wanted: int, pages: int, cold: bool) -> dict[str, Any]:
        def most(key: str, of: int) -> float:
            return round(max(run[key] / of for run in runs[way]), 4)

        faster = [1 / run["seconds"] for run in runs[way]]
        found: dict[str, Any] = {"speed_of_copy": spread(faster)}  # 1: as fast as the copy
        if way not in ("ours", "copy"):
            found["time_over_ours"] = ratios(runs, way, "ours")
        if way in RIVALS or way == "mergekit":
            found["time_over_ours+sha256"] = ratios(runs, way, "ours+sha256")
        found["peak_mib"] = round(max(run["peak_mib"] for run in runs[way]))
        if way in OURS:  # the rivals read through mappings
            found["read_over_needed"] = most("rchar", wanted)
            found["read_over_pages"] = most("rchar", pages)
        if cold and way != "copy":
            found["disk_over_pages"] = most("read_bytes", pages)
        return found

    def _judge(self, what: str, ways: dict[str, Any], cold: bool) -> None:
        """Holds the measured against the limits.

        The small model's runs in the per-layer table are shorter than a page, and so are the gaps at any width: of
        these, no disk can read less than the pages.
        """
        key, of = ("read_over_pages", "over needed pages") if self.small else ("read_over_needed", "over needed")
        for way in OURS:
            if not cold:
                self._limit(
                    f"{what}: speed of {way} over the copy's", ways[way]["speed_of_copy"]["median"], LIMITS[way]
                )
            self._limit(f"{what}: peak MiB of {way}", ways[way]["peak_mib"], LIMITS["peak_mib"], most=True)
            self._limit(f"{what}: bytes read by {way}, {of}", ways[way][key], LIMITS["read"], most=True)
        if "transformers" in ways and not cold:
            for key in ("time_over_ours", "time_over_ours+sha256"):
                measured = ways["transformers"][key]["median"]
                self._limit(f"{what}: transformers, {key.replace('_', ' ')}", measured, LIMITS["transformers"])

    def _limit(self, what: str, measured: float, limit: float, most: bool = False) -> None:
        met = measured <= limit if most else measured >= limit
        self.limits.append(
            {"what": what, "measured": measured, "at most" if most else "at least": limit, "met": bool(met)}
        )

    def commands(self, source: Path) -> dict[str, Any]:
        """Start to end of the commands that write nothing, as a share of what they may take."""
        program = str(Path(sys.executable).with_name("matexport"))
        command = {"python": [sys.executable, "-c", "pass"]}
        for name, (arguments, _) in COMMANDS.items():
            command[name] = [program, *(str(source) if part == "SOURCE" else part for part in arguments)]

        def once(way: str) -> dict[str, float]:
            started = time.perf_counter()
            done = subprocess.run(command[way], capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - started
            return {"seconds": seconds} if done.returncode == 0 else sys.exit(f"{way}: {done.stderr}")

        measuring.rounds(tuple(command), 1, once, "commands, to warm up")
        runs = measuring.rounds(tuple(command), max(5, self.runs), once, "commands")
        found = {}
        for name, (_, limit) in COMMANDS.items():
            share = spread([run["seconds"] / limit for run in runs[name]])
            found[name] = {"time_over_limit": share, "time_over_python_c_pass": ratios(runs, name, "python")}
            self._limit(f"{name}: time over {limit} s", share["median"], 1.0, most=True)
        return found

    def source(self, kind: str) -> Path:
        return self.sources / f"gemma-3n-{self.name.replace('/', '-')}-{kind}"

    def benchmark(self) -> dict[str, Any]:
        from slice_gemma3n import E2B_ROW, FFN_ROW, WHOLE_ROW, make_source

        source = make_source(self.source("multimodal"), self.model)
        packages = ("matexport", "numpy", "safetensors", "torch", "transformers")
        report: dict[str, Any] = {
            "model": self.name,
            "runs": self.runs,
            "source_bytes": {path.name: path.stat().st_size for path in sorted(source.glob("*.safetensors"))},
            "machine": measuring.machine(self.folder),
            "versions": measuring.versions(*packages),
            "commands": self.commands(source),
            "rows": {},
        }
        ways = (*OURS, "copy", *(RIVALS if self.small else ()))
        for row in (FFN_ROW, E2B_ROW):
            report["rows"][row] = self.row(row, ways, source)
        if self.mergekit:
            report["versions"]["mergekit"] = mergekit_versions(self.mergekit)
            text = make_source(self.source("text"), self.model, text_only=True)
            report["rows"][WHOLE_ROW] = self.row(WHOLE_ROW, (*OURS, "copy", "mergekit"), text)
        return {**report, "limits": self.limits}


NOTES = {  # of the rivals whose outputs are compared with ours
    "transformers": "saves no keys and values of the sharing layers: its model has no parameters for them",
    "get_slice": "",
    "mergekit": "leaves embed_tokens_per_layer and per_layer_model_projection uncut: it writes more, and what it "
    "writes is no usable model",
}


def mergekit_versions(python: str) -> dict[str, str] | None:
    """Versions of mergekit and what it stands on in an interpreter; None if it is not there."""
    names = ("mergekit", "torch", "transformers", "safetensors")
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found: dict[str, str] = json.loads(done.stdout)
    return found


def table(report: dict[str, Any]) -> str:
    lines = [f"{'':44}{'speed / copy':>24}{'time / ours':>22}{'MiB':>7}{'read':>8}{'disk':>8}"]

    def ratio(found: dict[str, float] | None) -> str:
        return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})" if found else ""

    for row, found in report["rows"].items():
        for state in ("warm", "cold"):
            for way, of in found.get(state, {}).items():
                read, disk = of.get("read_over_needed", ""), of.get("disk_over_pages", "")
                copied, rival = ratio(of["speed_of_copy"]), ratio(of.get("time_over_ours"))
                label = f"{row.removeprefix('Config for ')[:22]}, {state}, {way}"
                lines.append(f"{label:44}{copied:>24}{rival:>22}{of['peak_mib']:>7}{read:>8}{disk:>8}")
    for limit in report["limits"]:
        sign = "<=" if "at most" in limit else ">="
        bound = limit.get("at most", limit.get("at least"))
        lines.append(f"{'ok  ' if limit['met'] else 'MISS'} {limit['what']}: {limit['measured']} {sign} {bound}")
    return "\n".join(lines)


def one(way: str, text: str) -> None:
    """The child process."""
    job = json.loads(text)
    ways = slice_matmamba if job["kind"] == "matmamba" else slice_gemma3n_ways
    measuring.report(ways.prepared(way, job))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*DIVISORS, *slice_matmamba.SIZES], default="E4B/8")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there, and leave the sources for other runs")
    parser.add_argument("--mergekit", metavar="PYTHON", default=sys.executable, help="an interpreter that has mergekit")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(*args.one)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # after removing the folder
    mergekit = args.mergekit if args.model == "E4B/8" and mergekit_versions(args.mergekit) else None
    if args.model == "E4B/8" and mergekit is None:
        say(f"mergekit is left out: {args.mergekit} does not have it (--mergekit PYTHON)")
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.keep or ".") as temporary:
        folder = Path(temporary)
        if args.model in slice_matmamba.SIZES:
            report = slice_matmamba.benchmark(Path(__file__), folder, args.model, args.runs)
        else:
            report = Bench(folder, args.keep or folder, args.model, args.runs, mergekit).benchmark()
            print(table(report))
    say(f"written: {measuring.write_results('slice-' + args.model.replace('/', '-') + '.json', report)}")


if __name__ == "__main__":
    main()
