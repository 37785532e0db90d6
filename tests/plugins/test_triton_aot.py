"""The Triton kernels compiled for every GPU on a machine without one, in child processes: here Triton interprets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from matexport_plugins import aot

CAPABILITIES = [80, 86, 87, 89, 90, 100, 110, 120]
COMPILE = """
import dataclasses, sys, torch
from matexport_plugins import aot
from matexport_plugins.causal_conv1d import triton_aot as conv
from matexport_plugins.mamba2_scan import triton_aot as scan
capability = int(sys.argv[1])
bf16, everything = torch.bfloat16, {"state": True, "mask": True, "z": True}
launches = [
    *scan.launches(heads=64, P=64, N=128, dtype=bf16, capability=capability),
    *scan.launches(heads=64, P=24, N=128, dtype=bf16, capability=capability, **everything)[1:],
    *scan.launches(heads=64, P=48, N=128, dtype=bf16, step=True, **everything),
    *conv.launches(channels=4352, k=4, dtype=torch.float16, state=True),
    *conv.launches(channels=4352, k=4, dtype=bf16, state=True, mask=True),
]
if capability in (80, 90):
    launches += scan.launches(heads=6, P=80, N=64, groups=2, **everything, dt_limit=(0.001, 0.1))
for launch in launches:
    compiled = aot.compile_kernel(launch, capability)
    aot.assemble(compiled.ptx, compiled.target)
    print(compiled.metadata().replace("\\n", ""))
    print(repr(compiled.ptx))
"""


def child(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_everything_compiles_within_the_limits_of_the_gpu(capability: int, cache: str) -> None:
    done = child(COMPILE, str(capability), TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    kernels = [json.loads(line) for line in lines[::2]]
    assert [k["name"] for k in kernels] == [
        "sums_kernel", "scan_kernel", "scan_kernel", "step_kernel", "conv_kernel", "count_kernel",
        "conv_kernel",
        *(["sums_kernel", "scan_kernel"] if capability in (80, 90) else []),
    ]  # fmt: skip
    suffix = "a" if capability >= 90 else ""
    major, minor = divmod(aot.PTX_ISA[capability], 10)
    for kernel, ptx in zip(kernels, map(eval, lines[1::2]), strict=True):
        assert kernel["target"] == f"sm_{capability}{suffix}"  # with the a, it runs on that architecture only
        assert kernel["isa"] == f"{major}.{minor}"
        assert kernel["shared"] <= 1024 * aot.SHARED_MEMORY[capability]
        assert kernel["registers"] <= 255
        assert kernel["stack"] <= spill_budget(kernel), kernel
        assert kernel["hidden"] == 2
        assert len(aot.parameters(ptx)) == len(kernel["arguments"])
        assert set(kernel["numbers"]) == {k for k, v in kernel["arguments"].items() if v == "i32"}
        if kernel["name"] == "step_kernel":  # bound by bandwidth: all of a thread's state at once, in 16-byte accesses
            assert re.findall(r"(ld|st)\.global\.v4", ptx) == ["ld"] * 16 + ["st"] * 16
        if kernel["name"] == "scan_kernel" and "bf16" in kernel["arguments"]["x_ptr"]:
            assert tensor_cores(capability) in ptx
        assert not re.search(r"\.file|\.loc|/tmp|/home|plugins/", ptx)  # no folder of the machine that compiled it


def tensor_cores(capability: int) -> str:
    """The instruction that multiplies matrices fastest there."""
    return {9: "wgmma.mma_async", 10: "tcgen05.mma", 11: "tcgen05.mma"}.get(capability // 10, "mma.sync.aligned")


def spill_budget(kernel: dict[str, Any]) -> int:
    """Bytes of stack a thread: hardly any, except in the scan, whose state and products fill the registers."""
    return 192 if kernel["name"] == "scan_kernel" else 16


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of 80, 86"):
        aot.compile_kernel(aot.Launch(None, {}, {}, {}, ("1", "1", "1"), {}), 75)
    with pytest.raises(ValueError, match="no kernel"):
        aot.parameters("")
    done = child(
        "from matexport_plugins import aot\nfrom matexport_plugins.causal_conv1d import triton_aot as conv\n"
        "aot.compile_kernel(conv.launches(channels=4, k=4)[0], 80)",
        TRITON_INTERPRET="1",
    )
    assert "RuntimeError: Triton interprets in this process" in done.stderr
    done = child(
        "import dataclasses\nfrom matexport_plugins import aot\n"
        "from matexport_plugins.causal_conv1d import triton_aot as conv\n"
        "[launch] = conv.launches(channels=4, k=4)\n"
        "aot.compile_kernel(dataclasses.replace(launch, constants={}), 80)",
    )
    assert "is neither passed nor constant" in done.stderr


PTX = """.version 8.4
.target sm_90a
.visible .entry k(
\t.param .u64 .ptr .global k_param_0,
\t.param .u64 .ptr .global k_param_1
)
{
%s
}
"""


def test_hidden_parameters_are_dropped_only_where_they_are_not_used() -> None:
    assert len(aot.parameters(PTX % "")) == 2
    assert aot.parameters(aot.strip_hidden(PTX % "ld.param [k_param_0]", 1)) == [".param .u64 .ptr .global k_param_0"]
    with pytest.raises(ValueError, match="k_param_1"):
        aot.strip_hidden(PTX % "ld.param [k_param_1]", 1)
    assert aot.strip_hidden(PTX % "ld.param [k_param_10]", 1)  # another name


def test_ptx_of_sm_90a_runs_nowhere_else_and_a_new_isa_is_refused_by_an_old_assembler() -> None:
    """What the pinned versions are for, asked of the assembler itself."""
    ptx = PTX % "ret;"
    aot.assemble(ptx, "sm_90a")
    for other in ("sm_90", "sm_100a", "sm_120a"):
        with pytest.raises(ValueError, match="sm_90a"):
            aot.assemble(ptx, other)
    aot.assemble(ptx.replace("sm_90a", "sm_90"), "sm_100a")  # plain PTX goes on
    with pytest.raises(ValueError, match=r"(?i)version"):
        aot.assemble(ptx.replace("8.4", "99.0"), "sm_90a")


BY_ITSELF = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from matexport_plugins.causal_conv1d.triton_aot import launches
[launch] = launches(channels=300, k=4)
signature = {name: launch.arguments.get(name, "constexpr") for name in launch.kernel.arg_names}
source = ASTSource(fn=launch.kernel, signature=signature, constexprs=dict(launch.constants))
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


def test_what_triton_writes_by_itself(cache: str) -> None:
    """Controls: without the care that `aot` takes there are folders, hidden parameters and the newest ISA."""
    done = child(BY_ITSELF, TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\.file.*triton_kernels\.py", done.stdout)
    assert len(aot.parameters(done.stdout)) == 6 + 2
    [major, minor] = re.search(r"\.version (\d+)\.(\d+)", done.stdout).groups()  # type: ignore[union-attr]
    assert 10 * int(major) + int(minor) > aot.PTX_ISA[90]


def test_the_assembler_is_there() -> None:
    for name in ("ptxas", "ptxas-blackwell", "cuobjdump"):
        assert Path(aot.tool(name)).exists()
