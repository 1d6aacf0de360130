"""What memory a training will need, before its weights are loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

import psutil

from qe_edge.console import note, warn
from qe_edge.errors import require
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.train.hardware import Hardware
from qe_edge.train.lora import lora_config

# TRL computes the output layer in tiles of so many tokens by so many vocabulary entries, of which a fused
# kernel holds two in float32 at a time. On a CPU we hold so many bytes for each token of an answer and each
# entry of the vocabulary: `compute_answers_alone` keeps logits and log-probabilities, and computes with both.
TILE = (4096, 32768)
TILES, LOGIT = 2, 18
# What an allocator holds beside the activations. On a CPU malloc keeps what lies between tensors of changing
# sizes: measured on SFT and DPO of the shapes of SmolLM2-135M and Qwen3-0.6B (6 layers).
SURPLUS = {"cuda": 1.0, "cpu": 1.3}


class Estimate(NamedTuple):
    """Bytes of weights, of gradients and optimizer, and of activations.

    On a CPU, weights include what the process holds already.
    """

    weights: int
    training: int
    activations: int

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
) -> Estimate:
    """What a process needs for training.

    The longest row has `longest` tokens, the longest answer `answer`. `rank` is the adapter's, 0 for full
    fine-tuning.
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
    # TRL always copies an adapter for the reference; whole weights need no copy when they ran before.
    if isinstance(config, DpoConfig) and (rank or not config.precompute):
        weights += trained * 4
    return Estimate(process + weights, training, int(activations * SURPLUS[on.device]))


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


def announce(label: str, needs: Estimate, on: Hardware) -> None:
    """Say what a training will need, and warn where the device hasn't got it."""
    has = on.memory_gb()
    note(f"{label}: about {max(needs.memory_gb, 0.1):.1f} GB of memory on {on.name} in {on.precision}")
    if needs.memory_gb > has:
        warn(
            f"{label}: that is more than the {has:.1f} GB there are; if it fails, lower --batch-size and "
            "raise --accumulate alike, or add --checkpointing"
        )
