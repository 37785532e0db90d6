"""The NVIDIA GPUs of this machine, by their driver alone: no library has to be installed to ask."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...


@dataclass(frozen=True)
class Gpu:
    """One GPU; `capability` 89 is compute capability 8.9."""

    name: str
    capability: int

    def __str__(self) -> str:
        return f"{self.name} ({dotted(self.capability)})"


def find_gpus(library: str = "libcuda.so.1") -> tuple[Gpu, ...]:
    """The GPUs that CUDA sees (`CUDA_VISIBLE_DEVICES` counts), in its order; none without a driver."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(gpu for i in range(count.value) if (gpu := _describe(driver, i)))


def dotted(capability: int) -> str:
    """Compute capability 89 as NVIDIA writes it, 8.9."""
    return f"{capability // 10}.{capability % 10}"


def _describe(driver: ctypes.CDLL, index: int) -> Gpu | None:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
    )
    return None if failed else Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value)
