"""Rotary position embedding, fused with QK norm before it and the write of K and V into the paged cache after it."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.errors import ContractError
from cupyinfer.runtime.kernels import NULL, KernelSource, cdiv, get, launch
from cupyinfer.types import Array, dtype_of

_THREADS = 128  # of a block, as in rope_append.cu
SOURCE = KernelSource(
    "rope/rope_append.cu",
    ("rope_append",),
    {"DTYPE": ("float", "fp16", "bf16"), "VEC": (1, 2, 4, 8)},
    only=lambda macros: macros["VEC"] <= (4 if macros["DTYPE"] == "float" else 8),
)


# --- NumPy reference ------------------------------------------------------------------------------------------------
def _normalise(x, weight, eps, offset):
    """RMSNorm over the last axis of x [T, heads, D], in float32."""
    scale = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    return x * scale * (weight.astype(np.float32, copy=False) + np.float32(offset))


def _rotate(x, table):
    """Rotate the pairs (i, i + Dr/2) of x [T, heads, D] by the angles of table [T, Dr]; the rest passes through."""
    half = table.shape[-1] // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = np.empty_like(x)
    np.subtract(first * cos, second * sin, out=out[..., :half])
    np.add(second * cos, first * sin, out=out[..., half : 2 * half])
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def _rope_append_reference(
    qkv, positions, slot_mapping, kv_cache, q_out, norm_eps, norm_offset, rope_table=None, q_norm=None, k_norm=None
):
    H, K, S = q_out.shape[1], kv_cache.shape[2], kv_cache.shape[3]
    _check_sizes(qkv.shape, H, K, S, None if rope_table is None else rope_table.shape[1])
    wide = qkv.astype(np.float32, copy=False)
    qk = wide[:, : H + K]
    if q_norm is not None or k_norm is not None:
        q, k = qk[:, :H], qk[:, H:]
        q = q if q_norm is None else _normalise(q, q_norm, norm_eps, norm_offset)
        k = k if k_norm is None else _normalise(k, k_norm, norm_eps, norm_offset)
        qk = np.concatenate((q, k), axis=1)
    if rope_table is not None:
        qk = _rotate(qk, rope_table[positions])
    q_out[...] = qk[:, :H]
    k, v = qk[:, H:], wide[:, H + K :]
    if slot_mapping.min(initial=0) < 0:
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    page, offset = slot_mapping // S, slot_mapping % S
    kv_cache[page, 0, :, offset] = k
    kv_cache[page, 1, :, offset] = v


# --- CUDA launcher --------------------------------------------------------------------------------------------------
@cache
def _check_shapes(qkv_shape: tuple[int, ...], H: int, K: int, S: int, rotary: int | None) -> None:
    """What the kernel asks for beyond the contract. Raises ContractError."""
    D = qkv_shape[2]
    if D % 8 or not 8 <= D <= 256:
        raise ContractError(f"rope_append: head dim {D} is not allowed; allowed: a multiple of 8 up to 256")
    _check_sizes(qkv_shape, H, K, S, rotary)


@cache
def _check_sizes(qkv_shape: tuple[int, ...], H: int, K: int, S: int, rotary: int | None) -> None:
    """What the axis letters of the contract cannot say. Raises ContractError."""
    heads, D = qkv_shape[1:]
    if heads != H + 2 * K:
        raise ContractError(f"rope_append: qkv has {heads} heads; expected H + 2*K = {H} + 2*{K}")
    if rotary is not None and (rotary % 2 or not 2 <= rotary <= D):
        raise ContractError(f"rope_append: rotary dim {rotary} is not allowed; allowed: even, 2 to {D}")
    if S & (S - 1) or not 8 <= S <= 128:
        raise ContractError(f"rope_append: page size {S} is not allowed; allowed: a power of two, 8 to 128")


@cache
def _vector(D: int, rotary: int, itemsize: int) -> int:
    """Values per memory access: as many as 16 bytes hold that divide D and half the rotary dims."""
    return math.gcd(16 // itemsize, D, rotary // 2)


def _rope_append_launch(
    qkv, positions, slot_mapping, kv_cache, q_out, norm_eps, norm_offset, rope_table=None, q_norm=None, k_norm=None
):
    tokens, heads, D = qkv.shape
    H, K, S = q_out.shape[1], kv_cache.shape[2], kv_cache.shape[3]
    rotary = 0 if rope_table is None else rope_table.shape[1]
    _check_shapes(qkv.shape, H, K, S, None if rope_table is None else rotary)
    vector = _vector(D, rotary, qkv.itemsize)
    pairs = cdiv(D // vector, 2)
    lanes = min(32, 1 << (pairs - 1).bit_length())
    arrays = (qkv, positions, slot_mapping, rope_table, q_norm, k_norm, q_out, kv_cache)
    args = (
        *(NULL if a is None else a for a in arrays),
        *(np.int32(n) for n in (tokens, H, K, D, rotary, S.bit_length() - 1, lanes)),
        np.float32(norm_eps),
        np.float32(norm_offset),
    )
    kernel = get(SOURCE, "rope_append", DTYPE=dtype_of(qkv).ctype, VEC=vector)
    launch(kernel, (cdiv(tokens * heads, _THREADS // lanes),), (_THREADS,), args)


# --- contract -------------------------------------------------------------------------------------------------------
def _sample(rng, dtype, T, H, K, D, Dr, S, norm):
    """T tokens in distinct random slots of a pool with a few pages to spare; every seventh token is padding (-1)."""
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    pages, context = T // S + 3, 4096
    slots = rng.permutation(pages * S)[:T].astype(np.int32)
    slots[6::7] = -1
    angles = np.arange(context)[:, None] * 10000.0 ** (-np.arange(0, Dr, 2) / max(Dr, 1))
    return {
        "qkv": draw(T, H + 2 * K, D),
        "positions": rng.integers(0, context, T).astype(np.int32),
        "slot_mapping": slots,
        "rope_table": np.concatenate((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32) if Dr else None,
        "kv_cache": draw(pages, 2, K, S, D),
        "q_norm": draw(D) if norm else None,
        "k_norm": draw(D) if norm else None,
        "q_out": np.full((T, H, D), np.nan, dtype),
        "norm_eps": 1e-6,
        "norm_offset": 0.0 if norm != 2 else 1.0,
    }


def _sizes(*rows):
    return tuple(dict(zip(("T", "H", "K", "D", "Dr", "S", "norm"), row, strict=True)) for row in rows)


ROPE_APPEND = Op(
    name="rope_append",
    formula="q_out = R(pos) norm(q); kv_cache[slot] = R(pos) norm(k), v; R turns the pair (x_i, x_{i+Dr/2})",
    source="Su et al. 2021, arXiv:2104.09864, half-split pairs as in Hugging Face rotate_half; QK norm as in Qwen3",
    args=(
        Arg("qkv", "T N D", doc="heads of q, then of k, then of v: N = H + 2*K"),
        Arg("positions", "T", "int32", doc="position of the token in its sequence: row of rope_table"),
        Arg("slot_mapping", "T", "int32", doc="page * S + offset in the page; -1: the token is not written"),
        Arg("rope_table", "C Dr", "float32", optional=True, doc="row p: cos(p*f), then sin(p*f); None: no rotation"),
        Arg("kv_cache", "P 2 K S D", role="inout", doc="page, key or value, head, token in page, dim"),
        Arg("q_norm", "D", optional=True, doc="RMSNorm weight of every query head"),
        Arg("k_norm", "D", optional=True, doc="RMSNorm weight of every key head"),
        Arg("q_out", "T H D", role="out"),
    ),
    scalars={"norm_eps": "added to the mean square of a head", "norm_offset": "added to the norm weights (Gemma: 1)"},
    reference=_rope_append_reference,
    launch=_rope_append_launch,
    sample=_sample,
    sizes=_sizes(
        (1, 1, 1, 8, 8, 8, 1),
        (1, 32, 8, 128, 128, 16, 0),
        (3, 16, 8, 128, 128, 16, 1),
        (17, 6, 2, 64, 16, 32, 0),
        (33, 5, 1, 80, 32, 16, 0),
        (9, 4, 4, 96, 96, 128, 1),
        (5, 8, 4, 256, 256, 64, 2),
        (12, 7, 1, 40, 6, 16, 1),
        (130, 12, 12, 64, 0, 16, 0),
        (300, 14, 2, 64, 64, 16, 0),
        (0, 4, 2, 32, 32, 16, 0),
    ),
    cost=lambda qkv, q_out, **_: (2 * qkv.nbytes, 6 * q_out.size),
)


# --- public function ------------------------------------------------------------------------------------------------
def rope_append(
    qkv: Array,
    positions: Array,
    slot_mapping: Array,
    rope_table: Array | None,
    kv_cache: Array,
    *,
    q_norm: Array | None = None,
    k_norm: Array | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    q_out: Array,
) -> Array:
    """Normalise and rotate q and k, append k and v to the cache; returns q_out [T, H, D].

    qkv [T, H+2K, D] holds the heads of q, k and v side by side; kv_cache [P, 2, K, S, D] is written in place at
    ``slot_mapping[t] = page*S + offset`` (-1: nothing is written for token t). ``rope_table`` [C, Dr] float32 has in
    row p the cosines then the sines of p times the Dr/2 frequencies, scaled as they are to be used; only the first
    Dr <= D dims turn, in pairs (i, i + Dr/2). ``q_norm``/``k_norm`` [D]: RMSNorm over each head before the rotation
    (eps ``norm_eps``, ``norm_offset`` added to the weights). Everything is computed in float32 and rounded once.
    D: on a GPU a multiple of 8 up to 256. Positions must be below C and slots below P*S (not checked: they live on the
    device). Raises ContractError.
    """
    ROPE_APPEND(
        qkv=qkv,
        positions=positions,
        slot_mapping=slot_mapping,
        rope_table=rope_table,
        kv_cache=kv_cache,
        q_norm=q_norm,
        k_norm=k_norm,
        q_out=q_out,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
    )
    return q_out
