"""The activation functions in NumPy, one definition for every op's reference; rawkernels/common/activations.cuh is the
same for the kernels. Source: Hugging Face transformers, ``ACT2FN``.
"""

from __future__ import annotations

import math

import numpy as np


def activation(x: np.ndarray, kind: str) -> np.ndarray:
    """``silu``, ``gelu`` (exact, erf), ``gelu_tanh`` or ``relu`` of float32 values, as float32."""
    if kind == "silu":
        with np.errstate(over="ignore"):  # exp(-x) = inf gives the right -0
            return x / (1.0 + np.exp(-x))
    if kind == "gelu":
        return (0.5 * x * (1.0 + _erf(x * math.sqrt(0.5)))).astype(np.float32)
    if kind == "gelu_tanh":
        return 0.5 * x * (1.0 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)))
    return np.maximum(x, np.float32(0))


def _erf(x: np.ndarray) -> np.ndarray:
    """erf in float64, element by element: NumPy has none. Used by the exact GELU only."""
    flat = np.fromiter(map(math.erf, x.ravel().tolist()), np.float64, x.size)
    return flat.reshape(x.shape)
