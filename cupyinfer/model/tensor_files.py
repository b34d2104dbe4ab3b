"""Reading safetensors files: the header is checked against the file, then tensors are read one by one.

A file is 8 bytes (little-endian length n of the header), n bytes of JSON (name -> dtype, shape, data_offsets counted
from the end of the header) and the bytes of the tensors. Reading it here rather than through the safetensors package
lets bytes go from the file into a pinned buffer or into their final place, bfloat16 included.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cupyinfer.errors import CheckpointError, ConfigError
from cupyinfer.types import DType, dtype_of

_MAX_HEADER = 100 * 1024 * 1024  # the format's own limit, in bytes


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: ``start`` counts bytes from the beginning of ``file``."""

    name: str
    file: Path
    dtype_name: str  # as the header spells it: "BF16"
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def dtype(self) -> DType:
        """Raises CheckpointError for a type that weights may not have (F8_E4M3, I8, ...)."""
        if self.dtype_name not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"{self.file}: tensor {self.name} has dtype {self.dtype_name}; allowed: F32, F16, BF16"
            )
        return dtype_of(self.dtype_name)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file. Raises CheckpointError when the file is missing, cut off or not safetensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise _broken(path, f"a header of {length} bytes does not fit a file of {size} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise _broken(path, f"the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _broken(path, "the header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _parse_entry(path, name, entry, 8 + length, size) for name, entry in header.items()}


def read_into(file: BinaryIO, tensor: StoredTensor, offset: int, buffer: np.ndarray) -> None:
    """Fill the bytes of ``buffer`` (uint8, contiguous) from the tensor's bytes ``offset`` and following."""
    file.seek(tensor.start + offset)
    view = memoryview(buffer)  # type: ignore[arg-type]
    done = 0
    while done < buffer.size:
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise _broken(tensor.file, f"it ended inside tensor {tensor.name}")
        done += count


def _parse_entry(path: Path, name: str, entry: Any, base: int, size: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(int(extent) for extent in entry["shape"])
        start, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise _broken(path, f"the header's entry for tensor {name} is malformed") from None
    if base + end > size:
        raise _broken(path, f"tensor {name} should end at byte {base + end}, the file has {size}: it is truncated")
    expected = _element_bytes(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    if min(shape, default=0) < 0 or start < 0 or end < start or (expected and end - start != count * expected):
        raise _broken(path, f"tensor {name} has dtype {dtype}, shape {shape} and {end - start} bytes")
    return StoredTensor(name, path, str(dtype), shape, base + start, end - start)


def _element_bytes(dtype: Any) -> int:
    """Bytes of one element; 0 for a type we do not know (an error only if the tensor is needed)."""
    try:
        return dtype_of(str(dtype)).itemsize
    except ConfigError:
        return 0


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{os.fspath(path)} is not a complete safetensors file: {why}")
