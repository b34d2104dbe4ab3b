"""Whatever is pushed in whatever pieces, the pieces of text joined are the text, and none ends in half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import KINDS

from cupyinfer.text.detokenizer import REPLACEMENT, ByteDetokenizer, WindowDetokenizer, make_detokenizer
from cupyinfer.text.tokenizer import Tokenizer

TOKENIZERS = {kind: Tokenizer(make(), {}) for kind, make in KINDS.items()}
TEXT = st.text(st.sampled_from("ab ehlow\n 你好😀é👩\u200d🚀") | st.characters(codec="utf-8"), max_size=30)
exhaustive = settings(max_examples=150, deadline=None)


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    pieces = []
    for size in sizes:
        pieces.append(ids[:size])
        ids = ids[size:]
    return [*pieces, ids]


def stream(detokenizer, pieces) -> list[str]:
    return [*(detokenizer.push(p) for p in pieces), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@exhaustive
@given(text=TEXT, sizes=st.lists(st.integers(0, 4), max_size=12))
def test_pieces_joined_are_the_full_decode(kind, text, sizes):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    got = stream(make_detokenizer(tokenizer), cut(ids, sizes))
    assert "".join(got) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@exhaustive
@given(prompt=TEXT, text=TEXT)
def test_a_prompt_gives_the_spacing_of_the_whole(kind, prompt, text):
    tokenizer = TOKENIZERS[kind]
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text, add_special_tokens=False)
    got = "".join(stream(make_detokenizer(tokenizer, before), [[i] for i in ids]))
    assert tokenizer.decode(before) + got == tokenizer.decode(before + ids)


@pytest.mark.parametrize("kind", ["byte_level", "llama2", "gemma"])
@exhaustive
@given(text=st.text(alphabet="你好😀éa ", min_size=1, max_size=12))
def test_no_piece_holds_half_a_character(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    for detokenizer in (make_detokenizer(tokenizer), WindowDetokenizer(tokenizer)):
        assert not any(REPLACEMENT in piece for piece in stream(detokenizer, [[i] for i in ids]))


@exhaustive
@given(data=st.data())
def test_random_ids_of_a_byte_level_tokenizer_give_what_the_library_gives(data):
    tokenizer = TOKENIZERS["byte_level"]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    for skip in (True, False):
        want = tokenizer.decode(ids, skip_special_tokens=skip)
        pieces = cut(ids, data.draw(st.lists(st.integers(0, 5), max_size=8)))
        assert "".join(stream(make_detokenizer(tokenizer, skip_special_tokens=skip), pieces)) == want


def test_every_token_of_a_byte_level_tokenizer_gives_what_the_library_gives():
    tokenizer = TOKENIZERS["byte_level"]
    for i in range(tokenizer.vocab_size):
        for skip in (True, False):
            got = "".join(stream(make_detokenizer(tokenizer, skip_special_tokens=skip), [[40], [i], [40]]))
            assert got == tokenizer.decode([40, i, 40], skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@exhaustive
@given(data=st.data())
def test_random_ids_end_in_the_same_text_however_they_are_cut(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    pieces = cut(ids, data.draw(st.lists(st.integers(0, 5), max_size=8)))
    one_by_one = "".join(stream(make_detokenizer(tokenizer), [[i] for i in ids]))
    assert "".join(stream(make_detokenizer(tokenizer), pieces)) == one_by_one


def test_the_fast_way_is_taken_where_it_is_exact():
    ways = {kind: type(make_detokenizer(t)) for kind, t in TOKENIZERS.items()}
    fast = {"byte_level", "llama2", "gemma"}
    assert ways == {k: ByteDetokenizer if k in fast else WindowDetokenizer for k in KINDS}


def test_llama2_keeps_the_space_after_a_prompt_and_drops_it_at_the_start():
    tokenizer = TOKENIZERS["llama2"]
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert make_detokenizer(tokenizer, tokenizer.encode("hello")).push(ids) == " hello"
    assert make_detokenizer(tokenizer, [1]).push(ids) == "hello"


def test_an_unfinished_character_comes_out_at_the_end():
    tokenizer = TOKENIZERS["llama2"]
    euro = tokenizer.encode("\u20ac", add_special_tokens=False)[-3:]
    for detokenizer in (make_detokenizer(tokenizer, euro), WindowDetokenizer(tokenizer)):
        assert detokenizer.push(euro[:2]) == ""
        assert detokenizer.flush().strip(REPLACEMENT) == ""
        assert detokenizer.flush() == ""


def test_endless_garbage_neither_stalls_nor_grows():
    tokenizer = TOKENIZERS["gemma"]
    bad = tokenizer.token_id("<0x80>")
    detokenizer = WindowDetokenizer(tokenizer)
    text = "".join(detokenizer.push([bad]) for _ in range(500)) + detokenizer.flush()
    assert text == REPLACEMENT * 500
    assert len(detokenizer._window) <= 70
