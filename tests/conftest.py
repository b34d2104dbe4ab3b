"""Fixtures shared by all tests. Markers: gpu (needs an NVIDIA GPU), hf (needs torch and transformers)."""

from __future__ import annotations

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

    return module
