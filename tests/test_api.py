"""``LLM`` on a tiny real model: outputs, streaming, stop strings, chat, and what happens when something is wrong."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
from standins import write_model

from cupyinfer import LLM, RequestOutput, SamplingParams
from cupyinfer.errors import CheckpointError, ConfigError, RequestError
from cupyinfer.prompts import Prompt, read_prompts

LONG = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model_dir):
    with LLM(model_dir, device="cpu", max_num_seqs=8) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left_behind(llm):
    yield
    assert not llm.engine.has_unfinished()
    assert not llm._live
    assert llm.stats().pages_used == 0


# --- what comes out -------------------------------------------------------------------------------------------------
def test_a_text_gives_one_complete_output(llm):
    (output,) = llm.generate("hello world", LONG)
    assert isinstance(output, RequestOutput)
    assert output.prompt == "hello world"
    assert output.prompt_token_ids == llm.tokenizer.encode("hello world")
    assert output.finished
    (completion,) = output.outputs
    assert len(completion.token_ids) == 24
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert completion.logprobs is None


def test_timing_and_sizes(llm):
    metrics = llm.generate("hello world", LONG)[0].metrics
    assert 0 < metrics.queue <= metrics.ttft < metrics.e2e
    assert metrics.tpot * 23 == pytest.approx(metrics.e2e - metrics.ttft, rel=0.05)
    assert metrics.output_tokens == 24
    assert metrics.prompt_tokens == len(llm.tokenizer.encode("hello world"))


def test_outputs_come_in_the_order_of_the_prompts_whatever_their_form(llm):
    ids = llm.tokenizer.encode("def quicksort(")
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (20, 3, 11)]
    outputs = llm.generate(["hello", ids, "def"], params)
    assert [o.prompt for o in outputs] == ["hello", None, "def"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [20, 3, 11]
    for prompt in (ids, tuple(ids), np.array(ids)):
        (alone,) = llm.generate(prompt, params[1])
        assert alone.outputs[0].token_ids == outputs[1].outputs[0].token_ids
        assert alone.prompt_token_ids == ids


def test_no_prompts_no_outputs(llm):
    assert llm.generate([], LONG) == []


def test_stream_joined_is_generate(llm):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=30, ignore_eos=True, logprobs=1)
    whole = llm.generate("hello", params)[0]
    deltas = list(llm.stream("hello", params))
    assert len(deltas) > 10
    pieces = [d.outputs[0] for d in deltas]
    assert "".join(p.text for p in pieces) == whole.outputs[0].text
    assert sum((p.token_ids for p in pieces), []) == whole.outputs[0].token_ids
    assert sum((p.logprobs for p in pieces), []) == whole.outputs[0].logprobs
    assert [d.finished for d in deltas] == [False] * (len(deltas) - 1) + [True]
    assert pieces[-1].finish_reason == "length"
    assert deltas[-1].metrics.output_tokens == 30


def test_several_completions_of_one_prompt(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=12, ignore_eos=True)
    outputs = llm.generate("hello", params)[0].outputs
    assert [o.index for o in outputs] == [0, 1, 2]
    assert len({tuple(o.token_ids) for o in outputs}) == 3
    streamed: dict[int, list[int]] = {}
    for delta in llm.stream("hello", params):
        for piece in delta.outputs:
            streamed.setdefault(piece.index, []).extend(piece.token_ids)
    assert streamed == {o.index: o.token_ids for o in outputs}


def test_log_probabilities_come_with_words(llm):
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    (output,) = llm.generate("hello world", params)
    (completion,) = output.outputs
    assert len(completion.logprobs) == 6
    taken = [position[token] for position, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert [lp.rank for lp in taken] == [1] * 6
    assert completion.cumulative_logprob == pytest.approx(sum(lp.logprob for lp in taken))
    assert taken[0].decoded_token == llm.tokenizer.decode(completion.token_ids[:1])
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, position in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert position[token].decoded_token == llm.tokenizer.word(token)


def test_two_streams_at_once_do_not_lose_each_other(llm):
    prompts = ("hello", "def quicksort(")
    alone = ["".join(d.outputs[0].text for d in llm.stream(p, LONG)) for p in prompts]
    first, second = (llm.stream(p, LONG) for p in prompts)
    texts = ["", ""]
    for _ in range(10):
        texts[0] += next(first).outputs[0].text
    texts[1] += "".join(d.outputs[0].text for d in second)
    texts[0] += "".join(d.outputs[0].text for d in first)
    assert texts == alone


# --- stop strings ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_stop_string_ends_the_text_where_it_begins(llm, include, streaming):
    prompt = "hello world"
    full = llm.generate(prompt, LONG)[0].outputs[0].text
    stop = full[len(full) // 2 :][:3]
    end = full.index(stop)
    params = SamplingParams(
        temperature=0.0, max_tokens=24, ignore_eos=True, stop=[stop, "never"], include_stop_str_in_output=include
    )
    if streaming:
        deltas = list(llm.stream(prompt, params))
        text, last = "".join(d.outputs[0].text for d in deltas), deltas[-1].outputs[0]
    else:
        last = llm.generate(prompt, params)[0].outputs[0]
        text = last.text
    assert text == full[: end + len(stop) if include else end]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)


def test_a_stop_token_ends_the_text_and_is_not_shown(llm):
    free = llm.generate("hello", LONG)[0].outputs[0]
    token = free.token_ids[5]
    at = free.token_ids.index(token)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop_token_ids=[token])
    ended = llm.generate("hello", params)[0].outputs[0]
    assert ended.token_ids == free.token_ids[: at + 1]
    assert ended.text == llm.tokenizer.decode(free.token_ids[:at])
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)


def test_the_end_tokens_of_all_files_end_a_text(llm):
    assert llm.engine.eos_token_ids >= {1, 7}


# --- wrong input ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "^the prompt is empty"),
        (["hello", ""], r"^prompts\[1\]: the prompt is empty"),
        (["hello", []], r"^prompts\[1\]: the prompt is empty"),
        (["hello", [5, 100000]], r"^prompts\[1\]: prompt_token_ids\[1\]=100000 is not allowed; allowed: token ids"),
        ([[1], [-1]], r"^prompts\[1\]: prompt_token_ids\[0\]=-1"),
        (["x" * 600], r"^prompts\[0\]: the prompt has \d+ tokens; allowed: at most 255"),
        (["hello", 7.5], r"^prompts\[1\]=7.5 is not allowed; allowed: a text or a list of token ids"),
        (["hello", [1, True]], r"^prompts\[1\]=\[1, True\] is not allowed"),
        (None, "^prompts=None is not allowed"),
        ({"prompt": "x"}, "^prompts=.* is not allowed"),
        (["\ud800"], r"^prompts\[0\]: prompt=.* cannot be tokenized"),
    ],
)
def test_one_bad_prompt_is_named_before_anything_runs(llm, prompts, message):
    steps = llm.stats().steps
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, LONG)
    assert llm.stats().steps == steps


@pytest.mark.parametrize("params", [[LONG], [LONG] * 3, ["greedy", "greedy"]])
def test_sampling_params_must_fit_the_prompts(llm, params):
    with pytest.raises(RequestError, match="one for each of 2 prompts"):
        llm.generate(["hello", "world"], params)


def test_stream_takes_one_prompt(llm):
    with pytest.raises(RequestError, match="allowed: one text or one list"):
        llm.stream(["hello", "world"], LONG)


def test_an_unknown_setting_is_named_with_the_known_ones(model_dir):
    with pytest.raises(ConfigError, match="max_seqs=4 is not a setting of the engine; known: .*max_num_seqs"):
        LLM(model_dir, max_seqs=4)


def test_a_missing_model_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such directory"):
        LLM(tmp_path / "nothing")


def test_a_closed_llm_says_so(model_dir):
    llm = LLM(model_dir, device="cpu")
    llm.close()
    llm.close()
    with pytest.raises(ConfigError, match="closed"):
        llm.generate("hello", LONG)


# --- interruption ---------------------------------------------------------------------------------------------------
def interrupt_in_step(llm, monkeypatch, number: int) -> list[str]:
    """Ctrl-C arrives in the middle of the engine's step ``number``; returns a log of what ran to its end."""
    step, log = llm.engine.step, []

    def interrupted():
        updates = step()
        log.append("begun")
        if len(log) == 2 * number - 1:
            signal.raise_signal(signal.SIGINT)
        log.append("done")
        return updates

    monkeypatch.setattr(llm.engine, "step", interrupted)
    return log


