"""Philox4x32-10, a counter-based random generator: the NumPy twin of rawkernels/common/philox.cuh.

A counter-based generator has no state: the random words are a function of (key, counter). With the request's seed as
key and (vocabulary id, step) as counter, a draw depends on nothing else: not on the row, the batch or the order.

Source: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"; test vectors of Random123.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_ROUNDS = 10


def philox(counters: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The four random words of each counter: counters [N, 4, n] and keys [N, 2] uint32 -> [N, 4, n] uint32."""
    wide = counters.astype(np.uint64)
    even, odd = np.ascontiguousarray(wide[:, 0::2]), np.ascontiguousarray(wide[:, 1::2])  # words 0, 2 and 1, 3
    key = keys.astype(np.uint64)[:, :, None]
    product, high = np.empty_like(even), np.empty_like(even)
    for _ in range(_ROUNDS):
        np.multiply(even, _MULTIPLIERS, out=product)
        np.right_shift(product, _HIGH, out=high)
        np.bitwise_xor(high[:, ::-1], odd, out=even)
        np.bitwise_xor(even, key, out=even)
        np.bitwise_and(product[:, ::-1], _LOW, out=odd)
        key = (key + _WEYL) & _LOW
    words = np.empty(counters.shape, np.uint32)
    words[:, 0::2] = even
    words[:, 1::2] = odd
    return words


def random_words(seeds: np.ndarray, steps: np.ndarray, count: int) -> np.ndarray:
    """Random words [N, count] uint32: word i of row n is word i % 4 of counter (i // 4, steps[n], 0, 0), key seeds[n].

    seeds [N] uint64, steps [N] int32.
    """
    N, groups = len(seeds), -(-count // 4)
    counters = np.zeros((N, 4, groups), np.uint32)
    counters[:, 0] = np.arange(groups, dtype=np.uint32)
    counters[:, 1] = steps.astype(np.uint32)[:, None]
    keys = np.stack([seeds & _LOW, seeds >> _HIGH], axis=1).astype(np.uint32)
    words = philox(counters, keys)
    return words.transpose(0, 2, 1).reshape(N, 4 * groups)[:, :count]


def gumbel(words: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise, float32, from uint32 words: -log(-log(1 - u)) with u = (word + 1/2) / 2^32.

    The small end of u decides the large noise values, and float32 is finest there: the largest noise is 22.9 and its
    steps are far finer than the gaps that matter in a vocabulary of 2^18. u stays below 1, so no infinity arises.
    """
    u = words.astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-32)
    np.minimum(u, np.float32(1 - 2.0**-24), out=u)
    np.negative(u, out=u)
    np.log1p(u, out=u)
    np.negative(u, out=u)
    np.log(u, out=u)
    return np.negative(u, out=u)
