"""From settings to a running engine: device, model, memory, graphs."""

from __future__ import annotations

from functools import partial

from cupyinfer.config import EngineConfig, step_limits
from cupyinfer.engine.engine import LLMEngine
from cupyinfer.engine.memory_plan import make_pool, plan_memory
from cupyinfer.engine.runner import Model, Progress, Runner
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
