"""Paged attention: the references against a loop over positions in double precision, their limits, the decode plan."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cupyinfer.errors import ContractError
from cupyinfer.ops import attention
from cupyinfer.ops.attention import (
    HEAD_DIMS,
    MERGE_SOURCE,
    PAGED_DECODE,
    PAGED_PREFILL,
    _check,
    paged_decode,
    paged_prefill,
)
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.attention_plan import decode_plan

H100, ADA = (132, 233472), (128, 102400)  # (SMs, bytes of shared memory per SM)


def slow_query(q, kv_cache, table, position, scale, window, softcap):
    """One query row [H, D] at ``position``, key by key in double precision."""
    H, D = q.shape
    _, _, K, S, _ = kv_cache.shape
    out = np.zeros((H, D))
    seen = [j for j in range(position + 1) if not window or j > position - window]
    for h in range(H):
        weights, values = [], []
        for j in seen:
            key, value = kv_cache[table[j // S], :, h // (H // K), j % S].astype(np.float64)
            score = sum(float(a) * float(b) for a, b in zip(q[h], key, strict=True)) * scale
            weights.append(math.exp(softcap * math.tanh(score / softcap) if softcap else score))
            values.append(value)
        if seen:
            out[h] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    return out


def decode_inputs(lens, window=0, softcap=0.0, H=4, K=2, D=16, S=8):
    return PAGED_DECODE.sample(np.random.default_rng(3), np.float32, lens, H, K, D, S, window, softcap)


def prefill_inputs(lens, queries, window=0, softcap=0.0, H=4, K=2, D=16, S=8):
    return PAGED_PREFILL.sample(np.random.default_rng(3), np.float32, lens, queries, H, K, D, S, window, softcap)


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_decode_is_the_formula_key_by_key(window, softcap):
    lens = (0, 1, 7, 8, 9, 40)
    inputs = decode_inputs(lens, window, softcap)
    paged_decode(**inputs)
    for b, n in enumerate(lens):
        table = inputs["block_tables"][b]
        want = slow_query(inputs["q"][b], inputs["kv_cache"], table, n - 1, inputs["scale"], window, softcap)
        np.testing.assert_allclose(inputs["out"][b], want, rtol=2e-5, atol=1e-6)
    assert not inputs["out"][0].any()


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("chunk", [128, 3])
def test_prefill_is_the_formula_key_by_key(window, softcap, chunk, monkeypatch):
    monkeypatch.setattr(attention, "_QUERY_CHUNK", chunk)
    lens, queries = (0, 1, 7, 17, 16), (0, 1, 7, 10, 1)
    inputs = prefill_inputs(lens, queries, window, softcap)
    paged_prefill(**inputs)
    row = 0
    for b, (n, count) in enumerate(zip(lens, queries, strict=True)):
        table = inputs["block_tables"][b]
        for position in range(n - count, n):
            query = inputs["q"][row]
            want = slow_query(query, inputs["kv_cache"], table, position, inputs["scale"], window, softcap)
            np.testing.assert_allclose(inputs["out"][row], want, rtol=2e-5, atol=1e-6)
            row += 1


def test_a_prompt_in_chunks_gives_what_it_gives_whole():
    whole = prefill_inputs((50,), (50,), window=20)
    paged_prefill(**whole)
    chunked = np.full_like(whole["out"], np.nan)
    for begin, end in ((0, 13), (13, 14), (14, 50)):
        starts, lens = np.array([begin, end], np.int32), np.array([end], np.int32)
        inputs = whole | {"query_start": starts, "context_lens": lens, "max_query_len": end - begin, "out": chunked}
        paged_prefill(**inputs)
    np.testing.assert_allclose(chunked, whole["out"], rtol=1e-5, atol=1e-6)


def test_decode_is_prefill_of_one_token():
    inputs = decode_inputs((33, 1, 12), window=9, softcap=2.0)
    paged_decode(**inputs)
    one_each = np.arange(4, dtype=np.int32)
    arguments = {k: v for k, v in inputs.items() if k != "arena"}
    out = np.full_like(inputs["out"], np.nan)
    paged_prefill(**(arguments | {"query_start": one_each, "max_query_len": 1, "out": out}))
    np.testing.assert_allclose(out, inputs["out"], rtol=1e-5, atol=1e-6)


def test_rows_of_other_sequences_are_left_alone():
    """The engine passes whole q and out arrays; query_start of the prefills begins behind the decode rows."""
    inputs = prefill_inputs((9, 12), (2, 5))
    inputs["query_start"] += 3
    for name in ("q", "out"):
        inputs[name] = np.concatenate((np.full((3, 4, 16), np.nan, np.float32), inputs[name], inputs[name][:1]))
    inputs["out"][...] = 7.0
    paged_prefill(**inputs)
    assert (inputs["out"][:3] == 7.0).all() and (inputs["out"][10:] == 7.0).all()
    assert np.isfinite(inputs["out"]).all() and (inputs["out"][3:10] != 7.0).all()


def test_padding_rows_of_a_prefill_are_zero():
    inputs = prefill_inputs((8, 5), (8, 5))
    inputs["context_lens"][1] = 0
    paged_prefill(**inputs)
    assert np.isfinite(inputs["out"]).all()
    assert not inputs["out"][8:].any() and inputs["out"][:8].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, r"scale=0.0 is not allowed; allowed: > 0"),
        ({"window": -1}, r"window=-1 is not allowed; allowed: >= 0"),
        ({"softcap": -2.0}, r"softcap=-2.0 is not allowed"),
        ({"q": np.zeros((2, 3, 16), np.float32), "out": np.zeros((2, 3, 16), np.float32)}, "3 query heads are not a"),
        ({"context_lens": np.zeros(3, np.int32)}, "context_lens"),
        ({"block_tables": np.zeros((2, 4), np.int64)}, "block_tables has dtype int64"),
        ({"kv_cache": np.zeros((3, 2, 2, 12, 16), np.float32)}, "page size 12 is not allowed"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    with pytest.raises(ContractError, match=message):
        paged_decode(**(decode_inputs((3, 4)) | change))
    if "context_lens" not in change:
        with pytest.raises(ContractError, match=message):
            paged_prefill(**(prefill_inputs((3, 4), (1, 1)) | change))


def test_odd_head_dims_are_refused_on_a_gpu():
    with pytest.raises(ContractError, match="head dim 24 is not allowed; allowed: 16, 32, 64"):
        _check("paged_decode", 2, 1, 24, 16, 1.0, 0, 0.0)


@pytest.mark.parametrize("D", [2, 6, 24])
def test_the_reference_takes_any_head_dim(D):
    inputs = decode_inputs((1, 40), D=D)
    paged_decode(**inputs)
    for b, n in enumerate((1, 40)):
        table = inputs["block_tables"][b]
        want = slow_query(inputs["q"][b], inputs["kv_cache"], table, n - 1, inputs["scale"], 0, 0.0)
        np.testing.assert_allclose(inputs["out"][b], want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("limits", [H100, ADA])
def test_decode_plan_fits_the_sm(D, itemsize, limits):
    sms, per_sm = limits
    for G, B in ((1, 1), (4, 256), (16, 64)):
        plan = decode_plan(D, itemsize, G, B, sms, per_sm)
        blocks = plan.workers // sms
        assert plan.workers == blocks * sms and blocks * (plan.shared + 1024) <= per_sm
        assert 2 <= plan.stages <= 4
        dtype = "float" if itemsize == 4 else "bf16"
        assert {"DTYPE": dtype, "TILE_SIZE": plan.tile} in MERGE_SOURCE.combinations()
        if limits is H100:
            assert blocks == 2
            if itemsize == 2 and D >= 64:  # enough in flight to saturate memory (PERFORMANCE.md: 64 KB per SM)
                in_flight = blocks * (plan.threads // 32) * (plan.stages - 1) * 16 * D * 4
                assert in_flight >= 64 * 1024


@pytest.mark.parametrize("G", [1, 2, 4, 5, 7, 8, 16])
def test_three_tiles_in_flight_for_every_group_size(G):
    """Head dim 128, the largest batch by default: the buffer of the combined rows must not cost a ring buffer."""
    plan = decode_plan(128, 2, G, 256, *H100)
    assert (plan.workers, plan.stages, plan.tile) == (264, 3, 64)


def test_decode_plan_refuses_what_does_not_fit():
    with pytest.raises(ContractError, match="B=60000 sequences do not fit"):
        decode_plan(128, 2, 4, 60000, *H100)


# --- on a GPU -------------------------------------------------------------------------------------------------------
def to_device(cupy, inputs):
    moved = {k: cupy.asarray(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
    return moved | {"arena": Arena(cupy)} if "arena" in inputs else moved


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_captured_decode_replays_with_other_lengths(dtype, cupy):
    from cupyinfer.runtime.graph import capture

    rng = np.random.default_rng(0)
    inputs = PAGED_DECODE.sample(rng, dtype, (900, 17, 512, 0, 64), 8, 2, 64, 16, 0, 0.0)
    device = to_device(cupy, inputs)
    paged_decode(**device)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with capture(stream) as graph:
        paged_decode(**device)
    for lens in ((900, 17, 512, 0, 64), (1, 16, 300, 0, 63), (0, 0, 0, 0, 1)):
        device["context_lens"].set(np.array(lens, np.int32))
        device["out"].fill(np.nan)
        cupy.cuda.Device().synchronize()
        graph.launch()
        stream.synchronize()
        replayed = device["out"].get()
        device["out"].fill(np.nan)
        paged_decode(**device)
        np.testing.assert_array_equal(replayed, device["out"].get())
        want = {k: v.astype(np.float32) if getattr(v, "dtype", None) == dtype else v for k, v in inputs.items()}
        want |= {"context_lens": np.array(lens, np.int32), "out": np.empty(replayed.shape, np.float32)}
        paged_decode(**want)
        np.testing.assert_allclose(replayed, want["out"], atol=2e-3 if dtype == np.float16 else 1e-5)


@pytest.mark.gpu
def test_padding_a_decode_batch_changes_no_bit(cupy):
    inputs = PAGED_DECODE.sample(np.random.default_rng(1), np.float16, (700, 33, 1500), 16, 8, 128, 16, 0, 0.0)
    small = to_device(cupy, inputs)
    paged_decode(**small)
    grown = {"q": (8, 16, 128), "out": (8, 16, 128), "block_tables": (8, inputs["block_tables"].shape[1])}
    padded = dict(inputs)
    for name, shape in (grown | {"context_lens": (8,)}).items():
        padded[name] = np.zeros(shape, inputs[name].dtype)
        padded[name][:3] = inputs[name]
    padded = to_device(cupy, padded)
    paged_decode(**padded)
    np.testing.assert_array_equal(padded["out"].get()[:3], small["out"].get())
    assert not padded["out"].get()[3:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_decode_of_more_sequences_than_threads(dtype, cupy):
    rng = np.random.default_rng(2)
    lens = tuple(rng.integers(0, 90, 300).tolist())
    inputs = PAGED_DECODE.sample(rng, dtype, lens, 6, 2, 32, 16, 0, 0.0)
    device = to_device(cupy, inputs)
    paged_decode(**device)
    want = {k: v.astype(np.float32) if getattr(v, "dtype", None) == dtype else v for k, v in inputs.items()}
    paged_decode(**want)
    np.testing.assert_allclose(device["out"].get(), want["out"], atol=2e-3 if dtype == np.float16 else 1e-5)
