"""One call from a path, hub id or preset to a decoder on the device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cupyinfer.errors import ConfigError, OutOfMemoryError, invalid
from cupyinfer.model.architecture import ModelConfig
from cupyinfer.model.checkpoint import Progress, list_tensors, load_weights
from cupyinfer.model.config import read_config
from cupyinfer.model.decoder import Decoder
from cupyinfer.model.dummy import dummy_weights
from cupyinfer.model.hub import find_model
from cupyinfer.model.presets import PREFIX, dummy_config
from cupyinfer.model.tensor_files import StoredTensor
from cupyinfer.model.weights import Weights
from cupyinfer.ops.attention import HEAD_DIMS
from cupyinfer.ops.moe import MAX_CHOICES, MAX_EXPERTS
from cupyinfer.runtime.device import Device
from cupyinfer.types import FLOAT_NAMES, DType, dtype_of

LOAD_FORMATS = ("auto", "safetensors", "dummy")


def load_model(
    path_or_id: str | Path,
    device: Device,
    dtype: str = "auto",
    load_format: str = "auto",
    progress: Progress | None = None,
    *,
    max_positions: int | None = None,
    seed: int = 0,
) -> tuple[ModelConfig, Decoder]:
    """Read a model's configuration and put its weights on ``device``.

    ``path_or_id``: a directory, a hub id, or ``dummy:<preset>``. ``dtype`` auto: see :func:`resolve_dtype`.
    ``load_format`` dummy fills random weights from ``seed`` (the directory then needs only a config.json); auto reads
    safetensors, except for ``dummy:``. ``progress(done, total)`` counts bytes. ``max_positions`` limits the rotary
    tables to the context that will be used (tokens). Raises ConfigError, CheckpointError, OutOfMemoryError.
    """
    if load_format not in LOAD_FORMATS:
        raise invalid("load_format", load_format, ", ".join(LOAD_FORMATS))
    preset = str(path_or_id).startswith(PREFIX)
    if preset and load_format == "safetensors":
        raise invalid("load_format", load_format, f"auto or dummy with model={str(path_or_id)!r}")
    directory = None if preset else find_model(path_or_id)
    config = dummy_config(str(path_or_id)) if directory is None else read_config(directory)
    _check_sizes(config, device.is_cuda)
    if directory is None or load_format == "dummy":
        kind = resolve_dtype(config, device, dtype)
        weights = dummy_weights(config, device, kind, seed, progress)
    else:
        kind = resolve_dtype(config, device, dtype, list_tensors(directory))
        weights = load_weights(directory, config, device, kind, progress)
    positions = min(max_positions or config.max_position_embeddings, config.max_position_embeddings)
    return config, _make_decoder(config, weights, device, kind, positions)


def _make_decoder(config: ModelConfig, weights: Weights, device: Device, dtype: DType, positions: int) -> Decoder:
    """Raises OutOfMemoryError when the rotary tables of so many positions do not fit."""
    try:
        return Decoder(config, weights, device, dtype, positions)
    except MemoryError as error:  # CuPy's out-of-memory error is one too
        raise OutOfMemoryError(
            f"rotary tables of {positions} positions do not fit on {device} ({error}); lower max_model_len"
        ) from None


def _check_sizes(config: ModelConfig, on_gpu: bool) -> None:
    """Raise ConfigError for sizes that the ops cannot compute; the NumPy path takes almost any."""
    for name, most in (("num_experts", MAX_EXPERTS), ("experts_per_token", MAX_CHOICES)):
        if getattr(config, name) > most:
            raise invalid(name, getattr(config, name), f"at most {most}")
    if not on_gpu:
        return
    for name in ("hidden_size", "moe_intermediate_size"):
        if getattr(config, name) % 8:
            raise invalid(name, getattr(config, name), "a multiple of 8 on a GPU, whose kernels read 16 bytes at once")
    if config.head_dim not in HEAD_DIMS:
        allowed = ", ".join(map(str, HEAD_DIMS))
        raise invalid("head_dim", config.head_dim, f"{allowed} on a GPU, for which kernels exist (any with device=cpu)")


def resolve_dtype(
    config: ModelConfig, device: Device, dtype: str = "auto", tensors: Mapping[str, StoredTensor] | None = None
) -> DType:
    """The type that a model computes in.

    auto: float32 on the CPU, where 16-bit arithmetic is emulated; on a GPU the checkpoint's own type, as its config
    names it, else as its tensors have it. A float32 checkpoint stays float32: rounding it is the user's choice
    (``dtype="bfloat16"``). Raises ConfigError.
    """
    if dtype != "auto":
        if dtype not in (*FLOAT_NAMES, "half", "float"):
            raise invalid("dtype", dtype, f"auto, {', '.join(FLOAT_NAMES)}")
        return dtype_of(dtype)
    if not device.is_cuda:
        return dtype_of("float32")
    if config.dtype:
        return dtype_of(config.dtype)
    names = [stored.dtype_name for stored in (tensors or {}).values()]
    return dtype_of(max(set(names), key=names.count) if names else "float32")


def kv_cache_shape(config: ModelConfig, num_pages: int, block_size: int) -> tuple[int, int, int, int, int]:
    """Shape [P, 2, K, S, D] of one layer's cache. Raises ConfigError when the block size is not allowed."""
    if block_size not in (8, 16, 32, 64, 128):
        raise invalid("block_size", block_size, "8, 16, 32, 64, 128")
    if num_pages < 1:
        raise ConfigError(f"num_pages={num_pages} is not allowed; allowed: an integer >= 1")
    return config.kv_cache_shape(num_pages, block_size)
