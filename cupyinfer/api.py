"""The Python interface: :class:`LLM` completes prompts and conversations. Names follow vLLM's."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cupyinfer.config import EngineConfig
from cupyinfer.demo import demo_model_path
from cupyinfer.engine.loading import load_engine
from cupyinfer.engine.update import EngineStats
from cupyinfer.errors import CheckpointError, ConfigError, CupyinferError, RequestError, invalid
from cupyinfer.live_request import LiveRequest
from cupyinfer.model.hub import find_model
from cupyinfer.model.presets import PREFIX
from cupyinfer.outputs import RequestOutput
from cupyinfer.progress import Progress, ProgressBars
from cupyinfer.prompts import Prompt, PromptLike, read_prompts
from cupyinfer.sampling_params import SamplingParams
from cupyinfer.text.chat import ChatTemplate, Message, load_chat_template, named_chat_template
from cupyinfer.text.tokenizer import Tokenizer, load_tokenizer, read_json
from cupyinfer.types import dtype_of


class LLM:
    """A loaded model with its engine. Close it, or use it as a context manager. Threads that share it take turns, a
    step at a time; many prompts in one call of :meth:`generate` are faster.

    ``model``: folder of a Hugging Face checkpoint, a hub id, ``dummy:<preset>``, or None for the demo model. Further
    keywords are the settings of :class:`~cupyinfer.config.EngineConfig` (device, dtype, max_model_len, max_num_seqs,
    max_num_batched_tokens, block_size, gpu_memory_utilization, num_gpu_blocks_override, enable_prefix_caching,
    enforce_eager, seed, load_format, tokenizer); an unknown one raises ConfigError. ``progress(stage, done, total)``
    hears of loading weights, compiling kernels and capturing graphs; True draws bars on standard error.

    Raises ConfigError, CheckpointError, DeviceError, OutOfMemoryError.
    """

    def __init__(
        self, model: str | Path | None = None, *, progress: Progress | bool | None = None, **settings: Any
    ) -> None:
        self.model_name = "demo model" if model is None else str(model)
        if not (progress is None or isinstance(progress, bool) or callable(progress)):
            raise invalid("progress", progress, "None, True, False, or a function of (stage, done, total)")
        config = EngineConfig.make(model=str(demo_model_path() if model is None else model), **settings)
        is_preset = config.model.startswith(PREFIX)
        self._directory = None if is_preset else find_model(config.model)
        if self._directory is not None:
            config = replace(config, model=str(self._directory))
        self.tokenizer = _tokenizer_of(config, self._directory)
        self.chat_template = _chat_template_of(self._directory, self.tokenizer)
        bars = ProgressBars(None if progress is True else False)
        report = bars if isinstance(progress, bool) else progress
        try:
            self.engine, self.model_config = load_engine(config, report)
        finally:
            bars.close()
        if self.tokenizer is not None:  # an instruct model's end of turn is sometimes named only there
            vocab = self.model_config.vocab_size
            self.engine.eos_token_ids |= {t for t in self.tokenizer.eos_token_ids if t < vocab}
        self._numbers = itertools.count()
        self._live: dict[str, LiveRequest] = {}
        self._closed = False
        self._turn = threading.RLock()  # held by the thread that works on the engine or on what came of a step

    # --- what it is -------------------------------------------------------------------------------------------------
    @property
    def device(self) -> Any:
        """The :class:`~cupyinfer.runtime.device.Device` that computes."""
        return self.engine.runner.device

    @property
    def dtype(self) -> str:
        """The type that the model computes in: float32, float16 or bfloat16."""
        return dtype_of(self.engine.runner.kv_caches[0]).name

    @property
    def max_model_len(self) -> int:
        """Most tokens that a prompt and its output may have together."""
        return self.engine.plan.max_model_len

    def stats(self) -> EngineStats:
        """Counters of the engine: pages, prefix cache, preemptions, tokens."""
        return self.engine.stats()

    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends; greedy when it does not ask for sampling."""
        file = Path(self._directory or ".") / "generation_config.json"
        values = read_json(file) if self._directory is not None else {}
        names = ["repetition_penalty"]
        names += ["temperature", "top_p", "top_k", "min_p"] if values.get("do_sample") else []
        given = {name: values[name] for name in names if values.get(name) is not None}
        if not values.get("do_sample"):
            given["temperature"] = 0.0
        try:
            return SamplingParams(**given)
        except RequestError as error:
            raise CheckpointError(f"{file}: {error}") from None

    # --- what it does -----------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_progress_bar: bool = False,
    ) -> list[RequestOutput]:
        """Complete every prompt; the outputs come in the order of the prompts.

        ``prompts``: a text, a list of token ids, or a list of these. ``sampling_params``: for all, or one for each
        prompt; default: :meth:`default_sampling_params`. Raises RequestError naming the index of a bad prompt before
        anything runs. Ctrl-C ends every request of the call; the LLM stays usable.
        """
        found, many = read_prompts(prompts)
        live = self._add_all(found, self._params_of_each(sampling_params, len(found)), many, lazy=True)
        bars = ProgressBars(None if use_progress_bar else False)
        try:
            for request in live:  # they are served in this order, more or less
                while not request.finished:
                    if bars.due():
                        bars("prompts", sum(r.share_done(self.max_model_len) for r in live), len(live))
                    self._step()
        finally:
            bars.close()
            self._drop(live)
        return [request.result() for request in live]

    def stream(self, prompt: PromptLike, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt and yield what is new, as it comes: texts and token ids of all deltas joined are the
        whole. The last one has ``finished`` and the metrics. Closing the iterator early aborts the request.
        """
        found, many = read_prompts(prompt)
        if not found:
            raise RequestError("the prompt is empty; allowed: at least one token")
        if many:
            raise RequestError(f"prompt={prompt!r} is not allowed; allowed: one text or one list of token ids")
        (request,) = self._add_all(found, self._params_of_each(sampling_params, 1), False, lazy=False)
        deltas = self._deltas(request)
        next(deltas)  # started: closing an iterator that nobody has read from aborts the request, too
        return deltas

    def _deltas(self, request: LiveRequest) -> Iterator[RequestOutput]:
        """One empty output, then what is new."""
        try:
            yield request.result()
            while True:
                with self._turn:
                    news = request.news()
                if news is not None:
                    yield news
                elif request.finished:
                    return
                else:
                    self._step()
        finally:
            self._drop([request])

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        use_progress_bar: bool = False,
        **variables: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several. A conversation is a list of ``{"role": ..., "content": ...}``.

        ``chat_template`` and ``variables`` as for :meth:`chat_prompt`. Raises RequestError, ConfigError.
        """
        many = len(messages) > 0 and all(isinstance(m, Sequence) and not isinstance(m, (str, bytes)) for m in messages)
        talks: Any = messages if many else [messages]
        made = [self.chat_prompt(talk, chat_template=chat_template, **variables) for talk in talks]
        params = self._params_of_each(sampling_params, len(made))
        params = [replace(p, stop=(*p.stop, *stop)) for p, (_, stop) in zip(params, made, strict=True)]
        return self.generate([prompt for prompt, _ in made], params, use_progress_bar=use_progress_bar)

    def chat_prompt(
        self, messages: Sequence[Message], *, chat_template: str | None = None, **variables: Any
    ) -> tuple[Prompt, tuple[str, ...]]:
        """(the prompt of a conversation, stop strings that belong to its template).

        ``chat_template``: completion, transcript or a file, in place of the model's own, which a base model lacks;
        ``variables`` (tools, enable_thinking, add_generation_prompt, ...) are handed to the template.
        """
        tokenizer = self._need_tokenizer("messages")
        template = self.chat_template
        if chat_template is not None:
            template = named_chat_template(chat_template, tokenizer.special_tokens)
        if template is None:
            raise RequestError(
                f"{self.model_name} has no chat template, so it was not made for conversation; "
                "pass chat_template: completion, transcript or a file"
            )
        text = template.render(messages, **variables)
        return Prompt(text, tokenizer.encode(text, add_special_tokens=template.adds_special_tokens)), template.stop

    def close(self) -> None:
        """End all requests and give the device back."""
        with self._turn:
            if not self._closed:
                self._closed = True
                self._live.clear()
                self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- requests ---------------------------------------------------------------------------------------------------
    def _params_of_each(self, params: Any, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.default_sampling_params()
        each = [params] * count if isinstance(params, SamplingParams) else params
        listed = isinstance(each, Sequence) and len(each) == count
        if not listed or not all(isinstance(p, SamplingParams) for p in each):
            raise RequestError(f"sampling_params must be one SamplingParams, or one for each of {count} prompts")
        return list(each)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} cannot be used: {self.model_name} has no tokenizer.json; pass token ids")
        return self.tokenizer

    def _add_all(
        self, prompts: list[Prompt], params: list[SamplingParams], many: bool, lazy: bool
    ) -> list[LiveRequest]:
        """Check and queue every prompt, or none when one of them is bad."""
        live: list[LiveRequest] = []
        with self._turn:
            self._check_open()
            try:
                for prompt, p in zip(prompts, params, strict=True):
                    live.append(self._add(prompt, p, lazy))
            except CupyinferError as error:
                self._drop(live)
                raise type(error)(f"prompts[{len(live)}]: {error}" if many else str(error)) from None
        return live

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("this LLM is closed")

    def _add(self, prompt: Prompt, params: SamplingParams, lazy: bool) -> LiveRequest:
        if prompt.text == "":
            raise RequestError("the prompt is empty; allowed: at least one character")
        if params.stop:
            self._need_tokenizer("stop strings")
        ids = prompt.token_ids
        if ids is None:
            ids = self._need_tokenizer("a text prompt").encode(prompt.text or "")
        request_id = f"request-{next(self._numbers)}"
        request = LiveRequest(request_id, prompt.text, list(ids), params, self.tokenizer, lazy)
        try:
            self.engine.add_request(request_id, ids, params)
        except CupyinferError as error:
            raise type(error)(str(error).removeprefix(f"request {request_id}: ")) from None
        self._live[request_id] = request
        return request

    def _step(self) -> None:
        """One step of the engine; its news go to the requests they belong to. Ctrl-C waits until that is done."""
        with self._turn, _interrupts_deferred():
            self._check_open()
            for update in self.engine.step():
                request = self._live.get(update.request_id)
                if request is not None and request.take(update):
                    stop = request.completions[update.index].stop_string
                    self.engine.finish_sequence(update.request_id, update.index, stop)

    def _drop(self, requests: list[LiveRequest]) -> None:
        """Forget requests; those that have not finished are aborted."""
        with self._turn:
            for request in requests:
                self._live.pop(request.request_id, None)
                if not request.finished:
                    for update in self.engine.abort(request.request_id):
                        request.take(update)


def _tokenizer_of(config: EngineConfig, directory: Path | None) -> Tokenizer | None:
    """The tokenizer that was asked for, else the model's; None when the model has none. Raises CheckpointError."""
    if config.tokenizer is None:
        return None if directory is None else load_tokenizer(directory)
    path = Path(config.tokenizer)
    found = load_tokenizer(path.parent if path.name == "tokenizer.json" else find_model(path))
    if found is None:
        raise invalid("tokenizer", config.tokenizer, "tokenizer.json, the folder that holds it, or a hub id")
    return found


def _chat_template_of(directory: Path | None, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    if directory is None or tokenizer is None:
        return None
    return load_chat_template(directory, tokenizer.special_tokens)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C is raised at the end of the block, not inside it; pressed twice, at once."""
    default = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not default:
        yield
        return
    pressed = []

    def handler(number: int, frame: Any) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, default)
    if pressed:
        raise KeyboardInterrupt
