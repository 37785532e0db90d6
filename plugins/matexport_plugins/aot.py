"""Triton kernels compiled ahead of time: PTX and cubin for any NVIDIA GPU, on a machine without one.

Each op has a `triton_aot.py` that says which kernels it launches, and how; this module compiles one. PTX of sm_90 and
newer names its architecture with an `a` (sm_90a) and runs on no other. The PTX ISA is pinned to what drivers have known
for long: Triton writes the newest that its own assembler knows, which older drivers refuse.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import operator
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PTX_ISA = {80: 84, 86: 84, 87: 84, 89: 84, 90: 84, 100: 86, 103: 88, 110: 90, 120: 87, 121: 88}
"""Compute capability -> PTX ISA version: 8.4 came with CUDA 12.4, newer architectures have the first with them."""

SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""Compute capability -> KiB of shared memory that one program may take (CUDA C++ Programming Guide, table of
compute capabilities)."""


@dataclass(frozen=True)
class Launch:
    """A kernel, what it is specialised to, and how it is launched.

    Args:
        kernel: the function of triton.jit.
        arguments: name -> Triton's type of each parameter that is passed, in the kernel's order; pointers are aligned
            to 16 bytes.
        constants: everything else that the kernel takes; None for inputs that are absent.
        numbers: integer parameter -> its value, arithmetic on `batch` and `length` (see `evaluate`).
        grid: three numbers, the same arithmetic.
        outputs: pointers that the kernel writes -> their tensors' shapes, the same arithmetic.
    """

    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    numbers: Mapping[str, str]
    grid: tuple[str, str, str]
    outputs: Mapping[str, tuple[str, ...]]
    warps: int = 4
    stages: int = 2

    @property
    def inputs(self) -> list[str]:
        """The pointers that the kernel reads, in order."""
        return [k for k, v in self.arguments.items() if v.startswith("*") and k not in self.outputs]

    @property
    def name(self) -> str:
        """One for each specialisation: the kernel's, and eight digits of what it is specialised to."""
        parts = (self.arguments, self.constants, self.numbers, self.grid, self.outputs, self.warps, self.stages)
        text = json.dumps([dict(part) if isinstance(part, Mapping) else part for part in parts], sort_keys=True)
        return f"{self.kernel.__name__}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def evaluate(text: str, **sizes: Any) -> Any:
    """The arithmetic of a launch: +, -, *, // on integers and names.

    Args:
        sizes: `batch` and `length`; integers, or what has these operators, such as TensorRT's symbols (which stand on
            the left of every operator).

    Raises:
        ValueError: anything else.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left, op, right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.Name(name) if name in sizes:
                return sizes[name]
            case ast.Constant(int() as number):
                return number
        raise ValueError(f"{text!r} is no arithmetic on {', '.join(sizes)}")

    return value(ast.parse(text, mode="eval").body)


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and what a launcher has to know. `arguments` are the parameters of `ptx`, in order.

    `cubin` is made from the PTX as Triton wrote it and takes `hidden` further pointers at the end, which may be null;
    `ptx` has lost them. `registers`, `stack` (bytes a thread) and `shared` (bytes a program) are of the cubin.
    """

    name: str
    compute_capability: int
    target: str
    isa: str
    arguments: Mapping[str, str]
    numbers: Mapping[str, str]
    grid: tuple[str, str, str]
    outputs: Mapping[str, tuple[str, ...]]
    threads: int
    shared: int
    registers: int
    stack: int
    hidden: int
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    def metadata(self) -> str:
        """Everything but the code, as JSON."""
        return json.dumps({k: v for k, v in asdict(self).items() if k not in ("ptx", "cubin")}, indent=1)


def compile_kernel(launch: Launch, compute_capability: int) -> Compiled:
    """Needs no GPU.

    Raises:
        ValueError: a compute capability that is not in PTX_ISA, or PTX that uses Triton's hidden parameters.
        RuntimeError: Triton runs as an interpreter in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if compute_capability not in PTX_ISA:
        raise ValueError(f"compute capability {compute_capability}: expected one of {', '.join(map(str, PTX_ISA))}")
    if not isinstance(launch.kernel, triton.JITFunction):
        raise RuntimeError("Triton interprets in this process (TRITON_INTERPRET): compile in one where it does not")
    constants = dict(launch.constants)
    names = launch.kernel.arg_names
    signature = {name: launch.arguments.get(name, "constexpr") for name in names}
    missing = [name for name in names if name not in launch.arguments and name not in constants]
    if missing:
        raise ValueError(f"{launch.kernel.__name__}: {', '.join(missing)} is neither passed nor constant")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {
        "num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True,
        "ptx_version": PTX_ISA[compute_capability],
    }  # fmt: skip
    # without line information, since it names folders of this machine; on an error Triton prints all of the PTX
    with triton.knobs.compilation.scope(), contextlib.redirect_stdout(io.StringIO()):
        triton.knobs.compilation.disable_line_info = True
        compiled = triton.compile(source, target=GPUTarget("cuda", compute_capability, 32), options=options)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    version, target = re.search(r"\.version (\S+)\n\.target (\w+)", ptx).groups()  # type: ignore[union-attr]
    registers, stack = resources(cubin)
    return Compiled(
        name=compiled.metadata.name, compute_capability=compute_capability, target=target, isa=version,
        arguments=dict(launch.arguments), numbers=dict(launch.numbers), grid=launch.grid, outputs=dict(launch.outputs),
        threads=32 * launch.warps, shared=compiled.metadata.shared, registers=registers, stack=stack,
        hidden=len(parameters(ptx)) - len(launch.arguments), ptx=strip_hidden(ptx, len(launch.arguments)), cubin=cubin,
    )  # fmt: skip


ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\n\)", re.S)


def parameters(ptx: str) -> list[str]:
    """The declarations of a kernel's parameters."""
    found = ENTRY.search(ptx)
    if found is None:
        raise ValueError("no kernel in this PTX")
    return [line.strip() for line in found.group(2).split(",\n")]


def strip_hidden(ptx: str, keep: int) -> str:
    """PTX without the parameters after the first `keep`: Triton appends pointers to scratch memory that launchers other
    than its own do not pass.

    Raises:
        ValueError: the kernel uses one of them.
    """
    found = ENTRY.search(ptx)
    declared = parameters(ptx)
    names, body = [line.split()[-1] for line in declared[keep:]], ptx[found.end() :]  # type: ignore[union-attr]
    used = [name for name in names if re.search(rf"\b{re.escape(name)}\b", body)]
    if used:
        raise ValueError(f"this kernel uses hidden parameters: {', '.join(used)}")
    start, end = found.span(2)  # type: ignore[union-attr]
    return ptx[:start] + "\n\t" + ",\n\t".join(declared[:keep]) + ptx[end:]


def tool(name: str) -> Path:
    """A program of the CUDA toolkit that Triton brings along."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (spilled registers, mostly) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        done = subprocess.run([tool("cuobjdump"), "-res-usage", f.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {done.stdout[-300:]}{done.stderr[-300:]}")
    return int(found[1]), int(found[2])


def assemble(ptx: str, target: str) -> None:
    """Runs ptxas over PTX, for what it refuses.

    Raises:
        ValueError: with its message.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        program = tool("ptxas" if int(re.sub(r"\D", "", target)) < 100 else "ptxas-blackwell")
        command = [str(program), "-arch", target, f.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip() or done.stdout.strip())
