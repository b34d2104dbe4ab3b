"""Contracts: what an op promises, written as data.

An op is declared once, as an :class:`Op`: its arrays with named axes, its formula, its NumPy reference, its CUDA
launcher, sample inputs and costs. Calling it checks the arrays and dispatches; tests, benchmarks and the op reference
in docs/ are generated from the same object.

Axis letters mean the same in CUDA, Python and docs: B sequences, T tokens in the step, L layers, H query heads, K
key/value heads, G = H/K, D head dim, E hidden, F MLP width, V vocabulary, P pages, S tokens per page, M pages per
sequence, X experts, R ranks (rows of the sampling state where no rank exists), N and I for a GEMM's outputs and inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupyinfer.errors import ContractError
from cupyinfer.types import BFLOAT16

FLOATS = frozenset({np.dtype(np.float32), np.dtype(np.float16), BFLOAT16})
_AXIS = re.compile(r"^(\d+)?\*?([A-Za-z]+)?(?:\+(\d+))?$")


@dataclass(frozen=True)
class Arg:
    """One array of an op.

    ``axes`` names each axis, separated by spaces: a letter (``T``), a number (``2``), or ``a*letter+b`` (``2*F``,
    ``B+1``); ``...`` alone accepts any shape. ``dtype``: ``float`` (float32, float16 or bfloat16, the same for every
    ``float`` argument of the call), ``anyfloat`` (one of the three, on its own), or a NumPy name. ``role``: in, out
    (every element is written) or inout. C-contiguous unless ``strided`` (then only the last axis must be dense).
    """

    name: str
    axes: str
    dtype: str = "float"
    role: str = "in"
    optional: bool = False
    strided: bool = False
    doc: str = ""


@dataclass(frozen=True)
class Op:
    """An op: contract, reference, launcher. Call it with every array and scalar by keyword.

    ``reference(**kwargs)`` computes with NumPy and writes into the out arrays; ``launch(**kwargs)`` starts the CUDA
    kernels on the current stream. Both receive the same keywords. ``sample(rng, dtype, **sizes)`` makes inputs
    (out arrays included, filled with NaN or -1) for one entry of ``sizes``; ``cost(**kwargs)`` gives (bytes, flops)
    that the best implementation must move and do. ``tolerance`` maps a dtype name to the largest relative error
    ``|out - ref| / |ref|`` (2-norms over the whole array) that a GPU result may have against the float32 reference.
    """

    name: str
    formula: str
    args: tuple[Arg, ...]
    reference: Callable[..., None]
    launch: Callable[..., None]
    source: str = ""
    scalars: Mapping[str, str] = field(default_factory=dict)
    sample: Callable[..., dict[str, Any]] | None = None
    sizes: tuple[Mapping[str, Any], ...] = ()
    cost: Callable[..., tuple[int, int]] | None = None
    tolerance: Mapping[str, float] = field(default_factory=lambda: {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2})
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")

    def __post_init__(self) -> None:
        if self.name in OPS:
            raise ContractError(f"op {self.name} is declared twice")
        OPS[self.name] = self
        parsed = tuple((a, None if a.axes == "..." else tuple(_parse(x) for x in a.axes.split())) for a in self.args)
        object.__setattr__(self, "_parsed", parsed)

    def __call__(self, **kwargs: Any) -> None:
        on_gpu = self.check(kwargs)
        if on_gpu:
            self.launch(**kwargs)
        else:
            self.reference(**kwargs)

    def check(self, kwargs: Mapping[str, Any]) -> bool:
        """Check every array of the call; True when they are on the GPU. Raises ContractError naming the argument."""
        dims: dict[str, int] = {}
        float_dtype = None
        on_gpu: bool | None = None
        for arg, axes in self._parsed:  # type: ignore[attr-defined]
            array = kwargs.get(arg.name)
            if array is None:
                if arg.optional:
                    continue
                raise ContractError(f"{self.name}: argument {arg.name} is missing")
            here = type(array) is not np.ndarray
            if here is not on_gpu:
                if on_gpu is not None:
                    raise ContractError(f"{self.name}: {arg.name} is on another device than the arguments before it")
                on_gpu = here
            if axes is not None:
                self._check_shape(arg, axes, array.shape, dims)
            dtype = array.dtype
            if arg.dtype == "float":
                if dtype is not float_dtype and dtype != float_dtype:
                    if float_dtype is not None or dtype not in FLOATS:
                        raise self._wrong_dtype(arg, dtype, str(float_dtype or "float32, float16, bfloat16"))
                    float_dtype = dtype
            elif arg.dtype == "anyfloat":
                if dtype not in FLOATS:
                    raise self._wrong_dtype(arg, dtype, "float32, float16, bfloat16")
            elif dtype != arg.dtype:
                raise self._wrong_dtype(arg, dtype, arg.dtype)
            self._check_layout(arg, array)
        return bool(on_gpu)

    def _check_shape(self, arg: Arg, axes: tuple, shape: tuple[int, ...], dims: dict[str, int]) -> None:
        if len(shape) != len(axes):
            raise ContractError(f"{self.name}: {arg.name} must have axes [{arg.axes}], its shape is {shape}")
        for (times, letter, plus), n in zip(axes, shape, strict=True):
            if letter is None:
                if n != times:
                    raise ContractError(f"{self.name}: {arg.name} [{arg.axes}] has shape {shape}; expected {times}")
                continue
            value, rest = divmod(n - plus, times)
            if rest or value < 0:
                raise ContractError(f"{self.name}: {arg.name} [{arg.axes}] has shape {shape}")
            if dims.setdefault(letter, value) != value:
                known = ", ".join(f"{k}={v}" for k, v in dims.items())
                raise ContractError(f"{self.name}: {arg.name} [{arg.axes}] has shape {shape}, but {known}")

    def _check_layout(self, arg: Arg, array: Any) -> None:
        if arg.strided:
            if array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
                raise ContractError(f"{self.name}: the last axis of {arg.name} must be dense")
        elif not array.flags.c_contiguous:
            raise ContractError(f"{self.name}: {arg.name} must be C-contiguous; strides are {array.strides}")

    def _wrong_dtype(self, arg: Arg, dtype: Any, allowed: str) -> ContractError:
        return ContractError(f"{self.name}: {arg.name} has dtype {dtype}; allowed: {allowed}")


OPS: dict[str, Op] = {}


def _parse(axis: str) -> tuple[int, str | None, int]:
    match = _AXIS.match(axis)
    if match is None:
        raise ContractError(f"axis {axis!r} is not of the form 2, T, 2*F or B+1")
    times, letter, plus = match.groups()
    return int(times or 1), letter, int(plus or 0)
