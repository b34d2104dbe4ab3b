"""From a model directory to parameters on the device, one tensor at a time.

Bytes go from the file into a small staging buffer (pinned for a GPU) and from there into their rows of the parameter,
so host memory holds a few chunks and never a shard. On the CPU a tensor of the wanted type is read in place.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cupyinfer.errors import CheckpointError, OutOfMemoryError
from cupyinfer.model.config import ModelConfig, read_json
from cupyinfer.model.families import FAMILIES, is_harmless
from cupyinfer.model.tensor_files import StoredTensor, read_header, read_into
from cupyinfer.model.weights import Shape, Source, Weights, parameter_shapes
from cupyinfer.runtime.device import Device
from cupyinfer.runtime.memory import host_memory
from cupyinfer.runtime.tensor import Tensor
from cupyinfer.types import Array, DType

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CHUNK_BYTES = 32 * 1024 * 1024  # of a staging buffer


# --- what is on disk ------------------------------------------------------------------------------------------------
def list_tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a model directory: model.safetensors, or the shards that its index names (transformers' order).

    Raises CheckpointError when files are missing, cut off, or contradict the index.
    """
    directory = Path(directory)
    if (directory / _SINGLE).is_file():
        return read_header(directory / _SINGLE)
    if (directory / _INDEX).is_file():
        return _list_sharded(directory)
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pth"))
    if pickles:
        raise CheckpointError(
            f"{directory} holds its weights as pickles ({pickles[0]}), which can run any code when they are read; "
            f"allowed: safetensors. Convert with transformers' save_pretrained."
        )
    raise CheckpointError(f"{directory} has no weights: neither {_SINGLE} nor {_INDEX} is there")


def _list_sharded(directory: Path) -> dict[str, StoredTensor]:
    index = read_json(directory / _INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{directory / _INDEX} has no weight_map from tensor names to file names")
    shards = {file: read_header(directory / Path(file).name) for file in sorted(set(where.values()))}
    for tensor, file in where.items():
        if tensor not in shards[file]:
            raise CheckpointError(f"{directory / file} lacks tensor {tensor}, which {_INDEX} says it holds")
    return {tensor: shards[file][tensor] for tensor, file in where.items()}


def match_sources(
    config: ModelConfig, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, Shape], directory: str | Path
) -> list[tuple[Source, StoredTensor]]:
    """Pair every needed tensor with its place in a file, in file order.

    Raises CheckpointError for a missing tensor, a wrong shape or dtype, and a tensor that the model has no place for.
    """
    sources = list(FAMILIES[config.architecture].sources(config, tensors.keys()))
    pairs = []
    for source in sources:
        stored = tensors.get(source.tensor)
        if stored is None:
            raise _missing(directory, source.tensor, tensors, config)
        expected = source.shape(shapes[source.target])
        if stored.shape != expected:
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} has shape {list(stored.shape)}; "
                f"config.json asks for {list(expected)}"
            )
        _ = stored.dtype  # refuses a type that weights may not have
        pairs.append((source, stored))
    used = {source.tensor for source in sources}
    extra = [name for name in tensors if name not in used and not is_harmless(name, config)]
    if extra:
        raise CheckpointError(
            f"{directory}: tensor {extra[0]} has no place in a {config.architecture} of this config.json"
            + (f" (and {len(extra) - 1} more tensors)" if extra[1:] else "")
        )
    return sorted(pairs, key=lambda pair: (str(pair[1].file), pair[1].start))


def _missing(directory: str | Path, name: str, tensors: Iterable[str], config: ModelConfig) -> CheckpointError:
    close = difflib.get_close_matches(name, list(tensors), n=1)
    hint = f"; the closest name there is {close[0]}" if close else ""
    return CheckpointError(f"{directory}: tensor {name} of a {config.architecture} is missing{hint}")


# --- from disk to the device ----------------------------------------------------------------------------------------
def load_weights(
    directory: str | Path, config: ModelConfig, device: Device, dtype: DType, progress: Progress | None = None
) -> Weights:
    """All parameters of the model in ``directory``, as arrays of ``dtype`` on the device.

    ``progress(done, total)`` is called after every tensor, in bytes on disk. Raises CheckpointError, OutOfMemoryError.
    """
    shapes = parameter_shapes(config)
    pairs = match_sources(config, list_tensors(directory), shapes, directory)
    weights = allocate(shapes, device, dtype)
    total = sum(stored.nbytes for _, stored in pairs)
    done = 0
    copier = _Copier(device, dtype)
    for path in dict.fromkeys(stored.file for _, stored in pairs):
        with path.open("rb", buffering=0) as file:
            for source, stored in (pair for pair in pairs if pair[1].file == path):
                copier.copy(file, stored, source.place(weights[source.target]), source.transpose)
                done += stored.nbytes
                if progress:
                    progress(done, total)
    copier.finish()
    return weights


