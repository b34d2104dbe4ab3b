"""The decode batch that the ablation times is a real one: pages of its own for each sequence, the last slot written."""

from __future__ import annotations

import numpy as np
import pytest

from cupyinfer.bench.ablation import OPS, decode_batch


@pytest.mark.parametrize("batch, context, block_size", [(1, 256, 16), (3, 577, 64), (32, 16, 16)])
def test_batch(batch, context, block_size):
    made = decode_batch(batch, context, block_size)
    assert len(set(made.block_tables.ravel().tolist())) == made.block_tables.size
    page, offset = divmod(made.slot_mapping, block_size)
    assert np.array_equal(page, made.block_tables[:, (context - 1) // block_size])
    assert set(offset.tolist()) == {(context - 1) % block_size}
    assert made.block_tables.shape[1] * block_size >= context and made.num_decodes == batch


def test_every_op_is_where_it_is_looked_for():
    assert all(callable(getattr(module, name)) for module, name in OPS)


@pytest.mark.gpu
def test_runs(monkeypatch, capsys):
    from cupyinfer.bench import ablation

    monkeypatch.setattr("sys.argv", ["ablation", "dummy:qwen3-0.6b", "--batch", "2", "--context", "40"])
    ablation.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(OPS) and "us a step" in lines[0]
