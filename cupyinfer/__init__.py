"""cupyinfer: a CuPy-based LLM inference engine in pure Python that shows how one works.

    from cupyinfer import LLM, SamplingParams

    with LLM() as llm:  # the demo model; LLM("path/to/checkpoint") for any other
        print(llm.generate("def quicksort(", SamplingParams(max_tokens=64))[0].outputs[0].text)

Importing the package loads nothing: each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cupyinfer.api import LLM
    from cupyinfer.errors import CupyinferError
    from cupyinfer.outputs import CompletionOutput, RequestOutput
    from cupyinfer.runtime.tensor import Tensor
    from cupyinfer.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "CupyinferError", "RequestOutput", "SamplingParams", "Tensor", "__version__"]

_HOME = {
    "LLM": "cupyinfer.api",
    "CompletionOutput": "cupyinfer.outputs",
    "CupyinferError": "cupyinfer.errors",
    "RequestOutput": "cupyinfer.outputs",
    "SamplingParams": "cupyinfer.sampling_params",
    "Tensor": "cupyinfer.runtime.tensor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cupyinfer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
