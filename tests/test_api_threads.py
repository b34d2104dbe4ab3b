"""One ``LLM`` in several threads, several in one process, and what a closed one does to those who still wait for it."""

from __future__ import annotations

import threading

import pytest
from standins import write_model

from cupyinfer import LLM, SamplingParams
from cupyinfer.errors import ConfigError

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPTS = ["hello", "world", "def f(", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def llm(model):
    with LLM(model, device="cpu") as made:
        yield made


def in_threads(count: int, work) -> list[BaseException]:
    """Errors of ``work(i)`` in ``count`` threads."""
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def test_threads_that_share_an_llm_get_what_each_would_get_alone(llm):
    expected = [llm.generate(p, GREEDY)[0].outputs[0].token_ids for p in PROMPTS]

    def work(i: int) -> None:
        prompt = PROMPTS[i % 4]
        for _ in range(3):
            if i % 2:
                got = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids
            else:
                got = [t for delta in llm.stream(prompt, GREEDY) for t in delta.outputs[0].token_ids]
            assert got == expected[i % 4]

    assert in_threads(8, work) == []
    assert not llm.engine.has_unfinished()
    assert llm.stats().pages_used == 0


def test_an_llm_for_each_thread(model):
    outputs: list = []

    def work(i: int) -> None:
        with LLM(model, device="cpu") as own:
            outputs.append(own.generate("hello", GREEDY)[0].outputs[0].token_ids)

    assert in_threads(3, work) == []
    assert outputs == [outputs[0]] * 3


def test_closing_ends_a_stream_that_is_read_further(llm):
    stream = llm.stream("hello", GREEDY)
    next(stream)
    llm.close()
    with pytest.raises(ConfigError, match="this LLM is closed"):
        list(stream)


def test_closing_ends_a_call_of_another_thread(llm):
    started = threading.Event()
    step = llm.engine.step

    def slow():
        started.set()
        return step()

    llm.engine.step = slow
    endless = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    closer = threading.Thread(target=lambda: (started.wait(30), llm.close()))
    closer.start()
    errors = in_threads(1, lambda _: [llm.generate(["hello"] * 8, endless) for _ in range(50)])
    closer.join(timeout=30)
    assert [str(error) for error in errors] == ["this LLM is closed"]
