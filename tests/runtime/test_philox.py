"""Philox4x32-10 against Random123's test vectors, and the Gumbel noise made of it."""

from __future__ import annotations

import numpy as np
import pytest

from cupyinfer.runtime.philox import gumbel, philox, random_words

ONES = 0xFFFFFFFF
VECTORS = [  # counter, key, words: Random123's kat_vectors for philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", VECTORS)
def test_known_answers(counter, key, words):
    got = philox(np.array(counter, np.uint32)[None, :, None], np.array(key, np.uint32)[None])
    assert got.ravel().tolist() == list(words)


def test_many_counters_and_keys_at_once_give_what_each_gives_alone():
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 1 << 32, (3, 4, 5), dtype=np.uint32)
    keys = rng.integers(0, 1 << 32, (3, 2), dtype=np.uint32)
    got = philox(counters, keys)
    for n in range(3):
        for i in range(5):
            alone = philox(counters[n : n + 1, :, i : i + 1], keys[n : n + 1])
            assert np.array_equal(got[n, :, i], alone[0, :, 0])


def test_words_of_a_row_follow_the_documented_layout():
    seed, step = 0x0123456789ABCDEF, 77
    got = random_words(np.array([seed], np.uint64), np.array([step], np.int32), 11)
    assert got.shape == (1, 11)
    for i in range(11):
        counter = np.array([i // 4, step, 0, 0], np.uint32)[None, :, None]
        key = np.array([seed & ONES, seed >> 32], np.uint32)[None]
        assert got[0, i] == philox(counter, key)[0, i % 4, 0]


def test_both_halves_of_the_seed_and_the_step_matter():
    seeds = np.array([1, 1 + (1 << 32), 2, 1], np.uint64)
    words = random_words(seeds, np.array([0, 0, 0, 1], np.int32), 64)
    assert len({row.tobytes() for row in words}) == 4


def test_gumbel_is_finite_at_the_ends_and_has_the_right_moments():
    ends = gumbel(np.array([0, 1, ONES - 1, ONES], np.uint32))
    assert np.isfinite(ends).all() and ends[0] > ends[1] > 20 and ends[2] < -2.5
    seeds = np.arange(200, dtype=np.uint64)
    noise = gumbel(random_words(seeds, np.zeros(200, np.int32), 5000)).astype(np.float64)
    assert abs(noise.mean() - np.euler_gamma) < 0.005
    assert abs(noise.var() - np.pi**2 / 6) < 0.01
    quantiles = np.array([0.01, 0.25, 0.5, 0.9, 0.999])
    assert np.allclose(np.quantile(noise, quantiles), -np.log(-np.log(quantiles)), atol=0.05)
