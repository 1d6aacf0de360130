"""Mixed precision by measurement: each group of tensors gets the type that costs the answers least.

It starts from the largest of llama.cpp's own mixtures that fits the budget. Each group is then put into every
other type alone, on top of that mixture, and the change of the KL divergence from the source is measured.
These changes are taken to add up, and the choice is a knapsack: the least sum whose sizes stay within the
budget. If the whole, measured at last, isn't better than the mixture it started from, that one is kept.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qe_edge.errors import BadArgument, require
from qe_edge.export.gguf import unpermute_rotary
from qe_edge.export.imatrix import Importance
from qe_edge.export.quantize import MIXED, quantize_gguf
from qe_edge.export.source import Source

# llama.cpp's own mixtures to start from, the largest first.
MIXTURES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M")
# Types of ggml, the smallest first. Where a matrix is too narrow for one, llama.cpp takes another, which is
# then what was measured.
CANDIDATES = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
ROWS = 8  # of the calibration rows, to measure on
BLOCKS = 4  # of layers, told apart

Groups = dict[str, dict[str, str]]
"""Group -> its matrices, name in the source -> name in the GGUF."""


class Effect(NamedTuple):
    """A group in other types: its bytes, and by how many nats that alone changes the mean KL divergence."""

    types: dict[str, str]
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
    `scratch` a folder for three quantized files.

    Raises:
        BadArgument: the budget is too small for any choice.
    """
    groups, rows = group(source), rows[:ROWS]
    smallest = sizes(_uniform(base, CANDIDATES[0], groups, importance, scratch), groups)
    least = smallest.fixed + sum(smallest.groups.values())
    if least > budget:
        raise BadArgument(f"the budget of {budget / 1e6:.2f} MB is below the least, {least / 1e6:.2f} MB")
    start = start_from(base, groups, importance, budget, scratch)
    student = Student(source, rows)
    student.take(start, groups)
    before = student.divergence()
    effects = measure_effects(student, start, base, groups, importance, scratch)
    chosen = cheapest(effects, budget - smallest.fixed)
    assert chosen is not None  # the smallest of each fits
    types = {name: kind for effect in chosen.values() for name, kind in effect.types.items()}
    student.take(
        quantize_gguf(base, scratch / "chosen.gguf", MIXED, importance=importance, types=types), groups
    )
    return types if student.divergence() < before else types_of(start)


def start_from(base: Path, groups: Groups, importance: Importance, budget: int, scratch: Path) -> Path:
    """The largest of MIXTURES that fits the budget, as a file; all of the smallest type if none does."""
    for kind in MIXTURES:
        file = quantize_gguf(base, scratch / "start.gguf", kind, importance=importance)
        found = sizes(file, groups)
        if found.fixed + sum(found.groups.values()) <= budget:
            return file
    return _uniform(base, CANDIDATES[0], groups, importance, scratch).rename(scratch / "start.gguf")


