"""The draw: one token per row of logits, greedy or random, from all tokens or from the likely ones.

Random rows use the Gumbel-max trick: argmax(logits / temperature + Gumbel noise) is distributed as
softmax(logits / temperature). The noise of a token is a function of (seed, step, token id) alone (runtime/philox.py),
so a request draws the same tokens whatever its row and its neighbours are.

A temperature below 1e-5 means greedy: the lowest id among the largest logits. NaN counts as -inf.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupyinfer.contract import Arg, Op
from cupyinfer.errors import ContractError
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.kernels import KernelSource, cdiv, get, launch
from cupyinfer.runtime.philox import gumbel, random_words
from cupyinfer.types import Array

SIMPLE_SOURCE = KernelSource("sampling/sample_simple.cu", ("sample_partial", "sample_final"))
FILTERED_SOURCE = KernelSource("sampling/sample_filtered.cu", ("bucket_summary", "sample_filtered"))
GREEDY_BELOW = np.float32(1e-5)  # as in common/vocab.cuh
MAX_VOCAB = 1 << 18  # 1024 buckets of 8 lines of 32 logits, as in common/vocab.cuh
_BUCKETS = 1024
_MASS = np.float32(2.0**40)  # probabilities are summed as integers of this scale: any order gives the same sum


# --- NumPy references -----------------------------------------------------------------------------------------------
def _clean(logits: np.ndarray) -> np.ndarray:
    """NaN counts as -inf."""
    bad = np.isnan(logits)
    return np.where(bad, np.float32(-np.inf), logits) if bad.any() else logits


def _noise(seeds: np.ndarray, steps: np.ndarray, V: int) -> np.ndarray:
    return gumbel(random_words(seeds, steps, V))


def _sample_simple_reference(logits, temperature, seeds, steps, tokens, arena):
    logits = _clean(logits)
    random = np.flatnonzero(temperature >= GREEDY_BELOW)
    if len(random) < len(tokens):
        tokens[...] = logits.argmax(axis=1)
    for n in random:  # row by row: the noise of one row stays in the cache
        scaled = logits[n] / temperature[n]
        scaled += _noise(seeds[n : n + 1], steps[n : n + 1], logits.shape[1])[0]
        tokens[n] = scaled.argmax()


def _top_k_threshold(x: np.ndarray, k: int) -> np.float32:
    """The k-th largest value; -inf when top-k is off."""
    V = len(x)
    return np.partition(x, V - k)[V - k] if 0 < k < V else np.float32(-np.inf)


def _top_p_threshold(x: np.ndarray, p: np.float32) -> np.float32:
    """The largest t such that softmax(x) puts at least p on the values >= t; -inf when top-p is off."""
    if not p < 1:
        return np.float32(-np.inf)
    order = np.sort(x)[::-1]
    with np.errstate(invalid="ignore"):
        weights = np.where(order == order[0], np.float32(1), np.exp(order - order[0]))  # inf - inf is NaN
    mass = np.cumsum((weights * _MASS).astype(np.uint64))
    target = max(1.0, np.ceil(np.float64(p) * np.float64(mass[-1])))
    reached = np.searchsorted(mass, np.uint64(target))
    return order[min(reached, len(order) - 1)]


def _threshold(x: np.ndarray, k: int, p: np.float32, m: np.float32) -> np.float32:
    """The smallest scaled logit that top-k, then top-p, then min-p keep: all three keep whole levels of value."""
    threshold = _top_k_threshold(x, k)
    threshold = max(threshold, _top_p_threshold(x[x >= threshold], p))
    return max(threshold, x.max() + np.log(min(m, np.float32(1)))) if m > 0 else threshold


def _sample_filtered_reference(logits, temperature, top_k, top_p, min_p, seeds, steps, tokens, arena):
    logits = _clean(logits)
    for n in range(len(tokens)):
        if temperature[n] < GREEDY_BELOW or logits[n].max() == -np.inf:
            tokens[n] = logits[n].argmax()
            continue
        x = logits[n] / temperature[n]
        noisy = x + _noise(seeds[n : n + 1], steps[n : n + 1], logits.shape[1])[0]
        noisy[x < _threshold(x, int(top_k[n]), top_p[n], min_p[n])] = -np.inf
        tokens[n] = noisy.argmax()


# --- CUDA launchers -------------------------------------------------------------------------------------------------
def _splits(N: int, V: int) -> int:
    """Blocks that share one row: enough to fill the GPU when there are few rows; depends on the shape only."""
    return min(cdiv(V, 4096), max(1, 1056 // N))


def _need_arena(name: str, arena: Arena | None) -> Arena:
    if arena is None:
        raise ContractError(f"{name}: arena=None is not allowed on the GPU; allowed: an Arena for its scratch arrays")
    return arena


def _sample_simple_launch(logits, temperature, seeds, steps, tokens, arena):
    N, V = logits.shape
    if N == 0:
        return
    splits = _splits(N, V)
    partial = _need_arena("sample_simple", arena).take("sample_simple.partial", (N, splits), np.uint64)
    chunk = cdiv(V, splits * 4) * 4  # whole groups of four logits: they share one Philox call
    args = (logits, temperature, seeds, steps, partial, np.int32(V), np.int32(chunk))
    launch(get(SIMPLE_SOURCE, "sample_partial"), (splits, N), (256,), args)
    launch(get(SIMPLE_SOURCE, "sample_final"), (N,), (32,), (partial, tokens, np.int32(splits)))


def _sample_filtered_launch(logits, temperature, top_k, top_p, min_p, seeds, steps, tokens, arena):
    N, V = logits.shape
    if N == 0:
        return
    arena = _need_arena("sample_filtered", arena)
    maxima = arena.take("vocab.maxima", (N, _BUCKETS), np.float32)
    sums = arena.take("vocab.sums", (N, _BUCKETS), np.float32)
    launch(
        get(FILTERED_SOURCE, "bucket_summary"),
        (_BUCKETS // 8, N),
        (256,),
        (logits, temperature, maxima, sums, np.int32(V)),
    )
    args = (logits, temperature, top_k, top_p, min_p, seeds, steps, maxima, sums, tokens, np.int32(V))
    launch(get(FILTERED_SOURCE, "sample_filtered"), (N,), (1024,), args)


# --- contracts ------------------------------------------------------------------------------------------------------
def _sample_rows(rng, dtype, N, V):
    return {
        "logits": (3 * rng.standard_normal((N, V))).astype(np.float32),
        "temperature": np.array([(0.0, 0.6, 1.0, 3.0)[n % 4] for n in range(N)], np.float32),
        "seeds": rng.integers(0, 1 << 63, N).astype(np.uint64) * np.uint64(2) + np.uint64(1),
        "steps": rng.integers(0, 5000, N).astype(np.int32),
        "tokens": np.full(N, -1, np.int32),
        "arena": Arena(np),
    }


_FILTERS = (  # top_k, top_p, min_p
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 1.0, 0.1),
    (50, 0.8, 0.02),
    (3000, 1.0, 0.0),
    (3000, 0.999, 0.0),
    (-1, 0.01, 0.0),
    (5, 0.5, 0.5),
    (0, 0.95, 0.0),
)


def _sample_filtered_rows(rng, dtype, N, V):
    inputs = _sample_rows(rng, dtype, N, V)
    k, p, m = zip(*(_FILTERS[n % len(_FILTERS)] for n in range(N)), strict=True) if N else ((), (), ())
    filters: dict[str, Any] = {
        "top_k": np.array(k, np.int32),
        "top_p": np.array(p, np.float32),
        "min_p": np.array(m, np.float32),
    }
    return inputs | filters


_ROW_ARGS = (
    Arg("logits", "N V", "float32"),
    Arg("temperature", "N", "float32", doc="below 1e-5: greedy"),
)
_DRAW_ARGS = (
    Arg("seeds", "N", "uint64", doc="of each request"),
    Arg("steps", "N", "int32", doc="tokens the request has generated so far"),
    Arg("tokens", "N", "int32", role="out"),
)

SAMPLE_SIMPLE = Op(
    name="sample_simple",
    formula="tokens[n] = argmax_v(logits[n, v] / temperature[n] + gumbel(seeds[n], steps[n], v))",
    source="Gumbel 1954; Salmon et al. 2011 (Philox)",
    args=(*_ROW_ARGS, *_DRAW_ARGS),
    scalars={"arena": "scratch"},
    reference=_sample_simple_reference,
    launch=_sample_simple_launch,
    sample=_sample_rows,
    sizes=(
        {"N": 1, "V": 1},
        {"N": 5, "V": 33},
        {"N": 32, "V": 4096},
        {"N": 3, "V": 50257},
        {"N": 4, "V": 151936},
        {"N": 2, "V": 262144},
        {"N": 300, "V": 1023},
        {"N": 0, "V": 64},
    ),
    cost=lambda logits, **_: (logits.nbytes, 4 * logits.size),
    dtypes=("float32",),
)

SAMPLE_FILTERED = Op(
    name="sample_filtered",
    formula="as sample_simple, among the tokens that top-k, then top-p, then min-p keep",
    source="Hugging Face TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper, in this order",
    args=(
        *_ROW_ARGS,
        Arg("top_k", "N", "int32", doc="<= 0 or >= V: off"),
        Arg("top_p", "N", "float32", doc=">= 1: off"),
        Arg("min_p", "N", "float32", doc="<= 0: off"),
        *_DRAW_ARGS,
    ),
    scalars={"arena": "scratch"},
    reference=_sample_filtered_reference,
    launch=_sample_filtered_launch,
    sample=_sample_filtered_rows,
    sizes=(
        {"N": 1, "V": 1},
        {"N": 33, "V": 257},
        {"N": 44, "V": 4096},
        {"N": 44, "V": 8191},
        {"N": 44, "V": 50257},
        {"N": 11, "V": 151936},
        {"N": 2, "V": 262144},
        {"N": 0, "V": 64},
    ),
    cost=lambda logits, **_: (logits.nbytes, 4 * logits.size),
    dtypes=("float32",),
)


# --- public functions -----------------------------------------------------------------------------------------------
def sample_simple(
    logits: Array,
    temperature: Array,
    seeds: Array,
    steps: Array,
    *,
    tokens: Array,
    arena: Arena | None = None,
) -> Array:
    """Draw ``tokens[n]`` from softmax(logits[n] / temperature[n]); greedy where temperature[n] < 1e-5.

    logits [N, V] float32 (NaN counts as -inf; a row of nothing else gives token 0), temperature [N] float32, seeds [N]
    uint64, steps [N] int32, tokens [N] int32 out. The draw is a function of the row's logits, temperature, seed and
    step alone. arena: scratch, needed on the GPU. Raises ContractError.
    """
    SAMPLE_SIMPLE(logits=logits, temperature=temperature, seeds=seeds, steps=steps, tokens=tokens, arena=arena)
    return tokens


def sample_filtered(
    logits: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seeds: Array,
    steps: Array,
    *,
    tokens: Array,
    arena: Arena | None = None,
) -> Array:
    """As :func:`sample_simple`, among the tokens that the filters keep; top_k [N] int32, top_p and min_p [N] float32.

    In this order, on x = logits / temperature: top-k keeps the k largest x; top-p keeps the smallest set, from the
    largest on, whose share of softmax over the kept tokens reaches top_p; min-p keeps x >= max(x) + log(min_p), that
    is a probability of at least min_p times the largest. Tokens of equal x are kept or dropped together, so a tie at a
    threshold is kept. Off: top_k <= 0 or >= V, top_p >= 1, min_p <= 0. V is at most 2^18. Raises ContractError.
    """
    if logits.ndim == 2 and logits.shape[1] > MAX_VOCAB:
        raise ContractError(f"sample_filtered: V={logits.shape[1]} is not allowed; allowed: at most {MAX_VOCAB}")
    SAMPLE_FILTERED(
        logits=logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        steps=steps,
        tokens=tokens,
        arena=arena,
    )
    return tokens
