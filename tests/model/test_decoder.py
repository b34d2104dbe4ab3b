"""The decoder against golden outputs of Hugging Face transformers, one tiny checkpoint a family."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from paged_driver import PagedDriver, Sequence

from cupyinfer.model.loader import load_model
from cupyinfer.runtime.device import choose_device

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
FAMILIES = 12
LENGTHS = (1, 17, 300)
TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2, "float16": 2e-2}  # relative 2-norm of the logits


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return dict(arrays)


@cache
def decoder(name: str, device: str, dtype: str):
    return load_model(GOLDEN / name, choose_device(device), dtype)[1]


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64)))


def check_logits(name: str, device: str, dtype: str) -> None:
    """Logits of several positions of each prompt within the tolerance: each row in float32, all together in 16 bits."""
    data, kept, wanted = golden(name), [], []
    for length in LENGTHS:
        driver = PagedDriver(decoder(name, device, dtype))
        logits = driver.step([(Sequence(data[f"prompt_{length}"].tolist()), length)], every_row=True)
        kept += list(logits[data[f"rows_{length}"]])
        wanted += list(data[f"logits_{length}"])
    rows = zip(kept, wanted, strict=True) if dtype == "float32" else [(np.stack(kept), np.stack(wanted))]
    errors = [relative_error(got, want) for got, want in rows]
    assert all(error <= TOLERANCE[dtype] for error in errors), f"{name} {dtype}: relative errors {errors}"


def check_greedy(name: str, device: str, chunk: int = 10**9, block_size: int = 16) -> None:
    """Each prompt alone gives the golden tokens."""
    data = golden(name)
    for length in LENGTHS:
        driver = PagedDriver(decoder(name, device, "float32"), num_pages=1024 // block_size, block_size=block_size)
        want = data[f"tokens_{length}"].tolist()
        _, (tokens,) = driver.greedy([data[f"prompt_{length}"]], len(want), chunk)
        assert tokens == want, f"{name}, prompt {length}: differs from token {mismatch(tokens, want)} on"


def check_mixed(name: str, device: str) -> None:
    """32 sequences in one batch, prompts of all lengths prefilled in chunks beside decodes: the same tokens."""
    data = golden(name)
    lengths = [LENGTHS[i % 3] for i in range(32)]
    driver = PagedDriver(decoder(name, device, "float32"), num_pages=512, block_size=16, seed=1)
    logits, tokens = driver.greedy([data[f"prompt_{n}"] for n in lengths], 64, chunk=37)
    for i, n in enumerate(lengths):
        want = data[f"tokens_{n}"].tolist()
        assert tokens[i] == want, f"{name}, sequence {i}, prompt {n}: differs from token {mismatch(tokens[i], want)} on"
        assert relative_error(logits[i], data[f"logits_{n}"][-1]) <= TOLERANCE["float32"]


def mismatch(tokens: list[int], want: list[int]) -> int:
    return next(i for i, (a, b) in enumerate(zip(tokens, want, strict=True)) if a != b)


def test_every_family_has_a_golden():
    assert len(NAMES) == FAMILIES


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    check_logits(name, "cpu", "float32")


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens(name):
    check_greedy(name, "cpu")


@pytest.mark.parametrize("chunk, block_size", [(1, 8), (64, 32)])
def test_chunked_prefill(chunk, block_size):
    check_greedy("gemma3", "cpu", chunk, block_size)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_batch(name):
    check_mixed(name, "cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_logits_on_the_cpu(name, dtype):
    check_logits(name, "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_float32_on_the_gpu(name):
    check_logits(name, "cuda", "float32")
    check_greedy(name, "cuda")
    check_mixed(name, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("chunk, block_size", [(1, 8), (64, 32)])
@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_chunked_prefill_on_the_gpu(name, chunk, block_size):
    check_greedy(name, "cuda", chunk, block_size)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_logits_on_the_gpu(name, dtype):
    check_logits(name, "cuda", dtype)