class Student:
    """The source in float32, whose matrices can be replaced by quantized ones, and its own answers."""

    def __init__(self, source: Source, rows: Sequence[tuple[list[int], int]]):
        torch = require("torch", "train")
        from qe_edge.train.student import load_model

        self.source, self.rows = source, rows
        self.network = load_model(str(source.model), dtype=torch.float32).eval()
        self.weights = dict(self.network.named_parameters())
        self.expected = list(self._answers())

    def _answers(self) -> Iterator[Any]:
        """Log-probabilities [tokens, vocabulary] of each row, where its answer is decided."""
        torch = require("torch", "train")
        with torch.inference_mode():
            for ids, start in self.rows:
                yield self.network(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(1)

    def divergence(self) -> float:
        """Mean KL divergence of the answers now from those by itself, in nats."""
        pairs = zip(self.expected, self._answers(), strict=True)
        return float(np.mean([(p.exp() * (p - q)).sum(1).mean().item() for p, q in pairs]))

    def put(self, name: str, tensor: Any) -> Any:
        """Replace a matrix by a GGUF's; returns what was there."""
        torch = require("torch", "train")
        from gguf import dequantize

        before = self.weights[name].data
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        self.weights[name].data = unpermute_rotary(name, weight, self.source)
        return before

    def take(self, file: Path, groups: Groups) -> None:
        """Replace all matrices by those of a GGUF."""
        tensors = {tensor.name: tensor for tensor in _reader(file).tensors}
        for members in groups.values():
            for name, short in members.items():
                self.put(name, tensors[short])


def measure_effects(
    student: Student, start: Path, base: Path, groups: Groups, importance: Importance, scratch: Path
) -> dict[str, list[Effect]]:
    """Group -> its effect in each type that it can have; the first one leaves it as it is in `start`."""
    before, own, kinds = student.divergence(), sizes(start, groups), types_of(start)
    effects: dict[str, list[Effect]] = {}
    for name, members in groups.items():
        effects[name] = [Effect({short: kinds[short] for short in members.values()}, own.groups[name], 0.0)]
    for candidate in CANDIDATES:
        file = _uniform(base, candidate, groups, importance, scratch)
        found, tensors = sizes(file, groups), {tensor.name: tensor for tensor in _reader(file).tensors}
        for name, members in groups.items():
            types = {short: tensors[short].tensor_type.name for short in members.values()}
            if any(effect.types == types for effect in effects[name]):
                continue  # it was too narrow for the candidate, and this is what it got before
            original = {
                own_name: student.put(own_name, tensors[short]) for own_name, short in members.items()
            }
            effects[name].append(Effect(types, found.groups[name], student.divergence() - before))
            for own_name, data in original.items():
                student.weights[own_name].data = data
    return effects


def group(source: Source) -> Groups:
    """The matrices in groups: one kind of matrix in a quarter of the layers; embeddings and output apart."""
    gguf = require("gguf", "llama")
    layers = source.config.num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[source.architecture], layers)
    groups: Groups = defaultdict(dict)
    for name, shape in source.shapes.items():
        if len(shape) != 2:
            continue
        short = names.get_name(name, try_suffixes=(".weight",))
        layer = re.match(r"blk\.(\d+)\.", short)
        key = f"{short.split('.')[-2]} {int(layer[1]) * BLOCKS // layers}" if layer else short
        groups[key][name] = short
    return dict(groups)


def cheapest(effects: dict[str, list[Effect]], budget: int) -> dict[str, Effect] | None:
    """One effect a group, with the least sum of divergences within the budget; None if there is none."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices = [(name, effect) for name, found in effects.items() for effect in found]
    one_each = np.array([[name == own for own, _ in choices] for name in effects], float)
    bytes_of = np.array([[effect.bytes for _, effect in choices]], float)
    solved = milp(
        [effect.divergence for _, effect in choices],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bytes_of, -np.inf, budget)],
    )
    if solved.x is None:
        return None
    return {name: effect for (name, effect), x in zip(choices, solved.x, strict=True) if x > 0.5}


class Sizes(NamedTuple):
    """Bytes of a GGUF: of the matrices, by group, and of vectors and metadata."""

    groups: dict[str, int]
    fixed: int


def sizes(file: Path, groups: Groups) -> Sizes:
    """Where the bytes of a GGUF are."""
    reader = _reader(file)
    # Each tensor starts at a multiple of the alignment.
    padded = {t.name: -(-int(t.n_bytes) // reader.alignment) * reader.alignment for t in reader.tensors}
    found = {name: sum(padded[short] for short in members.values()) for name, members in groups.items()}
    return Sizes(found, file.stat().st_size - sum(found.values()))


def types_of(file: Path) -> dict[str, str]:
    """The type of each matrix of a GGUF."""
    return {t.name: t.tensor_type.name for t in _reader(file).tensors if len(t.shape) == 2}


def _uniform(base: Path, candidate: str, groups: Groups, importance: Importance, scratch: Path) -> Path:
    """All matrices in one type, in a file that the next one replaces."""
    everything = [short for members in groups.values() for short in members.values()]
    types = dict.fromkeys(everything, candidate)
    return quantize_gguf(base, scratch / "candidate.gguf", MIXED, importance=importance, types=types)


def _reader(file: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(str(file))
