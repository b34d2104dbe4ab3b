"""Tensor: views share memory, transfers keep every bit, DLPack works in both directions for every dtype."""

from __future__ import annotations

import numpy as np
import pytest

from cupyinfer.errors import ConfigError, DeviceError
from cupyinfer.runtime.device import gpu_count
from cupyinfer.runtime.tensor import Tensor
from cupyinfer.types import DTYPES

NAMES = [d.name for d in DTYPES]


def numbers(name: str, *shape: int) -> np.ndarray:
    dtype = next(d.numpy for d in DTYPES if d.name == name)
    return (np.arange(int(np.prod(shape))).reshape(shape) - 3).astype(dtype)


@pytest.mark.parametrize("name", NAMES)
def test_views_share_memory(name):
    values = numbers(name, 4, 6)
    tensor = Tensor(values)
    part = tensor.reshape(2, -1)[1, 2:5]
    assert part.shape == (3,) and part.dtype.name == name and part.device == "cpu"
    part[0] = 99
    assert values.reshape(2, -1)[1, 2] == 99


def test_other_dtypes_are_refused():
    with pytest.raises(ConfigError, match="complex64"):
        Tensor(np.zeros(3, np.complex64))


@pytest.mark.parametrize("name", NAMES)
def test_dlpack_round_trip_on_the_cpu(name):
    values = numbers(name, 3, 5)
    again = Tensor.from_dlpack(Tensor(values))
    assert again.array is values
    through = Tensor.from_dlpack(_Exporter(Tensor(values)))
    assert through.dtype.name == name
    assert np.shares_memory(through.array, values)
    assert np.array_equal(through.array.astype(np.float64), values.astype(np.float64))


class _Exporter:
    """Only the two DLPack methods, as another framework's array would look."""

    def __init__(self, tensor: Tensor) -> None:
        self.__dlpack__ = tensor.__dlpack__
        self.__dlpack_device__ = tensor.__dlpack_device__


@pytest.mark.hf
@pytest.mark.parametrize("name", NAMES)
def test_dlpack_with_torch(name):
    torch = pytest.importorskip("torch")
    values = numbers(name, 2, 7)
    exported = torch.from_dlpack(Tensor(values))
    assert str(exported.dtype) == f"torch.{name}"
    exported[0, 0] = 42
    assert values[0, 0] == 42
    imported = Tensor.from_dlpack(exported)
    assert imported.dtype.name == name and np.shares_memory(imported.array, values)


@pytest.mark.skipif(gpu_count()[0] > 0, reason="there is a GPU")
def test_no_gpu_is_one_clear_error():
    with pytest.raises(DeviceError, match="device=cuda was asked for, but"):
        Tensor(np.zeros(3, np.float32)).to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_transfers_keep_every_bit(name, cupy):
    values = numbers(name, 33, 65)
    stream = cupy.cuda.Stream(non_blocking=True)
    pinned = Tensor(values).pin()
    assert pinned.is_pinned and not Tensor(values).is_pinned
    there = pinned.to("cuda", stream)
    assert there.device == "cuda:0" and there.to("cuda") is there
    back = there.to("cpu", stream)
    stream.synchronize()
    assert back.is_pinned and np.array_equal(back.array.view(np.uint8), values.view(np.uint8))
    part = there[3:9, 5:40]  # not contiguous
    assert np.array_equal(part.numpy().astype(np.float64), values[3:9, 5:40].astype(np.float64))
    target = Tensor.zeros((33, 65), name, "cuda")
    target.copy_from(Tensor(values))
    assert np.array_equal(target.numpy().astype(np.float64), values.astype(np.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_dlpack_on_the_gpu(name, cupy):
    tensor = Tensor(numbers(name, 8, 8)).to("cuda")
    again = Tensor.from_dlpack(cupy.from_dlpack(tensor) if name != "bfloat16" else tensor)
    assert again.device == "cuda:0" and again.dtype.name == name
    torch = pytest.importorskip("torch")
    shared = torch.from_dlpack(tensor)
    assert str(shared.dtype) == f"torch.{name}"
    shared.zero_()
    assert not tensor.numpy().astype(np.float64).any()
    assert Tensor.from_dlpack(shared).dtype.name == name
