"""What a training will need, before its weights are loaded: memory and time."""

from __future__ import annotations

import copy
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
# kernel holds two in float32 at a time; on a CPU, about eight were measured.
TILE = (4096, 32768)
TILES = {"cuda": 2, "cpu": 8}


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
    tokens: int,
) -> Estimate:
    """What training on rows of `tokens` tokens in all, the longest of `longest`, takes on one process.

    `rank` is the adapter's, 0 for full fine-tuning. Activations are counted, not guessed: what autograd keeps
    of one layer and of two, run on torch's fake tensors, which compute nothing, gives the rest of the layers.
    """
    rows = config.batch_size * (2 if isinstance(config, DpoConfig) else 1)
    width = config.max_length if isinstance(config, SftConfig) and config.packing else longest
    first, second = (_Layers(model_config, n, rank, on, rows, width) for n in (1, 2))
    layers = model_config.num_hidden_layers
    frozen_bytes = on.weights(full=rank == 0).itemsize
    repeated = second.parameters - first.parameters, second.trained - first.trained
    parameters = first.parameters + (layers - 1) * repeated[0]
    trained = first.trained + (layers - 1) * repeated[1]
    kept = second.kept - first.kept
    if config.checkpointing:  # the inputs of all layers, and one layer at a time
        kept_in_all = first.kept + layers * rows * width * model_config.hidden_size * frozen_bytes
        if rank == 0 and on.precision != "float32":  # autocast's copies of the weights, which it keeps
            kept_in_all += parameters * 2
    else:
        kept_in_all = first.kept + (layers - 1) * kept
    tile = TILES[on.device] * 4 * min(rows * width, TILE[0]) * min(model_config.vocab_size, TILE[1])
    weights = (parameters - trained) * frozen_bytes + trained * 4
    training = trained * 12  # the gradient and Adam's two moments, in float32
    process = 0 if on.device == "cuda" else psutil.Process().memory_info().rss
    passes = 4 if rank else 6  # 2 forward, 2 backward through the activations, 2 more to the weights
    if config.checkpointing:
        passes += 2
    flops = passes * parameters * tokens * config.epochs
    if isinstance(config, DpoConfig):
        # TRL always copies an adapter for the reference; whole weights need no copy when they ran before.
        weights += trained * 4 if rank or not config.precompute else 0
        flops += 2 * parameters * tokens * (1 if config.precompute else config.epochs)
    return Estimate(process + weights, training, kept_in_all + tile, flops / on.processes)


class _Layers:
    """A model with the first few layers alone, of fake tensors: its parameters and what autograd keeps.

    That is the activations and, where the arithmetic is in 16 bits, its copies of float32 weights.
    """

    def __init__(self, model_config: Any, layers: int, rank: int, on: Hardware, rows: int, width: int):
        torch, peft = require("torch", "train"), require("peft", "train")
        from torch._subclasses.fake_tensor import FakeTensorMode
        from transformers import AutoModelForCausalLM

        shape = copy.deepcopy(model_config)
        shape.num_hidden_layers = layers
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[:layers]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=on.weights(full=rank == 0))
            if rank:
                model = peft.get_peft_model(model, lora_config(rank, rank))
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        fake = FakeTensorMode()
        with fake:
            _fake(model)
            ids = torch.zeros((rows, width), dtype=torch.long)
            mask = torch.ones((rows, 1, width, width), dtype=torch.bool)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            # The fused kernels of a real device don't keep attention's table of every token by every token.
            if storage._cdata not in own and tensor.shape[-2:] != (width, width):
                kept[storage._cdata] = storage
            return tensor

        backbone = (model.get_base_model() if rank else model).base_model
        # Fake tensors of a GPU need a GPU; those of a CPU are as large.
        as_on_cpu = on._replace(device="cpu").autocast()
        with (
            fake,
            as_on_cpu,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            self._output = backbone(input_ids=ids, attention_mask=mask, use_cache=False)
        self.kept = sum(storage.nbytes() for storage in kept.values())


def _fake(model: Any) -> None:
    """Replace a meta model's tensors by fake ones of the mode that is on; tied ones stay tied."""
    torch = require("torch", "train")
    done: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in done:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    trained = isinstance(tensor, torch.nn.Parameter)
                    done[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if trained else fake
                table[name] = done[id(tensor)]


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
