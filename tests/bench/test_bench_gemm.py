"""The GEMM benchmark: its arguments and table anywhere, its measurements on a GPU."""

from __future__ import annotations

import json

import pytest

from cupyinfer.bench import gemm as bench
from cupyinfer.runtime.device import gpu_count


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "0"], "rows='0' is not allowed"),
        (["--rows", "1,x"], "rows='1,x' is not allowed"),
        (["--models", "gpt-5"], "models='gpt-5' is not allowed"),
        (["--routes", "skinny,magma"], "routes='skinny,magma' is not allowed"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert bench.main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(gpu_count()[0] > 0, reason="a GPU is here")
def test_without_a_gpu_it_says_so(capsys):
    assert bench.main(["--rows", "1"]) == 1
    assert "device=cuda was asked for" in capsys.readouterr().err


def test_table_has_every_row(capsys):
    bench.print_rows(
        [bench.Row(1, 8, 16, "skinny", 2.5, 0.125, 3.0), bench.Row(2, 8, 16, "lt", 5.25, 1.5, 6.0)], "title"
    )
    text = capsys.readouterr().out
    assert all(word in text for word in ("title", "skinny", "2.50", "0.12", "lt", "5.25", "TB/s"))


@pytest.mark.gpu
@pytest.mark.parametrize("mode, T", [("routes", 8), ("routes", 40), ("sweep", 1), ("tune", 40)])
def test_measures_every_mode(mode, T, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUPYINFER_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(bench.SHAPES, "llama-8b", ((256, 512),))
    assert bench.main(["--models", "llama-8b", "--rows", str(T), "--mode", mode, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows and all(0.1 < row["us"] < 1e5 and row["tb_per_s"] > 0 for row in rows)
    wanted = {"sweep": {"skinny"}, "tune": {"lt"}}.get(mode, {"lt", "cublas"} | ({"skinny"} if T <= 16 else set()))
    assert {row["route"].split()[0] for row in rows} == wanted
    assert bool(list(tmp_path.glob("cublaslt-*.json"))) == (mode == "tune")
