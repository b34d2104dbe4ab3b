"""Fixtures shared by all tests. Markers: gpu (needs an NVIDIA GPU), hf (needs torch and transformers)."""

from __future__ import annotations

import os

import pytest

from cupyinfer.runtime.device import gpu_count


def pytest_collection_modifyitems(config, items):
    if gpu_count()[0] == 0:
        skip = pytest.mark.skip(reason=f"needs a GPU: {gpu_count()[1]}")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def cupy():
    import cupy as module

    if os.environ.get("CUPYINFER_TEST_NO_POOL"):  # compute-sanitizer then sees the true bounds of every array
        module.cuda.set_allocator(None)
    return module
