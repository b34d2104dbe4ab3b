"""Carrying a step's arrays to the device and its results back.

On a GPU all small arrays of a step travel in one copy from pinned memory, block tables in a second one (only the used
columns), and nothing waits: pinned buffers are used in turn, and each is written again only after its copy has run. On
a CPU the same calls hand the arrays through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyinfer.config import StepLimits
from cupyinfer.engine.batch import Batch
from cupyinfer.engine.sampling import Sampling
from cupyinfer.model.inputs import StepInputs
from cupyinfer.runtime.device import Device
from cupyinfer.runtime.memory import download, pinned_empty, upload, upload_columns
from cupyinfer.types import Array

_RING = 3  # pinned buffers used in turn: two steps may be in flight while the third is built
_ALIGN = 64  # bytes between the starts of two arrays, so that kernels may read them in wide words
_FORWARD = ("token_ids", "token_rows", "positions", "slot_mapping", "query_start", "context_lens", "logits_indices")
_DRAW = ("rows", "steps", "seeds", "temperature")
_SPECIAL = ("top_k", "top_p", "min_p", "penalty_rows", "repetition", "presence", "frequency")
_DTYPES = {"seeds": np.uint64} | dict.fromkeys(
    ("temperature", "top_p", "min_p", "repetition", "presence", "frequency"), np.float32
)
_PADDING = {"token_rows": -1, "slot_mapping": -1, "rows": -1}  # other arrays are padded with 0


@dataclass(frozen=True)
class Inputs:
    """A step on the device. ``extra``: the arrays of :class:`Special` that it has."""

    step: StepInputs
    rows: Array  # as in Sampling; padded like the step
    steps: Array
    seeds: Array
    temperature: Array
    extra: Mapping[str, Array]


def host_inputs(batch: Batch, last_tokens: np.ndarray) -> Inputs:
    """The batch as it is, for the CPU."""
    arrays = {name: getattr(batch, name) for name in _FORWARD}
    step = _step(arrays, batch.block_tables, last_tokens, batch.num_decodes, batch.max_query_len)
    draw = batch.sampling
    return Inputs(step, draw.rows, draw.steps, draw.seeds, draw.temperature, _special_arrays(draw))


def _step(
    arrays: Mapping[str, Array], block_tables: Array, last_tokens: Array, num_decodes: int, max_query_len: int
) -> StepInputs:
    return StepInputs(
        **{name: arrays[name] for name in _FORWARD},
        block_tables=block_tables,
        last_tokens=last_tokens,
        num_decodes=num_decodes,
        max_query_len=max_query_len,
    )


def _special_arrays(draw: Sampling) -> dict[str, np.ndarray]:
    if draw.special is None:
        return {}
    every = {name: getattr(draw.special, name) for name in _SPECIAL}
    return {name: array for name, array in every.items() if array is not None}


class _Layout:
    """Where each array of a step lies in the packed buffer: views on the device, and on each pinned buffer."""

    def __init__(self, sizes: tuple[tuple[str, int], ...], device: Array, ring: list[np.ndarray]) -> None:
        self.device: dict[str, Array] = {}
        self.host: list[dict[str, np.ndarray]] = [{} for _ in ring]
        offset = 0
        for name, size in sizes:
            dtype = np.dtype(_DTYPES.get(name, np.int32))
            end = offset + size * dtype.itemsize
            self.device[name] = device[offset:end].view(dtype) if size else device[:0]
            for views, buffer in zip(self.host, ring, strict=True):
                views[name] = buffer[offset:end].view(dtype)
            offset = -(-end // _ALIGN) * _ALIGN
        self.all_device = device[:offset]
        self.all_host = [buffer[:offset] for buffer in ring]


class DeviceInputs:
    """The fixed input buffers of a GPU runner: every step's arrays are written to the same addresses."""

    def __init__(self, device: Device, stream: Any, limits: StepLimits, last_tokens: Array) -> None:
        xp = device.xp
        tokens, rows, width = limits.max_num_batched_tokens, limits.max_num_seqs, limits.blocks_per_sequence
        size = _packed_bytes(tokens, rows, limits.logits_rows)
        self.last_tokens = last_tokens
        self._event = xp.cuda.Event
        self._stream = stream
        self._packed = xp.zeros(size, np.uint8)
        self._tables = xp.zeros((rows, width), np.int32)
        self._pinned = [pinned_empty((size,), np.uint8) for _ in range(_RING)]
        self._pinned_tables = [pinned_empty((rows, width), np.int32) for _ in range(_RING)]
        self._copied: list[Any] = [None] * _RING
        self._turn = 0
        self._layouts: dict[tuple, _Layout] = {}
        self._padded_steps: dict[int, StepInputs] = {}

    def send(self, batch: Batch, bucket: int = 0) -> Inputs:
        """Start copying the batch; with a ``bucket`` every array of the step is padded to that many sequences.

        The arrays returned are valid until the next call. Padding rows have slot -1, context length 0 and row -1.
        """
        turn = self._turn = (self._turn + 1) % _RING
        if self._copied[turn] is not None:
            self._copied[turn].synchronize()
        forward, draw, extra = self._arrays(batch, bucket)
        sizes = self._sizes(forward, bucket) + self._sizes(draw, bucket) + self._sizes(extra, 0)
        layout = self._layout(sizes, keep=bool(bucket) and not extra)
        for name, array in (forward | draw | extra).items():
            target = layout.host[turn][name]
            target[: len(array)] = array
            if len(array) < len(target):
                target[len(array) :] = _PADDING.get(name, 0)
        upload(layout.all_device, layout.all_host[turn], self._stream)
        sequences, used = batch.block_tables.shape
        self._pinned_tables[turn][:sequences, :used] = batch.block_tables
        upload_columns(self._tables, self._pinned_tables[turn], sequences, used, self._stream)
        self._copied[turn] = event = self._event(disable_timing=True)
        event.record(self._stream)
        views = layout.device
        step = self._padded_step(bucket, views) if bucket else self._exact_step(batch, views)
        draws = {name: views[name] for name in _DRAW}
        return Inputs(step, extra={name: views[name] for name in extra}, **draws)

    def _arrays(self, batch: Batch, bucket: int) -> tuple[dict, dict, dict]:
        forward = {name: getattr(batch, name) for name in _FORWARD}
        if bucket:  # the same for every decode step of the bucket
            forward["query_start"] = np.arange(bucket + 1, dtype=np.int32)
            forward["logits_indices"] = forward["query_start"][:bucket]
        draw = {name: getattr(batch.sampling, name) for name in _DRAW}
        return forward, draw, _special_arrays(batch.sampling)

    def _sizes(self, arrays: dict[str, np.ndarray], bucket: int) -> tuple[tuple[str, int], ...]:
        return tuple((name, max(len(array), bucket)) for name, array in arrays.items())

    def _layout(self, sizes: tuple[tuple[str, int], ...], keep: bool) -> _Layout:
        layout = self._layouts.get(sizes)
        if layout is None:
            layout = _Layout(sizes, self._packed, self._pinned)
            if keep:
                self._layouts[sizes] = layout
        return layout

    def _exact_step(self, batch: Batch, views: Mapping[str, Array]) -> StepInputs:
        tables = self._tables[: batch.num_sequences]
        return _step(views, tables, self.last_tokens, batch.num_decodes, batch.max_query_len)

    def _padded_step(self, bucket: int, views: Mapping[str, Array]) -> StepInputs:
        """The step of a bucket: always the same arrays, so it is made once."""
        step = self._padded_steps.get(bucket)
        if step is None:
            step = _step(views, self._tables[:bucket], self.last_tokens, bucket, 1)
            self._padded_steps[bucket] = step
        return step


