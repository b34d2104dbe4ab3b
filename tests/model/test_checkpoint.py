"""Reading checkpoints: every tensor lands in its place, and each kind of damage gives one clear error."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cupyinfer.errors import CheckpointError
from cupyinfer.model import checkpoint
from cupyinfer.model.checkpoint import list_tensors, load_weights
from cupyinfer.model.config import read_config
from cupyinfer.model.families import FAMILIES
from cupyinfer.model.weights import parameter_shapes
from cupyinfer.runtime.device import choose_device
from cupyinfer.types import BFLOAT16, dtype_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
SINGLE, SHARDED = "qwen3", "mixtral"
CPU = choose_device("cpu")


def load(directory: Path, dtype: str = "float32", device=CPU, **kwargs):
    return load_weights(directory, read_config(directory), device, dtype_of(dtype), **kwargs)


@pytest.fixture
def copied(tmp_path):
    """A copy of a golden checkpoint that the test may damage."""

    def copy(name: str) -> Path:
        shutil.copytree(GOLDEN / name, tmp_path / name)
        return tmp_path / name

    return copy


def rewrite(directory: Path, change) -> None:
    """Change the tensors of a float32 single-file checkpoint: ``change(dict)``."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture
def plain(copied):
    """gemma2: one file, float32."""
    return copied("gemma2")


# --- the map from names to places -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_sources_fill_every_parameter_once(name):
    config = read_config(GOLDEN / name)
    shapes = parameter_shapes(config)
    filled = Counter()
    for source in FAMILIES[config.architecture].sources(config, list_tensors(GOLDEN / name)):
        place = source.place(np.empty(shapes[source.target], np.int8))
        place[...] = 0
        filled[source.target] += place.size
    assert filled == {target: int(np.prod(shape)) for target, shape in shapes.items()}


