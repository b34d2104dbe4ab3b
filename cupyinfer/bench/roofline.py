"""The two ceilings of a machine, measured: bytes per second read from memory, and floating-point operations per second.

A step cannot be faster than its bytes over the first or its operations over the second; "% of roofline" is the larger
of these two times over the time that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cupyinfer.model.config import ModelConfig
from cupyinfer.ops.gemm import linear
from cupyinfer.runtime.arena import Arena
from cupyinfer.runtime.device import Device
from cupyinfer.runtime.kernels import KernelSource, get, launch
from cupyinfer.runtime.timing import time_calls, time_gpu
from cupyinfer.types import DType

SOURCE = KernelSource("bench/stream_read.cu", ("stream_read",))


@dataclass(frozen=True)
class Roofline:
    """Measured ceilings: bytes/s of a read-only stream, FLOP/s of a large matrix product in the model's dtype."""

    bandwidth: float
    flops: float

    def seconds(self, nbytes: float, flops: float) -> float:
        """The least time in which ``nbytes`` can be read and ``flops`` be done."""
        return max(nbytes / self.bandwidth, flops / self.flops)


@dataclass(frozen=True)
class Weights:
    """Weight elements of a model, summed over its layers (norms and biases left out)."""

    dense: int  # read and used for every token
    expert: int  # one expert of every sparse layer; 0 in a dense model
    head: int  # the output head
    num_experts: int = 0
    experts_per_token: int = 0

    @property
    def used_per_token(self) -> int:
        return self.dense + self.expert * self.experts_per_token

    def read(self, tokens: int) -> float:
        """Elements that a step over ``tokens`` tokens reads: of the experts those that are hit, on average."""
        if not self.num_experts:
            return self.dense
        missed = (1 - self.experts_per_token / self.num_experts) ** tokens
        return self.dense + self.expert * self.num_experts * (1 - missed)


def measure(device: Device, dtype: DType, weights: Weights) -> Roofline:
    """Measure both ceilings on ``device`` (about a second).

    On a CPU the bandwidth is that of a matrix-vector product over as many bytes as the model's weights, since a small
    model's stay in the caches; on a GPU that of device memory.
    """
    return Roofline(_bandwidth(device, weights), _flops(device, dtype))


def _bandwidth(device: Device, weights: Weights) -> float:
    xp = device.xp
    if not device.is_cuda:
        rows = max(1, int(min(weights.read(1) + weights.head, 1 << 28)) // 1024)
        data, vector = np.ones((rows, 1024), np.float32), np.ones(1024, np.float32)
        return data.nbytes / time_calls(lambda: data @ vector, repeats=15).percentile(10)
    data = xp.random.default_rng(0).integers(0, 1 << 31, 1 << 29, dtype=xp.int32).view(xp.uint32)
    out = xp.zeros(1, xp.uint32)
    kernel = get(SOURCE, "stream_read")
    blocks = 8 * xp.cuda.Device().attributes["MultiProcessorCount"]
    args = (data, out, np.int64(data.nbytes // 16))
    samples = time_gpu(lambda: launch(kernel, (blocks,), (256,), args), repeats=15, cold=False)
    return data.nbytes / samples.percentile(10)


def _flops(device: Device, dtype: DType) -> float:
    n = 8192 if device.is_cuda else 1024
    xp = device.xp
    rng = xp.random.default_rng(0)
    x, w = (rng.standard_normal((n, n), dtype=xp.float32).astype(dtype.numpy) for _ in range(2))
    out = xp.empty((n, n), dtype.numpy)
    arena = Arena(xp)
    run = lambda: linear(x, w, out=out, arena=arena)
    samples = time_gpu(run, repeats=10, cold=False) if device.is_cuda else time_calls(run, repeats=5)
    return 2 * n**3 / samples.percentile(10)


def count_weights(config: ModelConfig) -> Weights:
    """Count the weight elements of a configuration."""
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    head = config.vocab_size * config.hidden_size
    gates = 3 if config.gated_mlp else 2
    if not config.num_experts:
        return Weights(config.num_layers * (attention + gates * config.hidden_size * config.intermediate_size), 0, head)
    expert = config.num_layers * gates * config.hidden_size * config.moe_intermediate_size
    return Weights(config.num_layers * attention, expert, head, config.num_experts, config.experts_per_token)


def decode_cost(
    config: ModelConfig, weights: Weights, batch: int, context: float, itemsize: int
) -> tuple[float, float]:
    """(bytes, FLOPs) of one decode step of ``batch`` sequences with ``context`` keys each: weights and KV read once."""
    kv = 2 * config.num_kv_heads * config.head_dim * config.num_layers * context * batch
    nbytes = (weights.read(batch) + weights.head + kv) * itemsize
    return nbytes, 2 * (weights.used_per_token + weights.head) * batch + _attention_flops(config, batch * context)


def prefill_cost(
    config: ModelConfig, weights: Weights, prompts: int, length: int, itemsize: int
) -> tuple[float, float]:
    """(bytes, FLOPs) of computing ``prompts`` prompts of ``length`` tokens, one row of logits each."""
    tokens = prompts * length
    pairs = prompts * length * (length + 1) / 2  # causal
    flops = 2 * weights.used_per_token * tokens + 2 * weights.head * prompts + _attention_flops(config, pairs)
    return (weights.read(tokens) + weights.head) * itemsize, flops


def _attention_flops(config: ModelConfig, pairs: float) -> float:
    return 4 * config.num_heads * config.head_dim * config.num_layers * pairs
