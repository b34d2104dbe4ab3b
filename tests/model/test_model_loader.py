"""load_model: types, dummy weights, hub ids; and what the decoder does with unusual steps."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from paged_driver import PagedDriver, Sequence

from cupyinfer.errors import CheckpointError, ConfigError, OutOfMemoryError
from cupyinfer.model import checkpoint, hub
from cupyinfer.model.checkpoint import allocate, list_tensors
from cupyinfer.model.config import read_config, resolve_config
from cupyinfer.model.decoder import Decoder
from cupyinfer.model.inputs import StepInputs
from cupyinfer.model.loader import kv_cache_shape, load_model, resolve_dtype
from cupyinfer.model.rope import rope_table
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.device import Device, choose_device
from cupyinfer.types import dtype_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CPU = choose_device("cpu")
GPU = Device("cuda", 0, "a GPU that is only asked for its kind", None)
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


# --- types ----------------------------------------------------------------------------------------------------------
def test_auto_dtype():
    bf16, unnamed = resolve_config(TINY | {"dtype": "bfloat16"}), resolve_config(TINY)
    assert resolve_dtype(bf16, CPU).name == "float32"
    assert resolve_dtype(bf16, GPU).name == "bfloat16"
    assert resolve_dtype(unnamed, GPU).name == "float32"
    from_disk = load_model(GOLDEN / "qwen2", CPU)[1].weights
    assert from_disk["embed"].dtype == np.float32
    assert resolve_dtype(bf16, GPU, "half").name == "float16"
    with pytest.raises(ConfigError, match="dtype='int8'.*auto, float32"):
        resolve_dtype(bf16, CPU, "int8")


def test_dtype_of_the_tensors_counts_where_the_config_is_silent(tmp_path):
    shutil.copytree(GOLDEN / "qwen2", tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    fields = json.loads(path.read_text())
    del fields["dtype"]
    path.write_text(json.dumps(fields))
    assert resolve_dtype(read_config(tmp_path / "m"), GPU, "auto", list_tensors(tmp_path / "m")).name == "float16"


# --- dummy weights --------------------------------------------------------------------------------------------------
def test_dummy_from_a_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"attention_bias": True}))
    calls: list[tuple[int, int]] = []
    _, first = load_model(tmp_path, CPU, load_format="dummy", progress=lambda *c: calls.append(c))
    _, again = load_model(tmp_path, CPU, load_format="dummy")
    _, other = load_model(tmp_path, CPU, load_format="dummy", seed=1)
    assert all(np.array_equal(first.weights[n], again.weights[n]) for n in first.weights)
    assert not np.array_equal(first.weights["embed"], other.weights["embed"])
    assert np.all(first.weights["layers.0.attn_norm"] == 1) and np.all(first.weights["layers.0.qkv_bias"] == 0)
    assert first.weights["layers.0.up"].std() == pytest.approx(0.02, rel=0.05)
    assert calls[-1][0] == calls[-1][1] > 0
    _, (tokens,) = PagedDriver(first).greedy([[1, 2, 3]], 4)
    assert len(tokens) == 4


def test_dummy_norms_of_gemma_multiply_by_one(tmp_path):
    shutil.copy(GOLDEN / "gemma2" / "config.json", tmp_path)
    _, decoder = load_model(tmp_path, CPU, "bfloat16", "dummy")
    assert np.all(decoder.weights["layers.0.post_mlp_norm"] == 0)


@pytest.mark.gpu
def test_dummy_on_the_gpu(cupy):
    _, decoder = load_model("dummy:qwen3-0.6b", choose_device("cuda"), max_positions=256)
    up = decoder.weights["layers.5.up"]
    assert up.dtype == dtype_of("bfloat16").numpy and abs(float(up.astype("float32").std()) - 0.02) < 1e-3
    logits, _ = PagedDriver(decoder).greedy([[1, 2, 3]], 2)
    assert np.isfinite(logits).all() and logits.std() > 0


def test_formats_are_checked():
    with pytest.raises(ConfigError, match="load_format='pt'"):
        load_model(GOLDEN / "llama", CPU, load_format="pt")
    with pytest.raises(ConfigError, match="load_format='safetensors'"):
        load_model("dummy:llama-3.1-8b", CPU, load_format="safetensors")
    with pytest.raises(ConfigError, match="model='dummy:nothing'"):
        load_model("dummy:nothing", CPU)


def test_rows_must_be_whole_16_bytes_on_a_gpu(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"hidden_size": 36, "head_dim": 32}))
    with pytest.raises(ConfigError, match="hidden_size=36.*multiple of 8"):
        load_model(tmp_path, GPU, load_format="dummy")


def test_head_dims_without_a_kernel_run_on_the_cpu_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"head_dim": 6}))
    with pytest.raises(ConfigError, match="head_dim=6 is not allowed; allowed: 16, 32, .* on a GPU"):
        load_model(tmp_path, GPU, load_format="dummy")
    decoder = load_model(tmp_path, CPU, load_format="dummy")[1]
    assert np.isfinite(PagedDriver(decoder).greedy([[1, 2, 3], [4]], 5, chunk=2)[0]).all()


def test_moe_sizes_are_checked_before_the_weights_are_read(tmp_path):
    moe = TINY | {"architectures": ["MixtralForCausalLM"], "num_key_value_heads": 2}
    for fields, device, message in (
        ({"num_local_experts": 257}, CPU, "num_experts=257 is not allowed; allowed: at most 256"),
        ({"num_local_experts": 64, "num_experts_per_tok": 33}, CPU, "experts_per_token=33.*at most 32"),
        ({"intermediate_size": 20}, GPU, "moe_intermediate_size=20.*multiple of 8"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(moe | fields))
        with pytest.raises(ConfigError, match=message):
            load_model(tmp_path, device, load_format="dummy")
    (tmp_path / "config.json").write_text(json.dumps(moe | {"intermediate_size": 20}))
    load_model(tmp_path, CPU, load_format="dummy")


def test_a_context_too_long_for_memory_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"max_position_embeddings": 10**15}))
    with pytest.raises(OutOfMemoryError, match="tables of 1000000000000000 positions .* lower max_model_len"):
        load_model(tmp_path, CPU, load_format="dummy")
    load_model(tmp_path, CPU, load_format="dummy", max_positions=100)


def test_more_weights_than_host_memory_are_refused_before_the_system_grants_them(monkeypatch):
    monkeypatch.setattr(checkpoint, "host_memory", lambda: 1000.0)
    with pytest.raises(OutOfMemoryError, match="weights need 0.00 GiB as float32 on cpu.*this machine has 0.00 GiB"):
        load_model(GOLDEN / "llama", CPU)


def test_out_of_memory_names_the_need():
    class Full:
        @staticmethod
        def empty(shape, dtype):
            raise MemoryError("no room")

    with pytest.raises(OutOfMemoryError, match=r"need 3.00 GiB as float32 .*no room.*16-bit"):
        allocate({"a": (1 << 28,), "b": (1 << 29,)}, Device("cuda", 0, "small", Full), dtype_of("float32"))


def test_kv_cache_shape():
    config = resolve_config(TINY)
    assert kv_cache_shape(config, 5, 32) == (5, 2, 2, 32, 32)
    with pytest.raises(ConfigError, match="block_size=24"):
        kv_cache_shape(config, 5, 24)
    with pytest.raises(ConfigError, match="num_pages=0"):
        kv_cache_shape(config, 0, 16)


# --- where the files are --------------------------------------------------------------------------------------------
def test_missing_directory():
    with pytest.raises(CheckpointError, match="'/no/such/dir': there is no such directory"):
        load_model("/no/such/dir", CPU)


def test_file_instead_of_directory():
    with pytest.raises(CheckpointError, match="is a file"):
        load_model(GOLDEN / "llama" / "config.json", CPU)


def test_hub_id_without_the_hub_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        hub.find_model("org/name")


def test_hub_download(monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda name: str(GOLDEN / "llama") if name == "org/llama" else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert hub.find_model("org/llama") == GOLDEN / "llama"


def test_hub_failure_is_one_line(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="the hub refused it: no network$"):
        hub.find_model("org/name")


# --- unusual steps --------------------------------------------------------------------------------------------------
def decoder_of(name: str) -> Decoder:
    return load_model(GOLDEN / name, CPU)[1]


def test_no_logits_wanted():
    """A chunk in the middle of a prompt: hidden states only, no row of logits."""
    driver = PagedDriver(decoder_of("gemma2"))
    inputs, _ = driver._inputs([(Sequence([5, 6, 7]), 3)])
    inputs = dataclasses.replace(inputs, logits_indices=np.empty(0, np.int32))
    assert driver.decoder.forward(inputs, driver.caches, driver.arena).shape == (0, 160)


def test_padding_rows_change_nothing():
    """A graph's batch is padded with sequences of context 0 whose slot is -1."""
    decoder = decoder_of("llama3")
    plain, padded = PagedDriver(decoder), PagedDriver(decoder)
    want = plain.step([(Sequence([9]), 1)])
    inputs, _ = padded._inputs([(Sequence([9]), 1)])
    pad = lambda array, value: np.concatenate([array, np.array([value] * 3, np.int32)])
    step = StepInputs(
        token_ids=pad(inputs.token_ids, 0),
        token_rows=pad(inputs.token_rows, -1),
        positions=pad(inputs.positions, 0),
        slot_mapping=pad(inputs.slot_mapping, -1),
        query_start=np.arange(5, dtype=np.int32),
        context_lens=pad(inputs.context_lens, 0),
        block_tables=np.concatenate([inputs.block_tables, np.zeros((3, 1), np.int32)]),
        logits_indices=np.arange(4, dtype=np.int32),
        last_tokens=inputs.last_tokens,
        num_decodes=4,
        max_query_len=1,
    )
    got = decoder.forward(step, padded.caches, padded.arena)
    assert np.allclose(got[:1], want, rtol=1e-5, atol=1e-5) and np.isfinite(got).all()
    written = [np.isfinite(cache).any(axis=(1, 2, 4)).sum() for cache in padded.caches]
    assert written == [1, 1]


