"""Stop strings across token borders; the result never depends on how the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import byte_level

from cupyinfer.sampling_params import SamplingParams
from cupyinfer.text.stop import StopChecker
from cupyinfer.text.stream import TextStream
from cupyinfer.text.tokenizer import Tokenizer


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By the definition: the shortest beginning of the text that ends with a stop string; the longest such string."""
    for end in range(1, len(text) + 1):
        matching = [s for s in stops if text[:end].endswith(s)]
        if matching:
            stop = max(matching, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def run(checker: StopChecker, pieces: list[str]) -> tuple[str, str | None]:
    out = ""
    for piece in pieces:
        new, stopped = checker.push(piece)
        out += new
        if stopped:
            return out, stopped
    return out + checker.flush(), None


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=5), max_size=8),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_matches_the_definition_however_the_text_is_cut(pieces, stops, include):
    assert run(StopChecker(stops, include), pieces) == expected("".join(pieces), stops, include)


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.text(alphabet="abX", max_size=3), max_size=8))
def test_only_what_may_begin_a_stop_string_is_held_back(pieces):
    checker = StopChecker(["XaX"])
    text = shown = ""
    for piece in pieces:
        new, stopped = checker.push(piece)
        text, shown = text + piece, shown + new
        if stopped:
            return
        assert text.startswith(shown)
        assert "XaX".startswith(text[len(shown) :])


def test_without_stop_strings_everything_passes_at_once():
    assert StopChecker([]).push("anything") == ("anything", None)


def test_a_stop_string_before_min_tokens_passes_and_one_across_it_counts():
    checker = StopChecker(["END"])
    assert checker.push("xEND E", armed=False) == ("xEND ", None)
    assert checker.push("ND", armed=True) == ("", "END")


@pytest.mark.parametrize(("include", "text"), [(False, "hel"), (True, "hello w")])
def test_stream_stops_inside_a_token_and_ignores_the_rest(include, text):
    tokenizer = Tokenizer(byte_level(), {})
    ids = tokenizer.encode("hello world, hello", add_special_tokens=False)
    stream = TextStream(tokenizer, [], SamplingParams(stop="lo w", include_stop_str_in_output=include))
    got = "".join(stream.push([i]) for i in ids) + stream.finish()
    assert (got, stream.stopped) == (text, "lo w")
    used = tokenizer.decode(ids[: stream.tokens_used])
    assert "lo w" in used
    assert "lo w" not in tokenizer.decode(ids[: stream.tokens_used - 1])


def test_stream_min_tokens_counts_tokens():
    tokenizer = Tokenizer(byte_level(), {})
    ids = [tokenizer.encode("x", add_special_tokens=False)[0]] * 6
    stream = TextStream(tokenizer, [], SamplingParams(stop="x", min_tokens=3))
    assert [stream.push([i]) for i in ids] == ["x", "x", "x", "", "", ""]
    assert (stream.stopped, stream.tokens_used) == ("x", 4)


def test_stream_hands_out_what_was_held_when_the_sequence_ends():
    tokenizer = Tokenizer(byte_level(), {})
    stream = TextStream(tokenizer, [], SamplingParams(stop="world!"))
    shown = stream.push(tokenizer.encode("hello wor", add_special_tokens=False))
    assert shown == "hello "
    assert stream.finish() == "wor"
