"""The draw: against a slow implementation that sorts, its distribution, its independence of the batch, hard rows."""

from __future__ import annotations

import numpy as np
import pytest

from cupyinfer.errors import ContractError
from cupyinfer.ops.sampling import sample_filtered, sample_simple
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.philox import gumbel, random_words

OFF = (0, 1.0, 0.0)  # top_k, top_p, min_p


def simple(logits, temperature, seeds, steps=None):
    N = len(logits)
    tokens = np.full(N, -1, np.int32)
    steps = np.zeros(N, np.int32) if steps is None else np.asarray(steps, np.int32)
    temperature = np.broadcast_to(np.float32(temperature), N).copy()
    return sample_simple(logits, temperature, np.asarray(seeds, np.uint64), steps, tokens=tokens)


def columns(filters):
    k, p, m = zip(*filters, strict=True)
    return np.array(k, np.int32), np.array(p, np.float32), np.array(m, np.float32)


def filtered(logits, temperature, filters, seeds, steps=None):
    """filters: one (top_k, top_p, min_p) for all rows, or one per row."""
    N = len(logits)
    k, p, m = columns([filters] * N if isinstance(filters, tuple) else filters)
    tokens = np.full(N, -1, np.int32)
    steps = np.zeros(N, np.int32) if steps is None else np.asarray(steps, np.int32)
    temperature = np.broadcast_to(np.float32(temperature), N).copy()
    return sample_filtered(logits, temperature, k, p, m, np.asarray(seeds, np.uint64), steps, tokens=tokens)


def slow_keep(x, k, p, m):
    """Which of the values x are kept, level by level in falling order, in float64."""
    V = len(x)
    levels = sorted(set(x.tolist()), reverse=True)
    kept, weights = set(), {v: np.exp(np.float64(v) - levels[0]) * int((x == v).sum()) for v in levels}
    count = 0
    for level in levels:  # top-k: whole levels until k values are kept
        if 0 < k < V and count >= k:
            break
        kept.add(level)
        count += int((x == level).sum())
    total, mass, nucleus = sum(weights[v] for v in kept), 0.0, set()
    for level in sorted(kept, reverse=True):  # top-p: whole levels until their share reaches p
        if p < 1 and mass >= p * total:
            break
        nucleus.add(level)
        mass += weights[level]
    if m > 0:
        nucleus = {v for v in nucleus if np.exp(np.float64(v) - levels[0]) >= m}
    return np.array([v in nucleus for v in x.tolist()])


def slow_sample(logits, temperature, filters, seed, step=0):
    x = logits / np.float32(temperature)
    noise = gumbel(random_words(np.array([seed], np.uint64), np.array([step], np.int32), len(x)))[0]
    noisy = np.where(slow_keep(x, *filters), x + noise, -np.inf)
    return int(noisy.argmax())


# --- greedy ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("draw", [simple, lambda x, t, s: filtered(x, t, (3, 0.5, 0.1), s)], ids=["simple", "filtered"])
def test_greedy_takes_the_largest_the_lowest_id_on_ties_and_never_nan(draw):
    nan, inf = np.nan, np.inf
    rows = np.array(
        [
            [1, 5, 5, 2],
            [nan, -3, nan, -2],
            [-inf, -inf, -9, nan],
            [-inf, nan, -inf, -inf],
            [nan, nan, nan, nan],
            [inf, 0, inf, 1],
            [-0.0, 0.0, -1, -0.0],
        ],
        np.float32,
    )
    assert draw(rows, 0.0, np.arange(7)).tolist() == [1, 3, 2, 0, 0, 0, 0]
    assert draw(rows[:1], 9e-6, [3]).tolist() == [1]


def test_random_rows_never_draw_nan_or_minus_infinity():
    rows = np.tile(np.array([np.nan, 1, -np.inf, 0.5, np.nan], np.float32), (300, 1))
    assert set(simple(rows, 5.0, np.arange(300)).tolist()) == {1, 3}
    assert set(filtered(rows, 5.0, (4, 0.999, 0.001), np.arange(300)).tolist()) == {1, 3}
    dead = np.full((4, 7), -np.inf, np.float32)
    assert simple(dead, 1.0, np.arange(4)).tolist() == filtered(dead, 1.0, OFF, np.arange(4)).tolist() == [0] * 4


