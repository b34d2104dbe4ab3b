"""Every op, over its own size sweep: the reference on the CPU in every dtype, and the GPU kernels against it."""

from __future__ import annotations

import importlib
import pkgutil

import numpy as np
import pytest

import cupyinfer.ops
from cupyinfer.contract import OPS, Op
from cupyinfer.errors import ContractError
from cupyinfer.types import FLOAT_NAMES, dtype_of

for _module in pkgutil.iter_modules(cupyinfer.ops.__path__):
    importlib.import_module(f"cupyinfer.ops.{_module.name}")

CASES = [
    pytest.param(op, dict(sizes), dtype, id=f"{op.name}-{'-'.join(f'{k}{v}' for k, v in sizes.items())}-{dtype}")
    for op in OPS.values()
    for sizes in op.sizes
    for dtype in op.dtypes
]


def outputs(op: Op) -> list[str]:
    return [a.name for a in op.args if a.role != "in"]


def widen(value):
    """float32 copies of 16-bit arrays, plain copies of the rest: what the reference computes from."""
    if not isinstance(value, np.ndarray):
        return value
    return value.astype(np.float32) if str(value.dtype) in FLOAT_NAMES else value.copy()


def run_reference(op: Op, inputs: dict) -> dict[str, np.ndarray]:
    wide = {k: widen(v) for k, v in inputs.items()}
    op(**wide)
    return {name: wide[name] for name in outputs(op) if wide.get(name) is not None}


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float, what: str) -> None:
    """2-norm relative error; written so that NaN fails."""
    if np.issubdtype(want.dtype, np.integer):
        assert np.array_equal(got, want), f"{what}: integers differ at {np.argwhere(got != want)[:5].tolist()}"
        return
    got, want = got.astype(np.float64), want.astype(np.float64)
    assert np.array_equal(np.isnan(got), np.isnan(want)), f"{what}: NaN where the reference has none"
    got, want = np.where(np.isnan(want), 0.0, got), np.where(np.isnan(want), 0.0, want)
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite]), f"{what}: infinities differ"
    norm = np.linalg.norm(want[finite])
    error = np.linalg.norm(got[finite] - want[finite])
    if not error <= tolerance * max(norm, 1e-6):
        pytest.fail(f"{what}: relative error {error / max(norm, 1e-6):.3g} > {tolerance:.3g}")


def make(op: Op, sizes: dict, dtype: str) -> dict:
    assert op.sample is not None
    return op.sample(np.random.default_rng(7), dtype_of(dtype).numpy, **sizes)


@pytest.mark.parametrize("op, sizes, dtype", CASES)
def test_reference_in_every_dtype(op, sizes, dtype):
    """The reference run in 16 bits stays within the tolerance of the same reference run in float32."""
    inputs = make(op, sizes, dtype)
    want = run_reference(op, inputs)
    op(**inputs)
    for name, expected in want.items():
        assert_close(inputs[name], expected, 2 * op.tolerance[dtype], f"{op.name}.{name}")


@pytest.mark.gpu
@pytest.mark.parametrize("op, sizes, dtype", CASES)
def test_kernel_against_reference(op, sizes, dtype, cupy):
    from cupyinfer.runtime.arena import Arena

    inputs = make(op, sizes, dtype)
    want = run_reference(op, inputs)
    device = {k: cupy.asarray(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
    device = {k: Arena(cupy) if isinstance(v, Arena) else v for k, v in device.items()}
    op(**device)
    for name, expected in want.items():
        assert_close(device[name].get(), expected, op.tolerance[dtype], f"{op.name}.{name}")


@pytest.mark.parametrize("op", list(OPS.values()), ids=list(OPS))
def test_contract_is_complete_and_refuses_wrong_arrays(op):
    assert op.sample and op.sizes and op.cost and op.formula, f"{op.name}: contract is incomplete"
    sizes = next(dict(s) for s in op.sizes if all(v != 0 for v in s.values()))
    inputs = make(op, sizes, op.dtypes[0])
    first = next(a for a in op.args if inputs.get(a.name) is not None and a.axes != "...")
    wrong = inputs | {first.name: inputs[first.name][None]}
    with pytest.raises(ContractError, match=first.name):
        op(**wrong)
    missing = {k: v for k, v in inputs.items() if k != first.name}
    if not first.optional:
        with pytest.raises(ContractError, match=first.name):
            op(**missing)
    moved, flops = op.cost(**inputs)
    assert moved > 0 and flops >= 0
