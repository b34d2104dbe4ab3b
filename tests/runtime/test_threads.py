"""BLAS threads: set for a block, restored after it, errors included."""

from __future__ import annotations

import pytest

from cupyinfer.runtime import threads


def counts() -> list[int]:
    return [library.get_num_threads() for library in threads._libraries()]


def test_threads_are_restored():
    before = counts()
    assert before, "NumPy's BLAS was not found"
    with pytest.raises(KeyError), threads.blas_threads(1):
        assert counts() == [1] * len(before)
        raise KeyError
    assert counts() == before


def test_only_large_work_is_shared():
    assert not threads.wants_all_threads(1, 256 * 1408)  # the demo model, decoding
    assert not threads.wants_all_threads(256, 256 * 4096)  # a full batch of it, output head
    assert threads.wants_all_threads(2048, 256 * 1408)  # and reading many prompts
    assert threads.wants_all_threads(1, 2048 * 16384)  # Llama-3.2-1B
