"""From settings to a running engine: device, model, memory, graphs."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

from cupyinfer import env
from cupyinfer.config import EngineConfig, step_limits
from cupyinfer.engine.engine import LLMEngine
from cupyinfer.engine.memory_plan import make_pool, plan_memory
from cupyinfer.engine.runner import Model, Progress, Runner
from cupyinfer.errors import ConfigError
from cupyinfer.model.architecture import ModelConfig
from cupyinfer.model.loader import load_model
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.device import Device, choose_device
from cupyinfer.runtime.kv_pool import PageLayout


def load_engine(config: EngineConfig, progress: Progress | None = None) -> tuple[LLMEngine, ModelConfig]:
    """Load the model of ``config`` and make an engine for it.

    ``progress(stage, done, total)`` is called with stage "weights" (bytes), then on a GPU "kernels" and "graphs"
    (steps). Raises ConfigError, CheckpointError, DeviceError, OutOfMemoryError.
    """
    device = choose_device(config.device)
    check_environment(device.is_cuda)
    weights_progress = partial(progress, "weights") if progress else None
    model_config, decoder = load_model(
        config.model,
        device,
        config.dtype,
        config.load_format,
        weights_progress,
        max_positions=config.max_model_len,
        seed=config.seed,
    )
    return make_engine(config, model_config, decoder, decoder.dtype.name, device, progress), model_config


def check_environment(on_gpu: bool) -> None:
    """Raise ConfigError for an environment variable with a bad value, and for a cache folder that cannot be written.

    A folder that was named must be usable; CuPy's own default is looked at only where kernels will be compiled.
    """
    for variable in env.VARIABLES:
        variable.get()
    folders = {name: os.environ.get(name, "") for name in (env.CACHE_DIR.name, "CUPY_CACHE_DIR")}
    if on_gpu and not folders["CUPY_CACHE_DIR"] and os.environ.get("CUPY_CACHE_IN_MEMORY", "0") == "0":
        folders["CUPY_CACHE_DIR"] = str(Path.home() / ".cupy" / "kernel_cache")
    for name, folder in folders.items():
        if folder:
            _check_folder(name, folder)


def _check_folder(name: str, folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{name}={folder!r}: the cache cannot be written ({error.strerror or error}); "
            f"allowed: set {name} to a folder that you may write to"
        ) from None


def make_engine(
    config: EngineConfig,
    model_config: ModelConfig,
    model: Model,
    dtype: str,
    device: Device,
    progress: Progress | None = None,
) -> LLMEngine:
    """An engine over a model that is on ``device`` already; ``dtype`` is the one of its KV pages."""
    limits = step_limits(config, device.is_cuda, model_config.max_position_embeddings)
    layout = PageLayout(
        model_config.num_layers, model_config.num_kv_heads, config.block_size, model_config.head_dim, dtype
    )
    arena, vocab = Arena(device.xp), model_config.vocab_size
    plan = plan_memory(config, limits, device, model, vocab, layout, arena, progress)
    pool = make_pool(device, plan.num_blocks, layout)
    runner = Runner(model, vocab, plan, device, pool.kv_caches, arena)
    if device.is_cuda:
        device.xp.cuda.Device(device.index).synchronize()  # weights and pages were written on another stream
    runner.capture_graphs(progress)
    return LLMEngine(runner, pool, plan, model_config.eos_token_ids)