def test_a_step_allocates_nothing_new():
    """The second step of the same shape takes every array from the arena's buffers."""
    driver = PagedDriver(decoder_of("qwen3-moe"))
    sequence = Sequence(list(range(3, 40)))
    driver.step([(sequence, 20)])
    driver.arena.freeze()
    driver.step([(sequence, 5)])


@pytest.mark.parametrize(
    "name, change",
    [
        ("mistral", {"windows": (0, 0)}),
        ("qwen2", {"windows": (0, 0)}),
        ("gemma2", {"windows": (48, 48)}),
        ("gemma2", {"attention_softcap": 0.0}),
        ("gemma2", {"logit_softcap": 0.0}),
        ("gemma3", {"windows": (0, 0, 0, 0)}),
        ("qwen3-moe", {"renormalize_experts": True}),
        ("gpt2", {"activation": "relu"}),
        ("gpt2", {"attention_scale": 1.0}),
    ],
)
def test_goldens_notice_each_feature(name, change):
    """The goldens are worth something: with one feature wrong the logits are off by far more than the tolerance."""
    with np.load(GOLDEN / name / "golden.npz") as data:
        prompt, want = data["prompt_300"].tolist(), data["logits_300"][-1]
    right = decoder_of(name)
    wrong = Decoder(dataclasses.replace(right.config, **change), right.weights, CPU, right.dtype)
    logits = PagedDriver(wrong).step([(Sequence(prompt), 300)])[0]
    assert np.linalg.norm(logits - want) > 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("name", ["llama3", "llama-linear", "llama-yarn"])
