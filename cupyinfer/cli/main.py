"""Parses the command line, runs one subcommand, and turns every error into one line and an exit code.

Exit codes: 0 done; 1 the machine failed (device, memory, a bug); 2 the input was wrong; 130 Ctrl-C; 141 the reader of
our output went away.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import cupyinfer
from cupyinfer import env
from cupyinfer.errors import CupyinferError, DeviceError, OutOfMemoryError

# A subcommand is a module with configure(parser), which sets parser's ``run`` default to run(args) -> exit code.
# Only the module of the command at hand is imported: help and doctor work when nothing else does.
COMMANDS = {
    "generate": ("cupyinfer.cli.generate", "complete a prompt, or many"),
    "chat": ("cupyinfer.cli.chat", "talk with a model"),
    "bench": ("cupyinfer.cli.bench", "measure decode, prefill and an offline workload against the machine's ceilings"),
    "doctor": ("cupyinfer.cli.doctor", "show what this machine has, what is missing and how to fix it"),
}
_EPILOG = """examples:
  cupyinfer generate "def quicksort("                     the demo model that ships with the package
  cupyinfer generate --model ./Llama-3.2-1B "Once upon"   a Hugging Face checkpoint (folder or hub id)
  cupyinfer chat --model Qwen/Qwen3-0.6B
  cupyinfer doctor

`cupyinfer COMMAND --help` shows the options of one command. Documentation: README.md and docs/.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: sys.argv[1:]); returns the exit code."""
    _prepare_streams()
    try:
        args = parse(sys.argv[1:] if argv is None else list(argv))
        code = args.run(args)
        sys.stdout.flush()  # a reader that went away shows here, not in the interpreter's shutdown
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\ncupyinfer: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the last line of defence: one line instead of a traceback
        return _report(error)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error; the options are a --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"cupyinfer: error: {message}; see {self.prog} --help\n")


def parse(argv: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="cupyinfer",
        description="Run large language models on a GPU or a CPU, and see how it is done.",
        epilog=_EPILOG,
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="version", version=f"cupyinfer {cupyinfer.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, formatter_class=formatter)
        if name == chosen:
            with _interrupts_at_once():
                importlib.import_module(module).configure(sub)
    return parser.parse_args(argv)


def _prepare_streams() -> None:
    """A closed stream reads as empty and swallows what is written; a character that the encoding of an output lacks
    is written as an escape sequence.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open until the process ends
        elif mode == "w" and isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _interrupts_at_once() -> Iterator[None]:
    """Ctrl-C ends the process: nothing has begun, and NumPy answers a KeyboardInterrupt in its import with a page."""
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _debugging() -> bool:
    try:
        return env.DEBUG.get() > 0
    except CupyinferError:  # a bad value, which is what will be reported
        return False


def _report(error: Exception) -> int:
    if _debugging():
        traceback.print_exc()
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    expected = isinstance(error, CupyinferError) or full
    what = "error" if expected else f"internal error: {type(error).__name__}"
    hint = "" if expected else " (CUPYINFER_DEBUG=1 shows the traceback)"
    print(f"cupyinfer: {what}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
    return 1 if not expected or full or isinstance(error, (DeviceError, OutOfMemoryError)) else 2
