"""cuBLAS matrix products that CUDA graphs can capture, on CuPy's own handle and library.

CuPy refuses every cuBLAS call while its current stream captures; the refusal sits in CuPy's wrapper of cublasSetStream,
nowhere deeper. The product here therefore calls ``cublasGemmEx`` of the very library that CuPy loaded, on the handle
that ``cupy.cublas`` uses, with the stream and a workspace set explicitly: the same code runs eagerly and while a graph
is captured, with the same algorithm, hence the same bits. cuBLAS would otherwise take its workspace from a pool of its
own, which a captured graph must not do.

Matrices are row-major. cuBLAS is column-major, and a row-major matrix is the transpose of the column-major one in the
same memory; so ``out = a @ b`` is asked for as ``out^T = b^T @ a^T`` (:class:`Layout`).
"""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cupyinfer.errors import DeviceError, OutOfMemoryError
from cupyinfer.types import Array, dtype_of

WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises for Hopper
COMPUTE = {"float32": 68, "tf32": 77}  # CUBLAS_COMPUTE_32F: true float32 products; CUBLAS_COMPUTE_32F_FAST_TF32
STATUS = {
    1: "CUBLAS_STATUS_NOT_INITIALIZED",
    3: "CUBLAS_STATUS_ALLOC_FAILED",
    7: "CUBLAS_STATUS_INVALID_VALUE",
    8: "CUBLAS_STATUS_ARCH_MISMATCH",
    11: "CUBLAS_STATUS_MAPPING_ERROR",
    13: "CUBLAS_STATUS_EXECUTION_FAILED",
    14: "CUBLAS_STATUS_INTERNAL_ERROR",
    15: "CUBLAS_STATUS_NOT_SUPPORTED",
    16: "CUBLAS_STATUS_LICENSE_ERROR",
}
# CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: no TF32, and split sums stay float32
_MATH_MODE = 0 | 16
_HOST_POINTERS = 0  # CUBLAS_POINTER_MODE_HOST: alpha and beta are read during the call

_P, _I, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES = {
    "cublasGetMathMode": (_P, _P),
    "cublasSetMathMode": (_P, _I),
    "cublasSetPointerMode_v2": (_P, _I),
    "cublasSetStream_v2": (_P, _P),
    "cublasSetWorkspace_v2": (_P, _P, _SIZE),
    "cublasGemmEx": (_P, _I, _I, _I, _I, _I, _P, _P, _I, _I, _P, _I, _I, _P, _P, _I, _I, _I, _I),
}


@dataclass(frozen=True)
class Layout:
    """A row-major product as the column-major one that cuBLAS is asked for.

    cuBLAS's first operand is ``b`` (op_first: 0 as stored, 1 transposed), its second ``a``; it writes rows x columns =
    N x M. Leading dimensions are the row lengths of the arrays.
    """

    op_first: int
    op_second: int
    rows: int
    columns: int
    inner: int
    ld_first: int
    ld_second: int
    ld_out: int


def layout(a: Array, b: Array, transpose_a: bool, transpose_b: bool) -> Layout:
    """The :class:`Layout` of op(a) @ op(b); a and b are dense and two-dimensional."""
    rows_a, inner = a.shape[::-1] if transpose_a else a.shape
    columns_b = b.shape[0] if transpose_b else b.shape[1]
    return Layout(int(transpose_b), int(transpose_a), columns_b, rows_a, inner, b.shape[1], a.shape[1], columns_b)


def check(status: int, call: str) -> None:
    """Raise DeviceError naming the status when a cuBLAS or cuBLASLt call did not return success."""
    if status:
        raise DeviceError(f"{call} failed: {STATUS.get(status, f'status {status}')}")


def mapped_path(name: str, maps: str) -> str | None:
    """The file behind a mapped library: ``libcublas`` in the text of /proc/self/maps, or None."""
    match = re.search(rf"\s(/\S.*/{name}\.so[^/\n]*)$", maps, re.MULTILINE)
    return match.group(1) if match else None


@cache
def loaded_library(name: str) -> ctypes.CDLL:
    """The CUDA library (``cublas`` or ``cublasLt``) that CuPy has loaded; never a second copy of another version."""
    from cupy.cuda import device

    device.get_cublas_handle()  # loads cuBLAS, and cuBLASLt with it
    try:
        if sys.platform == "win32":
            return _by_name(f"{name}64_{{}}.dll")
        path = mapped_path(f"lib{name}", Path("/proc/self/maps").read_text(encoding="utf-8"))
        return ctypes.CDLL(path) if path else _by_name(f"lib{name}.so.{{}}")
    except OSError as error:
        raise DeviceError(f"the {name} library that CuPy uses could not be opened: {error}") from None


