"""What the user may set, and what the engine runs with.

:class:`EngineConfig` is the request: frozen, checked, with ``None`` meaning "choose for me". It is resolved once:
:func:`step_limits` fixes how large a step can be, the engine measures what memory is left, and :func:`make_plan`
returns the frozen :class:`EnginePlan` in which nothing is left to choose. Names follow vLLM's where they mean the same.
"""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any

from cupyinfer import env
from cupyinfer.errors import ConfigError, OutOfMemoryError, invalid
from cupyinfer.types import FLOAT_NAMES

LOAD_FORMATS = ("auto", "safetensors", "dummy")
BLOCK_SIZES = (8, 16, 32, 64, 128)
LOGITS_ROWS = 256  # rows of logits [N, V] that a step may always ask for: prompt logprobs come in slices of this many
_SEQUENCES = 256  # default of max_num_seqs
_CPU_CACHE_BYTES = 1 << 30  # default upper bound of the KV cache in host memory
_CPU_CACHE_SEQUENCES = 8  # default size of the KV cache in host memory, in sequences of full length


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine. ``None`` means: chosen when the engine starts. Raises ConfigError for bad values."""

    model: str  # folder of a Hugging Face checkpoint, or a hub id
    device: str | None = None  # auto, cpu, cuda, cuda:N; None: CUPYINFER_DEVICE, else auto
    dtype: str = "auto"  # auto, float32, float16, bfloat16
    load_format: str = "auto"  # auto, safetensors, dummy (random weights)
    tokenizer: str | None = None  # folder, file or hub id; None: the model's
    max_model_len: int | None = None  # tokens of prompt and output together; None: the model's, or what memory allows
    max_num_seqs: int | None = None  # sequences that run at once; None: 256, or the tokens of a step if these are fewer
    max_num_batched_tokens: int | None = None  # tokens of one step; None: 8192 on a GPU, 2048 on a CPU
    block_size: int = 16  # tokens per KV page
    gpu_memory_utilization: float = 0.9  # share of the device's memory for weights, scratch and KV pages together
    num_gpu_blocks_override: int | None = None  # KV pages, instead of what memory allows (on a CPU too)
    enable_prefix_caching: bool = True
    enforce_eager: bool = False  # no CUDA graphs
    seed: int = 0  # of requests that bring none

    @classmethod
    def make(cls, **settings: Any) -> EngineConfig:
        """An EngineConfig from keywords; an unknown one raises ConfigError and says what is known."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name, value in settings.items():
            if name not in known:
                raise ConfigError(f"{name}={value!r} is not a setting of the engine; known: {', '.join(known)}")
        if "model" not in settings:
            raise ConfigError("model is missing: the folder of a Hugging Face checkpoint, or a hub id")
        return cls(**settings)

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_integer("seed", 0, 2**64 - 1)
        for name, least, most in (
            ("max_num_seqs", 1, 65535),
            ("max_model_len", 2, 2**31 - 1),
            ("max_num_batched_tokens", 1, 2**31 - 1),
            ("num_gpu_blocks_override", 1, 2**31 - 1),
        ):
            if getattr(self, name) is not None:
                self._check_integer(name, least, most)
        budget, rows = self.max_num_batched_tokens, self.max_num_seqs
        if budget is not None and rows is not None and budget < rows:
            raise invalid("max_num_batched_tokens", budget, f"an integer >= max_num_seqs ({rows})")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share <= 1:
            raise invalid("gpu_memory_utilization", share, "a number > 0 and <= 1")

    def _check_choices(self) -> None:
        if self.dtype not in ("auto", *FLOAT_NAMES):
            raise invalid("dtype", self.dtype, ", ".join(("auto", *FLOAT_NAMES)))
        if self.load_format not in LOAD_FORMATS:
            raise invalid("load_format", self.load_format, ", ".join(LOAD_FORMATS))
        if self.block_size not in BLOCK_SIZES or not isinstance(self.block_size, int):
            raise invalid("block_size", self.block_size, ", ".join(map(str, BLOCK_SIZES)))
        for name in ("enable_prefix_caching", "enforce_eager"):
            if not isinstance(getattr(self, name), bool):
                raise invalid(name, getattr(self, name), "True, False")
        if not str(self.model):
            raise invalid("model", self.model, "the folder of a Hugging Face checkpoint, or a hub id")

    def _check_integer(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise invalid(name, value, f"an integer from {least} to {most}")


@dataclass(frozen=True)
class StepLimits:
    """How large a sequence and a step can be. ``logits_rows``: rows of logits [N, V] one step may ask for."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int

    @property
    def blocks_per_sequence(self) -> int:
        """M: width of a block table."""
        return -(-self.max_model_len // self.block_size)

    @property
    def logits_rows(self) -> int:
        return min(self.max_num_batched_tokens, max(self.max_num_seqs, LOGITS_ROWS))


@dataclass(frozen=True)
class EnginePlan(StepLimits):
    """Everything the engine runs with, resolved."""

    num_blocks: int
    enable_prefix_caching: bool
    seed: int
    depth: int  # steps in flight at once: 2 on a GPU (one launched before the one before is read), 1 on a CPU
    decode_buckets: tuple[int, ...]  # batch sizes that decode steps are padded to; empty on a CPU: no padding
    use_graphs: bool  # each bucket is captured as a CUDA graph


def step_limits(config: EngineConfig, on_gpu: bool, model_context: int) -> StepLimits:
    """Limits of one step. ``model_context``: max_position_embeddings of the model, in tokens. Raises ConfigError."""
    length = config.max_model_len or model_context
    if length > model_context:
        raise invalid("max_model_len", length, f"at most {model_context}, the context that the model was made for")
    budget = config.max_num_batched_tokens or max(8192 if on_gpu else 2048, config.max_num_seqs or 0)
    return StepLimits(length, config.max_num_seqs or min(_SEQUENCES, budget), budget, config.block_size)


def cpu_blocks(config: EngineConfig, limits: StepLimits, page_bytes: int) -> int:
    """KV pages on a CPU when the user does not say: eight full sequences, at most 1 GiB, but one that was asked for."""
    wanted = limits.blocks_per_sequence * min(_CPU_CACHE_SEQUENCES, limits.max_num_seqs)
    least = limits.blocks_per_sequence if config.max_model_len is not None else 1
    return max(least, min(wanted, _CPU_CACHE_BYTES // page_bytes))


def gpu_blocks(available: int, page_bytes: int) -> int:
    """KV pages that fit into ``available`` bytes of device memory. Raises OutOfMemoryError when not even one does."""
    blocks = available // page_bytes
    if blocks < 1:
        raise OutOfMemoryError(
            f"the KV cache needs at least {page_bytes / 2**20:.1f} MiB, but {available / 2**20:.1f} MiB of device "
            "memory are left beside weights and scratch; raise gpu_memory_utilization or lower max_num_batched_tokens, "
            "max_num_seqs or max_model_len"
        )
    return int(blocks)


def make_plan(config: EngineConfig, limits: StepLimits, on_gpu: bool, num_blocks: int) -> EnginePlan:
    """The final plan for a KV cache of ``num_blocks`` pages.

    A max_model_len that the user asked for must fit into the pages (OutOfMemoryError otherwise); one taken from the
    model is lowered to what fits.
    """
    tokens = num_blocks * limits.block_size
    if tokens < limits.max_model_len and config.max_model_len is not None:
        raise OutOfMemoryError(
            f"max_model_len={limits.max_model_len} needs {limits.blocks_per_sequence} KV pages, but {num_blocks} fit "
            f"({tokens} tokens); lower max_model_len, or raise num_gpu_blocks_override or gpu_memory_utilization"
        )
    eager = config.enforce_eager or env.NO_GRAPHS.get()
    return EnginePlan(
        max_model_len=min(limits.max_model_len, tokens),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        block_size=limits.block_size,
        num_blocks=num_blocks,
        enable_prefix_caching=config.enable_prefix_caching,
        seed=config.seed,
        depth=2 if on_gpu else 1,
        decode_buckets=decode_buckets(limits.max_num_seqs) if on_gpu else (),
        use_graphs=on_gpu and not eager,
    )


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes of decode steps: 1, 2, 4, then steps of 8 to 256, then of 32."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, max_num_seqs + 32, 32)]
    return tuple(s for s in sizes if s < max_num_seqs) + (max_num_seqs,)
