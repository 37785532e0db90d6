"""Mamba2Scan on an NVIDIA GPU: our Triton and CUDA kernels against mamba_ssm, flash-linear-attention and PyTorch.

    python benchmarks/gpu_scan.py --out FOLDER [--seconds 240]      (`make gpu OUT=FOLDER` runs the tests as well)

Every way is verified against a float64 computation first, on the very tensors that are timed, then all are timed in
turns with CUDA events around replays of a CUDA graph, so that what the host costs is left out. Rooflines are what this
GPU was measured to copy and to multiply in the same run. Needs torch, triton and numpy; rivals take part if they are
installed.
`--dry` walks the same path on tiny sizes without a GPU, in Triton's interpreter, and measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
for root in ("plugins", "exporter", "tests/helpers"):
    sys.path.insert(0, str(Path(__file__).parents[1] / root))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402, N812
from measuring import say, spread, versions  # noqa: E402

import cuda_kernels  # noqa: E402
import matexport_plugins  # noqa: E402
from matexport_plugins.mamba2_scan import triton_op  # noqa: E402

Tensors = dict[str, torch.Tensor]
Way = Callable[[], Any]
DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.float16 if DRY else torch.bfloat16
HEADS, N, CHUNK = (4, 16, 16) if DRY else (64, 128, 64)
HEAD_DIMS = [16, 24] if DRY else [64, 16, 32, 24, 48]
PREFILLS = (
    [(2, 37)] if DRY else [(8, 2048), (64, 197), (1, 16384), (4, 16384), (1, 197), (64, 2048), (1, 2048), (16, 512)]
)
COMPILED = [(2, 37)] if DRY else [(8, 2048)]  # torch.compile takes long, so it takes part here only
STEPS = [2] if DRY else [64, 1, 256, 16]
ROUNDS = 2 if DRY else 7
TOLERANCE = 3e-2  # of the largest value; bfloat16 has 8 bits
ABSENT = "absent"


# ------------------------------------------------------------------------------------------------ inputs
def inputs_of(batch: int, length: int, P: int) -> Tensors:
    torch.manual_seed(batch * length + P)

    def normal(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    return {
        "x": normal(batch, length, HEADS * P), "dt_raw": normal(batch, length, HEADS),
        "A": -torch.exp(2.8 * torch.rand(HEADS, device=DEVICE)), "B": normal(batch, length, N),
        "C": normal(batch, length, N) * N**-0.5, "D": normal(HEADS, dtype=torch.float32),
        "dt_bias": normal(HEADS, dtype=torch.float32) - 4,  # steps of about 0.02, as trained models have
        "state": normal(batch, HEADS, N, P, dtype=torch.float32),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- PyTorch
def differences(a: torch.Tensor) -> torch.Tensor:
    """[..., t, s] = sum of a over (s, t], minus infinity where s > t."""
    total = a.cumsum(-1)
    later = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf)


def chunked(
    x: torch.Tensor, dt_raw: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    dt_bias: torch.Tensor, state: torch.Tensor, Q: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The chunked form in a few einsums: matrix products in x's type, decays in A's type. One group."""
    length = x.shape[1]
    pad = -length % Q
    dt = F.softplus(dt_raw.to(A.dtype) + dt_bias)
    x, dt, B, C = (
        F.pad(v, (0, 0, 0, pad)).unflatten(1, (-1, Q)) for v in (x.unflatten(-1, (len(A), -1)).flatten(2), dt, B, C)
    )
    x = x.unflatten(-1, (len(A), -1))  # b c q h p
    a = (dt * A).permute(0, 3, 1, 2)  # b h c q
    inside = torch.exp(differences(a)).to(x.dtype)
    u = (x * dt[..., None]).to(x.dtype)
    W = torch.einsum("bctn,bcsn->bcts", C, B)[:, None] * inside
    y = torch.einsum("bhcts,bcshp->bcthp", W, u)
    total = a.cumsum(-1)
    to_end = torch.exp(total[..., -1:] - total).to(x.dtype)
    own = torch.einsum("bcsn,bhcs,bcshp->bchnp", B, to_end, u).to(A.dtype)
    own = torch.cat([state.to(A.dtype)[:, None], own], 1)
    between = torch.exp(differences(F.pad(total[..., -1], (1, 0))))  # b h c+1 c+1
    states = torch.einsum("bhzc,bchnp->bzhnp", between, own)
    before = states[:, :-1].to(x.dtype)
    y = y + torch.einsum("bctn,bchnp,bhct->bcthp", C, before, torch.exp(total).to(x.dtype))
    y = y + x * D[:, None].to(x.dtype)
    return y.flatten(1, 2)[:, :length].flatten(2), states[:, -1]


