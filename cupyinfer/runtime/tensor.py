"""``Tensor``: a thin handle on a NumPy or CuPy array that knows how to move between host and device.

It adds no arithmetic: use the array (``.array``) with NumPy, CuPy or :mod:`cupyinfer.ops`. Weights pass through it on
their way from a file to the device, and it is the door to other frameworks through DLPack.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyinfer.errors import invalid
from cupyinfer.runtime.device import Device, array_module, choose_device
from cupyinfer.runtime.memory import download, is_pinned, pinned_empty, upload
from cupyinfer.types import BFLOAT16, Array, DType, dtype_of

_UINT, _BFLOAT = 1, 4  # DLDataTypeCode
_CPU = 1  # DLDeviceType kDLCPU


class Tensor:
    """A handle on one array of dtype float32, float16, bfloat16, int32 or int64.

    ``Tensor(array)`` shares memory with ``array``. Slicing and reshaping give tensors that share memory too.
    """

    __slots__ = ("array",)

    def __init__(self, array: Array) -> None:
        dtype_of(array)  # refuses other types
        self.array = array

    # --- making -----------------------------------------------------------------------------------------------------
    @classmethod
    def empty(
        cls, shape: Sequence[int], dtype: str = "float32", device: str | Device = "cpu", pin: bool = False
    ) -> Tensor:
        """Uninitialised [shape]. ``pin``: page-locked host memory, for asynchronous transfers (CPU tensors only)."""
        target = _device(device)
        if pin:
            if target.is_cuda:
                raise invalid("pin", pin, "False for a tensor on a GPU; only host memory can be pinned")
            return cls(pinned_empty(tuple(shape), dtype_of(dtype).numpy))
        return cls(target.xp.empty(tuple(shape), dtype=dtype_of(dtype).numpy))

    @classmethod
    def zeros(cls, shape: Sequence[int], dtype: str = "float32", device: str | Device = "cpu") -> Tensor:
        return cls(_device(device).xp.zeros(tuple(shape), dtype=dtype_of(dtype).numpy))

    @classmethod
    def from_dlpack(cls, other: Any) -> Tensor:
        """Share the memory of any object with ``__dlpack__`` (PyTorch, JAX, CuPy, NumPy, another Tensor)."""
        if isinstance(other, Tensor):
            return cls(other.array)
        if other.__dlpack_device__()[0] == _CPU:
            return cls(_numpy_from_dlpack(other))
        import cupy

        return cls(cupy.from_dlpack(other))

    # --- describing -------------------------------------------------------------------------------------------------
    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> DType:
        return dtype_of(self.array)

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def size(self) -> int:
        return self.array.size

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:N``."""
        return "cpu" if array_module(self.array) is np else f"cuda:{self.array.device.id}"

    @property
    def is_pinned(self) -> bool:
        return self.device == "cpu" and _cuda_in_use() and is_pinned(self.array)

    def __len__(self) -> int:
        return len(self.array)

    def __repr__(self) -> str:
        return f"Tensor(shape={self.shape}, dtype={self.dtype.name}, device={self.device})"

    # --- views ------------------------------------------------------------------------------------------------------
    def reshape(self, *shape: int) -> Tensor:
        """The same elements as [shape]; one entry may be -1. Shares memory when the layout allows it."""
        return Tensor(self.array.reshape(*shape))

    def __getitem__(self, key: Any) -> Tensor:
        return Tensor(self.array[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.array[key] = value.array if isinstance(value, Tensor) else value

    # --- moving -----------------------------------------------------------------------------------------------------
    def pin(self) -> Tensor:
        """A page-locked copy of a CPU tensor."""
        copy = Tensor.empty(self.shape, self.dtype.name, pin=True)
        copy.array[...] = self.array
        return copy

    def to(self, device: str | Device, stream: Any = None) -> Tensor:
        """The tensor on ``device`` (itself when it is there already).

        With a ``stream`` the copy is only started: it overlaps with the host when the host side is pinned (see
        :meth:`pin`; a download creates pinned memory itself), and the caller waits for the stream before reading.
        """
        target = _device(device)
        if self.device == (f"cuda:{target.index}" if target.is_cuda else "cpu"):
            return self
        if target.is_cuda:
            return Tensor(self._to_cuda(target, stream))
        return Tensor(self._to_cpu(stream))

    def copy_from(self, source: Tensor, stream: Any = None) -> None:
        """Fill this tensor with ``source`` (same shape and dtype, either device); asynchronous like :meth:`to`."""
        if source.shape != self.shape or source.dtype != self.dtype:
            raise invalid("source", f"{source.dtype.name}{source.shape}", f"{self.dtype.name}{self.shape}")
        here, there = self.device != "cpu", source.device != "cpu"
        if here == there:
            self.array[...] = source.array
        elif here:
            _transfer(upload, self.array, np.ascontiguousarray(source.array), stream)
        else:
            _transfer(download, self.array, array_module(source.array).ascontiguousarray(source.array), stream)

    def numpy(self) -> np.ndarray:
        """The values in host memory (shares memory with a CPU tensor; waits for the device otherwise)."""
        return self.to("cpu").array

    def _to_cuda(self, target: Device, stream: Any) -> Array:
        with target.xp.cuda.Device(target.index):
            result = target.xp.empty(self.shape, dtype=self.array.dtype)
            if self.device == "cpu":
                _transfer(upload, result, np.ascontiguousarray(self.array), stream)
            else:
                result[...] = self.array
        return result

    def _to_cpu(self, stream: Any) -> np.ndarray:
        result = pinned_empty(self.shape, self.array.dtype)
        _transfer(download, result, array_module(self.array).ascontiguousarray(self.array), stream)
        return result

    # --- DLPack -----------------------------------------------------------------------------------------------------
    def __dlpack__(self, **kwargs: Any) -> Any:
        """Export the memory (see the Python array API standard). bfloat16 keeps its type, which NumPy alone cannot."""
        if self.device == "cpu" and self.array.dtype == BFLOAT16:
            capsule = self.array.view(np.uint16).__dlpack__()
            _set_type_code(capsule, _UINT, _BFLOAT)
            return capsule
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def _device(device: str | Device) -> Device:
    return device if isinstance(device, Device) else choose_device(device)


def _cuda_in_use() -> bool:
    return "cupy" in sys.modules and sys.modules["cupy"].cuda.is_available()


def _transfer(copy: Any, first: Array, second: Array, stream: Any) -> None:
    import cupy

    copy(first, second, stream or cupy.cuda.get_current_stream())
    if stream is None:
        cupy.cuda.get_current_stream().synchronize()


class _Capsule:
    """Hands an existing DLPack capsule to ``numpy.from_dlpack``, which wants an object with the two methods."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CPU, 0)


def _numpy_from_dlpack(other: Any) -> np.ndarray:
    capsule = other.__dlpack__()
    if _set_type_code(capsule, _BFLOAT, _UINT):  # NumPy does not know bfloat16: take the bits, then name them
        return np.from_dlpack(_Capsule(capsule)).view(BFLOAT16)
    return np.from_dlpack(_Capsule(capsule))


def _set_type_code(capsule: Any, old: int, new: int) -> bool:
    """Change the type code inside an unversioned DLPack capsule; False when the code is not ``old``.

    DLTensor starts the managed tensor: data (8 bytes), device (8), ndim (4), then dtype.code (1 byte).
    """
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    code = ctypes.c_uint8.from_address(get(capsule, b"dltensor") + 20)
    if code.value != old:
        return False
    code.value = new
    return True
