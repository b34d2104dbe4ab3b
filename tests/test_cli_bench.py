"""``cupyinfer bench`` on a tiny model: the table, the JSON, and options that are wrong before anything is measured."""

from __future__ import annotations

import json

import pytest
from standins import write_model

from cupyinfer.bench.report import _with_prefix
from cupyinfer.cli.main import main

SMALL = ("--batches", "1,2", "--prompt", "6", "--out", "4", "--prefill", "2x8", "--rounds", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


def test_table_and_file(model, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["bench", "--model", model, *SMALL, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    got = json.loads(file.read_text(encoding="utf-8"))
    names = [result["workload"] for result in got["results"]]
    assert names == ["decode batch 1, prompt 6, out 4", "decode batch 2, prompt 6, out 4", "prefill 2 x 8"]
    assert all(name in out and name in err for name in names)
    assert "GB/s read" in out
    for result in got["results"]:
        assert result["value"] > 0
        assert result["roofline"] > 0
    for decode in got["results"][:2]:
        steps = decode["steps"]
        assert 0 < steps["p10"] <= steps["median"] <= steps["p90"] <= steps["p99"]


def test_json_on_standard_output_is_alone_there(model, capsys):
    assert main(["bench", "--model", model, *SMALL, "--workloads", "prefill", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert [r["unit"] for r in json.loads(out)["results"]] == ["tokens/s"]
    assert "prefill 2 x 8" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "0"], "--prompt=0 is not allowed; allowed: an integer of 1 or more"),
        (["--out", "1"], "--out=1 is not allowed; allowed: an integer of 2 or more"),
        (["--rounds", "0"], "--rounds=0"),
        (["--sequences", "-1"], "--sequences=-1"),
        (["--batches", "1,x"], "--batches='x'"),
        (["--prefill", "2"], "--prefill=''"),
        (["--workloads", "decode,sing"], "--workloads='sing' is not allowed; allowed: decode, prefill, offline"),
        (["--json", "/nowhere/figures.json"], "--json='/nowhere/figures.json' is not allowed"),
        (["--json", "/"], "--json='/' is not allowed"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(words, message, capsys):
    assert main(["bench", "--model", "/nowhere/model", *words]) == 2
    assert message in capsys.readouterr().err


def test_rates_are_in_the_unit_that_fits():
    assert _with_prefix(4.03e12, "B/s") == "4.03 TB/s"
    assert _with_prefix(2.35e11, "FLOP/s") == "235.0 GFLOP/s"