def test_fused_rows_are_in_order():
    weights, tensors = load(GOLDEN / "gemma2"), load_file(GOLDEN / "gemma2" / "model.safetensors")
    parts = [tensors[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert np.array_equal(weights["layers.1.qkv"], np.concatenate(parts))
    parts = [tensors[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up")]
    assert np.array_equal(weights["layers.0.up"], np.concatenate(parts))


@pytest.mark.parametrize(
    "name, layers, experts, block, parts",
    [
        ("qwen3-moe", (0, 2), 8, "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", (0, 1), 4, "block_sparse_moe", ("w1", "w3", "w2")),
    ],
)
def test_stacked_experts_are_read_too(copied, name, layers, experts, block, parts):
    """The layout and names of transformers 5's own modules: one tensor for all experts of a layer.

    The file is written beside the shards of the checkpoint: like transformers we read model.safetensors first.
    """
    directory = copied(name)
    arrays = {name: bits(stored) for name, stored in list_tensors(directory).items()}
    for layer in layers:
        theirs, new = f"model.layers.{layer}.{block}", f"model.layers.{layer}.mlp"
        pop = lambda x, part, prefix=theirs: arrays.pop(f"{prefix}.experts.{x}.{part}.weight")
        both = [np.concatenate([pop(x, parts[0]), pop(x, parts[1])]) for x in range(experts)]
        arrays[f"{new}.experts.gate_up_proj"] = np.stack(both)
        arrays[f"{new}.experts.down_proj"] = np.stack([pop(x, parts[2]) for x in range(experts)])
        arrays[f"{new}.gate.weight"] = arrays.pop(f"{theirs}.gate.weight")
    want = load(directory)
    write_bfloat16(directory / "model.safetensors", arrays)
    got = load(directory)
    assert all(np.array_equal(got[name], want[name]) for name in want)


def bits(stored) -> np.ndarray:
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        return np.frombuffer(file.read(stored.nbytes), np.uint16).reshape(stored.shape)


def write_bfloat16(path: Path, arrays: dict[str, np.ndarray]) -> None:
    header, offset = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_original_gpt2_names_and_buffers(copied):
    """The hub's gpt2 has no ``transformer.`` in front of its names and carries the causal masks."""
    directory = copied("gpt2")
    want = load(directory)
    tensors: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= {name.removeprefix("transformer."): array for name, array in load_file(file).items()}
        file.unlink()
    (directory / "model.safetensors.index.json").unlink()
    tensors |= {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "h.0.attn.masked_bias": np.float32(-1e4)}
    save_file({name: np.atleast_1d(array) for name, array in tensors.items()}, directory / "model.safetensors")
    got = load(directory)
    assert all(np.array_equal(got[name], want[name]) for name in want)


def test_tied_head_on_disk_is_not_needed(plain):
    rewrite(plain, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert "lm_head" not in load(plain)


# --- types and memory -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_types_convert(stored, wanted):
    name = {"float32": "gemma2", "float16": "qwen2", "bfloat16": "qwen3"}[stored]
    exact, got = load(GOLDEN / name), load(GOLDEN / name, wanted)
    assert all(array.dtype == dtype_of(wanted).numpy for array in got.values())
    for key, array in exact.items():
        assert np.array_equal(got[key], array.astype(dtype_of(wanted).numpy)), key


def test_chunks_give_the_same(monkeypatch):
    want = load(GOLDEN / "gpt2", "bfloat16")
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 4 * 1000)
    got = load(GOLDEN / "gpt2", "bfloat16")
    assert all(np.array_equal(got[name], want[name]) for name in want)


def test_host_memory_stays_small(tmp_path, monkeypatch):
    """Beyond the parameters themselves a load holds a staging buffer, not a shard."""
    fields = json.loads((GOLDEN / "gemma2" / "config.json").read_text()) | {"vocab_size": 100_000}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tensors = load_file(GOLDEN / "gemma2" / "model.safetensors")
    tensors["model.embed_tokens.weight"] = np.zeros((100_000, 48), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 1 << 20)
    tracemalloc.start()
    weights = load(tmp_path, "bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sum(array.nbytes for array in weights.values()) + (3 << 20)


def test_progress_counts_bytes():
    calls: list[tuple[int, int]] = []
    load(GOLDEN / SHARDED, progress=lambda done, total: calls.append((done, total)))
    total = sum(stored.nbytes for stored in list_tensors(GOLDEN / SHARDED).values())
    assert calls[-1] == (total, total) and [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen2"])
def test_gpu_holds_the_same(name, wanted, monkeypatch):
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 4 * 1000)  # so that both pinned buffers are reused
    want, got = load(GOLDEN / name, wanted), load(GOLDEN / name, wanted, choose_device("cuda"))
    for key, array in want.items():
        assert np.array_equal(got[key].get().view(np.uint8), array.view(np.uint8)), key


# --- damage ---------------------------------------------------------------------------------------------------------
def refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_missing_tensor(plain):
    rewrite(plain, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(plain, r"model.layers.1.mlp.up_proj.weight of a Gemma2ForCausalLM is missing; the closest name")


def test_wrong_shape(plain):
    rewrite(plain, lambda t: t.update({"model.norm.weight": np.ones(47, np.float32)}))
    refused(plain, r"model.norm.weight has shape \[47\]; config.json asks for \[48\]")


def test_wrong_dtype(plain):
    rewrite(plain, lambda t: t.update({"model.norm.weight": np.ones(48, np.int8)}))
    refused(plain, r"model.norm.weight has dtype I8; allowed: F32, F16, BF16")


def test_unexpected_tensor(plain):
    rewrite(plain, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(128, np.float32)}))
    refused(plain, r"q_proj.bias has no place")


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_truncated_file(plain, keep):
    path = plain / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(plain, "model.safetensors is not a complete safetensors file")


def test_truncated_shard(copied):
    directory = copied(SHARDED)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(directory, f"{shard.name} is not a complete.*truncated")


def test_file_that_shrinks_while_it_is_read(plain, monkeypatch):
    tensors = list_tensors(plain)
    monkeypatch.setattr(checkpoint, "list_tensors", lambda directory: tensors)
    path = plain / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(plain, "it ended inside tensor")


def test_missing_shard(copied):
    directory = copied(SHARDED)
    shard = sorted(directory.glob("*.safetensors"))[0]
    shard.unlink()
    refused(directory, f"{shard.name} cannot be read: No such file")


def test_index_that_lies(copied):
    directory = copied(SHARDED)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = files[0]
    path.write_text(json.dumps(index))
    refused(directory, f"{files[0]} lacks tensor model.norm.weight")
    path.write_text("{}")
    refused(directory, "has no weight_map")


@pytest.mark.parametrize(
    "header, message",
    [
        (b"{nonsense", "not valid JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"a": {"dtype": "F32"}}', "entry for tensor a is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "tensor a has dtype F32"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "tensor a has dtype F32"),
    ],
)
def test_malformed_header(plain, header, message):
    (plain / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    refused(plain, message)


def test_pickles_are_refused(plain):
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    refused(plain, "pickles.*safetensors")
    (plain / "pytorch_model.bin").unlink()
    refused(plain, "has no weights")


def test_bfloat16_is_read_bit_for_bit():
    stored = list_tensors(GOLDEN / SINGLE)["model.embed_tokens.weight"]
    weights = load(GOLDEN / SINGLE, "bfloat16")
    assert weights["embed"].dtype == BFLOAT16
    assert np.array_equal(weights["embed"].view(np.uint16), bits(stored))