# --- distribution ---------------------------------------------------------------------------------------------------
def chi_square(tokens, probabilities):
    expected = probabilities * len(tokens)
    observed = np.bincount(tokens, minlength=len(probabilities))
    assert observed[expected == 0].sum() == 0
    used = expected > 0
    return (((observed - expected) ** 2)[used] / expected[used]).sum()


def softmax(x):
    w = np.exp(x - x.max())
    return w / w.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distribution_over_seeds_and_over_steps(temperature):
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, 0.25], np.float64)
    rows = np.tile(logits.astype(np.float32), (6000, 1))
    want = softmax(logits / temperature)
    limit = 33.7  # chi-square, 7 degrees of freedom: exceeded with probability 2e-5
    assert chi_square(simple(rows, temperature, np.arange(6000)), want) < limit
    assert chi_square(simple(rows, temperature, np.full(6000, 12345), np.arange(6000)), want) < limit


def test_distribution_among_the_kept():
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, 0.25], np.float64)
    rows = np.tile(logits.astype(np.float32), (6000, 1))
    want = np.where(logits >= 1.0, np.exp(logits), 0)
    tokens = filtered(rows, 1.0, (3, 1.0, 0.0), np.arange(6000))
    assert chi_square(tokens, want / want.sum()) < 21.6  # 2 degrees of freedom, 2e-5
    assert set(tokens.tolist()) == {0, 1, 6}


# --- against the slow implementation --------------------------------------------------------------------------------
FILTERS = [
    OFF,
    (1, 1.0, 0.0),
    (5, 1.0, 0.0),
    (10**6, 1.0, 0.0),
    (-1, 0.9, 0.0),
    (0, 0.05, 0.0),
    (0, 1e-9, 0.0),
    (0, 1.0, 0.2),
    (0, 1.0, 1.0),
    (20, 0.8, 0.01),
    (7, 0.99, 0.3),
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("kind", ["random", "coarse", "equal", "masked", "peaked"])
def test_filters_against_sorting(kind, filters):
    rng = np.random.default_rng(3)
    for case, V in enumerate((1, 2, 9, 64, 131)):
        row = {
            "random": lambda V: 3 * rng.standard_normal(V),
            "coarse": lambda V: rng.integers(-3, 4, V) / 2,  # many equal values at every threshold
            "equal": lambda V: np.full(V, 1.25),
            "masked": lambda V: np.where(rng.random(V) < 0.6, -np.inf, rng.standard_normal(V)),
            "peaked": lambda V: np.eye(1, V, V // 2)[0] * 50,
        }[kind](V).astype(np.float32)
        if not np.isfinite(row).any():
            continue
        for seed in range(6):
            temperature = (0.7, 1.0, 2.5)[seed % 3]
            got = filtered(row[None], temperature, filters, [seed + 100 * case], [seed])
            assert got[0] == slow_sample(row, temperature, filters, seed + 100 * case, seed)


def test_top_k_keeps_ties_at_its_threshold():
    row = np.tile(np.array([3, 1, 1, 1, 0], np.float32), (400, 1))
    assert set(filtered(row, 3.0, (2, 1.0, 0.0), np.arange(400)).tolist()) == {0, 1, 2, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    row = np.tile(np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), (600, 1))
    for p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2}), (0.96, {0, 1, 2, 3})):
        assert set(filtered(row, 1.0, (0, p, 0.0), np.arange(600)).tolist()) == kept


def test_filters_apply_in_order_top_k_top_p_min_p():
    """top-p's share is of what top-k kept; min-p compares with the largest, whatever was dropped before."""
    row = np.tile(np.log(np.array([0.4, 0.2, 0.2, 0.1, 0.1], np.float32)), (500, 1))
    assert set(filtered(row, 1.0, (1, 0.5, 0.0), np.arange(500)).tolist()) == {0}
    assert set(filtered(row, 1.0, (3, 0.6, 0.0), np.arange(500)).tolist()) == {0, 1, 2}
    assert set(filtered(row, 1.0, (3, 0.49, 0.0), np.arange(500)).tolist()) == {0}
    assert set(filtered(row, 1.0, (0, 0.95, 0.45), np.arange(500)).tolist()) == {0, 1, 2}


