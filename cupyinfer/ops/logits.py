"""What happens to logits around the draw: penalties and biases before it, log-probabilities beside it."""

from __future__ import annotations

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.errors import ContractError
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.kernels import NULL, KernelSource, cdiv, get, launch
from cupyinfer.types import Array

ADJUST_SOURCE = KernelSource("logits/adjust.cu", ("apply_penalties", "apply_bias"))
LOGPROBS_SOURCE = KernelSource("logits/logprobs.cu", ("unscaled_bucket_summary", "logprobs"))
MAX_TOP = 20
MAX_VOCAB = 1 << 18  # as in common/vocab.cuh
_BUCKETS = 1024


# --- NumPy references -----------------------------------------------------------------------------------------------
def _apply_penalties_reference(logits, rows, counts, repetition, presence, frequency):
    active = (rows >= 0) & ((repetition != 1) | (presence != 0) | (frequency != 0))
    for n in np.flatnonzero(active):
        seen = np.flatnonzero(counts[rows[n]])
        times = counts[rows[n], seen] >> 1
        x = logits[n, seen]
        x = np.where(x > 0, x / repetition[n], x * repetition[n])
        x -= frequency[n] * times.astype(np.float32) + presence[n] * (times > 0)
        logits[n, seen] = x


def _apply_bias_reference(logits, bias_rows, bias_ids, bias_values):
    used = bias_rows >= 0
    np.add.at(logits, (bias_rows[used], bias_ids[used]), bias_values[used])


def _logprobs_reference(logits, tokens, chosen, ranks, top_ids, top_logprobs, top_n, arena):
    x = np.where(np.isnan(logits), np.float32(-np.inf), logits)
    N, V = x.shape
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = x - x.max(axis=1, keepdims=True)
        total = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        logp = shifted - total
    valid = (tokens >= 0) & (tokens < V)
    rows, ids = np.arange(N), np.where(valid, tokens, 0)
    chosen[...] = np.where(valid, logp[rows, ids], np.float32(np.nan))
    ranks[...] = np.where(valid, 1 + (x > x[rows, ids][:, None]).sum(axis=1), 0)
    if top_n:
        threshold = np.partition(x, V - top_n, axis=1)[:, V - top_n]
        for n in range(N):
            likely = np.flatnonzero(x[n] >= threshold[n])
            top_ids[n] = likely[np.argsort(-x[n, likely], kind="stable")][:top_n]
        top_logprobs[...] = np.take_along_axis(logp, top_ids, axis=1)


# --- CUDA launchers -------------------------------------------------------------------------------------------------
def _apply_penalties_launch(logits, rows, counts, repetition, presence, frequency):
    N, V = logits.shape
    args = (logits, rows, counts, repetition, presence, frequency, np.int32(V))
    launch(get(ADJUST_SOURCE, "apply_penalties"), (cdiv(V, 1024), N), (256,), args)


def _apply_bias_launch(logits, bias_rows, bias_ids, bias_values):
    J = len(bias_rows)
    args = (logits, bias_rows, bias_ids, bias_values, np.int32(logits.shape[1]), np.int32(J))
    launch(get(ADJUST_SOURCE, "apply_bias"), (cdiv(J, 256),), (256,), args)