def test_ctrl_c_ends_the_call_after_the_step_and_leaves_the_llm_usable(llm, monkeypatch):
    before = llm.generate("hello", LONG)[0].outputs[0].text
    with monkeypatch.context() as patch:
        log = interrupt_in_step(llm, patch, number=3)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["hello", "world"] * 4, LONG)
    assert log == ["begun", "done"] * 3
    assert llm.stats().pages_used == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llm.generate("hello", LONG)[0].outputs[0].text == before


def test_an_abandoned_stream_is_aborted(llm):
    stream = llm.stream("hello", LONG)
    next(stream)
    assert llm.engine.has_unfinished()
    stream.close()
    assert not llm.engine.has_unfinished()
    llm.stream("hello", LONG)  # nobody even begins to read it
    assert not llm.engine.has_unfinished()


# --- chat -----------------------------------------------------------------------------------------------------------
HELLO = [{"role": "user", "content": "hello"}]


def test_chat_without_a_template_says_what_to_do(llm):
    with pytest.raises(RequestError, match="has no chat template.*completion, transcript or a file"):
        llm.chat(HELLO, LONG)


def test_chat_with_a_built_in_template(llm):
    (output,) = llm.chat(HELLO, LONG, chat_template="transcript")
    assert output.prompt == "User: hello\nAssistant:"
    assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt)
    assert output.outputs[0].text == llm.generate(output.prompt, LONG)[0].outputs[0].text


