"""Rows by index: token embedding, the token ids of a step, and the rows whose logits are wanted."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.errors import ContractError
from cupyinfer.runtime.kernels import NULL, KernelSource, cdiv, get, launch
from cupyinfer.types import Array, dtype_of

SOURCE = KernelSource(
    "embedding/embedding.cu", ("embed", "resolve_tokens", "gather_rows"), {"DTYPE": ("float", "fp16", "bf16")}
)


# --- NumPy references -----------------------------------------------------------------------------------------------
def _embed_reference(token_ids, table, out, scale, positions=None, position_table=None):
    np.take(table, token_ids, axis=0, out=out, mode="clip")  # "clip" writes straight into out, "raise" buffers
    if scale != 1.0:
        np.multiply(out, np.float32(scale), out=out, casting="same_kind")
    if position_table is not None:
        out += position_table[positions]


def _resolve_tokens_reference(token_ids, token_rows, last_tokens, out):
    out[...] = np.where(token_rows < 0, token_ids, last_tokens[np.maximum(token_rows, 0)])


def _gather_rows_reference(x, indices, out):
    np.take(x, indices, axis=0, out=out, mode="clip")


# --- CUDA launchers -------------------------------------------------------------------------------------------------
def _threads(x: Array) -> int:
    """One thread for each 16-byte chunk of a row, in whole warps."""
    return int(min(512, max(32, cdiv(x.shape[1] * x.itemsize, 512) * 32)))


def _embed_launch(token_ids, table, out, scale, positions=None, position_table=None):
    kernel = get(SOURCE, "embed", DTYPE=dtype_of(table).ctype)
    none = position_table is None
    extra = (NULL, NULL) if none else (positions, position_table)
    launch(
        kernel,
        (out.shape[0],),
        (_threads(out),),
        (token_ids, table, *extra, out, np.int32(out.shape[1]), np.float32(scale)),
    )


def _resolve_tokens_launch(token_ids, token_rows, last_tokens, out):
    kernel = get(SOURCE, "resolve_tokens", DTYPE="float")
    T = out.shape[0]
    launch(kernel, (cdiv(T, 256),), (256,), (token_ids, token_rows, last_tokens, out, np.int32(T)))


def _gather_rows_launch(x, indices, out):
    kernel = get(SOURCE, "gather_rows", DTYPE=dtype_of(x).ctype)
    launch(kernel, (out.shape[0],), (_threads(out),), (x, indices, out, np.int32(out.shape[1])))


# --- contracts ------------------------------------------------------------------------------------------------------
def _sample_embed(rng, dtype, T, V, E, C=0):
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    inputs: dict[str, Any] = {
        "token_ids": rng.integers(0, V, T).astype(np.int32),
        "table": draw(V, E),
        "out": np.full((T, E), np.nan, dtype),
        "scale": 1.0 if C else 2.5,
    }
    if C:
        inputs |= {"positions": rng.integers(0, C, T).astype(np.int32), "position_table": draw(C, E)}
    return inputs


def _sample_resolve(rng, dtype, T, R):
    return {
        "token_ids": rng.integers(0, 1000, T).astype(np.int32),
        "token_rows": rng.integers(-1, R, T).astype(np.int32),
        "last_tokens": rng.integers(1000, 2000, R).astype(np.int32),
        "out": np.full(T, -1, np.int32),
    }


def _sample_gather(rng, dtype, T, E, N):
    return {
        "x": rng.standard_normal((T, E)).astype(dtype),
        "indices": rng.integers(0, T, N).astype(np.int32),
        "out": np.full((N, E), np.nan, dtype),
    }


EMBED = Op(
    name="embed",
    formula="out[t] = table[token_ids[t]] * scale + position_table[positions[t]]",
    source="Hugging Face LlamaModel.embed_tokens, GPT2Model.wte + wpe, Gemma2Model (scale sqrt(E))",
    args=(
        Arg("token_ids", "T", "int32"),
        Arg("table", "V E"),
        Arg("positions", "T", "int32", optional=True),
        Arg("position_table", "C E", optional=True, doc="learned positions (GPT-2)"),
        Arg("out", "T E", role="out"),
    ),
    scalars={"scale": "factor on the token embedding: sqrt(E) for Gemma, else 1"},
    reference=_embed_reference,
    launch=_embed_launch,
    sample=_sample_embed,
    sizes=(
        {"T": 1, "V": 5, "E": 8},
        {"T": 7, "V": 11, "E": 13},
        {"T": 3, "V": 64, "E": 768, "C": 32},
        {"T": 5, "V": 100, "E": 4096},
        {"T": 4, "V": 9, "E": 5001, "C": 3},
        {"T": 0, "V": 8, "E": 64},
    ),
    cost=lambda out, position_table=None, **_: (out.nbytes * (2 if position_table is None else 3), 2 * out.size),
)

RESOLVE_TOKENS = Op(
    name="resolve_tokens",
    formula="out[t] = token_ids[t] if token_rows[t] < 0 else last_tokens[token_rows[t]]",
    args=(
        Arg("token_ids", "T", "int32"),
        Arg("token_rows", "T", "int32", doc="row of the sampling state, or -1"),
        Arg("last_tokens", "R", "int32"),
        Arg("out", "T", "int32", role="out"),
    ),
    reference=_resolve_tokens_reference,
    launch=_resolve_tokens_launch,
    sample=_sample_resolve,
    sizes=({"T": 1, "R": 1}, {"T": 257, "R": 32}, {"T": 0, "R": 4}),
    cost=lambda out, **_: (4 * out.nbytes, 0),
    dtypes=("float32",),
)

GATHER_ROWS = Op(
    name="gather_rows",
    formula="out[n] = x[indices[n]]",
    args=(Arg("x", "T E"), Arg("indices", "N", "int32"), Arg("out", "N E", role="out")),
    reference=_gather_rows_reference,
    launch=_gather_rows_launch,
    sample=_sample_gather,
    sizes=(
        {"T": 1, "E": 8, "N": 1},
        {"T": 9, "E": 129, "N": 4},
        {"T": 33, "E": 1024, "N": 40},
        {"T": 6, "E": 5120, "N": 2},
        {"T": 3, "E": 64, "N": 0},
    ),
    cost=lambda out, indices, **_: (2 * out.nbytes + indices.nbytes, 0),
)


# --- public functions -----------------------------------------------------------------------------------------------
def embed(
    token_ids: Array,
    table: Array,
    *,
    scale: float = 1.0,
    positions: Array | None = None,
    position_table: Array | None = None,
    out: Array,
) -> Array:
    """``out[t] = table[token_ids[t]] * scale (+ position_table[positions[t]])``.

    token_ids [T] int32 in 0..V-1, table [V, E], positions [T] int32 in 0..C-1, position_table [C, E], out [T, E]; the
    last three float arrays share a dtype. Computed in float32, rounded after each operation as Hugging Face's 16-bit
    models do. Ids are not checked here (they may live on the device): the engine checks them. Raises ContractError.
    """
    if (positions is None) != (position_table is None):
        raise ContractError("embed: positions and position_table go together; only one was given")
    EMBED(token_ids=token_ids, table=table, positions=positions, position_table=position_table, out=out, scale=scale)
    return out


def resolve_tokens(token_ids: Array, token_rows: Array, last_tokens: Array, *, out: Array) -> Array:
    """The token ids of a step, all [T] int32: ``token_ids[t]`` where the host knew it (``token_rows[t] < 0``), else
    ``last_tokens[token_rows[t]]``, which the step before sampled on the device. last_tokens [R] int32.
    """
    RESOLVE_TOKENS(token_ids=token_ids, token_rows=token_rows, last_tokens=last_tokens, out=out)
    return out


def gather_rows(x: Array, indices: Array, *, out: Array) -> Array:
    """``out[n] = x[indices[n]]``: x [T, E], indices [N] int32 in 0..T-1, out [N, E]."""
    GATHER_ROWS(x=x, indices=indices, out=out)
    return out
