"""What is checked before an engine loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from cupyinfer.config import EngineConfig
from cupyinfer.engine.loading import check_environment, load_engine
from cupyinfer.errors import ConfigError, OutOfMemoryError

LLAMA = str(Path(__file__).resolve().parents[1] / "golden" / "llama")


@pytest.mark.parametrize("name", ["CUPYINFER_CACHE_DIR", "CUPY_CACHE_DIR"])
def test_an_unwritable_cache_is_one_clear_error(name, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(name, str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=f"{name}=.*file/cache': the cache cannot be written .*; allowed: set {name}"):
        load_engine(EngineConfig.make(model=LLAMA, device="cpu"))


def test_a_cache_folder_that_is_missing_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPYINFER_CACHE_DIR", str(tmp_path / "a" / "b"))
    load_engine(EngineConfig.make(model=LLAMA, device="cpu"))
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())


def test_cupys_own_cache_matters_only_where_kernels_are_compiled(monkeypatch, tmp_path):
    (tmp_path / ".cupy").write_text("")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    check_environment(on_gpu=False)
    with pytest.raises(ConfigError, match="CUPY_CACHE_DIR=.*cannot be written"):
        check_environment(on_gpu=True)
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    check_environment(on_gpu=True)


@pytest.mark.parametrize("name", ["CUPYINFER_DEBUG", "CUPYINFER_NO_GRAPHS"])
def test_a_bad_variable_is_refused(name, monkeypatch):
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(ConfigError, match=f"environment variable {name}='maybe' is not allowed"):
        load_engine(EngineConfig.make(model=LLAMA, device="cpu"))


def engine(**settings):
    return load_engine(EngineConfig.make(model=LLAMA, **{"device": "cpu", **settings}))[0]


def test_more_pages_than_memory_is_one_clear_error():
    with pytest.raises(OutOfMemoryError, match="2147483647 KV pages need .* GiB of host memory.*lower num_gpu"):
        engine(num_gpu_blocks_override=2**31 - 1)


def test_a_context_beyond_the_models_is_refused_whatever_its_size():
    for length in (513, 2**31 - 1):
        with pytest.raises(ConfigError, match=f"max_model_len={length} is not allowed; allowed: at most 512"):
            engine(max_model_len=length)


@pytest.mark.parametrize("device", [3, "tpu", "cuda:x", ["cpu"]])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ConfigError, match="device=.* is not allowed; allowed: auto, cpu, cuda, cuda:N"):
        engine(device=device)
