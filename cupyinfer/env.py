"""The environment variables that cupyinfer reads, in one typed table (``cupyinfer doctor`` prints it).

A value that does not parse raises :class:`~cupyinfer.errors.ConfigError`; nothing is silently ignored.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupyinfer.errors import ConfigError


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, how to parse it, its default and what it does."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str

    def get(self) -> Any:
        text = os.environ.get(self.name)
        if text is None or text == "":
            return self.default() if callable(self.default) else self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigError(f"environment variable {self.name}={text!r} is not allowed: {error}") from None


def _flag(text: str) -> bool:
    values = {"0": False, "1": True, "false": False, "true": True, "no": False, "yes": True}
    if text.lower() not in values:
        raise ValueError("allowed: 0, 1, true, false, yes, no")
    return values[text.lower()]


def _device(text: str) -> str:
    if text not in ("auto", "cpu", "cuda"):
        raise ValueError("allowed: auto, cpu, cuda")
    return text


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("allowed: an integer >= 0")
    return value


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cupyinfer"


CACHE_DIR = Variable("CUPYINFER_CACHE_DIR", Path, _default_cache, "folder for tuned settings (kernels: CUPY_CACHE_DIR)")
DEVICE = Variable("CUPYINFER_DEVICE", _device, "auto", "device used when --device / device= is not given")
KERNEL_DIR = Variable("CUPYINFER_KERNEL_DIR", Path, None, "read .cu sources from this folder instead of the package's")
NO_GRAPHS = Variable("CUPYINFER_NO_GRAPHS", _flag, False, "run decode steps eagerly instead of as CUDA graphs")
NO_OVERLAP = Variable(
    "CUPYINFER_NO_OVERLAP", _flag, False, "in CUDA graphs, start a kernel only when the one before has ended"
)
DEBUG = Variable("CUPYINFER_DEBUG", _count, 0, "1: tracebacks on the command line; 2: print every kernel launch")

VARIABLES = (CACHE_DIR, DEVICE, KERNEL_DIR, NO_GRAPHS, NO_OVERLAP, DEBUG)
