"""The device state of the sampler against slow loops."""

from __future__ import annotations

import numpy as np

from cupyinfer.ops.sampling_state import count_prompt, count_tokens, store_last


def i32(*values):
    return np.array(values, np.int32)


def test_counts_follow_a_sequence():
    counts = np.zeros((3, 6), np.int32)
    count_prompt(i32(4, 4, 1, 4, 0), i32(1, 1, 1, 2, -1), counts)
    count_tokens(i32(4, 2, 5), i32(1, 2, -1), counts)
    count_tokens(i32(4), i32(1), counts)
    assert counts.tolist() == [[0] * 6, [0, 1, 0, 0, 5, 0], [0, 0, 2, 0, 1, 0]]


def test_marking_a_prompt_twice_changes_nothing():
    rng = np.random.default_rng(0)
    ids, rows = rng.integers(0, 9, 100).astype(np.int32), rng.integers(-1, 4, 100).astype(np.int32)
    once = count_prompt(ids, rows, np.zeros((4, 9), np.int32)).copy()
    assert np.array_equal(count_prompt(ids, rows, once.copy()), once)
    assert set(np.unique(once).tolist()) == {0, 1}


def test_repeated_tokens_all_count():
    counts = np.zeros((1, 3), np.int32)
    count_tokens(i32(2, 2, 2, 0), i32(0, 0, 0, 0), counts)
    assert counts.tolist() == [[2, 0, 6]]


def test_ids_outside_the_vocabulary_are_skipped():
    counts = np.zeros((2, 3), np.int32)
    count_tokens(i32(3, -1, 2), i32(0, 0, 1), counts)
    count_prompt(i32(7, -2, 0), i32(1, 1, 1), counts)
    assert counts.tolist() == [[0, 0, 0], [1, 0, 2]]


def test_store_last_writes_its_rows_only():
    last = i32(10, 11, 12, 13)
    assert store_last(i32(7, 8, 9), i32(2, -1, 0), last_tokens=last).tolist() == [9, 11, 7, 13]
