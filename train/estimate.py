"""What a training will need, before its weights are loaded: memory and time."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import psutil

from qe_edge.console import note
from qe_edge.errors import require
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.train.hardware import Hardware
from qe_edge.train.lora import lora_config

# The share of the device's matrix product rate that training reaches at best, as measured on a CPU with AVX2.
# On one with AMX, where matrix products are many times as fast and nothing else is, it was about .06.
EFFICIENCY = 0.35
# TRL computes the output layer in tiles of so many tokens by so many vocabulary entries, of which a fused
# kernel holds two in float32 at a time. On a CPU we hold so many bytes for each token of an answer and each
# entry of the vocabulary: `compute_answers_alone` keeps logits and log-probabilities, and computes with both.
TILE = (4096, 32768)
TILES, LOGIT = 2, 18
# What an allocator holds beside the activations. On a CPU malloc keeps what lies between tensors of changing
# sizes: measured on SFT and DPO of the shapes of SmolLM2-135M and Qwen3-0.6B (6 layers).
SURPLUS = {"cuda": 1.0, "cpu": 1.3}


class Estimate(NamedTuple):
    """Bytes of weights, of gradients and optimizer, and of activations; floating point operations in all.

    On a CPU, weights include what the process holds already.
    """

    weights: int
    training: int
    activations: int
    flops: float

    @property
    def memory_gb(self) -> float:
        return (self.weights + self.training + self.activations) / 2**30


def estimate(
    model_config: Any,
    config: SftConfig | DpoConfig,
    on: Hardware,
    *,
    rank: int,
    longest: int,
    answer: int,
    tokens: int,
    epochs: float = 1.0,
) -> Estimate:
    """What training on rows of `tokens` tokens in all, `epochs` times, takes on one process.

    The longest row has `longest` tokens, the longest answer `answer`.

    `rank` is the adapter's, 0 for full fine-tuning.
    """
    rows = config.batch_size * (2 if isinstance(config, DpoConfig) else 1)
    width = config.max_length if isinstance(config, SftConfig) and config.packing else longest
    parameters, trained = _parameters(model_config, rank, on)
    frozen_bytes, layers = on.weights(full=rank == 0).itemsize, model_config.num_hidden_layers
    layer = _kept_by_layer(model_config, rank, on)
    if config.checkpointing:  # the inputs of all layers, and one layer at a time
        kept = layer + layers * model_config.hidden_size * frozen_bytes
    else:
        kept = layer * layers
    # Beside them, the embeddings' and the last norm's.
    activations = rows * width * (kept + 12 * model_config.hidden_size)
    if on.precision != "float32" and frozen_bytes == 4:  # autocast's copies of the weights, which it keeps
        activations += parameters * 2
    if on.device == "cuda":
        activations += TILES * 4 * min(rows * width, TILE[0]) * min(model_config.vocab_size, TILE[1])
    else:
        activations += LOGIT * rows * answer * model_config.vocab_size
    weights = (parameters - trained) * frozen_bytes + trained * 4
    training = trained * 12  # the gradient and Adam's two moments, in float32
    process = 0 if on.device == "cuda" else psutil.Process().memory_info().rss
    passes = 4 if rank else 6  # 2 forward, 2 backward through the activations, 2 more to the weights
    if config.checkpointing:
        passes += 2
    flops = passes * parameters * tokens * epochs
    if isinstance(config, DpoConfig):
        # TRL always copies an adapter for the reference; whole weights need no copy when they ran before.
        weights += trained * 4 if rank or not config.precompute else 0
        flops += 2 * parameters * tokens * (1 if config.precompute else epochs)
    return Estimate(process + weights, training, int(activations * SURPLUS[on.device]), flops / on.processes)


def _parameters(model_config: Any, rank: int, on: Hardware) -> tuple[int, int]:
    """How many parameters the model has, its adapter included, and how many of them are trained."""
    torch, peft = require("torch", "train"), require("peft", "train")
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=on.weights(full=rank == 0))
        if rank:
            model = peft.get_peft_model(model, lora_config(rank, rank))
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def _kept_by_layer(model_config: Any, rank: int, on: Hardware) -> int:
    """Bytes that autograd keeps for each token in a layer of Qwen3 (of Llama, a few percent less).

    As found with its hooks on transformers' implementation: what matrix products get, in the precision of the
    arithmetic, and what the norms get, in float32. Fused attention keeps no table of every token by every
    token.
    """
    c, size = model_config, 4 if on.precision == "float32" else 2
    hidden, feed_forward = c.hidden_size, c.intermediate_size
    head = getattr(c, "head_dim", None) or hidden // c.num_attention_heads
    queries, keys = head * c.num_attention_heads, head * c.num_key_value_heads
    products = 2 * hidden + 4 * queries + 4 * feed_forward + 7 * rank
    norms = 2 * hidden + queries + keys
    if size == 2:  # what was cast
        products += 3 * hidden + queries
    if not rank:  # their own weights are trained too
        norms += 2 * hidden + queries + keys
    return size * products + 4 * norms


def matmul_rate(on: Hardware) -> float:
    """Operations per second of one matrix product in the training's precision, measured now."""
    torch = require("torch", "train")
    dtype = getattr(torch, on.precision)
    a, b = (torch.randn(2048, 2048, device=on.device).to(dtype) for _ in range(2))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def announce(label: str, needs: Estimate, on: Hardware) -> None:
    """Say what a training will need, and warn where the device hasn't got it."""
    minutes, has = needs.flops / matmul_rate(on) / EFFICIENCY / 60, on.memory_gb()
    how_long = f"{max(minutes, 1):.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    note(
        f"{label}: about {max(needs.memory_gb, 0.1):.1f} GB of memory and {how_long} or more "
        f"on {on.name} in {on.precision}"
    )
    if needs.memory_gb > has:
        note(
            f"{label}: that is more than the {has:.1f} GB there are; if it fails, lower --batch-size and "
            "raise --accumulate alike, or add --checkpointing"
        )
