"""Which device computes: the CPU through NumPy, or one NVIDIA GPU through CuPy.

Looking for a GPU costs a few milliseconds and imports nothing: the driver library is asked directly. CuPy is imported
only when its GPU will be used.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cupyinfer import env
from cupyinfer.errors import DeviceError, invalid
from cupyinfer.types import Array


@dataclass(frozen=True)
class Device:
    """The chosen device. ``xp`` is the array module that computes on it: numpy or cupy."""

    kind: str  # "cpu" or "cuda"
    index: int
    name: str
    xp: Any

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def __str__(self) -> str:
        return f"{self.kind}:{self.index} ({self.name})" if self.is_cuda else f"cpu ({self.name})"


@cache
def gpu_count() -> tuple[int, str]:
    """(number of usable GPUs, why there are none). Asks libcuda, honours CUDA_VISIBLE_DEVICES, imports nothing."""
    names = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
    for name in names:
        try:
            driver = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return 0, "no NVIDIA driver is installed (libcuda.so.1 was not found)"
    code = driver.cuInit(0)
    if code:
        return 0, f"the NVIDIA driver refused to start (cuInit returned {code})"
    count = ctypes.c_int()
    code = driver.cuDeviceGetCount(ctypes.byref(count))
    if code or count.value == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return 0, "the driver reports no GPU" + (f" (CUDA_VISIBLE_DEVICES={hidden!r})" if hidden is not None else "")
    return count.value, ""


def cupy_problem() -> str:
    """Why CuPy cannot be used here, or an empty string."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install cupy-cuda12x (or cupy-cuda13x for a CUDA 13 driver)"
    return ""


def choose_device(request: str | None = None) -> Device:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    ``auto`` takes the GPU when one answers, else the CPU. An explicit ``cuda`` that is not to be had raises
    DeviceError saying why; nothing falls back silently.
    """
    request = env.DEVICE.get() if request is None or request == "" else request
    if not isinstance(request, str):
        raise invalid("device", request, "auto, cpu, cuda, cuda:N")
    if request == "auto":
        request = "cuda" if gpu_count()[0] and not cupy_problem() else "cpu"
    if request == "cpu":
        return Device("cpu", 0, "NumPy", np)
    kind, _, index = request.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise invalid("device", request, "auto, cpu, cuda, cuda:N")
    return _cuda_device(int(index or 0))


def _cuda_device(index: int) -> Device:
    count, why = gpu_count()
    why = why or cupy_problem()
    if why:
        raise DeviceError(f"device=cuda was asked for, but {why}. Use device=cpu, or see `cupyinfer doctor`.")
    if index >= count:
        raise DeviceError(f"device=cuda:{index} was asked for, but there are {count} GPUs (0 to {count - 1})")
    import cupy

    try:
        cupy.cuda.Device(index).use()
        name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
        cupy.zeros(1)
    except Exception as error:  # CuPy raises many types here: driver too old, library missing, device lost
        why = f"device=cuda:{index} does not work: {error}. `cupyinfer doctor` shows what is missing."
        raise DeviceError(why) from None
    return Device("cuda", index, name, cupy)


@cache
def multiprocessors(index: int) -> int:
    """How many streaming multiprocessors (SMs) GPU ``index`` has: what launch shapes are chosen by."""
    import cupy

    return cupy.cuda.Device(index).attributes["MultiProcessorCount"]


def array_module(array: Array) -> Any:
    """numpy for a NumPy array, cupy for a CuPy array."""
    return np if type(array) is np.ndarray else sys.modules["cupy"]


def to_host(array: Array) -> np.ndarray:
    """The array in host memory, as NumPy (waits for the device)."""
    return array if type(array) is np.ndarray else array.get()