def allocate(shapes: Mapping[str, Shape], device: Device, dtype: DType) -> Weights:
    """Uninitialised parameters. Raises OutOfMemoryError naming the bytes that all of them need."""
    need = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    try:
        if not device.is_cuda and need > host_memory():  # the system would grant it, and kill us when we fill it
            raise MemoryError(f"this machine has {host_memory() / 2**30:.2f} GiB")
        return {name: device.xp.empty(shape, dtype=dtype.numpy) for name, shape in shapes.items()}
    except MemoryError as error:  # CuPy's out-of-memory error is one too
        raise OutOfMemoryError(
            f"the weights need {need / 2**30:.2f} GiB as {dtype.name} on {device}, which is not free ({error}); "
            f"use a smaller model, a 16-bit dtype or a device with more memory"
        ) from None


class _Copier:
    """Copies tensors from files into parameters, converting their type where it differs."""

    def __init__(self, device: Device, dtype: DType) -> None:
        self.device = device
        self.dtype = dtype
        self._raw = np.empty(0, np.uint8)  # bytes as they are stored, when they need converting
        self._slots = [_PinnedSlot(dtype) for _ in range(2)] if device.is_cuda else []  # one fills, one is in flight
        self._turn = 0

    def copy(self, file: BinaryIO, stored: StoredTensor, target: Array, transpose: bool) -> None:
        if transpose:
            values = self._read(file, stored, 0, target.size).reshape(stored.shape)
            self._put_whole(values.T, target)
        elif not self.device.is_cuda and stored.dtype == self.dtype:
            read_into(file, stored, 0, target.reshape(-1).view(np.uint8))
        else:
            self._copy_chunks(file, stored, target.reshape(-1))

    def finish(self) -> None:
        """Wait until every copy has arrived."""
        for slot in self._slots:
            slot.wait()

    def _copy_chunks(self, file: BinaryIO, stored: StoredTensor, flat: Array) -> None:
        step = _CHUNK_BYTES // 4
        for start in range(0, flat.size, step):
            part = flat[start : start + step]
            if not self.device.is_cuda:
                part[...] = self._read(file, stored, start, part.size)
                continue
            slot = self._next_slot(part.size)
            if stored.dtype == self.dtype:
                read_into(file, stored, start * self.dtype.itemsize, slot.bytes(part.size))
            else:
                slot.values(part.size)[...] = self._read(file, stored, start, part.size)
            slot.send(part)

    def _put_whole(self, values: np.ndarray, target: Array) -> None:
        if self.device.is_cuda:
            slot = self._next_slot(target.size)
            slot.values(target.size).reshape(target.shape)[...] = values
            slot.send(target.reshape(-1))
        else:
            target[...] = values

    def _read(self, file: BinaryIO, stored: StoredTensor, start: int, count: int) -> np.ndarray:
        """``count`` elements from element ``start`` on, in the stored type; valid until the next call."""
        size = count * stored.dtype.itemsize
        if self._raw.size < size:
            self._raw = np.empty(size, np.uint8)
        read_into(file, stored, start * stored.dtype.itemsize, self._raw[:size])
        return self._raw[:size].view(stored.dtype.numpy)

    def _next_slot(self, count: int) -> _PinnedSlot:
        self._turn ^= 1
        slot = self._slots[self._turn]
        slot.wait()
        slot.reserve(count)
        return slot


class _PinnedSlot:
    """A page-locked buffer whose content travels to the GPU while another one is filled."""

    def __init__(self, dtype: DType) -> None:
        import cupy

        self._dtype = dtype
        self._stream = cupy.cuda.get_current_stream()
        self._arrived = cupy.cuda.Event(disable_timing=True)
        self._buffer = Tensor.empty((0,), dtype.name, pin=True)

    def reserve(self, count: int) -> None:
        if self._buffer.size < count:
            self._buffer = Tensor.empty((max(count, _CHUNK_BYTES // 4),), self._dtype.name, pin=True)

    def values(self, count: int) -> np.ndarray:
        return self._buffer.array[:count]

    def bytes(self, count: int) -> np.ndarray:
        return self.values(count).view(np.uint8)

    def send(self, target: Any) -> None:
        Tensor(target).copy_from(self._buffer[: target.size], self._stream)
        self._arrived.record(self._stream)

    def wait(self) -> None:
        self._arrived.synchronize()
