"""Mixed precision by measurement: each group of tensors gets the type that costs the answers least.

Every group is quantized alone to every candidate type, by llama.cpp's own quantizer, and the KL divergence of
the answers from the source's is measured. Effects of several groups are taken to add up. The choice is then a
knapsack: the least sum of divergences whose sizes stay within the budget.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qe_edge.errors import BadArgument, require
from qe_edge.export.gguf import unpermute_rotary
from qe_edge.export.imatrix import Importance
from qe_edge.export.quantize import MIXED, quantize_gguf
from qe_edge.export.source import Source

# Types of ggml, the smallest first. Where a matrix is too narrow for one, llama.cpp takes another, which is
# then what was measured.
CANDIDATES = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
ROWS = 8  # of the calibration rows, to measure on
BLOCKS = 4  # of layers, told apart


class Effect(NamedTuple):
    """A group of tensors in one type: its bytes, and the mean KL divergence that it causes alone, in nats."""

    type: str
    bytes: int
    divergence: float


def choose_types(
    source: Source,
    base: Path,
    rows: Sequence[tuple[list[int], int]],
    importance: Importance,
    budget: int,
    scratch: Path,
) -> dict[str, str]:
    """GGUF tensor name -> type of ggml, so that `base` quantized with them has at most `budget` bytes.

    `base` is the source's unquantized GGUF, `rows` are token ids with the place where the answer starts, and
    `scratch` a folder for one quantized file at a time.

    Raises:
        BadArgument: the budget is too small for any choice.
    """
    groups = _groups(source)
    smallest = _sizes(_quantized(base, CANDIDATES[0], groups, importance, scratch), groups)
    if smallest.fixed + sum(smallest.groups.values()) > budget:
        least = smallest.fixed + sum(smallest.groups.values())
        raise BadArgument(f"the budget of {budget / 1e6:.2f} MB is below the least, {least / 1e6:.2f} MB")
    effects = measure_effects(source, base, rows[:ROWS], importance, scratch)
    chosen = _cheapest(effects, budget - smallest.fixed)
    assert chosen is not None  # the smallest of each fits
    return {name: effect.type for group, effect in chosen.items() for name in groups[group].values()}


def measure_effects(
    source: Source,
    base: Path,
    rows: Sequence[tuple[list[int], int]],
    importance: Importance,
    scratch: Path,
) -> dict[str, list[Effect]]:
    """Group -> its effect in each type that it can have."""
    torch = require("torch", "train")
    from gguf import dequantize

    from qe_edge.train.student import load_model

    network = load_model(str(source.model), dtype=torch.float32).eval()
    parameters = dict(network.named_parameters())
    groups = _groups(source)

    def answers() -> list[Any]:
        """Log-probabilities where the answer of each row is decided."""
        with torch.inference_mode():
            return [
                network(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(1) for ids, start in rows
            ]

    expected = answers()
    effects: dict[str, list[Effect]] = defaultdict(list)
    for candidate in CANDIDATES:
        file = _quantized(base, candidate, groups, importance, scratch)
        sizes = _sizes(file, groups)
        tensors = {tensor.name: tensor for tensor in _reader(file).tensors}
        for group, members in groups.items():
            parts = [tensors[short] for short in members.values()]
            found = parts[0].tensor_type.name
            if any(effect.type == found for effect in effects[group]):
                continue  # it was too narrow for the candidate, and this is what it got before
            original = {name: parameters[name].data for name in members}
            for name, part in zip(members, parts, strict=True):
                weight = torch.from_numpy(dequantize(part.data, part.tensor_type).copy())
                parameters[name].data = unpermute_rotary(name, weight, source)
            divergence = np.mean(
                [
                    (wanted.exp() * (wanted - got)).sum(1).mean().item()
                    for wanted, got in zip(expected, answers(), strict=True)
                ]
            )
            for name, data in original.items():
                parameters[name].data = data
            effects[group].append(Effect(found, sizes.groups[group], float(divergence)))
    return effects


def _quantized(
    base: Path, candidate: str, groups: dict[str, dict[str, str]], importance: Importance, scratch: Path
) -> Path:
    """All matrices in one type, in a file that the next one replaces."""
    everything = [name for members in groups.values() for name in members.values()]
    types = dict.fromkeys(everything, candidate)
    return quantize_gguf(base, scratch / "candidate.gguf", MIXED, importance=importance, types=types)


class _Sizes(NamedTuple):
    """Bytes of a GGUF: of the matrices, by group, and of vectors and metadata."""

    groups: dict[str, int]
    fixed: int


def _sizes(file: Path, groups: dict[str, dict[str, str]]) -> _Sizes:
    reader = _reader(file)
    # Each tensor starts at a multiple of the alignment.
    padded = {t.name: -(-int(t.n_bytes) // reader.alignment) * reader.alignment for t in reader.tensors}
    found = {group: sum(padded[name] for name in members.values()) for group, members in groups.items()}
    return _Sizes(found, file.stat().st_size - sum(found.values()))


def _groups(source: Source) -> dict[str, dict[str, str]]:
    """Group -> its matrices, source name -> GGUF name: one kind of matrix in a quarter of the layers."""
    gguf = require("gguf", "llama")
    layers = source.config.num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[source.architecture], layers)
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for name, shape in source.shapes.items():
        if len(shape) != 2:
            continue
        short = names.get_name(name, try_suffixes=(".weight",))
        layer = re.match(r"blk\.(\d+)\.", short)
        group = f"{short.split('.')[-2]} {int(layer[1]) * BLOCKS // layers}" if layer else short
        groups[group][name] = short
    return dict(groups)


def _cheapest(effects: dict[str, list[Effect]], budget: int) -> dict[str, Effect] | None:
    """One effect a group, with the least sum of divergences within the budget; None if there is none."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [(group, effect) for group, found in effects.items() for effect in found]
    one_each = np.array([[group == name for group, _ in choices] for name in effects], float)
    sizes = np.array([[effect.bytes for _, effect in choices]], float)
    solved = milp(
        # Measured alone, a slight effect can come out a little below none at all.
        [max(effect.divergence, 0.0) for _, effect in choices],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes, -np.inf, budget)],
    )
    if solved.x is None:
        return None
    return {group: effect for (group, effect), x in zip(choices, solved.x, strict=True) if x > 0.5}


def _reader(file: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(str(file))