@pytest.mark.hf
def test_against_transformers_warpers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(5)
    for k, p, m in ((50, 1.0, 0.0), (0, 0.9, 0.0), (40, 0.7, 0.0), (100, 0.95, 0.05), (0, 1.0, 0.1)):
        row = (2 * rng.standard_normal(1000)).astype(np.float32)
        scores = torch.tensor(row)[None] / 0.8
        if k:
            scores = transformers.TopKLogitsWarper(k)(None, scores)
        if p < 1:
            scores = transformers.TopPLogitsWarper(p)(None, scores)
        if m:
            scores = transformers.MinPLogitsWarper(m)(None, scores)
        assert np.array_equal(torch.isfinite(scores)[0].numpy(), slow_keep(row / np.float32(0.8), k, p, m))
        seeds = np.arange(40)
        tokens = filtered(np.tile(row, (40, 1)), 0.8, (k, p, m), seeds)
        assert torch.isfinite(scores)[0][torch.tensor(tokens).long()].all()


# --- one row does not see the others --------------------------------------------------------------------------------
def test_a_row_draws_the_same_alone_and_in_any_batch():
    rng = np.random.default_rng(11)
    N, V = 16, 333
    logits = (2 * rng.standard_normal((N, V))).astype(np.float32)
    seeds, steps = rng.integers(0, 1 << 40, N), rng.integers(0, 99, N)
    temperature = rng.uniform(0, 2, N).astype(np.float32)
    filters = [FILTERS[n % len(FILTERS)] for n in range(N)]
    together = filtered(logits, temperature, filters, seeds, steps)
    order = rng.permutation(N)
    shuffled = filtered(logits[order], temperature[order], [filters[i] for i in order], seeds[order], steps[order])
    assert np.array_equal(shuffled, together[order])
    for n in range(N):
        alone = filtered(logits[n : n + 1], temperature[n], filters[n], seeds[n : n + 1], steps[n : n + 1])
        assert alone[0] == together[n]


def test_without_filters_both_ops_draw_the_same():
    rng = np.random.default_rng(12)
    logits = rng.standard_normal((64, 200)).astype(np.float32)
    seeds, temperature = np.arange(64), rng.uniform(0, 3, 64).astype(np.float32)
    assert np.array_equal(simple(logits, temperature, seeds), filtered(logits, temperature, OFF, seeds))


def test_the_seed_decides_and_the_step_moves_on():
    logits = np.zeros((50, 1000), np.float32)
    same = simple(logits, 1.0, np.full(50, 9), np.zeros(50))
    assert len(set(same.tolist())) == 1
    assert len(set(simple(logits, 1.0, np.full(50, 9), np.arange(50)).tolist())) > 40
    assert len(set(simple(logits, 1.0, np.arange(50)).tolist())) > 40


def test_too_large_a_vocabulary_is_refused():
    with pytest.raises(ContractError, match="V=262145.*at most 262144"):
        filtered(np.zeros((1, 262145), np.float32), 1.0, OFF, [0])


