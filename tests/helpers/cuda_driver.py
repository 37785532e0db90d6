"""Launches compiled kernels through the CUDA driver alone, as another runtime would. Needs torch and a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

from matexport_plugins.aot import Compiled, evaluate


class Module:
    """One compiled kernel, loaded. `code` is "ptx", without the parameters that Triton hides, or "cubin", with them."""

    def __init__(self, compiled: Compiled, code: str) -> None:
        import torch

        torch.zeros(1, device="cuda")  # the driver needs the context that torch makes
        self.compiled = compiled
        self.hidden = 0 if code == "ptx" else compiled.hidden
        self.driver = ctypes.CDLL("libcuda.so.1")
        image = compiled.ptx.encode() + b"\0" if code == "ptx" else compiled.cubin
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), image)
        self.call("cuModuleGetFunction", ctypes.byref(self.function), module, compiled.name.encode())
        dynamic = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.call("cuFuncSetAttribute", self.function, dynamic, compiled.shared)

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.driver, name)(*arguments)
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}")

    def launch(self, values: dict[str, Any], **sizes: int) -> None:
        """`values`: tensors by parameter; `sizes`: batch and length."""
        import torch

        def number(text: str) -> int:
            return evaluate(text, **sizes)

        held: list[Any] = []
        for name, kind in self.compiled.arguments.items():
            if kind.startswith("*"):
                held.append(ctypes.c_void_p(values[name].data_ptr()))
            else:
                held.append(ctypes.c_int32(number(self.compiled.numbers[name])))
        held += [ctypes.c_void_p(None)] * self.hidden
        addresses = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
        grid = [number(text) for text in self.compiled.grid]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        shape = (*grid, self.compiled.threads, 1, 1, self.compiled.shared)
        self.call("cuLaunchKernel", self.function, *map(ctypes.c_uint, shape), stream, addresses, None)
