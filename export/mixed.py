"""Mixed precision by measurement: each group of tensors gets the type that costs the answers least.

It starts from the largest of llama.cpp's own mixtures that fits the budget. Each group is then put into every
other type alone, on top of that mixture, and the change of the KL divergence from the source is measured.
These changes are taken to add up, and the choice is a knapsack: the least sum whose sizes stay within the
budget. If the whole isn't better than the mixture it started from, on answers that it wasn't chosen on, the
mixture is kept.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qe_edge.console import progress
from qe_edge.errors import BadArgument, require
from qe_edge.export.gguf import unpermute_rotary
from qe_edge.export.imatrix import Importance
from qe_edge.export.quantize import MIXED, quantize_gguf
from qe_edge.export.source import Source
from qe_edge.export.streamed import Streamed

if TYPE_CHECKING:
    from torch import Tensor

# llama.cpp's own mixtures to start from, the largest first.
MIXTURES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_M")
# Types of ggml, the smallest first. Where a matrix is too narrow for one, llama.cpp takes another, which is
# then what was measured.
CANDIDATES = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
ROWS = 8  # of the calibration rows, to measure on; as many others decide
BLOCKS = 4  # of layers, told apart

Groups = dict[str, dict[str, str]]
"""Group -> its matrices, name in the source -> name in the GGUF."""


class Effect(NamedTuple):
    """A group in other types: its bytes, and by how many nats that alone changes the mean KL divergence."""

    types: dict[str, str]
    bytes: int
    divergence: float


def check_budget(source: Source, budget: int) -> None:
    """Refuse what not even the matrices fit into, before hours of work; `choose_types` knows to the byte.

    Raises:
        BadArgument: the budget, in bytes, is too small.
    """
    gguf = require("gguf", "llama")
    kinds = gguf.GGMLQuantizationType

    def smallest(rows: int, width: int) -> int:
        # llama.cpp's fallback for rows that can't be cut into Q3_K's blocks of 256 (`tensor_type_fallback`).
        kind = kinds[CANDIDATES[0]] if width % gguf.QK_K == 0 else kinds.IQ4_NL
        values, size = gguf.GGML_QUANT_SIZES[kind]
        return int(rows * -(-width // values) * size)

    least = sum(smallest(*shape) for shape in source.shapes.values() if len(shape) == 2)
    if budget < least:
        raise BadArgument(
            f"the budget of {budget / 1e6:.2f} MB is below {least / 1e6:.2f} MB, "
            "which the matrices take at least"
        )


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
    groups = group(source)
    smallest = sizes(_uniform(base, CANDIDATES[0], groups, importance, scratch), groups)
    least = smallest.fixed + sum(smallest.groups.values())
    if least > budget:
        raise BadArgument(f"the budget of {budget / 1e6:.2f} MB is below the least, {least / 1e6:.2f} MB")
    start = start_from(base, groups, importance, budget, scratch)
    student = Student(source, rows[:ROWS])
    student.take(start, groups)
    effects = measure_effects(student, start, base, groups, importance, scratch)
    del student  # and the answers that it holds
    chosen = cheapest(effects, budget - smallest.fixed)
    assert chosen is not None  # the smallest of each fits
    types = {name: kind for effect in chosen.values() for name, kind in effect.types.items()}
    whole = quantize_gguf(base, scratch / "chosen.gguf", MIXED, importance=importance, types=types)
    judge, divergences = Student(source, rows[ROWS : 2 * ROWS] or rows[:ROWS]), []
    for file in (start, whole):
        judge.take(file, groups)
        divergences.append(judge.divergence())
    return types if divergences[1] < divergences[0] else types_of(start)


def start_from(base: Path, groups: Groups, importance: Importance, budget: int, scratch: Path) -> Path:
    """The largest of MIXTURES that fits the budget, as a file; all of the smallest type if none does."""
    for kind in MIXTURES:
        file = quantize_gguf(base, scratch / "start.gguf", kind, importance=importance)
        found = sizes(file, groups)
        if found.fixed + sum(found.groups.values()) <= budget:
            return file
    return _uniform(base, CANDIDATES[0], groups, importance, scratch).rename(scratch / "start.gguf")


class Student(Streamed):
    """The source, whose matrices can be replaced by quantized ones, and its own answers.

    `replaced` is name in the source -> matrix of a GGUF, which stays on the disk as well.
    """

    def __init__(self, source: Source, rows: Sequence[tuple[list[int], int]]):
        super().__init__(source)
        self.rows = rows
        self.replaced: dict[str, Stored] = {}
        self.expected = list(self._answers())

    def weight(self, name: str, rows: slice = slice(None)) -> Tensor:
        torch = require("torch", "train")
        from gguf import dequantize

        if name not in self.replaced:
            return super().weight(name, rows)
        stored = self.replaced[name]
        weight = torch.from_numpy(dequantize(stored.read(rows), stored.kind).copy())
        return unpermute_rotary(name, weight, self.source)

    def _answers(self) -> Iterator[Tensor]:
        """Log-probabilities [tokens, vocabulary] of each row, where its answer is decided."""
        torch = require("torch", "train")
        found = self.hidden([ids for ids, _ in self.rows])
        answers = [hidden[start - 1 : -1] for hidden, (_, start) in zip(found, self.rows, strict=True)]
        # All at once, since the output matrix is the largest to read.
        for logits in self.output(torch.cat(answers)).split([len(answer) for answer in answers]):
            yield logits.log_softmax(1)

    def divergence(self) -> float:
        """Mean KL divergence of the answers now from those by itself, in nats."""
        pairs = zip(self.expected, self._answers(), strict=True)
        return float(np.mean([(p.exp() * (p - q)).sum(1).mean().item() for p, q in pairs]))

    def take(self, file: Path, groups: Groups) -> None:
        """Replace all matrices by those of a GGUF."""
        matrices = stored_in(file)
        for members in groups.values():
            self.replaced |= {name: matrices[short] for name, short in members.items()}


def measure_effects(
    student: Student, start: Path, base: Path, groups: Groups, importance: Importance, scratch: Path
) -> dict[str, list[Effect]]:
    """Group -> its effect in each type that it can have; the first one leaves it as it is in `start`."""
    before, own, kinds = student.divergence(), sizes(start, groups), types_of(start)
    unchanged = student.replaced
    effects: dict[str, list[Effect]] = {}
    for name, members in groups.items():
        effects[name] = [Effect({short: kinds[short] for short in members.values()}, own.groups[name], 0.0)]
    with progress("measuring types", len(CANDIDATES) * len(groups)) as advance:
        for candidate in CANDIDATES:
            file = _uniform(base, candidate, groups, importance, scratch)
            found, matrices = sizes(file, groups), stored_in(file)
            for name, members in groups.items():
                types = {short: matrices[short].kind.name for short in members.values()}
                # Where it was too narrow for the candidate, this is what it got before.
                if all(effect.types != types for effect in effects[name]):
                    student.replaced = unchanged | {own: matrices[short] for own, short in members.items()}
                    effects[name].append(Effect(types, found.groups[name], student.divergence() - before))
                advance()
    student.replaced = unchanged
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


class Stored(NamedTuple):
    """A matrix of a GGUF, and where its bytes are."""

    file: Path
    start: int
    shape: tuple[int, int]  # rows, bytes of a row
    kind: Any  # of gguf.GGMLQuantizationType

    def read(self, rows: slice) -> np.ndarray:
        """Bytes [rows, bytes of a row]."""
        # Mapped anew each time, or all that was ever read of the file would stay mapped.
        return np.memmap(self.file, np.uint8, "r", self.start, self.shape)[rows]


def stored_in(file: Path) -> dict[str, Stored]:
    """The matrices of a GGUF by name."""
    found = {}
    for t in _reader(file).tensors:
        if len(t.shape) == 2:
            rows = int(t.shape[1])
            found[t.name] = Stored(file, int(t.data_offset), (rows, int(t.n_bytes) // rows), t.tensor_type)
    return found


def types_of(file: Path) -> dict[str, str]:
    """The type of each matrix of a GGUF."""
    return {name: stored.kind.name for name, stored in stored_in(file).items()}


def _uniform(base: Path, candidate: str, groups: Groups, importance: Importance, scratch: Path) -> Path:
    """All matrices in one type, in a file that the next one replaces."""
    everything = [short for members in groups.values() for short in members.values()]
    types = dict.fromkeys(everything, candidate)
    return quantize_gguf(base, scratch / "candidate.gguf", MIXED, importance=importance, types=types)


def _reader(file: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(str(file))
