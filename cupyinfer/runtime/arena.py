"""Named scratch buffers with fixed addresses.

A step's intermediate arrays live here instead of in fresh allocations: a captured CUDA graph replays with the very
addresses it was captured with, and every layer reuses the same few buffers, which also keeps them in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupyinfer.errors import DeviceError
from cupyinfer.types import Array


class Arena:
    """Scratch memory of one device. ``take`` the same name with another shape and the same bytes are reused."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self._buffers: dict[str, Array] = {}
        self._views: dict[tuple, Array] = {}
        self._frozen = False
        self._retaining = False
        self._retired: list[Array] = []

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised C-contiguous array [shape] of dtype, valid until ``name`` is taken again.

        Grows the buffer when needed; after :meth:`freeze` growing raises, since captured graphs hold the addresses.
        """
        key = (name, shape, dtype)
        view = self._views.get(key)
        if view is None:
            dtype = np.dtype(dtype)
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            buffer = self._buffers.get(name)
            if buffer is None or buffer.size < size:
                buffer = self._grow(name, size)
            view = buffer[:size].view(dtype).reshape(shape)
            if len(self._views) > 4096:  # many different prompt lengths: views are cheap to make again
                self._views.clear()
            self._views[key] = view
        return view

    def _grow(self, name: str, size: int) -> Array:
        if self._retaining and name in self._buffers:
            self._retired.append(self._buffers[name])
        if self._frozen:
            raise DeviceError(f"scratch buffer {name} would have to grow to {size} bytes after graphs were captured")
        self._views = {k: v for k, v in self._views.items() if k[0] != name}
        self._buffers[name] = self.xp.empty(max(size, 256), dtype=np.uint8)
        return self._buffers[name]

    def freeze(self) -> None:
        """Forbid growing from now on."""
        self._frozen = True

    def retain(self) -> None:
        """Keep every buffer alive from now on: a graph captured with one goes on using it after the arena grew."""
        self._retaining = True

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in (*self._buffers.values(), *self._retired))