# --- rows that leave the fast path of the kernel --------------------------------------------------------------------
def hard_rows(V):
    """(logits [N, V], temperature [N], filters [N]) for which few candidates do not suffice, or ties abound."""
    rng = np.random.default_rng(V)
    draw = rng.standard_normal(V)
    shapes = {
        "flat": 0.3 * draw,
        "equal": np.zeros(V),
        "negative": -1e4 + draw,
        "huge": 1e30 * draw,
        "coarse": np.round(2 * draw),
        "two levels": np.where(np.arange(V) % 3 == 0, 1.0, 0.0),
        "rising": np.linspace(-30, 5, V),
        "clustered": np.where(np.arange(V) < 300, 8 + draw, draw),
        "one peak": np.where(np.arange(V) == V - 1, 60.0, draw),
        "mostly masked": np.where(np.arange(V) % 97 == 5, draw, -np.inf),
        "nearly all masked": np.where(np.arange(V) == V // 2, 1.0, -np.inf),
        "some nan": np.where(np.arange(V) % 50 == 1, np.nan, 4 * draw),
        "infinite": np.where(np.arange(V) % 1000 == 7, np.inf, draw),
        "tiny": 1e-3 * draw,
    }
    filters = [OFF, (1, 1.0, 0.0), (40, 1.0, 0.0), (900, 0.97, 0.0), (3000, 1.0, 0.0), (6000, 0.9, 0.0), (0, 0.9, 0.0)]
    filters += [(0, 0.999, 0.0), (0, 0.99999994, 0.0), (0, 1.0, 0.3), (50, 0.9, 0.1), (V - 1, 1.0, 0.0)]
    rows = [(shape, f, t) for shape in shapes for f in filters for t in (0.0, 0.6, 1.7)]
    rows = [r for i, r in enumerate(rows) if r[2] > 0 or i % 5 == 0]
    logits = np.stack([shapes[shape] for shape, _, _ in rows]).astype(np.float32)
    return logits, np.array([t for _, _, t in rows], np.float32), [f for _, f, _ in rows]


@pytest.mark.parametrize("V", [100, 700])
def test_hard_rows_against_sorting(V):
    logits, temperature, filters = hard_rows(V)
    seeds = np.arange(len(logits)) * 7919
    got = filtered(logits, temperature, filters, seeds)
    for n, row in enumerate(logits):
        row = np.where(np.isnan(row), -np.inf, row).astype(np.float32)
        if temperature[n] == 0:
            assert got[n] == row.argmax()
        elif np.isinf(row.max()):
            assert row[got[n]] == np.inf
        else:
            assert got[n] == slow_sample(row, temperature[n], filters[n], seeds[n]), filters[n]


@pytest.mark.gpu
@pytest.mark.parametrize("V", [1, 2, 31, 33, 700, 4095, 4096, 4097, 9001, 50257, 151936, 262144])
def test_kernel_on_hard_rows(V, cupy):
    logits, temperature, filters = hard_rows(V)
    seeds, steps = np.arange(len(logits)).astype(np.uint64) * np.uint64(7919), np.zeros(len(logits), np.int32)
    arguments = [logits, temperature, *columns(filters), seeds, steps]
    want = sample_filtered(*arguments, tokens=np.full(len(logits), -1, np.int32))
    tokens = cupy.full(len(logits), -1, cupy.int32)
    sample_filtered(*map(cupy.asarray, arguments), tokens=tokens, arena=Arena(cupy))
    wrong = np.flatnonzero(tokens.get() != want)
    assert not len(wrong), [(int(n), filters[n], float(temperature[n])) for n in wrong[:8]]
    want = sample_simple(logits, temperature, seeds, steps, tokens=np.full(len(logits), -1, np.int32))
    device = [cupy.asarray(a) for a in (logits, temperature, seeds, steps)]
    sample_simple(*device, tokens=tokens, arena=Arena(cupy))
    assert np.array_equal(tokens.get(), want)


@pytest.mark.gpu
def test_captured_draw_equals_eager(cupy):
    logits, temperature, filters = hard_rows(4097)
    N = len(logits)
    arguments = [cupy.asarray(a) for a in (logits, temperature, *columns(filters))]
    arguments += [cupy.arange(N, dtype=cupy.uint64), cupy.zeros(N, cupy.int32)]
    arena, tokens = Arena(cupy), cupy.full(N, -1, cupy.int32)
    eager = sample_filtered(*arguments, tokens=tokens, arena=arena).get()
    arena.freeze()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        sample_filtered(*arguments, tokens=tokens, arena=arena)
        graph = stream.end_capture()
        tokens.fill(-1)
        graph.launch(stream)
        stream.synchronize()
    assert np.array_equal(tokens.get(), eager)