def one_step(
    x: torch.Tensor, dt_raw: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    dt_bias: torch.Tensor, state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    kind = A.dtype
    dt = F.softplus(dt_raw[:, 0].to(kind) + dt_bias)
    u = x[:, 0].to(kind).unflatten(-1, (len(A), -1))
    state = (
        torch.exp(dt * A)[..., None, None] * state
        + B[:, 0].to(kind)[:, None, :, None] * (dt[..., None] * u)[:, :, None]
    )
    y = torch.einsum("bn,bhnp->bhp", C[:, 0].to(kind), state) + D[:, None] * u
    return y.flatten(1)[:, None].to(x.dtype), state


def truth(inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, for the first entry of the batch."""
    along = {"x", "dt_raw", "B", "C", "state"}
    exact = {k: (v[:1] if k in along else v).double() for k, v in inputs.items()}
    return one_step(**exact) if inputs["x"].shape[1] == 1 else chunked(**exact)


# ------------------------------------------------------------------------------------------------- rivals
def mamba_ssm_prefill(i: Tensors) -> Way:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    state = i["state"].transpose(2, 3).contiguous()
    x, B, C = i["x"].unflatten(-1, (HEADS, -1)), i["B"][:, :, None], i["C"][:, :, None]

    def run() -> Any:
        y, final = mamba_chunk_scan_combined(
            x, i["dt_raw"], i["A"], B, C, chunk_size=256, D=i["D"], dt_bias=i["dt_bias"], initial_states=state,
            dt_softplus=True, return_final_states=True,
        )  # fmt: skip
        return y.flatten(2), final.transpose(2, 3)

    return run


def mamba_ssm_step(i: Tensors) -> Way:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    P, work = i["state"].shape[-1], i["state"].transpose(2, 3).contiguous()
    kept = work.clone()
    x, dt = i["x"][:, 0].unflatten(-1, (HEADS, P)), i["dt_raw"][:, 0, :, None].expand(-1, -1, P)
    A, D, bias = (
        i["A"][:, None, None].expand(-1, P, N),
        i["D"][:, None].expand(-1, P),
        i["dt_bias"][:, None].expand(-1, P),
    )

    def run() -> Any:  # it updates the state in place: from call to call it decays, which costs the same
        y = selective_state_update(work, x, dt, A, i["B"], i["C"], D, dt_bias=bias, dt_softplus=True)
        return y.flatten(1)[:, None], work.transpose(2, 3)

    run.reset = lambda: work.copy_(kept)  # type: ignore[attr-defined]
    return run


def simple_gla_prefill(i: Tensors) -> Way:
    """Its operands are made beforehand and D x is added afterwards, both outside what is timed: to its advantage."""
    from fla.ops.simple_gla import chunk_simple_gla

    x = i["x"].unflatten(-1, (HEADS, -1))
    dt = F.softplus(i["dt_raw"].float() + i["dt_bias"])
    q, k = (i[name][:, :, None].expand(-1, -1, HEADS, -1).contiguous() for name in ("C", "B"))
    v, g = (x * dt[..., None]).to(x.dtype), dt * i["A"]

    def run() -> Any:
        return chunk_simple_gla(q, k, v, g, scale=1.0, initial_state=i["state"], output_final_state=True)

    run.finish = lambda y, state: ((y + x * i["D"][:, None]).flatten(2), state)  # type: ignore[attr-defined]
    return run


def ours_prefill(i: Tensors) -> Way:
    if not DRY:
        triton_op.tune(**i)
    return functools.partial(triton_op.mamba2_scan, **i)


def ours_step(i: Tensors) -> Way:
    work = i["state"].clone()
    run = functools.partial(triton_op.mamba2_scan, **i | {"state": work}, out_state=work)
    run.reset = lambda: work.copy_(i["state"])  # type: ignore[attr-defined]
    return run


def ours_in_cuda(i: Tensors) -> Way:
    """Needs libmatexport_cuda.so, which is built where matexport-plugins was installed beside an nvcc."""
    path = matexport_plugins.trt_library()
    if path is None or DRY:
        raise ModuleNotFoundError("libmatexport_cuda")
    step = i["x"].shape[1] == 1
    call, memory = cuda_kernels.prepare(cuda_kernels.open_library(path), "Mamba2Scan", i, in_place=step)

    def run() -> Any:
        call()
        return memory["y"], memory["final_state"]

    if step:  # the state is updated in place
        run.reset = lambda: memory["final_state"].copy_(i["state"])  # type: ignore[attr-defined]
    return run


COMPILE = {"backend": "eager"} if DRY else {"dynamic": False}
PREFILL_WAYS: dict[str, Callable[[Tensors], Way]] = {
    "triton": ours_prefill,
    "cuda": ours_in_cuda,
    "mamba_ssm": mamba_ssm_prefill,
    "simple_gla": simple_gla_prefill,
    "torch": lambda i: functools.partial(chunked, **i),
    "torch.compile": lambda i: functools.partial(torch.compile(chunked, **COMPILE), **i),
}
STEP_WAYS: dict[str, Callable[[Tensors], Way]] = {
    "triton": ours_step,
    "cuda": ours_in_cuda,
    "mamba_ssm": mamba_ssm_step,
    "torch": lambda i: functools.partial(one_step, **i),
    "torch.compile": lambda i: functools.partial(torch.compile(one_step, **COMPILE), **i),
}


# --------------------------------------------------------------------------------------------- measuring
def prepared(make: Callable[[Tensors], Way], inputs: Tensors, want: tuple[torch.Tensor, ...]) -> Way | str:
    """A way that computes the right thing, as a CUDA graph where it can be captured; or why it takes no part."""
    try:
        run = make(inputs)
        y, state = getattr(run, "finish", lambda *v: v)(*run())
        for name, got, expected in (("y", y, want[0]), ("state", state, want[1])):
            error = float((got[:1].double() - expected).abs().max() / expected.abs().max())
            if not error < TOLERANCE:
                return f"wrong: {name} is off by {error:.1e}"
    except ModuleNotFoundError:
        return ABSENT
    except Exception as problem:
        return f"failed: {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"[:200]
    getattr(run, "reset", lambda: None)()
    del y, state
    if DRY:
        return run
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except Exception:
        torch.cuda.synchronize()
        return run
    return graph.replay


def seconds(run: Way, repeats: int) -> float:
    if DRY:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def compare(ways: dict[str, Callable[[Tensors], Way]], inputs: Tensors, least: float) -> dict[str, Any]:
    """Verifies all ways and times them in turns. `least`: seconds that the roofline allows.

    Returns:
        For each way the fraction of the roofline, and our time below its; or why it took no part.
    """
    want = truth(inputs)
    runs = {name: prepared(make, inputs, want) for name, make in ways.items()}
    found: dict[str, Any] = {name: run for name, run in runs.items() if isinstance(run, str)}
    able = {name: run for name, run in runs.items() if not isinstance(run, str)}
    times: dict[str, list[float]] = {name: [] for name in able}
    repeats = {name: max(1, min(200, int(4e-3 / max(seconds(run, 3), 1e-7)))) for name, run in able.items()}
    names = list(able)
    for k in range(ROUNDS):
        for name in (*names[k % len(names) :], *names[: k % len(names)]):
            times[name].append(seconds(able[name], repeats[name]))
    for name, taken in times.items():
        found[name] = {"roofline": spread([least / t for t in taken]), "microseconds": spread([1e6 * t for t in taken])}
        if name != "triton" and "triton" in times:
            found[name]["times_ours"] = spread([t / own for t, own in zip(taken, times["triton"], strict=True)])
    return found


def in_words(found: dict[str, Any]) -> str:
    slower = f", {found['times_ours']['median']} x our time" if "times_ours" in found else ""
    return f"{found['roofline']['median']:.0%} of the roofline{slower}"


def ceilings() -> dict[str, float]:
    """What this GPU copies (bytes read and written a second) and multiplies (bfloat16, random data; FLOP a second)."""
    if DRY:
        return {"bytes": 1.0, "flops": 1.0}
    a = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    m = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    for _ in range(3):
        b.copy_(a), torch.mm(m, m)
    return {"bytes": 2 * a.numel() / seconds(lambda: b.copy_(a), 20), "flops": 2 * 8192**3 / seconds(lambda: m @ m, 20)}


def prefill_work(batch: int, length: int, P: int) -> tuple[float, float]:
    """Bytes that must move, inputs and outputs once, and FLOPs of the chunked form with chunks of 64 steps."""
    width = HEADS * P
    size = torch.finfo(DTYPE).bits // 8
    moved = batch * (length * size * (2 * width + 2 * N + HEADS) + 2 * 4 * N * width)
    return moved, batch * length * (2 * CHUNK * N + 2 * CHUNK * width + 4 * N * width)


def step_work(batch: int, P: int) -> tuple[float, float]:
    return prefill_work(batch, 1, P)[0], 5.0 * batch * N * HEADS * P


def environment() -> dict[str, Any]:
    gpu = None if DRY else torch.cuda.get_device_properties(0)
    return {
        "gpu": "none" if gpu is None else gpu.name,
        "multiprocessors": None if gpu is None else gpu.multi_processor_count,
        "l2_bytes": None if gpu is None else gpu.L2_cache_size,
        **versions("torch", "triton", "mamba_ssm", "flash-linear-attention"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder for the results")
    parser.add_argument("--seconds", type=float, default=240, help="begin no further point after this time")
    parser.add_argument("--dry", action="store_true", help="walk the path on tiny sizes, without a GPU")
    options = parser.parse_args()
    if not DRY and (options.out is None or not torch.cuda.is_available()):
        sys.exit("gpu_scan: needs an NVIDIA GPU, a CUDA build of PyTorch and --out FOLDER; or --dry")
    started, ceiling = time.perf_counter(), ceilings()
    result: dict[str, Any] = {"environment": environment(), "ceilings": ceiling, "dtype": str(DTYPE), "points": []}
    points = [("prefill", P, *shape) for shape in PREFILLS for P in HEAD_DIMS]
    steps = [("step", P, batch, 1) for batch in STEPS for P in HEAD_DIMS]
    points = points[: len(HEAD_DIMS)] + steps + points[len(HEAD_DIMS) :]
    for kind, P, batch, length in points:
        point: dict[str, Any] = {"kind": kind, "heads": HEADS, "P": P, "N": N, "batch": batch, "length": length}
        result["points"].append(point)
        if time.perf_counter() - started > options.seconds:
            point["ways"] = "not reached in the time given"
            continue
        say(f"{kind}, P {P}, batch {batch}, length {length}")
        moved, flops = prefill_work(batch, length, P) if kind == "prefill" else step_work(batch, P)
        least = max(moved / ceiling["bytes"], flops / ceiling["flops"])
        ways = dict(PREFILL_WAYS if kind == "prefill" else STEP_WAYS)
        if (kind == "prefill" and (batch, length) not in COMPILED) or (kind == "step" and batch != STEPS[0]):
            del ways["torch.compile"]
        inputs = inputs_of(batch, length, P)
        point |= {"bytes": moved, "flops": flops, "ways": compare(ways, inputs, least)}
        if kind == "prefill":
            key = triton_op.tuning_key(batch, length, HEADS, 1, P, N, DTYPE, inputs["x"].device)
            point["tiles"] = vars(triton_op._tuned[key]) if key in triton_op._tuned else "by the rule"
        for name, found in point["ways"].items():
            say(f"  {name}: {found if isinstance(found, str) else 'right' if DRY else in_words(found)}")
        del inputs
        if not DRY:
            torch.cuda.empty_cache()
    if DRY:
        wrong = [w for p in result["points"] for w in p["ways"].values() if isinstance(w, str) and w != ABSENT]
        sys.exit(
            f"dry run: {wrong}" if wrong else print("dry run: every way that is installed is right; nothing measured")
        )
    options.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", result["environment"]["gpu"]).strip("-").lower()
    path = options.out / f"gpu_scan-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
