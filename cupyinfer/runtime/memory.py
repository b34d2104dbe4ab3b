"""Host and device memory: pinned buffers, asynchronous copies, and what the allocator holds.

A copy is asynchronous only when its host side is page-locked ("pinned"); from ordinary memory the driver first copies
to a hidden pinned buffer while the host waits. The functions here take NumPy arrays from :func:`pinned_empty`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyinfer.errors import DeviceError
from cupyinfer.types import Array

_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind


def host_memory() -> float:
    """Bytes of memory that this machine has; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def pinned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised page-locked NumPy array [shape] of dtype. The memory lives as long as the array."""
    import cupy

    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    memory = cupy.cuda.alloc_pinned_memory(max(count * dtype.itemsize, 1))
    return np.frombuffer(memory, dtype=np.uint8, count=count * dtype.itemsize).view(dtype).reshape(shape)


def is_pinned(array: np.ndarray) -> bool:
    """True when the driver knows the array's memory as page-locked."""
    import cupy

    attributes = cupy.cuda.runtime.pointerGetAttributes(array.ctypes.data)
    return attributes.type == 1  # cudaMemoryTypeHost


def upload(device: Array, host: np.ndarray, stream: Any) -> None:
    """Start copying host -> device (same size in bytes, both contiguous) on the stream. Returns at once if pinned."""
    _copy(device.data.ptr, host.ctypes.data, device, host, _TO_DEVICE, stream)


def download(host: np.ndarray, device: Array, stream: Any) -> None:
    """Start copying device -> host on the stream; wait for the stream (or an event on it) before reading host."""
    _copy(host.ctypes.data, device.data.ptr, device, host, _TO_HOST, stream)


def upload_columns(device: Array, host: np.ndarray, rows: int, columns: int, stream: Any) -> None:
    """Start copying host[:rows, :columns] -> device[:rows, :columns]; both are dense [R, C] of one dtype and width."""
    import cupy

    pitch = host.strides[0]
    if host.shape[1] != device.shape[1] or host.dtype != device.dtype or rows > min(len(host), len(device)):
        raise DeviceError(f"a copy of {rows} rows needs two arrays alike, not {host.shape} and {device.shape}")
    cupy.cuda.runtime.memcpy2DAsync(
        device.data.ptr,
        pitch,
        host.ctypes.data,
        pitch,
        columns * host.itemsize,
        rows,
        _TO_DEVICE,
        stream.ptr,
    )


def _copy(target: int, source: int, device: Array, host: np.ndarray, kind: int, stream: Any) -> None:
    import cupy

    if device.nbytes != host.nbytes or not (device.flags.c_contiguous and host.flags.c_contiguous):
        sizes = f"{host.nbytes} bytes on the host, {device.nbytes} on the device"
        raise DeviceError(f"a copy needs two dense arrays of one size, not {sizes}")
    cupy.cuda.runtime.memcpyAsync(target, source, device.nbytes, kind, stream.ptr)


@dataclass(frozen=True)
class MemoryUsage:
    """Device memory in bytes: the device's, and what CuPy's pool holds of it."""

    total: int  # of the device
    free: int  # of the device, as the driver says
    pool_reserved: int  # taken from the device by the pool
    pool_used: int  # handed out by the pool

    @property
    def pool_idle(self) -> int:
        """Bytes that :func:`compact` can give back, when whole chunks are idle."""
        return self.pool_reserved - self.pool_used


def memory_usage() -> MemoryUsage:
    """Usage of the current GPU."""
    import cupy

    free, total = cupy.cuda.runtime.memGetInfo()
    pool = cupy.get_default_memory_pool()
    return MemoryUsage(total, free, pool.total_bytes(), pool.used_bytes())


def compact() -> int:
    """Give the pool's idle chunks back to the device; returns the bytes released."""
    import cupy

    cupy.cuda.get_current_stream().synchronize()
    before = memory_usage().pool_reserved
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.get_default_pinned_memory_pool().free_all_blocks()
    return before - memory_usage().pool_reserved
