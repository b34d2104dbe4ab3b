"""What users pass as prompts, brought into one form."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cupyinfer.errors import RequestError

_ALLOWED = "a text, a list of token ids, or a list of these"


class Prompt(NamedTuple):
    """One prompt: a text, token ids, or both (the text they were made from)."""

    text: str | None = None
    token_ids: Sequence[int] | None = None


PromptLike = str | Sequence[int] | Prompt


def read_prompts(prompts: Any) -> tuple[list[Prompt], bool]:
    """(every prompt, whether ``prompts`` was a list of prompts rather than a single one).

    One text, one list of token ids (or a 1-D integer array), or a list of these. Raises RequestError naming the index
    of a value of another type.
    """
    single = _one(prompts)
    if single is not None:
        return [single], False
    if isinstance(prompts, (bytes, dict)) or not isinstance(prompts, (Sequence, np.ndarray)):
        raise RequestError(f"prompts={prompts!r} is not allowed; allowed: {_ALLOWED}")
    found = []
    for index, value in enumerate(prompts):
        prompt = Prompt(None, []) if isinstance(value, (list, tuple)) and not value else _one(value)
        if prompt is None:
            raise RequestError(f"prompts[{index}]={value!r} is not allowed; allowed: a text or a list of token ids")
        found.append(prompt)
    return found, True


def _one(value: Any) -> Prompt | None:
    """A single prompt, or None when the value is none."""
    if isinstance(value, Prompt):
        return value
    if isinstance(value, str):
        return Prompt(value)
    if isinstance(value, np.ndarray):
        return Prompt(None, value.tolist()) if value.ndim == 1 and value.dtype.kind in "iu" else None
    if isinstance(value, (list, tuple)) and value and all(_is_id(x) for x in value):
        return Prompt(None, [int(x) for x in value])
    return None


def _is_id(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
