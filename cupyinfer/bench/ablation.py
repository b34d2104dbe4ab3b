"""Where a decode step's time goes: ``python -m cupyinfer.bench.ablation dummy:llama-3.1-8b --batch 1 --context 256``.

The decode step is captured as a graph and timed; then captured again without one op, once for each op. What the step
gets faster by is what the op costs where it stands, launch gaps and overlap included, which timing an op alone cannot
tell. Keys and values are zero here, so attention draws less power than with real ones.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

import cupyinfer.engine.runner as runner_module
import cupyinfer.model.decoder as decoder_module
import cupyinfer.model.layers as layers_module
from cupyinfer.api import LLM
from cupyinfer.engine.batch import Batch, idle_batch
from cupyinfer.runtime.graph import capture
from cupyinfer.runtime.timing import time_gpu

OPS: tuple[tuple[ModuleType, str], ...] = (
    *(
        (layers_module, n)
        for n in ("rope_append", "paged_decode", "linear", "gated_linear", "gate_mul", "add_rms_norm")
    ),
    (decoder_module, "linear"),  # the output head
    (runner_module, "sample_simple"),
)


def decode_batch(batch: int, context: int, block_size: int) -> Batch:
    """A decode step of ``batch`` sequences with ``context`` keys each, on pages of their own."""
    width = context // block_size + 1
    last = context - 1
    first_pages = np.arange(batch, dtype=np.int32) * width
    return dataclasses.replace(
        idle_batch(decodes=batch),
        context_lens=np.full(batch, context, np.int32),
        positions=np.full(batch, last, np.int32),
        slot_mapping=(first_pages + last // block_size) * block_size + last % block_size,
        block_tables=np.arange(batch * width, dtype=np.int32).reshape(batch, width),
    )


def step_seconds(stream: Any, step: Callable[[], None]) -> float:
    """Median device seconds of the captured step."""
    with stream:
        step()
    stream.synchronize()
    with capture(stream) as graph:
        step()
    with stream:
        return time_gpu(graph.launch, repeats=15, cold=False).median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=256, help="keys of each sequence")
    parser.add_argument("--block-size", type=int, default=16)
    args = parser.parse_args()
    pages = args.batch * (args.context // args.block_size + 1) + 64
    settings = {"num_gpu_blocks_override": pages, "max_num_seqs": args.batch, "block_size": args.block_size}
    with LLM(args.model, device="cuda", max_model_len=1024, enforce_eager=True, **settings) as llm:
        runner = llm.engine.runner
        with runner.on_device():
            step = runner.decode_body(decode_batch(args.batch, args.context, args.block_size), args.batch)
        whole = step_seconds(runner.stream, step)
        print(f"{args.model}, batch {args.batch}, context {args.context}: {whole * 1e6:.0f} us a step")
        for module, name in OPS:
            original = getattr(module, name)
            setattr(module, name, lambda *_, **kwargs: kwargs.get("q_out", kwargs.get("out")))
            saved = whole - step_seconds(runner.stream, step)
            setattr(module, name, original)
            print(f"  {module.__name__.rpartition('.')[2]}.{name}: {saved * 1e6:.1f} us", flush=True)


if __name__ == "__main__":
    main()
