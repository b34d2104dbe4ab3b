"""SamplingParams: what is allowed, what is refused and how."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from cupyinfer.errors import RequestError
from cupyinfer.sampling_params import SamplingParams

nan, inf = math.nan, math.inf


def test_defaults_are_vllms():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p, p.seed) == (1, 1.0, 1.0, 0, 0.0, None)
    assert (p.max_tokens, p.min_tokens, p.stop, p.stop_token_ids, p.ignore_eos) == (16, 0, (), (), False)
    assert not p.greedy and not p.filtered and not p.penalized


BAD = [
    ("n", [0, -1, 1.0, True, "1", None]),
    ("temperature", [-0.1, nan, inf, "1", True, None]),
    ("top_p", [0, -0.5, 1.01, nan, "0.9", True]),
    ("top_k", [-2, 1.5, True, "5", None]),
    ("min_p", [-0.1, 1.1, nan, True]),
    ("seed", [-1, 1 << 64, 1.0, "7", True]),
    ("max_tokens", [0, -1, 2.5, None, True]),
    ("min_tokens", [-1, 17, True, 0.0]),
    ("presence_penalty", [-2.1, 2.1, nan, "0"]),
    ("frequency_penalty", [-2.1, 2.1, inf]),
    ("repetition_penalty", [0, -1, nan, inf, 101]),
    ("logprobs", [-1, 21, True, 1.0, "2"]),
    ("prompt_logprobs", [-1, 21, True]),
    ("stop", ["", ["a", ""], [1], 3, b"x", {"a": 1}]),
    ("stop_token_ids", [3, [-1], [True], ["1"], "12", [1.0]]),
    ("logit_bias", [[1], {"1": 2.0}, {-1: 0.0}, {1: "2"}, {1: nan}, {1: inf}, {1: 101}, {True: 1.0}, {1: True}]),
    ("ignore_eos", [1, "yes", None]),
    ("skip_special_tokens", [0, None]),
    ("include_stop_str_in_output", ["no"]),
]


@pytest.mark.parametrize("field, value", [(f, v) for f, values in BAD for v in values], ids=repr)
def test_bad_values_name_field_value_and_what_is_allowed(field, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}=") and "is not allowed; allowed: " in message


@pytest.mark.parametrize(
    "field, value, kept",
    [
        ("temperature", 0, 0.0),
        ("temperature", np.float32(0.5), 0.5),
        ("top_p", 1, 1.0),
        ("top_k", -1, -1),
        ("top_k", np.int64(40), 40),
        ("seed", (1 << 64) - 1, (1 << 64) - 1),
        ("stop", "END", ("END",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", None, ()),
        ("stop_token_ids", [np.int32(5), 7], (5, 7)),
        ("stop_token_ids", None, ()),
        ("logit_bias", {5: 1, 6: -inf}, {5: 1.0, 6: -inf}),
        ("logit_bias", {}, None),
        ("logprobs", 0, 0),
    ],
)
def test_good_values_are_kept_in_plain_types(field, value, kept):
    got = getattr(SamplingParams(**{field: value}), field)
    assert got == kept and type(got) is type(kept)


def test_min_tokens_may_reach_max_tokens():
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3
    with pytest.raises(RequestError, match="min_tokens=4 is not allowed; allowed: 0 to max_tokens=3"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_kinds_of_rows():
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=0, top_k=5, top_p=0.5).filtered
    assert all(SamplingParams(**f).filtered for f in ({"top_k": 1}, {"top_p": 0.99}, {"min_p": 0.01}))
    assert not SamplingParams(top_k=-1).filtered
    penalties = ({"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"repetition_penalty": 1.1})
    assert all(SamplingParams(**f).penalized for f in penalties)


def test_validate_for_a_vocabulary():
    params = SamplingParams(stop_token_ids=[9], logit_bias={9: 1.0}, logprobs=5)
    params.validate_for(10)
    with pytest.raises(RequestError, match=r"stop_token_ids=9 .*from 0 to 8"):
        params.validate_for(9)
    with pytest.raises(RequestError, match=r"logit_bias=9 .*from 0 to 8"):
        SamplingParams(logit_bias={9: 1.0}).validate_for(9)
    with pytest.raises(RequestError, match=r"prompt_logprobs=5 .*0 to 4"):
        SamplingParams(prompt_logprobs=5).validate_for(4)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5
