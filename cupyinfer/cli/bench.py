"""``cupyinfer bench``: decode grid, prefill and the offline workload, against the machine's measured ceilings."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

import cupyinfer
from cupyinfer.api import LLM
from cupyinfer.bench import report, roofline, workloads
from cupyinfer.bench.workloads import Bench, Result
from cupyinfer.cli.options import add_engine_options, engine_settings
from cupyinfer.errors import invalid
from cupyinfer.progress import ProgressBars
from cupyinfer.types import dtype_of

BATCHES = {"cuda": (1, 8, 32, 128, 256), "cpu": (1, 4, 8)}  # of the decode grid, by kind of device
PREFILL = {"cuda": ((16, 2048), (4, 4000)), "cpu": ((1, 512), (4, 512))}  # prompts x tokens
SEQUENCES = {"cuda": 256, "cpu": 8}  # of the offline workload
WORKLOADS = ("decode", "prefill", "offline")
_EPILOG = """examples:
  cupyinfer bench                                                      the demo model
  cupyinfer bench --model dummy:llama-3.1-8b --max-model-len 4096      an 8B shape with random weights
  cupyinfer bench --model dummy:qwen3-0.6b --workloads decode --batches 1,256 --json result.json

Decode: batch 1 with prompts of 128 and 256 output tokens, larger batches with 512 and 128, greedy, EOS ignored.
"% of roofline" is the least time that the bytes and operations need at the measured ceilings, over the measured time.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure decode, prefill and a whole offline workload; prints a table, --json writes all figures."
    )
    parser.epilog = _EPILOG
    parser.add_argument("--workloads", default="decode,prefill", metavar="LIST", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument(
        "--batches", metavar="LIST", help="batch sizes of the decode grid; default: 1,8,32,128,256; on a CPU 1,4,8"
    )
    parser.add_argument("--prompt", type=int, metavar="TOKENS", help="prompt length of the decode grid")
    parser.add_argument("--out", type=int, metavar="TOKENS", help="output length of the decode grid, 2 or more")
    parser.add_argument(
        "--prefill",
        metavar="LIST",
        help="prompts x tokens; default: 16x2048,4x4000; on a CPU 1x512,4x512; or what fits",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="of the offline workload; default: 256, on a CPU 8; up to 2048 tokens",
    )
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="best of N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure; - for standard output")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check_options(args)
    chosen = _chosen(args.workloads)
    batches = [_number("--batches", part) for part in args.batches.split(",")] if args.batches else None
    shapes = [_shape(part) for part in args.prefill.split(",")] if args.prefill else None
    settings = {"enable_prefix_caching": False} | engine_settings(args)
    to_stdout = str(args.json) == "-"
    console = Console(stderr=to_stdout, width=None if sys.stdout.isatty() else 140)
    with closing(ProgressBars()) as bars, LLM(**settings, progress=bars) as llm:
        config = llm.model_config
        dtype = dtype_of(llm.dtype)
        weights = roofline.count_weights(config)
        limits = roofline.measure(llm.device, dtype, weights)
        bench = Bench(llm, config, weights, limits, dtype.itemsize, args.rounds)
        kind = llm.device.kind
        fits = [(count, min(length, llm.max_model_len - 1)) for count, length in PREFILL[kind]]
        args.sequences = args.sequences or SEQUENCES[kind]
        results = list(_results(bench, chosen, batches or list(BATCHES[kind]), shapes or fits, args))
        machine = _machine(llm)
    report.print_table(f"{machine['model']} on {machine['device']}, {machine['dtype']}", limits, results, console)
    text = json.dumps(report.as_json(machine, limits, results), indent=1)
    if to_stdout:
        print(text)
    elif args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Refuse bad numbers and an unwritable file before minutes of measuring. Raises ConfigError."""
    for name, least in (("prompt", 1), ("out", 2), ("sequences", 1), ("rounds", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise invalid(f"--{name}", value, f"an integer of {least} or more")
    file = args.json
    if file is None or str(file) == "-":
        return
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise invalid("--json", str(file), "a file that can be written, or -")


def _results(bench: Bench, chosen: list[str], batches: list[int], shapes: list[tuple[int, int]], args: Any):
    """Results as they come, each also said on standard error: a long run shows that it lives."""
    for name in chosen:
        if name == "decode":
            made = (workloads.decode(bench, b, *_lengths(b, args)) for b in batches)
        elif name == "prefill":
            made = (workloads.prefill(bench, count, length) for count, length in shapes)
        else:
            made = (workloads.offline(bench, n) for n in [args.sequences])
        for result in made:
            _say(result)
            yield result


def _say(result: Result) -> None:
    share = f"{100 * result.roofline:.0f} % of roofline"
    print(f"{result.workload}: {result.value:,.4g} {result.unit}, {share}", file=sys.stderr, flush=True)


def _lengths(batch: int, args: argparse.Namespace) -> tuple[int, int]:
    prompt, out = (128, 256) if batch == 1 else (512, 128)
    return args.prompt or prompt, args.out or out


def _chosen(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in WORKLOADS:
            raise invalid("--workloads", name, ", ".join(WORKLOADS))
    return names


def _number(option: str, text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise invalid(option, text, "integers of 1 or more, separated by commas")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    count, _, length = text.partition("x")
    return _number("--prefill", count), _number("--prefill", length)


def _machine(llm: LLM) -> dict[str, Any]:
    return {
        "cupyinfer": cupyinfer.__version__,
        "model": llm.model_name,
        "device": str(llm.device),
        "dtype": llm.dtype,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
