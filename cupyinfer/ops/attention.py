"""Attention over a paged KV cache: one query token a sequence (decode), or many (prefill, whole or chunked)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.errors import ContractError
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.attention_plan import MAX_ROWS, decode_plan, device_limits
from cupyinfer.runtime.kernels import KernelSource, cdiv, get, launch
from cupyinfer.types import Array, dtype_of

HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 160, 192, 256)
_QUERY_CHUNK = 128  # query tokens that the prefill reference scores at once: bounds its memory

_HALF = {"DTYPE": ("fp16", "bf16"), "HEAD_DIM": HEAD_DIMS}
DECODE_SOURCE = KernelSource("attention/paged_decode.cu", ("paged_decode",), _HALF)
DECODE_F32_SOURCE = KernelSource("attention/paged_decode_f32.cu", ("paged_decode_f32",), {"HEAD_DIM": HEAD_DIMS})
MERGE_SOURCE = KernelSource(
    "attention/paged_decode_merge.cu",
    ("paged_decode_merge",),
    {"DTYPE": ("float", "fp16", "bf16"), "TILE_SIZE": (16, 32, 64)},
    only=lambda m: m["TILE_SIZE"] in ((16, 32) if m["DTYPE"] == "float" else (32, 64)),
)
PREFILL_SOURCE = KernelSource("attention/paged_prefill.cu", ("paged_prefill",), _HALF)
PREFILL_F32_SOURCE = KernelSource("attention/paged_prefill_f32.cu", ("paged_prefill_f32",), {"HEAD_DIM": HEAD_DIMS})


# --- NumPy reference ------------------------------------------------------------------------------------------------
@cache
def _kv_index(K: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(2)[:, None, None], np.arange(K)[:, None]


def _gather(kv_cache, table, first, end):
    """Keys and values at positions first..end-1 of one sequence: float32 [2, K, end-first, D], one copy at most."""
    K, S, D = kv_cache.shape[2:]
    first_page = first // S
    pages = table[first_page : (end + S - 1) // S]
    if len(pages) == 1:
        kv = kv_cache[pages[0]]
    else:
        halves, heads = _kv_index(K)
        kv = kv_cache[pages, halves, heads].reshape(2, K, -1, D)  # [2, K, pages, S, D] before
    return kv[:, :, first - first_page * S : end - first_page * S].astype(np.float32, copy=False)


def _attend(q, keys, values, softcap, bias=None):
    """softmax(q keys^T + bias) values for scaled q [K, rows, D], keys and values [K, n, D], bias [rows, n] or None."""
    scores = q @ keys.transpose(0, 2, 1)
    if softcap:
        scores *= np.float32(1.0 / softcap)
        np.tanh(scores, out=scores)
        scores *= np.float32(softcap)
    if bias is not None:
        scores += bias
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    result = scores @ values
    result /= total
    return result


def _decode_reference(q, kv_cache, block_tables, context_lens, out, scale, window, softcap, arena=None):
    B, H, D = q.shape
    K = kv_cache.shape[2]
    _check_sizes("paged_decode", H, K, kv_cache.shape[3], scale, window, softcap)
    scaled = (q.astype(np.float32, copy=False) * np.float32(scale)).reshape(B, K, H // K, D)
    for b, end in enumerate(context_lens.tolist()):
        if end == 0:
            out[b] = 0
            continue
        keys, values = _gather(kv_cache, block_tables[b], max(0, end - window) if window else 0, end)
        out[b] = _attend(scaled[b], keys, values, softcap).reshape(H, D)


def _prefill_reference(
    q, kv_cache, block_tables, query_start, context_lens, out, scale, max_query_len, window, softcap
):
    _check_sizes("paged_prefill", q.shape[1], kv_cache.shape[2], kv_cache.shape[3], scale, window, softcap)
    starts = query_start.tolist()
    for b, end in enumerate(context_lens.tolist()):
        begin = end - (starts[b + 1] - starts[b])  # position of the first query token
        for row in range(starts[b], starts[b + 1], _QUERY_CHUNK):
            rows = min(_QUERY_CHUNK, starts[b + 1] - row)
            position = begin + row - starts[b]
            chunk, where = q[row : row + rows], out[row : row + rows]
            if end == 0:
                where[...] = 0
            else:
                _prefill_chunk(chunk, where, kv_cache, block_tables[b], position, scale, window, softcap)


def _prefill_chunk(q, out, kv_cache, table, position, scale, window, softcap):
    """Rows q [n, H, D] of one sequence, the first at ``position``, against all keys that any of them sees."""
    n, H, D = q.shape
    K = kv_cache.shape[2]
    first, end = max(0, position + 1 - window) if window else 0, position + n
    keys, values = _gather(kv_cache, table, first, end)
    scaled = q.astype(np.float32, copy=False) * np.float32(scale)
    scaled = scaled.reshape(n, K, H // K, D).transpose(1, 0, 2, 3).reshape(K, -1, D)  # rows: token, then group
    bias = None
    if n > 1:
        distance = np.arange(position, end)[:, None] - np.arange(first, end)
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        bias = np.repeat(np.where(hidden, np.float32(-np.inf), np.float32(0.0)), H // K, axis=0)
    result = _attend(scaled, keys, values, softcap, bias)
    out[...] = result.reshape(K, n, H // K, D).transpose(1, 0, 2, 3).reshape(n, H, D)


# --- CUDA launchers -------------------------------------------------------------------------------------------------
@cache
def _check(op: str, H: int, K: int, D: int, S: int, scale: float, window: int, softcap: float) -> None:
    """What the kernels ask for beyond the contracts. Raises ContractError."""
    if D not in HEAD_DIMS:
        raise ContractError(f"{op}: head dim {D} is not allowed; allowed: {', '.join(map(str, HEAD_DIMS))}")
    _check_sizes(op, H, K, S, scale, window, softcap)


@cache
def _check_sizes(op: str, H: int, K: int, S: int, scale: float, window: int, softcap: float) -> None:
    """What the axis letters of the contracts cannot say. Raises ContractError."""
    if H % K:
        raise ContractError(f"{op}: {H} query heads are not a multiple of {K} key/value heads")
    if S & (S - 1) or not 8 <= S <= 128:
        raise ContractError(f"{op}: page size {S} is not allowed; allowed: a power of two, 8 to 128")
    for name, value, allowed in (
        ("scale", scale, scale > 0),
        ("window", window, window >= 0),
        ("softcap", softcap, softcap >= 0),
    ):
        if not allowed:
            raise ContractError(f"{op}: {name}={value} is not allowed; allowed: {'> 0' if name == 'scale' else '>= 0'}")


def _decode_launch(q, kv_cache, block_tables, context_lens, out, scale, window, softcap, arena):
    B, H, D = q.shape
    K, S = kv_cache.shape[2:4]
    _check("paged_decode", H, K, D, S, scale, window, softcap)
    if B == 0:
        return
    plan = decode_plan(D, q.itemsize, H // K, B, *device_limits(q.device.id))
    partial_out = arena.take("paged_decode_out", (2 * plan.workers * MAX_ROWS, D), np.float32)
    partial_lse = arena.take("paged_decode_lse", (2 * plan.workers * MAX_ROWS,), np.float32)
    arrays = (q, kv_cache, block_tables, context_lens, out, partial_out, partial_lse)
    sizes = [np.int32(n) for n in (B, H, K, block_tables.shape[1], S.bit_length() - 1, window)]
    if q.itemsize == 2:
        kernel = get(DECODE_SOURCE, "paged_decode", DTYPE=dtype_of(q).ctype, HEAD_DIM=D)
        sizes.append(np.int32(plan.stages))
    else:
        kernel = get(DECODE_F32_SOURCE, "paged_decode_f32", HEAD_DIM=D)
    args = (*arrays, *sizes, np.float32(scale), np.float32(softcap))
    launch(kernel, (plan.workers,), (plan.threads,), args, shared=plan.shared)
    merge = get(MERGE_SOURCE, "paged_decode_merge", DTYPE=dtype_of(q).ctype, TILE_SIZE=plan.tile)
    merge_args = (partial_out, partial_lse, context_lens, out, *(np.int32(n) for n in (B, H, K, D, window)))
    launch(merge, (plan.workers,), (128,), merge_args, shared=4 * (B + 1))


def _prefill_launch(q, kv_cache, block_tables, query_start, context_lens, out, scale, max_query_len, window, softcap):
    H, D = q.shape[1:]
    K, S = kv_cache.shape[2:4]
    _check("paged_prefill", H, K, D, S, scale, window, softcap)
    if q.itemsize == 2:
        kernel = get(PREFILL_SOURCE, "paged_prefill", DTYPE=dtype_of(q).ctype, HEAD_DIM=D)
        rows, buffers = (64, 2) if D > 128 else (128, 4)  # query rows, tiles of 64 keys or values
        shared = (rows + buffers * 64) * D * 2
    else:
        kernel = get(PREFILL_F32_SOURCE, "paged_prefill_f32", HEAD_DIM=D)
        rows, shared = 32, (32 + 32) * (D + 4) * 4
    arrays = (q, kv_cache, block_tables, query_start, context_lens, out)
    sizes = [np.int32(n) for n in (H, K, block_tables.shape[1], S.bit_length() - 1, window)]
    grid = (cdiv(max_query_len * (H // K), rows), K, context_lens.shape[0])
    launch(kernel, grid, (128,), (*arrays, *sizes, np.float32(scale), np.float32(softcap)), shared=shared)


# --- contracts ------------------------------------------------------------------------------------------------------
def _pool(rng, dtype, lens, K, D, S):
    """A pool whose pages belong to the sequences in shuffled order, and the block tables.

    Every slot that no sequence owns holds NaN, unused table entries are 0: a kernel that lets anything beyond a
    context into its result shows it.
    """
    counts = [-(-n // S) for n in lens]
    total = sum(counts)
    order = rng.permutation(np.arange(1, total + 2))[:total].astype(np.int32)  # page 0 stays nobody's: all NaN
    tables = np.zeros((len(lens), max(counts, default=0) + 1), np.int32)
    pool = np.full((total + 2, 2, K, S, D), np.nan, dtype)
    for b, n in enumerate(lens):
        tables[b, : counts[b]], order = order[: counts[b]], order[counts[b] :]
        slots = np.arange(n)
        pool[tables[b, slots // S], :, :, slots % S] = rng.standard_normal((n, 2, K, D)).astype(dtype)
    return pool, tables


def _sample_decode(rng, dtype, lens, H, K, D, S, window, softcap):
    kv_cache, tables = _pool(rng, dtype, lens, K, D, S)
    return {
        "q": rng.standard_normal((len(lens), H, D)).astype(dtype),
        "kv_cache": kv_cache,
        "block_tables": tables,
        "context_lens": np.array(lens, np.int32),
        "out": np.full((len(lens), H, D), np.nan, dtype),
        "scale": D**-0.5,
        "window": window,
        "softcap": softcap,
        "arena": Arena(np),
    }


def _sample_prefill(rng, dtype, lens, queries, H, K, D, S, window, softcap):
    """``queries[b]`` query tokens at the end of a context of ``lens[b]``."""
    kv_cache, tables = _pool(rng, dtype, lens, K, D, S)
    T = sum(queries)
    return {
        "q": rng.standard_normal((T, H, D)).astype(dtype),
        "kv_cache": kv_cache,
        "block_tables": tables,
        "query_start": np.cumsum([0, *queries]).astype(np.int32),
        "context_lens": np.array(lens, np.int32),
        "out": np.full((T, H, D), np.nan, dtype),
        "scale": D**-0.5,
        "max_query_len": max([*queries, 0]),
        "window": window,
        "softcap": softcap,
    }


def _sizes(names, *rows):
    return tuple(dict(zip(names, row, strict=True)) for row in rows)


_MIXED = (0, 1, 15, 16, 17, 300)
_DECODE_SIZES = _sizes(
    ("lens", "H", "K", "D", "S", "window", "softcap"),
    ((37, 5), 4, 2, 64, 16, 20, 30.0),
    ((1,), 1, 1, 32, 8, 0, 0.0),
    ((9, 40), 4, 2, 16, 8, 0, 0.0),
    ((200, 70), 20, 1, 64, 16, 0, 0.0),
    (_MIXED, 32, 8, 128, 16, 0, 0.0),
    (_MIXED, 8, 4, 256, 32, 64, 50.0),
    (_MIXED, 3, 1, 80, 16, 0, 0.0),
    (_MIXED, 10, 2, 96, 128, 0, 0.0),
    (_MIXED, 12, 12, 64, 16, 0, 0.0),
    (_MIXED, 14, 2, 112, 8, 7, 0.0),
    ((100, 33), 16, 1, 160, 16, 0, 0.0),
    ((65,), 32, 1, 192, 64, 0, 20.0),
    ((1030,), 16, 8, 128, 16, 0, 0.0),
    ((2500, 0, 700), 40, 8, 128, 16, 0, 0.0),
)
_PREFILL_SIZES = _sizes(
    ("lens", "queries", "H", "K", "D", "S", "window", "softcap"),
    ((37, 5), (37, 2), 4, 2, 64, 16, 20, 30.0),
    ((1,), (1,), 1, 1, 32, 8, 0, 0.0),
    ((90, 40), (70, 40), 4, 2, 16, 8, 0, 0.0),
    (_MIXED, _MIXED, 32, 8, 128, 16, 0, 0.0),
    (_MIXED, (0, 1, 4, 16, 1, 129), 16, 8, 128, 16, 0, 0.0),
    (_MIXED, (0, 1, 15, 7, 17, 300), 8, 4, 256, 32, 64, 50.0),
    (_MIXED, (0, 0, 15, 16, 17, 65), 3, 1, 80, 16, 0, 0.0),
    (_MIXED, _MIXED, 10, 2, 96, 128, 100, 0.0),
    (_MIXED, _MIXED, 12, 12, 64, 16, 0, 0.0),
    ((100, 64), (100, 63), 14, 2, 112, 8, 7, 0.0),
    ((100, 33), (50, 33), 4, 1, 160, 16, 0, 0.0),
    ((65,), (64,), 2, 1, 192, 64, 0, 20.0),
    ((513, 300), (513, 44), 8, 1, 64, 16, 130, 0.0),
)
_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
_SCALARS = {
    "scale": "multiplies q . k",
    "window": "keys a query sees, itself included; 0: all",
    "softcap": "scores become softcap * tanh(scores / softcap); 0: off",
}


def _decode_cost(q, kv_cache, context_lens, window, **_):
    """Every visible K and V element once, q and out once; two multiply-adds per query head and element pair."""
    lens = context_lens.astype(np.int64)
    seen = int((np.minimum(lens, window) if window else lens).sum())
    K, D = kv_cache.shape[2], kv_cache.shape[4]
    return 2 * seen * K * D * kv_cache.itemsize + 2 * q.nbytes, 4 * seen * q.shape[1] * D


def _prefill_cost(q, kv_cache, query_start, context_lens, window, **_):
    """As decode; a query at position p sees min(p + 1, window) keys."""
    K, D, seen, read = kv_cache.shape[2], kv_cache.shape[4], 0, 0
    for n, end in zip(np.diff(query_start).tolist(), context_lens.tolist(), strict=True):
        visible = np.arange(end - n + 1, end + 1)
        seen += int((np.minimum(visible, window) if window else visible).sum())
        read += min(end, window + n) if window else end
    return 2 * read * K * D * kv_cache.itemsize + 2 * q.nbytes, 4 * seen * q.shape[1] * D


_CACHE_ARGS = (
    Arg("kv_cache", "P 2 K S D", doc="page, key or value, head, token in page, dim"),
    Arg("block_tables", "B M", "int32", doc="page ids of each sequence in order; unused entries are not read"),
)

PAGED_DECODE = Op(
    name="paged_decode",
    formula="out[b] = softmax(scale * q[b] K_b^T) V_b over the last `window` (or all) of context_lens[b] positions",
    source="Dao 2023, Flash-Decoding; Kwon et al. 2023, arXiv:2309.06180 (pages)",
    args=(
        Arg("q", "B H D"),
        *_CACHE_ARGS,
        Arg("context_lens", "B", "int32", doc="tokens in the cache, the query's own included; 0 gives zeros"),
        Arg("out", "B H D", role="out"),
    ),
    scalars=_SCALARS,
    reference=_decode_reference,
    launch=_decode_launch,
    sample=_sample_decode,
    sizes=_DECODE_SIZES,
    cost=_decode_cost,
    tolerance=_TOLERANCE,
)

PAGED_PREFILL = Op(
    name="paged_prefill",
    formula="out[i] = softmax(scale * q[i] K^T) V over positions pos(i) - window < j <= pos(i) of i's sequence",
    source="Dao 2023, arXiv:2307.08691 (FlashAttention-2); Kwon et al. 2023, arXiv:2309.06180 (pages)",
    args=(
        Arg("q", "T H D"),
        *_CACHE_ARGS,
        Arg("query_start", "B+1", "int32", doc="first row of each sequence in q and out; rows outside stay untouched"),
        Arg("context_lens", "B", "int32", doc="tokens in the cache, all query tokens included"),
        Arg("out", "T H D", role="out"),
    ),
    scalars=_SCALARS | {"max_query_len": "at least the largest number of query rows of a sequence"},
    reference=_prefill_reference,
    launch=_prefill_launch,
    sample=_sample_prefill,
    sizes=_PREFILL_SIZES,
    cost=_prefill_cost,
    tolerance=_TOLERANCE,
)


# --- public functions -----------------------------------------------------------------------------------------------
def paged_decode(
    q: Array,
    kv_cache: Array,
    block_tables: Array,
    context_lens: Array,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    out: Array,
    arena: Any,
) -> Array:
    """One query token a sequence: ``out[b] = softmax(scale * q[b] K^T) V``; returns out [B, H, D].

    q [B, H, D] sits at position ``context_lens[b] - 1``; query head h reads key/value head ``h // (H/K)`` of kv_cache
    [P, 2, K, S, D] through block_tables [B, M] int32. ``window`` > 0: only the last ``window`` positions. ``softcap``
    > 0: scores are soft-capped (Gemma 2). context_lens[b] == 0 gives zeros. ``arena`` holds the partial results.
    The kernels started depend on shapes alone, so the call can be captured in a graph and replayed with other lengths
    up to M*S. D: one of HEAD_DIMS on a GPU; S: a power of two, 8 to 128. Raises ContractError.
    """
    PAGED_DECODE(
        q=q,
        kv_cache=kv_cache,
        block_tables=block_tables,
        context_lens=context_lens,
        out=out,
        scale=scale,
        window=window,
        softcap=softcap,
        arena=arena,
    )
    return out


def paged_prefill(
    q: Array,
    kv_cache: Array,
    block_tables: Array,
    query_start: Array,
    context_lens: Array,
    scale: float,
    max_query_len: int,
    *,
    window: int = 0,
    softcap: float = 0.0,
    out: Array,
) -> Array:
    """Causal attention of many query tokens a sequence against pages that already hold their keys; returns out.

    Rows query_start[b]..query_start[b+1] of q [T, H, D] are the last tokens of sequence b, whose context (cached
    prefix, earlier chunks and these tokens) has context_lens[b] tokens: row i sits at ``context_lens[b] - q_len + i``
    and sees the positions up to its own (only the last ``window`` of them when window > 0). Rows of q and out that
    belong to no sequence are left alone. ``max_query_len`` bounds the rows of a sequence. The rest as in
    :func:`paged_decode`.
    """
    PAGED_PREFILL(
        q=q,
        kv_cache=kv_cache,
        block_tables=block_tables,
        query_start=query_start,
        context_lens=context_lens,
        out=out,
        scale=scale,
        max_query_len=max_query_len,
        window=window,
        softcap=softcap,
    )
    return out
