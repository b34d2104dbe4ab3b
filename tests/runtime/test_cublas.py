"""cuBLAS and cuBLASLt: what can be known without a GPU (layouts, names, stored algorithms), and the calls with one."""

from __future__ import annotations

import ctypes
import json

import numpy as np
import pytest

from cupyinfer.errors import ConfigError, DeviceError
from cupyinfer.runtime import cublas, cublaslt

MAPS = """\
7f0000000000-7f0000001000 r-xp 00000000 08:01 12 /opt/cuda lib/libcublasLt.so.12.8.4.1
7f0000002000-7f0000003000 r--p 00000000 08:01 13 /opt/cuda lib/libcublas.so.12.8.4.1
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
"""


def column_major_product(at: cublas.Layout, first, second):
    """What cuBLAS computes: flat memory read column by column, leading dimensions as given."""

    def matrix(flat, ld, rows, columns):
        return np.array([[flat[c * ld + r] for c in range(columns)] for r in range(rows)])

    a = matrix(first, at.ld_first, *((at.inner, at.rows) if at.op_first else (at.rows, at.inner)))
    b = matrix(second, at.ld_second, *((at.columns, at.inner) if at.op_second else (at.inner, at.columns)))
    product = (a.T if at.op_first else a) @ (b.T if at.op_second else b)
    out = np.full(at.columns * at.ld_out, np.nan)
    for r in range(at.rows):
        for c in range(at.columns):
            out[c * at.ld_out + r] = product[r, c]
    return out


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_layout_gives_the_row_major_product(transpose_a, transpose_b):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 5)), rng.standard_normal((5, 4))
    stored_a, stored_b = (np.ascontiguousarray(m.T) if t else m for m, t in ((a, transpose_a), (b, transpose_b)))
    at = cublas.layout(stored_a, stored_b, transpose_a, transpose_b)
    out = column_major_product(at, stored_b.ravel(), stored_a.ravel())
    np.testing.assert_allclose(out.reshape(3, 4), a @ b)


def test_the_mapped_library_is_found_by_its_exact_name():
    assert cublas.mapped_path("libcublas", MAPS) == "/opt/cuda lib/libcublas.so.12.8.4.1"
    assert cublas.mapped_path("libcublasLt", MAPS) == "/opt/cuda lib/libcublasLt.so.12.8.4.1"
    assert cublas.mapped_path("libcufft", MAPS) is None


def test_a_failed_call_names_its_status():
    cublas.check(0, "cublasGemmEx")
    with pytest.raises(DeviceError, match="cublasGemmEx failed: CUBLAS_STATUS_NOT_SUPPORTED"):
        cublas.check(15, "cublasGemmEx")
    with pytest.raises(DeviceError, match="cublasLtMatmul failed: status 99"):
        cublas.check(99, "cublasLtMatmul")


def test_buckets_hold_their_rows_and_grow():
    buckets = [cublaslt.bucket(t) for t in range(1, 5000)]
    assert all(b >= t for t, b in enumerate(buckets, 1)) and buckets == sorted(buckets)
    assert [cublaslt.bucket(t) for t in (1, 16, 17, 256, 257, 512, 513)] == [16, 16, 32, 256, 320, 512, 1024]


def test_alignment_is_the_largest_power_of_two():
    assert [cublaslt.alignment_of(a) for a in (512, 256, 48, 2, 3)] == [256, 256, 16, 2, 1]


def problem(T=40, bias=False):
    x, w = np.zeros((T, 64), np.float16), np.zeros((48, 64), np.float16)
    return cublaslt.Problem(cublas.layout(x, w, False, True), "float16", "float32", "float32", bias, 16, 1 << 20)


def test_rows_of_a_bucket_share_a_key_and_nothing_else_does():
    assert problem(40).key() == problem(64).key() == "T64-N48-I64-NT-float16-float32-float32"
    assert len({problem(64).key(), problem(65).key(), problem(64, bias=True).key()}) == 3