def _packed_bytes(tokens: int, rows: int, logits_rows: int) -> int:
    """Bytes that the largest step may need: token arrays, sequence arrays, logits rows, and gaps between them."""
    widest = 4 * tokens + 3 * rows + logits_rows + 8 * (len(_DRAW) + len(_SPECIAL)) * rows
    return 4 * widest + _ALIGN * (len(_FORWARD) + len(_DRAW) + len(_SPECIAL) + 1)


class Results:
    """Brings a step's result arrays to the host: ``fetch`` starts the copies, the callable it returns waits."""

    def __init__(self, device: Device, stream: Any, max_rows: int) -> None:
        self._event = device.xp.cuda.Event if device.is_cuda else None
        self._stream = stream
        self._ring = [pinned_empty((max_rows,), np.int32) for _ in range(_RING)] if device.is_cuda else []
        self._turn = 0

    def fetch(self, tokens: Array, others: Mapping[str, Array]) -> Callable[[], tuple[np.ndarray, dict]]:
        """``tokens`` [N] int32 and any other arrays; waiting gives (tokens, others) as NumPy arrays.

        The tokens are to be read before two more steps are fetched.
        """
        if self._event is None:
            copies = {name: array.copy() for name, array in others.items()}
            mine = tokens.copy()
            return lambda: (mine, copies)
        self._turn = (self._turn + 1) % _RING
        host = self._ring[self._turn][: len(tokens)]
        if len(tokens):
            download(host, tokens, self._stream)
        rest = {name: pinned_empty(array.shape, array.dtype) for name, array in others.items()}
        for name, array in others.items():
            if array.size:
                download(rest[name], array, self._stream)
        event = self._event(disable_timing=True)
        event.record(self._stream)

        def wait() -> tuple[np.ndarray, dict]:
            event.synchronize()
            return host, rest

        return wait
