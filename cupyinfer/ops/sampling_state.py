"""The sampling state on the device: which tokens each running sequence has seen, and the last one it drew.

The state has R rows, one per sequence that may run at once. It never leaves the device: the next step reads it there.
"""

from __future__ import annotations

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.runtime.kernels import KernelSource, cdiv, get, launch
from cupyinfer.types import Array

SOURCE = KernelSource("sampling_state/sampling_state.cu", ("count_tokens", "count_prompt", "store_last"))


# --- NumPy references -----------------------------------------------------------------------------------------------
def _used(ids: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return (rows >= 0) & (ids >= 0) & (ids < counts.shape[1])


def _count_tokens_reference(tokens, rows, counts):
    used = _used(tokens, rows, counts)
    np.add.at(counts, (rows[used], tokens[used]), 2)


def _count_prompt_reference(token_ids, rows, counts):
    used = _used(token_ids, rows, counts)
    counts[rows[used], token_ids[used]] |= 1


def _store_last_reference(tokens, rows, last_tokens):
    used = rows >= 0
    last_tokens[rows[used]] = tokens[used]


# --- CUDA launchers -------------------------------------------------------------------------------------------------
def _count_tokens_launch(tokens, rows, counts):
    N, V = len(tokens), counts.shape[1]
    launch(get(SOURCE, "count_tokens"), (cdiv(N, 256),), (256,), (tokens, rows, counts, np.int32(N), np.int32(V)))


def _count_prompt_launch(token_ids, rows, counts):
    T, V = len(token_ids), counts.shape[1]
    launch(get(SOURCE, "count_prompt"), (cdiv(T, 256),), (256,), (token_ids, rows, counts, np.int32(T), np.int32(V)))


def _store_last_launch(tokens, rows, last_tokens):
    N = len(tokens)
    launch(get(SOURCE, "store_last"), (cdiv(N, 256),), (256,), (tokens, rows, last_tokens, np.int32(N)))


# --- contracts ------------------------------------------------------------------------------------------------------
def _sample_counts(rng, dtype, N, V, R):
    return {
        "tokens": rng.integers(0, V, N).astype(np.int32),
        "rows": rng.permutation(np.arange(-1, R))[:N].astype(np.int32),
        "counts": rng.integers(0, 9, (R, V)).astype(np.int32),
    }


def _sample_prompt(rng, dtype, T, V, R):
    return {
        "token_ids": rng.integers(0, V, T).astype(np.int32),
        "rows": rng.integers(-1, R, T).astype(np.int32),
        "counts": rng.integers(0, 9, (R, V)).astype(np.int32),
    }


def _sample_last(rng, dtype, N, R):
    return {
        "tokens": rng.integers(0, 9999, N).astype(np.int32),
        "rows": rng.permutation(np.arange(-1, R))[:N].astype(np.int32),
        "last_tokens": np.arange(R, dtype=np.int32),
    }


_COUNTS = Arg("counts", "R V", "int32", role="inout", doc="2 * times generated + (1 if in the prompt)")
_ROWS_DOC = "row of the state, -1: skip"

COUNT_TOKENS = Op(
    name="count_tokens",
    formula="counts[rows[n], tokens[n]] += 2",
    args=(Arg("tokens", "N", "int32"), Arg("rows", "N", "int32", doc=_ROWS_DOC), _COUNTS),
    reference=_count_tokens_reference,
    launch=_count_tokens_launch,
    sample=_sample_counts,
    sizes=({"N": 1, "V": 3, "R": 2}, {"N": 300, "V": 1000, "R": 320}, {"N": 0, "V": 8, "R": 1}),
    cost=lambda tokens, **_: (16 * max(1, len(tokens)), len(tokens)),
    dtypes=("float32",),
)

COUNT_PROMPT = Op(
    name="count_prompt",
    formula="counts[rows[t], token_ids[t]] |= 1",
    args=(Arg("token_ids", "T", "int32"), Arg("rows", "T", "int32", doc=_ROWS_DOC), _COUNTS),
    reference=_count_prompt_reference,
    launch=_count_prompt_launch,
    sample=_sample_prompt,
    sizes=({"T": 1, "V": 3, "R": 1}, {"T": 1001, "V": 50, "R": 7}, {"T": 0, "V": 8, "R": 1}),
    cost=lambda token_ids, **_: (16 * max(1, len(token_ids)), 0),
    dtypes=("float32",),
)

STORE_LAST = Op(
    name="store_last",
    formula="last_tokens[rows[n]] = tokens[n]",
    args=(
        Arg("tokens", "N", "int32"),
        Arg("rows", "N", "int32", doc=_ROWS_DOC),
        Arg("last_tokens", "R", "int32", role="inout"),
    ),
    reference=_store_last_reference,
    launch=_store_last_launch,
    sample=_sample_last,
    sizes=({"N": 1, "R": 1}, {"N": 257, "R": 300}, {"N": 0, "R": 4}),
    cost=lambda tokens, **_: (12 * max(1, len(tokens)), 0),
    dtypes=("float32",),
)


# --- public functions -----------------------------------------------------------------------------------------------
def count_tokens(tokens: Array, rows: Array, counts: Array) -> Array:
    """Count the tokens just drawn: ``counts[rows[n], tokens[n]] += 2``; tokens, rows [N] int32, counts [R, V] int32.

    Rows of -1 and ids outside the vocabulary are skipped. Returns counts.
    """
    COUNT_TOKENS(tokens=tokens, rows=rows, counts=counts)
    return counts


def count_prompt(token_ids: Array, rows: Array, counts: Array) -> Array:
    """Mark the tokens of prompts: ``counts[rows[t], token_ids[t]] |= 1``; token_ids, rows [T] int32. Returns counts.

    Rows of -1 and ids outside the vocabulary are skipped.
    """
    COUNT_PROMPT(token_ids=token_ids, rows=rows, counts=counts)
    return counts


def store_last(tokens: Array, rows: Array, *, last_tokens: Array) -> Array:
    """Keep the tokens just drawn for the next step: ``last_tokens[rows[n]] = tokens[n]``; all int32, last_tokens [R].

    Rows of -1 are skipped. Returns last_tokens.
    """
    STORE_LAST(tokens=tokens, rows=rows, last_tokens=last_tokens)
    return last_tokens
