"""Random weights of a real model's shapes, for benchmarks and tests (``load_format="dummy"``)."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupyinfer.model.architecture import ModelConfig
from cupyinfer.model.checkpoint import Progress, allocate
from cupyinfer.model.weights import Weights, is_norm, parameter_shapes
from cupyinfer.runtime.device import Device
from cupyinfer.runtime.tensor import Tensor
from cupyinfer.types import Array, DType

_STD = 0.02  # the usual initializer_range of these families
_CHUNK = 1 << 24  # numbers drawn at once: bounds the float32 temporary


def dummy_weights(
    config: ModelConfig, device: Device, dtype: DType, seed: int = 0, progress: Progress | None = None
) -> Weights:
    """Parameters drawn from N(0, 0.02); norms multiply by 1 and biases are 0. The same seed gives the same weights.

    Raises OutOfMemoryError.
    """
    weights = allocate(parameter_shapes(config), device, dtype)
    total = sum(array.nbytes for array in weights.values())
    rng = device.xp.random.default_rng(seed)
    done = 0
    for name, array in weights.items():
        if is_norm(name):
            _fill(array, 1.0 - config.norm_offset)
        elif name.endswith("_bias"):
            _fill(array, 0.0)
        else:
            _fill_normal(rng, array)
        done += array.nbytes
        if progress:
            progress(done, total)
    return weights


def _fill(array: Array, value: float) -> None:
    Tensor(array).copy_from(Tensor(np.full(array.shape, value, array.dtype)))


def _fill_normal(rng: Any, array: Array) -> None:
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        draw = rng.standard_normal(part.size, dtype=np.float32)
        draw *= np.float32(_STD)
        part[...] = draw