def test_chat_with_the_models_template_adds_no_second_begin_token(tmp_path):
    directory = write_model(tmp_path)
    template = "{{ bos_token }}{% for m in messages %}({{ m.content }}){% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    with LLM(directory, device="cpu") as llm:
        outputs = llm.chat([HELLO, [{"role": "user", "content": "world"}]], LONG)
        assert [o.prompt for o in outputs] == ["<s>(hello)", "<s>(world)"]
        assert outputs[0].prompt_token_ids.count(0) == 1


def test_bad_messages_are_request_errors(llm):
    for messages in ([], "hello", [{"content": "x"}]):
        with pytest.raises(RequestError, match="messages"):
            llm.chat(messages, LONG, chat_template="completion")


# --- other models ---------------------------------------------------------------------------------------------------
@pytest.fixture
def mute(tmp_path):
    """A checkpoint without tokenizer."""
    write_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with LLM(tmp_path, device="cpu") as made:
        yield made


def test_without_tokenizer_token_ids_work_and_text_is_none(mute):
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=1)
    (completion,) = mute.generate([[3, 4, 5]], params)[0].outputs
    assert completion.text is None
    assert len(completion.token_ids) == 5
    assert completion.logprobs[0][completion.token_ids[0]].decoded_token is None
    assert all(d.outputs[0].text is None for d in mute.stream([3, 4, 5], params))


@pytest.mark.parametrize("call", [lambda m: m.generate("hello", LONG), lambda m: m.chat(HELLO, LONG)])
def test_without_tokenizer_texts_are_refused(mute, call):
    with pytest.raises(RequestError, match="has no tokenizer.json; pass token ids"):
        call(mute)


def test_without_tokenizer_stop_strings_are_refused(mute):
    with pytest.raises(RequestError, match="stop strings cannot be used"):
        mute.generate([[3, 4]], SamplingParams(stop="x"))


def test_another_tokenizer(mute, model_dir):
    for tokenizer in (model_dir, model_dir / "tokenizer.json"):
        with LLM(mute.model_name, device="cpu", tokenizer=str(tokenizer)) as llm:
            assert llm.generate("hello", LONG)[0].outputs[0].text


def test_a_tokenizer_that_is_none_is_refused(model_dir, tmp_path):
    with pytest.raises(ConfigError, match="tokenizer=.* is not allowed"):
        LLM(model_dir, device="cpu", tokenizer=str(tmp_path))


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({"eos_token_id": 1}, {"temperature": 0.0}),
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 5}, {"temperature": 0.6, "top_k": 5, "top_p": 1.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
    ],
)
def test_default_sampling_comes_from_generation_config(llm, model_dir, file, expected, monkeypatch, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    monkeypatch.setattr(llm, "_directory", tmp_path)
    params = llm.default_sampling_params()
    assert {name: getattr(params, name) for name in expected} == expected


def test_a_malformed_generation_config_is_named(llm, monkeypatch, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": -1}))
    monkeypatch.setattr(llm, "_directory", tmp_path)
    with pytest.raises(CheckpointError, match="generation_config.json: temperature=-1"):
        llm.generate("hello")


def test_prompts_in_every_form():
    assert read_prompts("a") == ([Prompt("a")], False)
    assert read_prompts([1, 2]) == ([Prompt(None, [1, 2])], False)
    assert read_prompts(np.array([1, 2])) == ([Prompt(None, [1, 2])], False)
    assert read_prompts(["a", [1, 2]]) == ([Prompt("a"), Prompt(None, [1, 2])], True)
    assert read_prompts(np.array([[1, 2], [3, 4]])) == ([Prompt(None, [1, 2]), Prompt(None, [3, 4])], True)
    assert read_prompts([Prompt("a", [1])]) == ([Prompt("a", [1])], True)


@pytest.mark.parametrize("params", [3, [None], "greedy", [LONG, LONG]])
def test_other_things_than_sampling_params_are_refused(llm, params):
    with pytest.raises(RequestError, match="sampling_params must be one SamplingParams, or one for each of 1 prompts"):
        llm.generate("hello", params)


def test_progress_must_be_callable(model_dir):
    with pytest.raises(ConfigError, match="progress=3 is not allowed"):
        LLM(model_dir, device="cpu", progress=3)
