"""How many KV pages fit: on a GPU by running the largest steps once and looking at what is left; and their pool."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from cupyinfer.config import EngineConfig, EnginePlan, StepLimits, cpu_blocks, gpu_blocks, make_plan
from cupyinfer.engine.batch import Batch, idle_batch
from cupyinfer.engine.runner import Model, Progress, Runner
from cupyinfer.errors import OutOfMemoryError
from cupyinfer.ops.logits import MAX_TOP, MAX_VOCAB
from cupyinfer.ops.sampling import sample_filtered
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.device import Device
from cupyinfer.runtime.kernels import collecting, compile_all
from cupyinfer.runtime.kv_pool import CpuBlockPool, PageLayout, PagePool
from cupyinfer.types import dtype_of

_GRAPH_NODE_BYTES = 16 << 10  # device memory that a captured kernel may take, generously
_NODES_PER_LAYER = 12


def plan_memory(
    config: EngineConfig,
    limits: StepLimits,
    device: Device,
    model: Model,
    vocab_size: int,
    layout: PageLayout,
    arena: Arena,
    progress: Progress | None = None,
) -> EnginePlan:
    """The final plan. On a GPU ``arena`` has grown to what the largest steps need. Raises OutOfMemoryError."""
    if not device.is_cuda:
        blocks = config.num_gpu_blocks_override or cpu_blocks(config, limits, layout.page_bytes)
        return make_plan(config, limits, False, blocks)
    draft = make_plan(replace(config, max_model_len=None), limits, True, limits.blocks_per_sequence)
    free = device.xp.cuda.runtime.memGetInfo()[0]
    try:
        _run_largest_steps(Runner(model, vocab_size, draft, device, _one_page(device, layout), arena), progress)
    except MemoryError as error:
        raise OutOfMemoryError(
            f"a step of {limits.max_num_batched_tokens} tokens does not fit into the {free / 2**30:.2f} GiB that the "
            f"weights left ({error}); lower max_num_batched_tokens or max_num_seqs"
        ) from None
    blocks = config.num_gpu_blocks_override or gpu_blocks(_available(config, draft, device, layout), layout.page_bytes)
    return make_plan(config, limits, True, blocks)


def _one_page(device: Device, layout: PageLayout) -> list:
    """One zeroed page, the same for every layer: the measuring steps read it and keep nothing."""
    page = device.xp.zeros((1, *layout.shape), dtype_of(layout.dtype).numpy)
    return [page] * layout.num_layers


def _available(config: EngineConfig, plan: EnginePlan, device: Device, layout: PageLayout) -> int:
    """Bytes for KV pages: the share of the device that may be used, less everything used now and graphs to come."""
    cuda = device.xp.cuda
    cuda.Device(device.index).synchronize()
    device.xp.get_default_memory_pool().free_all_blocks()
    free, total = cuda.runtime.memGetInfo()
    graphs = len(plan.decode_buckets) * layout.num_layers * _NODES_PER_LAYER * _GRAPH_NODE_BYTES
    return int(free - (1 - config.gpu_memory_utilization) * total) - (graphs if plan.use_graphs else 0)


def _run_largest_steps(runner: Runner, progress: Progress | None) -> None:
    """Run what needs the most scratch: the largest prompts, the widest decode steps, every way to sample.

    Smaller sizes are run too, since some kernels want more scratch for fewer tokens. The kernels that all this needs
    are compiled first, several at once.
    """
    plan = runner.plan
    tokens = [t for t in (4, 16, 64, 256, 1024, 4096) if t < plan.max_num_batched_tokens]
    prompts = [_prompts(plan, t) for t in (plan.max_num_batched_tokens, *reversed(tokens))]
    decodes = [idle_batch(decodes=n) for n in plan.decode_buckets[::-1]]
    with collecting() as kernels:
        _run(runner, (prompts[1:] or prompts) + decodes)
    with runner.on_device():
        compile_all(kernels, partial(progress, "kernels") if progress else None)
    _run(runner, prompts + decodes)
    runner.synchronize()


def _run(runner: Runner, steps: list[Batch]) -> None:
    for batch in steps:
        runner.run_idle(batch)
    with runner.on_device():
        _sample_every_way(runner)


def _prompts(plan: EnginePlan, tokens: int) -> Batch:
    """Prompts as long as possible that make ``tokens`` together, asking for as many logits as a step may."""
    full, rest = divmod(tokens, plan.max_model_len)
    lens = [plan.max_model_len] * full + [rest] * (rest > 0)
    if len(lens) > plan.max_num_seqs:  # many short sequences: as many as may run at once
        lens = lens[: plan.max_num_seqs]
    return idle_batch(lens, logits_rows=min(sum(lens), plan.logits_rows))


def _sample_every_way(runner: Runner) -> None:
    """Reserve the scratch of filters and log-probabilities for the most rows."""
    if runner.vocab_size > MAX_VOCAB:  # requests that want them are refused
        return
    xp, arena, rows, vocab = runner.device.xp, runner.arena, runner.plan.max_num_seqs, runner.vocab_size
    logits = arena.take("raw_logits", (rows, vocab), np.float32)
    logits.fill(0)
    ones, zeros = xp.ones(rows, np.float32), xp.zeros(rows, np.int32)
    seeds, tokens = xp.zeros(rows, np.uint64), xp.zeros(rows, np.int32)
    sample_filtered(logits, ones, zeros + 1, ones, ones, seeds, zeros, tokens=tokens, arena=arena)
    runner.score("sampled", logits, tokens, min(MAX_TOP, vocab))
    all_rows = runner.plan.logits_rows
    wide = arena.take("logits", (all_rows, vocab), np.float32)
    runner.score("prompt", wide, xp.zeros(all_rows, np.int32), min(MAX_TOP, vocab))


def make_pool(device: Device, num_pages: int, layout: PageLayout) -> PagePool:
    """The pool of the device: KVBlockPool on a GPU, CpuBlockPool otherwise. Raises OutOfMemoryError."""
    if not device.is_cuda:
        return CpuBlockPool(num_pages, layout)
    from cupyinfer.runtime.kv_pool_cuda import KVBlockPool  # needs CuPy

    return KVBlockPool(num_pages, layout)
