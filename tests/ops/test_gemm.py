"""linear and gemm: the reference against a slow loop, the choice of a route, and on a GPU every route against it."""

from __future__ import annotations

import numpy as np
import pytest

from cupyinfer.errors import ConfigError, ContractError
from cupyinfer.ops.gemm import gemm, linear
from cupyinfer.runtime.gemm_plan import GemmConfig, choose_route, skinny_plan
from cupyinfer.types import BFLOAT16

SHAPES_8B = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (128256, 4096))
SHAPES_SMALL = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024), (8, 8), (3, 16), (33, 520))


def slow_product(a, b):
    out = np.zeros((a.shape[0], b.shape[1]))
    for i in range(a.shape[0]):
        for j in range(b.shape[1]):
            for k in range(a.shape[1]):
                out[i, j] += float(a[i, k]) * float(b[k, j])
    return out


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_linear_is_a_loop_of_multiply_adds(rows, dtype):
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s).astype(dtype) for s in ((rows, 12), (7, 12), (7,)))
    out = np.full((rows, 7), np.nan, np.float32)
    assert linear(x, w, b, out=out) is out
    np.testing.assert_allclose(out, slow_product(x, w.T) + b.astype(np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_gemm_is_a_loop_of_multiply_adds(transpose_a, transpose_b):
    rng = np.random.default_rng(1)
    a, b, out = (rng.standard_normal(s).astype(np.float32) for s in ((4, 5), (5, 3), (4, 3)))
    want = 0.5 * slow_product(a, b) - 2.0 * out
    stored_a, stored_b = (np.ascontiguousarray(m.T) if t else m for m, t in ((a, transpose_a), (b, transpose_b)))
    config = GemmConfig(transpose_a=transpose_a, transpose_b=transpose_b)
    gemm(stored_a, stored_b, alpha=0.5, beta=-2.0, out=out, config=config)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_gemm_does_not_read_out_when_beta_is_zero():
    out = np.full((2, 2), np.nan, np.float32)
    gemm(np.eye(2, dtype=np.float32), np.ones((2, 2), np.float32), out=out)
    assert np.array_equal(out, np.ones((2, 2)))


def test_wrong_arrays_are_refused_by_name():
    x, w = np.zeros((2, 8), np.float16), np.zeros((4, 8), np.float16)
    with pytest.raises(ContractError, match=r"out has dtype bfloat16; allowed: float16, float32"):
        linear(x, w, out=np.zeros((2, 4), BFLOAT16))
    with pytest.raises(ContractError, match="weight"):
        linear(x, w.astype(np.float32), out=np.zeros((2, 4), np.float16))
    with pytest.raises(ContractError, match="bias"):
        linear(x, w, np.zeros(3, np.float16), out=np.zeros((2, 4), np.float16))
    with pytest.raises(ContractError, match=r"op\(a\) \(2, 8\) @ op\(b\) \(4, 8\) does not give out \(2, 4\)"):
        gemm(x, w, out=np.zeros((2, 4), np.float16))
    with pytest.raises(ContractError, match="in_dtype='bfloat16' was asked for, but the array is float16"):
        linear(x, w, out=np.zeros((2, 4), np.float16), config=GemmConfig(in_dtype="bfloat16"))
    with pytest.raises(ConfigError, match="transpose"):
        linear(x, w, out=np.zeros((2, 4), np.float16), config=GemmConfig(transpose_a=True))


@pytest.mark.parametrize(
    "field, value",
    [
        ("route", "magma"),
        ("compute", "float16"),
        ("in_dtype", "int8"),
        ("out_dtype", "double"),
        ("workspace_bytes", -1),
        ("algorithm", -2),
        ("algorithm", 3),  # needs route lt or cublas
    ],
)
def test_config_refuses_what_does_not_exist(field, value):
    with pytest.raises(ConfigError, match=field):
        GemmConfig(**{field: value})


def test_config_refuses_tf32_in_our_own_kernel():
    with pytest.raises(ConfigError, match="compute"):
        GemmConfig(route="skinny", compute="tf32")


def test_choice_of_route():
    assert choose_route(1, 4096, 4096, "bfloat16") == "skinny"
    assert choose_route(8, 4097, 4096, "float16") == "skinny"
    assert choose_route(16, 4096, 1024, "float16") == "skinny"
    assert choose_route(16, 4096, 4096, "float16") == "lt"
    assert choose_route(17, 4096, 4096, "float16") == "lt"
    assert choose_route(8, 64, 64, "float32") == "skinny"
    assert choose_route(9, 64, 64, "float32") == "lt"
    assert choose_route(1, 64, 12, "bfloat16") == "cublas"  # rows of 24 bytes
    assert choose_route(1, 64, 12, "float32") == "skinny"  # rows of 48 bytes
    assert choose_route(64, 63, 64, "bfloat16") == "cublas"


@pytest.mark.parametrize("multiprocessors", [16, 84, 132])
@pytest.mark.parametrize("shape", SHAPES_8B + SHAPES_SMALL)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_launch_shape_fits_every_gpu(shape, multiprocessors, itemsize):
    N, I = shape
    plans = {t: skinny_plan(t, N, I, itemsize, multiprocessors) for t in range(1, 17 if itemsize == 2 else 9)}
    for t, plan in plans.items():
        assert plan.rows >= t and plan.rows in ((8, 16) if itemsize == 2 else (1, 2, 4, 8))
        assert plan.blocks * 8 * plan.tiles >= N > (plan.blocks - 1) * 8 * plan.tiles
        assert 1 <= plan.warps <= 16 and plan.shared <= 99 * 1024  # the least of sm_80 to sm_120
        assert plan.tiles == 1 or plan.blocks >= 1.5 * multiprocessors
        assert (plan.warps - 1) * 512 < I * itemsize, "a warp would have nothing to do"
    assert len({plan.warps for plan in plans.values()}) == 1, "the order of additions would depend on the rows"


def test_few_outputs_get_more_warps():
    assert skinny_plan(1, 1024, 3072, 2, 132).warps == 12
    assert skinny_plan(1, 4096, 4096, 2, 132).warps == 8


# --- on the GPU -----------------------------------------------------------------------------------------------------
def device_arrays(cupy, T, N, I, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x, w, b = (rng.standard_normal(s, dtype=np.float32).astype(dtype) for s in ((T, I), (N, I), (N,)))
    want = x.astype(np.float64) @ w.astype(np.float64).T + b.astype(np.float64)
    return cupy.asarray(x), cupy.asarray(w), cupy.asarray(b), want


def poisoned(cupy, shape, dtype):
    return cupy.asarray(np.full(shape, np.nan, dtype))


def error(got, want):
    got = got.get().astype(np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["skinny", "lt", "cublas", "cupy"])
@pytest.mark.parametrize(
    "dtype, out_dtype", [("f4", "f4"), ("f2", "f2"), ("f2", "f4"), ("bf16", "bf16"), ("bf16", "f4")]
)
@pytest.mark.parametrize("T", [1, 8])
def test_every_route_gives_the_product(cupy, route, dtype, out_dtype, T):
    dtype, out_dtype = (BFLOAT16 if d == "bf16" else np.dtype(d) for d in (dtype, out_dtype))
    x, w, b, want = device_arrays(cupy, T, 264, 520, dtype)
    out = poisoned(cupy, (T, 264), out_dtype)
    linear(x, w, b, out=out, config=GemmConfig(route=route))
    limit = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 5e-3}[str(out_dtype)]  # TF32 would give 3e-4 in float32
    assert error(out, want) <= limit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_a_row_has_the_same_bits_whatever_is_beside_it(cupy, dtype):
    most = 8 if dtype == np.float32 else 16
    x, w, b, _ = device_arrays(cupy, most, 2200, 1032, dtype)
    config = GemmConfig(route="skinny")
    alone = poisoned(cupy, (most, 2200), dtype)
    for t in range(most):
        linear(x[t : t + 1], w, b, out=alone[t : t + 1], config=config)
    for rows in (2, 3, 5, 8, most):
        together = poisoned(cupy, (rows, 2200), dtype)
        linear(x[:rows], w, b, out=together, config=config)
        assert cupy.array_equal(together.view(np.uint8), alone[:rows].view(np.uint8)), rows


@pytest.mark.gpu
@pytest.mark.parametrize("route, T", [("skinny", 5), ("lt", 40), ("cublas", 40)])
def test_a_graph_gives_the_same_bits_as_eager(cupy, route, T):
    from cupyinfer.runtime.graph import capture

    x, w, b, _ = device_arrays(cupy, T, 512, 1024, BFLOAT16)
    eager, replayed = (poisoned(cupy, (T, 512), BFLOAT16) for _ in range(2))
    stream = cupy.cuda.Stream(non_blocking=True)
    config = GemmConfig(route=route)
    cupy.cuda.Device().synchronize()
    with stream:
        linear(x, w, b, out=eager, config=config)
    stream.synchronize()
    with capture(stream) as graph:
        linear(x, w, b, out=replayed, config=config)
    graph.launch()
    stream.synchronize()
    assert cupy.array_equal(eager.view(np.uint8), replayed.view(np.uint8))


@pytest.mark.gpu
def test_unaligned_rows_take_another_route(cupy):
    x, w, b, want = device_arrays(cupy, 2, 64, 72, np.float16)
    shifted = cupy.empty(x.size + 1, np.float16)[1:].reshape(x.shape)
    shifted[...] = x
    out = poisoned(cupy, (2, 64), np.float16)
    linear(shifted, w, b, out=out)
    assert error(out, want) <= 1e-3
    with pytest.raises(ContractError, match="route=skinny needs at most 16 rows"):
        linear(shifted, w, b, out=out, config=GemmConfig(route="skinny"))
    with pytest.raises(ConfigError, match="skinny is a route of linear"):
        gemm(x, w, transpose_b=True, out=out, config=GemmConfig(route="skinny"))


@pytest.mark.gpu
def test_tf32_only_when_asked(cupy):
    x, w, b, want = device_arrays(cupy, 64, 256, 2048, np.float32)
    out = cupy.empty((64, 256), np.float32)
    for route in ("lt", "cublas", "cupy"):
        linear(x, w, b, out=out, config=GemmConfig(route=route))
        assert error(out, want) <= 2e-6, route
    linear(x, w, b, out=out, config=GemmConfig(route="cublas", compute="tf32"))
    assert 1e-5 <= error(out, want) <= 2e-3