def test_goldens_notice_rope_scaling(name):
    with np.load(GOLDEN / name / "golden.npz") as data:
        prompt, want = data["prompt_300"].tolist(), data["logits_300"][-1]
    right = decoder_of(name)
    ropes = tuple(dataclasses.replace(rope, kind="default") for rope in right.config.ropes)
    wrong = Decoder(dataclasses.replace(right.config, ropes=ropes), right.weights, CPU, right.dtype)
    logits = PagedDriver(wrong).step([(Sequence(prompt), 300)])[0]
    assert np.linalg.norm(logits - want) > 1e-2 * np.linalg.norm(want)


# --- rotary tables --------------------------------------------------------------------------------------------------
def test_default_rope_table():
    rope = resolve_config(TINY).ropes[0]
    table = rope_table(rope, 9000)  # more than one chunk
    for position in (0, 1, 63, 8999):
        for pair in (0, 5, 15):
            angle = position * 10000.0 ** (-pair / 16)
            assert table[position, pair] == pytest.approx(math.cos(angle), abs=1e-3)
            assert table[position, 16 + pair] == pytest.approx(math.sin(angle), abs=1e-3)


def test_linear_rope_stretches_positions():
    linear = resolve_config(TINY | {"rope_scaling": {"type": "linear", "factor": 4.0}}).ropes[0]
    assert np.allclose(rope_table(linear, 64)[::4], rope_table(resolve_config(TINY).ropes[0], 16), atol=1e-6)


def test_max_positions_limits_the_tables():
    right = decoder_of("gemma3")
    limited = Decoder(right.config, right.weights, CPU, right.dtype, max_positions=32)
    assert limited.nbytes == right.nbytes - 2 * (512 - 32) * 32 * 4


def test_arena_is_shared_between_layers():
    driver = PagedDriver(decoder_of("qwen3-moe"))
    driver.step([(Sequence(list(range(3, 20))), 17)])
    assert isinstance(driver.arena, Arena) and driver.arena.nbytes < 17 * 4 * 2000