def _by_name(pattern: str) -> ctypes.CDLL:
    """Open a library by its name with the version of CuPy's toolkit in it."""
    import cupy

    return ctypes.CDLL(pattern.format(cupy.cuda.runtime.runtimeGetVersion() // 1000))


@cache
def _function(name: str) -> Any:
    function = getattr(loaded_library("cublas"), name)
    function.argtypes, function.restype = _SIGNATURES[name], ctypes.c_int
    return function


def _call(name: str, *args: Any) -> None:
    check(_function(name)(*args), name)


_workspaces: dict[tuple[int, int], Any] = {}  # (device, bytes) -> memory; kept for ever: graphs hold the addresses


def workspace(nbytes: int = WORKSPACE_BYTES) -> int:
    """The address of the current device's cuBLAS workspace of ``nbytes`` (allocated once, outside any capture).

    All products of a device share it, so they must be ordered: one stream, or events between streams. Raises
    DeviceError when it would have to be allocated during a capture, OutOfMemoryError when there is no room for it.
    """
    import cupy

    key = (cupy.cuda.runtime.getDevice(), nbytes)
    memory = _workspaces.get(key)
    if memory is None:
        if cupy.cuda.get_current_stream().is_capturing():
            raise DeviceError("run a product once before capturing it: the cuBLAS workspace does not exist yet")
        try:
            memory = _workspaces[key] = cupy.cuda.Memory(nbytes)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise OutOfMemoryError(f"no room for the cuBLAS workspace of {nbytes} bytes: {error}") from None
    return memory.ptr


def gemm(
    a: Array,
    b: Array,
    out: Array,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    compute: str = "float32",
    algorithm: int = -1,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> None:
    """``out = alpha * op(a) @ op(b) + beta * out`` with cublasGemmEx on CuPy's current stream.

    a and b: dense, two-dimensional, one dtype; out float32 or that dtype. Products are summed in float32. ``compute``
    is ``float32`` or ``tf32`` (float32 inputs rounded to 10 bits of mantissa). ``algorithm``: -1 lets cuBLAS choose.
    Raises DeviceError with the name of the status. Shapes are the caller's to check.
    """
    import cupy
    from cupy.cuda import device

    handle, at = device.get_cublas_handle(), layout(a, b, transpose_a, transpose_b)
    code, out_code = dtype_of(a).cuda_code, dtype_of(out).cuda_code
    space = workspace(workspace_bytes)
    mode_before = ctypes.c_int()
    _call("cublasGetMathMode", handle, ctypes.byref(mode_before))
    _call("cublasSetStream_v2", handle, cupy.cuda.get_current_stream().ptr)
    _call("cublasSetWorkspace_v2", handle, space, workspace_bytes)  # after the stream: setting that resets it
    _call("cublasSetPointerMode_v2", handle, _HOST_POINTERS)
    _call("cublasSetMathMode", handle, _MATH_MODE)
    try:
        # fmt: off
        _call(
            "cublasGemmEx", handle, at.op_first, at.op_second, at.rows, at.columns, at.inner,
            ctypes.byref(ctypes.c_float(alpha)), b.data.ptr, code, at.ld_first, a.data.ptr, code, at.ld_second,
            ctypes.byref(ctypes.c_float(beta)), out.data.ptr, out_code, at.ld_out, COMPUTE[compute], algorithm,
        )
        # fmt: on
    finally:
        _call("cublasSetMathMode", handle, mode_before.value)


def gemm_cupy(
    a: Array,
    b: Array,
    out: Array,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
    compute: str = "float32",
) -> None:
    """The same product through ``cupy.cublas``, CuPy's documented way; CuPy refuses it while a graph is captured.

    float32 goes through ``cupy.cublas.gemm``; 16-bit types, which that does not take, through ``gemmEx`` beneath it.
    """
    import cupy.cublas
    from cupy.cuda import device
    from cupy_backends.cuda.libs import cublas

    if a.dtype == "float32" and compute == "float32":
        names = ("N", "T")
        cupy.cublas.gemm(names[transpose_a], names[transpose_b], a, b, out=out, alpha=alpha, beta=beta)
        return
    at, code, out_code = layout(a, b, transpose_a, transpose_b), dtype_of(a).cuda_code, dtype_of(out).cuda_code
    scalars = (ctypes.c_float * 2)(alpha, beta)
    address = ctypes.addressof(scalars)
    cublas.gemmEx(
        device.get_cublas_handle(), at.op_first, at.op_second, at.rows, at.columns, at.inner, address, b.data.ptr,
        code, at.ld_first, a.data.ptr, code, at.ld_second, address + 4, out.data.ptr, out_code, at.ld_out,
        COMPUTE[compute], -1,
    )  # fmt: skip
