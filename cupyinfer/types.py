"""Data types: one name, one NumPy dtype, one C++ type and one cuBLAS code for each.

bfloat16 is NumPy's through :mod:`ml_dtypes`; CuPy 14 accepts the same dtype object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cupyinfer.errors import invalid

Array = Any  # numpy.ndarray or cupy.ndarray; CuPy is never imported just to name its type


@dataclass(frozen=True)
class DType:
    """A data type that tensors may have."""

    name: str  # as users write it: "bfloat16"
    numpy: np.dtype  # as arrays carry it
    ctype: str  # as rawkernels/common/types.cuh names it
    cuda_code: int  # cudaDataType_t
    safetensors: str  # as a safetensors header spells it

    @property
    def itemsize(self) -> int:
        return self.numpy.itemsize


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

DTYPES = (
    DType("float32", np.dtype(np.float32), "float", 0, "F32"),
    DType("float16", np.dtype(np.float16), "fp16", 2, "F16"),
    DType("bfloat16", BFLOAT16, "bf16", 14, "BF16"),
    DType("int32", np.dtype(np.int32), "int", 10, "I32"),
    DType("int64", np.dtype(np.int64), "long long", 24, "I64"),
)
FLOAT_NAMES = ("float32", "float16", "bfloat16")
_BY_NAME = {d.name: d for d in DTYPES} | {"half": DTYPES[1], "float": DTYPES[0]}
_BY_NUMPY = {d.numpy: d for d in DTYPES}
_BY_SAFETENSORS = {d.safetensors: d for d in DTYPES}


def dtype_of(value: Any) -> DType:
    """The :class:`DType` of a name ("bfloat16"), a NumPy dtype or an array.

    Raises ConfigError for any other type.
    """
    if isinstance(value, DType):
        return value
    if isinstance(value, str):
        found = _BY_NAME.get(value) or _BY_SAFETENSORS.get(value)
    else:
        found = _BY_NUMPY.get(np.dtype(getattr(value, "dtype", value)))
    if found is None:
        raise invalid("dtype", str(getattr(value, "dtype", value)), ", ".join(d.name for d in DTYPES))
    return found
