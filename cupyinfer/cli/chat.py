"""``cupyinfer chat``: a conversation in the terminal, or from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator

from cupyinfer.api import LLM
from cupyinfer.cli.options import (
    add_engine_options,
    add_sampling_options,
    announce,
    engine_settings,
    sampling_params,
)
from cupyinfer.errors import RequestError
from cupyinfer.progress import ProgressBars
from cupyinfer.sampling_params import SamplingParams
from cupyinfer.text.chat import BUILTIN

_HELP = """/reset   forget the conversation
/help    this list
/exit    leave (so does Ctrl-D); Ctrl-C stops an answer"""
_FALLBACK = "completion"
_EPILOG = """examples:
  cupyinfer chat --model Qwen/Qwen3-0.6B --system "Answer in one sentence."
  echo "What is a prime number?" | cupyinfer chat --model ./Llama-3.2-1B-Instruct
  cupyinfer chat                    the demo model, which goes on with what you type (it knows Python, not conversation)

A model that has no chat template is not made for conversation. It gets --chat-template completion: the model continues
the plain text of all that was said. `transcript` writes "User: ... Assistant: ..." instead; a file name uses that file.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = "Talk with a model: its chat template, the whole conversation as context, one message a line."
    parser.epilog = _EPILOG
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    names = f"{', '.join(BUILTIN)} or a Jinja file"
    parser.add_argument("--chat-template", metavar="NAME", help=f"{names}; default: the model's")
    add_engine_options(parser)
    add_sampling_options(parser, max_tokens=512)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    sampling_params(args, SamplingParams())  # what is wrong whatever the model is refused before it is loaded
    bars = ProgressBars()
    try:
        with LLM(**engine_settings(args), progress=bars) as llm:
            announce(llm)
            template = args.chat_template
            if template is None and llm.chat_template is None:
                template = _FALLBACK
                note = f"this model has no chat template: it continues your text (--chat-template {_FALLBACK})"
                print(f"cupyinfer: {note}", file=sys.stderr)
            Conversation(llm, sampling_params(args, llm.default_sampling_params()), template, args.system).talk()
    finally:
        bars.close()
    return 0


class Conversation:
    """Reads messages, streams answers, keeps the history."""

    def __init__(self, llm: LLM, params: SamplingParams, template: str | None, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._template = template
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)
        self._interactive = sys.stdin.isatty()

    def talk(self) -> None:
        """Until /exit or the end of standard input."""
        if self._interactive:
            print(_HELP, file=sys.stderr)
        for line in self._lines():
            command = line.strip()
            if command == "/exit":
                return
            if command == "/reset":
                self.messages = list(self._start)
                print("cupyinfer: the conversation begins anew", file=sys.stderr)
            elif command == "/help":
                print(_HELP, file=sys.stderr)
            elif command.startswith("/") and " " not in command:
                print(f"cupyinfer: there is no command {command}; /help lists them", file=sys.stderr)
            elif command:
                self._answer(line)

    def _lines(self) -> Iterator[str]:
        if not self._interactive:
            yield from (line.removesuffix("\n") for line in sys.stdin)
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then edits lines and remembers them
        while True:
            try:
                yield input("\n> ")
            except KeyboardInterrupt:  # at the prompt: a new line, as in a shell
                print(file=sys.stderr)
            except EOFError:
                print(file=sys.stderr)
                return

    def _answer(self, text: str) -> None:
        """Stream one answer. A conversation that is too long or refused is reported, and the message taken back."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            prompt, stop = self._llm.chat_prompt(self.messages, chat_template=self._template)
            params = dataclasses.replace(self._params, stop=(*self._params.stop, *stop))
            for delta in self._llm.stream(prompt, params):
                piece = "".join(o.text or "" for o in delta.outputs)
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="", file=sys.stderr)
        except RequestError as error:
            self.messages.pop()
            print(f"cupyinfer: error: {error} (/reset forgets the conversation)", file=sys.stderr)
            return
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
