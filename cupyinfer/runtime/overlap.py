"""Programmatic dependent launch: a launch that may start before the kernel before it on the stream has ended.

CuPy has no call for it, so the driver's ``cuLaunchKernelEx`` is called directly, on the function handle of a
``cupy.RawKernel``. What a kernel must do to be launched so is written in rawkernels/common/overlap.cuh. Source: CUDA
Driver API, "Execution Control"; CUDA C++ Programming Guide, "Programmatic Dependent Launch".
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from cupyinfer import env
from cupyinfer.errors import DeviceError

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_FIRST_CAPABILITY = 90  # compute capability 9.0, Hopper


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a 64-byte union, here its int member."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("nvcuda.dll" if hasattr(ctypes, "windll") else "libcuda.so.1")
    except OSError:
        return None


def can_overlap() -> bool:
    """True when the current GPU and driver know overlapping launches and CUPYINFER_NO_OVERLAP does not forbid them."""
    import cupy

    if env.NO_OVERLAP.get() or int(cupy.cuda.Device().compute_capability) < _FIRST_CAPABILITY:
        return False
    return hasattr(_driver(), "cuLaunchKernelEx")


def launch_overlapping(
    function: int, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared: int
) -> None:
    """Launch the CUfunction on CuPy's current stream; arguments as :func:`cupyinfer.runtime.kernels.launch` checked."""
    import cupy

    values = (ctypes.c_uint64 * len(args))(*map(_bits, args))
    start = ctypes.addressof(values)
    pointers = (ctypes.c_void_p * len(args))(*range(start, start + 8 * len(args), 8))
    attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
    config = _Config(
        (ctypes.c_uint * 3)(*(*grid, 1, 1)[:3]),
        (ctypes.c_uint * 3)(*(*block, 1, 1)[:3]),
        shared,
        cupy.cuda.get_current_stream().ptr,
        ctypes.pointer(attribute),
        1,
    )
    code = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
    if code:
        raise DeviceError(f"cuLaunchKernelEx returned {code} for grid {grid}, block {block}, {shared} shared bytes")


def _bits(arg: Any) -> int:
    """The argument's bytes in the low end of 64 bits (little-endian): what the driver copies from is their address."""
    if isinstance(arg, np.generic):
        return int.from_bytes(arg.tobytes(), "little")
    return arg.data.ptr
