"""``cupyinfer generate``: complete one prompt, streaming, or many."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from cupyinfer.api import LLM
from cupyinfer.cli.options import (
    add_engine_options,
    add_sampling_options,
    announce,
    engine_settings,
    parse_token_ids,
    sampling_params,
)
from cupyinfer.errors import ConfigError, RequestError
from cupyinfer.outputs import CompletionOutput, RequestMetrics, RequestOutput, as_dict
from cupyinfer.progress import ProgressBars
from cupyinfer.prompts import PromptLike
from cupyinfer.sampling_params import SamplingParams

_EPILOG = """examples:
  cupyinfer generate "def quicksort("
  cupyinfer generate --model ./Llama-3.2-1B --max-tokens 200 --temperature 0.8 --seed 1 "Once upon a time"
  cupyinfer generate --file prompts.txt --json >answers.jsonl
  cupyinfer generate --model dummy:llama-3.1-8b --token-ids "1,2,3" --ignore-eos
  git diff | cupyinfer generate --model ./my-model -

The text goes to standard output as it is made, progress and speed to standard error. A model without tokenizer takes
--token-ids and prints token ids.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Complete a prompt; without --model with the demo model, which writes Python."
    parser.epilog = _EPILOG
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to complete; - is stdin")
    source.add_argument("--file", metavar="PROMPTS.txt", help="one prompt a line, blank ones skipped; - is stdin")
    source.add_argument("--token-ids", metavar='"1,2,3"', help="token ids in place of a text")
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each result, and nothing else")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="completions of each prompt (default: 1)")
    parser.add_argument("--logprobs", type=int, metavar="K", help="with --json: of each token and the K likeliest")
    parser.add_argument("--prompt-logprobs", type=int, metavar="K", help="... and of the prompt's tokens")
    add_engine_options(parser)
    add_sampling_options(parser, max_tokens=128)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    prompts = read_prompts(args)
    _check_sampling(args)
    bars = ProgressBars()
    try:
        with LLM(**engine_settings(args), progress=bars) as llm:
            params = sampling_params(args, llm.default_sampling_params())
            if args.json:
                _print_json(llm, prompts, params)
                return 0
            if len(prompts) == 1 and params.n == 1:
                _stream(llm, prompts[0], params)
            else:
                _print_all(llm, prompts, params)
    finally:
        bars.close()
    return 0


def _check_sampling(args: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the model, before minutes of loading. Raises ConfigError, RequestError."""
    for option, value in (("--logprobs", args.logprobs), ("--prompt-logprobs", args.prompt_logprobs)):
        if value is not None and not args.json:
            raise ConfigError(f"{option} is not allowed without --json, which prints them")
    sampling_params(args, SamplingParams())


def read_prompts(args: argparse.Namespace) -> list[PromptLike]:
    """The prompts of the command line, in order. Raises ConfigError, RequestError."""
    if args.token_ids is not None:
        return [parse_token_ids(args.token_ids)]
    if args.file is None:
        text = _read("-").removesuffix("\n") if args.prompt == "-" else args.prompt
        if not text:
            raise RequestError("the prompt is empty; allowed: at least one character")
        return [text]
    lines: list[PromptLike] = [line for line in _read(args.file).split("\n") if line.strip()]
    if not lines:
        raise ConfigError(f"--file={args.file!r} holds no prompt; allowed: a text file with one prompt a line")
    return lines


def _read(name: str) -> str:
    """A text without byte order mark; every kind of line end is \\n."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        return text.removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read: {error}") from None


def _stream(llm: LLM, prompt: PromptLike, params: SamplingParams) -> None:
    deltas = llm.stream(prompt, params)  # refuses a bad prompt before anything else is said
    announce(llm)
    if isinstance(prompt, str) and sys.stdout.isatty() and sys.stderr.isatty():
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        dim = prompt if plain else f"\033[2m{prompt}\033[0m"
        print(dim, end="", file=sys.stderr, flush=True)  # the model's words follow it
    last = None
    first = True
    for last in deltas:
        for piece in last.outputs:
            print(_shown(piece, first), end="", flush=True)
            first = False
    print(flush=True)
    if last is not None:
        print(_speed([last.metrics]), file=sys.stderr)


def _shown(piece: CompletionOutput, first: bool = True) -> str:
    """The text, or the token ids of a model without tokenizer."""
    if piece.text is not None:
        return piece.text
    ids = ",".join(map(str, piece.token_ids))
    return ids if first or not ids else f",{ids}"


def _print_all(llm: LLM, prompts: list[PromptLike], params: SamplingParams) -> None:
    outputs = llm.generate(prompts, params, use_progress_bar=True)
    announce(llm)
    for number, output in enumerate(outputs, 1):
        for completion in output.outputs:
            which = f"{number}" if params.n == 1 else f"{number}.{completion.index + 1}"
            print(f"==> {which}: {_title(output)} <==\n{_shown(completion)}\n")
    print(_speed([o.metrics for o in outputs]), file=sys.stderr)


def _title(output: RequestOutput) -> str:
    text = output.prompt if output.prompt is not None else ",".join(map(str, output.prompt_token_ids))
    return text if len(text) <= 70 else f"{text[:67]}..."


def _print_json(llm: LLM, prompts: list[PromptLike], params: SamplingParams) -> None:
    for output in llm.generate(prompts, params, use_progress_bar=True):
        for line in as_dict(output):
            print(json.dumps(line))


def _speed(metrics: list[RequestMetrics]) -> str:
    """One line: tokens, tokens/s and time to first token, over all requests."""
    tokens = sum(m.output_tokens for m in metrics)
    seconds = max(m.e2e for m in metrics)
    first = sorted(m.ttft for m in metrics)[len(metrics) // 2]
    rate = tokens / seconds if seconds else 0.0
    what = "first token after" if len(metrics) == 1 else f"{len(metrics)} prompts, median time to first token"
    return f"cupyinfer: {tokens} tokens in {seconds:.2f} s, {rate:.0f} tokens/s, {what} {first * 1e3:.0f} ms"