def test_stored_algorithms_come_back(tmp_path):
    path = str(tmp_path / "new" / "lt.json")
    assert cublaslt.tuned(path) == {}
    cublaslt.store(path, "first", list(range(8)), 12.345)
    cublaslt.store(path, "second", [2**64 - 1] * 8, 1.0)
    assert cublaslt.tuned(path) == {"first": list(range(8)), "second": [2**64 - 1] * 8}
    assert json.loads((tmp_path / "new" / "lt.json").read_text())["first"]["us"] == pytest.approx(12.345, abs=0.01)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["lt.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"k": 1}', '{"k": {"algo": [1, 2]}}', '{"k": {"algo": ["x"]}}'])
def test_a_damaged_tuning_file_is_named(tmp_path, text):
    path = tmp_path / "lt.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"lt\.json is damaged"):
        cublaslt.tuned(str(path))
    with pytest.raises(ConfigError, match="delete it and tune again"):
        cublaslt.store(str(path), "key", [0] * 8, 1.0)


def test_an_unwritable_cache_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="CUPYINFER_CACHE_DIR"):
        cublaslt.store(str(tmp_path / "file" / "lt.json"), "key", [0] * 8, 1.0)


# --- on the GPU -----------------------------------------------------------------------------------------------------
@pytest.mark.gpu
def test_the_library_is_the_one_cupy_uses(cupy):
    from cupy_backends.cuda.libs import cublas as binding

    handle, version = cupy.cuda.device.get_cublas_handle(), ctypes.c_int()
    get_version = cublas.loaded_library("cublas").cublasGetVersion_v2
    cublas.check(get_version(ctypes.c_void_p(handle), ctypes.byref(version)), "cublasGetVersion")
    assert version.value == binding.getVersion(handle)


@pytest.mark.gpu
def test_products_leave_cupys_handle_as_it_was(cupy):
    from cupy_backends.cuda.libs import cublas as binding

    handle = cupy.cuda.device.get_cublas_handle()
    a = cupy.ones((32, 32), np.float32)
    out = cupy.empty((32, 32), np.float32)
    binding.setMathMode(handle, 0)
    cublas.gemm(a, a, out)
    assert binding.getMathMode(handle) == 0 and binding.getPointerMode(handle) == 0
    assert float(out[0, 0]) == 32.0
    assert cupy.array_equal(a @ a, out)


@pytest.mark.gpu
def test_a_workspace_is_not_allocated_during_a_capture(cupy):
    from cupyinfer.runtime.graph import capture

    a, out = cupy.ones((32, 32), np.float32), cupy.empty((32, 32), np.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with pytest.raises(DeviceError, match="run a product once before capturing"), capture(stream):
        cublas.gemm(a, a, out, workspace_bytes=123 << 10)
    cublas.gemm(a, a, out)  # the stream and the library work on
    assert float(out[0, 0]) == 32.0


@pytest.mark.gpu
def test_wrong_algorithms_are_refused(cupy):
    a, out = cupy.ones((32, 32), np.float16), cupy.empty((32, 32), np.float16)
    with pytest.raises(DeviceError, match="algorithm=99 was asked for, but cuBLASLt proposes"):
        cublaslt.matmul(a, a, out, algorithm=99)


@pytest.mark.gpu
def test_a_tuned_algorithm_is_used_and_right(cupy, tmp_path, monkeypatch):
    monkeypatch.setenv("CUPYINFER_CACHE_DIR", str(tmp_path))
    x, w = cupy.ones((40, 64), np.float16), cupy.ones((48, 64), np.float16)
    out = cupy.empty((40, 48), np.float16)
    calls = []

    def seconds(i):
        cublaslt.matmul(x, w, out, transpose_b=True, algorithm=i)
        calls.append(i)
        return 1.0 if i else 2.0  # the second proposal wins

    this = cublaslt.Problem(cublas.layout(x, w, False, True), "float16", "float16", "float32", False, 256, 32 << 20)
    best, times = cublaslt.tune(seconds, this)
    assert calls == list(range(len(times))) and best == min(1, len(times) - 1)
    (entry,) = cublaslt.tuned(str(cublaslt.tuning_file(0))).values()
    assert entry == list(cublaslt.Plan(this).proposals(cupy.cuda.device.get_cublas_handle())[best].algo)
    out.fill(0)
    cublaslt.matmul(x, w, out, transpose_b=True)
    assert bool((out == 64).all())