def _logprobs_launch(logits, tokens, chosen, ranks, top_ids, top_logprobs, top_n, arena):
    N, V = logits.shape
    if N == 0:
        return
    if arena is None:
        raise ContractError("logprobs: arena=None is not allowed on the GPU; allowed: an Arena for its scratch arrays")
    maxima = arena.take("vocab.maxima", (N, _BUCKETS), np.float32)
    sums = arena.take("vocab.sums", (N, _BUCKETS), np.float32)
    summary = get(LOGPROBS_SOURCE, "unscaled_bucket_summary")
    launch(summary, (_BUCKETS // 8, N), (256,), (logits, maxima, sums, np.int32(V)))
    top = (top_ids, top_logprobs) if top_n else (NULL, NULL)
    args = (logits, tokens, maxima, sums, chosen, ranks, *top, np.int32(V), np.int32(top_n))
    launch(get(LOGPROBS_SOURCE, "logprobs"), (N,), (1024,), args)


# --- contracts ------------------------------------------------------------------------------------------------------
def _sample_penalties(rng, dtype, N, V, R):
    counts = rng.integers(0, 7, (R, V)).astype(np.int32)
    counts[rng.random((R, V)) < 0.5] = 0
    return {
        "logits": rng.standard_normal((N, V)).astype(np.float32),
        "rows": rng.permutation(np.arange(-1, R))[:N].astype(np.int32),
        "counts": counts,
        "repetition": np.where(np.arange(N) % 3 == 0, 1.0, 1.3).astype(np.float32),
        "presence": np.where(np.arange(N) % 2 == 0, 0.0, 0.7).astype(np.float32),
        "frequency": np.where(np.arange(N) % 3 == 1, -0.25, 0.0).astype(np.float32),
    }


def _sample_bias(rng, dtype, N, V, J):
    cells = rng.permutation(N * V)[:J]  # distinct cells: the order of additions is then fixed
    rows = np.where(np.arange(J) % 5 == 4, -1, cells // V)
    values = np.where(np.arange(J) % 3 == 0, -np.inf, rng.standard_normal(J))
    return {
        "logits": rng.standard_normal((N, V)).astype(np.float32),
        "bias_rows": rows.astype(np.int32),
        "bias_ids": (cells % V).astype(np.int32),
        "bias_values": values.astype(np.float32),
    }


def _sample_logprobs(rng, dtype, N, V, top_n):
    return {
        "logits": (3 * rng.standard_normal((N, V))).astype(np.float32),
        "tokens": rng.integers(0, V, N).astype(np.int32),
        "chosen": np.full(N, np.nan, np.float32),
        "ranks": np.full(N, -1, np.int32),
        "top_ids": np.full((N, top_n), -1, np.int32),
        "top_logprobs": np.full((N, top_n), np.nan, np.float32),
        "top_n": top_n,
        "arena": Arena(np),
    }


APPLY_PENALTIES = Op(
    name="apply_penalties",
    formula="x = x / repetition if x > 0 else x * repetition, for tokens seen; "
    "x -= frequency * times + presence * (times > 0), times = counts >> 1",
    source="CTRL, arXiv:1909.05858 (repetition, as Hugging Face); OpenAI API (presence, frequency: generated only)",
    args=(
        Arg("logits", "N V", "float32", role="inout"),
        Arg("rows", "N", "int32", doc="row of counts, -1: leave this row of logits alone"),
        Arg("counts", "R V", "int32", doc="2 * times generated + (1 if in the prompt)"),
        Arg("repetition", "N", "float32"),
        Arg("presence", "N", "float32"),
        Arg("frequency", "N", "float32"),
    ),
    reference=_apply_penalties_reference,
    launch=_apply_penalties_launch,
    sample=_sample_penalties,
    sizes=(
        {"N": 1, "V": 7, "R": 3},
        {"N": 8, "V": 4097, "R": 9},
        {"N": 3, "V": 50257, "R": 4},
        {"N": 0, "V": 64, "R": 2},
    ),
    cost=lambda logits, **_: (2 * logits.nbytes, 3 * logits.size),
    dtypes=("float32",),
)

APPLY_BIAS = Op(
    name="apply_bias",
    formula="logits[bias_rows[j], bias_ids[j]] += bias_values[j]",
    args=(
        Arg("logits", "N V", "float32", role="inout"),
        Arg("bias_rows", "J", "int32", doc="-1: skip"),
        Arg("bias_ids", "J", "int32"),
        Arg("bias_values", "J", "float32", doc="-inf forbids the token"),
    ),
    reference=_apply_bias_reference,
    launch=_apply_bias_launch,
    sample=_sample_bias,
    sizes=({"N": 1, "V": 5, "J": 1}, {"N": 6, "V": 1001, "J": 700}, {"N": 2, "V": 9, "J": 0}),
    cost=lambda bias_rows, **_: (20 * max(1, len(bias_rows)), len(bias_rows)),
    dtypes=("float32",),
)

LOGPROBS = Op(
    name="logprobs",
    formula="chosen = log_softmax(logits)[tokens]; ranks = 1 + #(logits > logits[tokens]); top = the top_n largest",
    source="OpenAI API logprobs, top_logprobs",
    args=(
        Arg("logits", "N V", "float32"),
        Arg("tokens", "N", "int32"),
        Arg("chosen", "N", "float32", role="out"),
        Arg("ranks", "N", "int32", role="out"),
        Arg("top_ids", "N top", "int32", role="out"),
        Arg("top_logprobs", "N top", "float32", role="out"),
    ),
    scalars={"top_n": "0 to 20", "arena": "scratch"},
    reference=_logprobs_reference,
    launch=_logprobs_launch,
    sample=_sample_logprobs,
    sizes=(
        {"N": 1, "V": 1, "top_n": 1},
        {"N": 5, "V": 33, "top_n": 20},
        {"N": 32, "V": 4096, "top_n": 5},
        {"N": 3, "V": 50257, "top_n": 0},
        {"N": 4, "V": 151936, "top_n": 20},
        {"N": 0, "V": 64, "top_n": 2},
    ),
    cost=lambda logits, **_: (logits.nbytes, 3 * logits.size),
    dtypes=("float32",),
)


# --- public functions -----------------------------------------------------------------------------------------------
def apply_penalties(
    logits: Array, rows: Array, counts: Array, repetition: Array, presence: Array, frequency: Array
) -> Array:
    """Penalise, in place, the tokens that a sequence has seen; returns logits [N, V] float32.

    counts [R, V] int32 holds 2 * times generated + (1 if in the prompt); rows [N] int32 picks its row, -1 leaves the
    logits alone. repetition [N] acts on tokens of prompt and output (logit > 0 divided, else multiplied), then
    frequency [N] (times generated) and presence [N] (once) are subtracted for generated tokens. Off: 1, 0, 0.
    """
    APPLY_PENALTIES(
        logits=logits, rows=rows, counts=counts, repetition=repetition, presence=presence, frequency=frequency
    )
    return logits


def apply_bias(logits: Array, bias_rows: Array, bias_ids: Array, bias_values: Array) -> Array:
    """``logits[bias_rows[j], bias_ids[j]] += bias_values[j]`` in place; bias_* [J], rows of -1 are skipped.

    -inf forbids a token (logit_bias, min_tokens). A cell may be named more than once. Returns logits [N, V] float32.
    """
    APPLY_BIAS(logits=logits, bias_rows=bias_rows, bias_ids=bias_ids, bias_values=bias_values)
    return logits


def logprobs(
    logits: Array,
    tokens: Array,
    top_n: int,
    *,
    chosen: Array,
    ranks: Array,
    top_ids: Array,
    top_logprobs: Array,
    arena: Arena | None = None,
) -> None:
    """Log-probabilities of the tokens drawn and of the top_n most likely ones, from raw logits [N, V] float32.

    tokens [N] int32 (an id outside the vocabulary gives chosen NaN, rank 0), chosen [N] float32, ranks [N] int32 (1:
    the most likely), top_ids [N, top_n] int32 and top_logprobs [N, top_n] float32 in falling order, ties by lower id.
    top_n: 0 to min(20, V); V is at most 2^18. NaN counts as -inf. arena: scratch, needed on the GPU.
    """
    V = logits.shape[-1]
    if not 0 <= top_n <= min(MAX_TOP, V):
        raise ContractError(f"logprobs: top_n={top_n} is not allowed; allowed: 0 to {min(MAX_TOP, V)}")
    if V > MAX_VOCAB:
        raise ContractError(f"logprobs: V={V} is not allowed; allowed: at most {MAX_VOCAB}")
    if top_ids.shape[-1] != top_n:
        raise ContractError(f"logprobs: top_ids has shape {top_ids.shape}; allowed: [N, top_n={top_n}]")
    LOGPROBS(
        logits=logits,
        tokens=tokens,
        chosen=chosen,
        ranks=ranks,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        top_n=top_n,
        arena=arena,
    )
