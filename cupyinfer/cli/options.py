"""Command-line options that several subcommands share: which model, which engine settings, how to sample."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cupyinfer.api import LLM
from cupyinfer.config import BLOCK_SIZES, LOAD_FORMATS
from cupyinfer.errors import invalid
from cupyinfer.sampling_params import SamplingParams
from cupyinfer.types import FLOAT_NAMES

_SAMPLING = (
    *("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs", "prompt_logprobs"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Which model, where, and the engine's settings. Read them back with :func:`engine_settings`."""
    group = parser.add_argument_group("model and engine")
    group.add_argument("--model", metavar="PATH_OR_ID", help="folder of a Hugging Face checkpoint, or a hub id")
    group.add_argument("--device", metavar="DEVICE", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    group.add_argument("--dtype", default="auto", metavar="TYPE", help=f"auto, {_listed(FLOAT_NAMES)}")
    formats = f"{_listed(LOAD_FORMATS)} (dummy: random weights)"
    group.add_argument("--load-format", default="auto", metavar="FORMAT", help=formats)
    group.add_argument("--tokenizer", metavar="PATH_OR_ID", help="another tokenizer than the model's")
    group.add_argument("--max-model-len", type=int, metavar="TOKENS", help="longest prompt and output together")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="sequences that run at once")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="TOKENS", help="tokens of one step")
    group.add_argument("--block-size", type=int, metavar="TOKENS", help=f"of a KV page: {_listed(BLOCK_SIZES)}")
    group.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="of the GPU's memory, up to 1")
    group.add_argument("--num-gpu-blocks-override", type=int, metavar="PAGES", help="KV pages, not what memory allows")
    group.add_argument("--no-prefix-caching", action="store_true", help="do not reuse pages of equal beginnings")
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords for :class:`cupyinfer.api.LLM`; what was not given is left to its defaults."""
    names = ("model", "device", "dtype", "load_format", "tokenizer", "max_model_len", "max_num_seqs")
    more = ("max_num_batched_tokens", "block_size", "gpu_memory_utilization", "num_gpu_blocks_override")
    settings = {name: getattr(args, name) for name in names + more if getattr(args, name) is not None}
    if args.no_prefix_caching:
        settings["enable_prefix_caching"] = False
    if args.enforce_eager:
        settings["enforce_eager"] = True
    return settings


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How tokens are chosen and when to stop. Read them back with :func:`sampling_params`."""
    group = parser.add_argument_group("sampling (default: as the model's generation_config.json says, else greedy)")
    group.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help="default: %(default)s")
    group.add_argument("--min-tokens", type=int, metavar="N", help="do not stop before")
    group.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    group.add_argument("--top-p", type=float, metavar="P", help="only the likeliest tokens that sum up to P")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K likeliest tokens")
    group.add_argument("--min-p", type=float, metavar="P", help="only tokens P times as likely as the likeliest")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="1: off")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="0: off")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="0: off")
    group.add_argument("--seed", type=int, metavar="S", help="another seed, another text; the default is fixed too")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at TEXT (repeatable)")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")


def sampling_params(args: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """The model's defaults with what was given on the command line. Raises RequestError.

    Asking for top-p, top-k or min-p of a model whose default is greedy means temperature 1: nothing is ignored.
    """
    settings = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name, None) is not None}
    if args.stop:
        settings["stop"] = args.stop
    if args.ignore_eos:
        settings["ignore_eos"] = True
    if defaults.greedy and "temperature" not in settings and {"top_p", "top_k", "min_p"} & set(settings):
        settings["temperature"] = 1.0
    return dataclasses.replace(defaults, **settings)


def announce(llm: LLM) -> None:
    """Say once, on standard error, what was chosen."""
    print(f"cupyinfer: {Path(llm.model_name).name} on {llm.device}, {llm.dtype}", file=sys.stderr)


def parse_token_ids(text: str) -> list[int]:
    """``"1,2,3"`` -> [1, 2, 3]. Raises ConfigError."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise invalid("--token-ids", text, 'integers separated by commas, such as "1,2,3"') from None
