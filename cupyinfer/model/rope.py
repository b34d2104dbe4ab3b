"""Rotary position tables: cosines and sines of every position, scaled as the model's config says.

Frequencies follow Hugging Face's ROPE_INIT_FUNCTIONS step by step in float32, so that float32 logits agree.
"""

from __future__ import annotations

import math

import numpy as np

from cupyinfer.model.architecture import RopeConfig

_CHUNK = 8192  # positions computed at once: bounds the float64 temporaries


def rope_frequencies(rope: RopeConfig) -> np.ndarray:
    """The angle per position of each pair of dims: float32 [rotary_dim / 2]."""
    if rope.kind == "yarn":
        return _yarn(rope)
    frequencies = np.float32(1.0) / _wavelengths(rope)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def rope_table(rope: RopeConfig, positions: int) -> np.ndarray:
    """float32 [positions, rotary_dim]: row p holds cos(p*f) for the rotary_dim/2 frequencies f, then sin(p*f).

    The angle is rounded to float32 as in the reference implementation, its cosine and sine are exact.
    """
    frequencies = rope_frequencies(rope)
    half = frequencies.size
    table = np.empty((positions, 2 * half), dtype=np.float32)
    for start in range(0, positions, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, positions), dtype=np.float32)
        angles = (rows[:, None] * frequencies).astype(np.float64)
        table[start : start + rows.size, :half] = np.cos(angles) * rope.attention_factor
        table[start : start + rows.size, half:] = np.sin(angles) * rope.attention_factor
    return table


def _wavelengths(rope: RopeConfig) -> np.ndarray:
    """theta^(2i/d), float32 [rotary_dim / 2]."""
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    return (np.float64(rope.theta) ** exponents.astype(np.float64)).astype(np.float32)


def _llama3(frequencies: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Llama 3.1: long waves are stretched by ``factor``, short ones kept, those between are interpolated."""
    context, low, high = rope.original_max_positions, rope.low_freq_factor, rope.high_freq_factor
    waves = np.float32(2 * math.pi) / frequencies
    stretched = np.where(waves > context / low, frequencies / np.float32(rope.factor), frequencies)
    smooth = (np.float32(context) / waves - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * stretched / np.float32(rope.factor) + smooth * stretched
    between = (waves >= context / high) & (waves <= context / low)
    return np.where(between, blended, stretched).astype(np.float32)


def _yarn(rope: RopeConfig) -> np.ndarray:
    """YaRN (arXiv:2309.00071): dims that turn often keep their frequency, slow ones are stretched, a ramp between."""
    dim = rope.rotary_dim
    low, high = _correction_dim(rope, rope.beta_fast), _correction_dim(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    waves = _wavelengths(rope)
    fast, slow = np.float32(1.0) / waves, np.float32(1.0) / (np.float32(rope.factor) * waves)
    return (slow * (1 - kept) + fast * kept).astype(np.float32)


def _correction_dim(rope: RopeConfig, rotations: float) -> float:
    """The dim whose wave turns ``rotations`` times over the original context."""
    turns = rope.original_max_positions / (rotations * 2 * math.pi)
    return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))
