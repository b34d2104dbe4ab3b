"""Loading a checkpoint's tokenizer: what is read from which file, and one clear error for each kind of damage."""

from __future__ import annotations

import json

import pytest
from standins import KINDS, byte_level, write_text_files

from cupyinfer.errors import CheckpointError, RequestError
from cupyinfer.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def model_dir(tmp_path):
    return write_text_files(tmp_path)


def test_begin_token_and_end_tokens_come_from_the_files(model_dir):
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.encode("hello")[0] == tokenizer.token_id("<s>") == 0
    assert tokenizer.encode("hello", add_special_tokens=False)[0] != 0
    assert tokenizer.eos_token_ids == (1, 7)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.special_ids == {0, 1}


def test_decode_skips_special_tokens_unless_asked(model_dir):
    tokenizer = load_tokenizer(model_dir)
    ids = [*tokenizer.encode("hello world"), 1]
    assert tokenizer.decode(ids) == "hello world"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>hello world</s>"


def test_an_id_beyond_the_vocabulary_decodes_to_nothing(model_dir):
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


@pytest.mark.parametrize(("flag", "begins"), [(True, True), (False, False), (None, True)])
def test_add_bos_token_overrides_the_post_processor(flag, begins):
    settings = {"bos_token": "<s>"} | ({} if flag is None else {"add_bos_token": flag})
    tokenizer = Tokenizer(byte_level(), settings)
    ids = tokenizer.encode("hello")
    assert (ids[0] == 0) is begins
    assert tokenizer.decode(ids) == "hello"


def test_add_bos_token_adds_what_the_post_processor_does_not():
    backend = byte_level()
    backend.post_processor = None
    ids = Tokenizer(backend, {"bos_token": "<s>", "add_bos_token": True}).encode("hello")
    assert ids[0] == 0


def test_truncation_and_padding_of_the_file_are_switched_off(model_dir):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(model_dir / "tokenizer.json"))
    text = "hello world " * 9
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == "<s>" + text


def test_a_directory_without_tokenizer_gives_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}', "\u0000"])
def test_a_malformed_tokenizer_names_the_file(model_dir, content):
    (model_dir / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer.json is not a tokenizer"):
        load_tokenizer(model_dir)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", "[1]", "must hold a JSON object, it holds a list"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id='</s>' is not allowed"),
        ("generation_config.json", '{"eos_token_id": [1, -2]}', "allowed: an id or a list of ids"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id=True is not allowed"),
    ],
)
def test_a_malformed_config_names_file_and_field(model_dir, file, content, message):
    (model_dir / file).write_text(content)
    with pytest.raises(CheckpointError, match=message.replace("[", r"\[")):
        load_tokenizer(model_dir)


def test_text_that_is_not_unicode_is_a_request_error(model_dir):
    with pytest.raises(RequestError, match="cannot be tokenized"):
        load_tokenizer(model_dir).encode("\ud800")


@pytest.mark.parametrize("kind", ["byte_level", "gemma"])
def test_token_bytes_joined_are_the_text(kind):
    tokenizer = Tokenizer(KINDS[kind](), {})
    text = "hello (world) 你好 é\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes[i] for i in ids).decode() == text


def test_a_decoder_of_another_kind_has_no_token_bytes():
    assert Tokenizer(KINDS["word_piece"](), {}).token_bytes is None


@pytest.mark.hf
def test_same_ids_as_transformers(model_dir):
    transformers = pytest.importorskip("transformers")
    (model_dir / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(model_dir))
    ours = load_tokenizer(model_dir)
    for text in ["hello world", "", "</s> hello <tool call>", "grüße 😀\n\n  x"]:
        assert ours.encode(text) == theirs(text)["input_ids"]
