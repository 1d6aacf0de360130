"""What a benchmark is given by name, and what it takes where nothing is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qe_edge.console import shown
from qe_edge.errors import BadArgument, BadInput
from qe_edge.export.lineage import learnt_queries
from qe_edge.retrieval.datasets import BUILTIN, builtin_folder, split_name
from qe_edge.student.models import resolve
from qe_edge.work.files import MANIFEST
from qe_edge.work.folder import Workdir, is_numbered


class Model(NamedTuple):
    """A model to measure: its name in tables, what it is found by, and joins instead of its own.

    `sha256` is None where the weights are elsewhere, as a hub id's are. `learnt` are the queries that it was
    trained on, as far as that is known.
    """

    label: str
    name: str
    sha256: str | None
    joins: tuple[str, ...] = ()
    learnt: frozenset[str] = frozenset()


def parse_model(text: str) -> tuple[str, str]:
    """`MODEL` or `LABEL=MODEL` -> (label for tables, model); a file's or folder's label is its name.

    What exists as it is written is a model, whatever it holds.
    """
    label, equals, model = text.partition("=")
    if equals and "/" not in label and not Path(text).exists():
        return label, model
    ref = resolve(text)
    if not ref.path or text.startswith("builtin:"):
        return shown(text), text
    return shown(f"{ref.path.parent.name} {ref.path.name}" if is_numbered(ref.path) else ref.path.name), text


def learnt_by_model(name: str) -> frozenset[str]:
    """The queries that a model was trained on, by the records of the folder where it lies."""
    path = resolve(name).path
    if path is None:
        return frozenset()
    return frozenset(learnt_queries(path if (path / MANIFEST).is_file() else path.parent))


def parse_run(text: str) -> tuple[str, Path]:
    """`FILE` or `LABEL=FILE` -> (label for tables, file); a file's label is its name."""
    label, equals, file = text.partition("=")
    if equals and "/" not in label and not Path(text).exists():
        if not file:
            raise BadArgument(f"--run {text} names no file; write FILE or LABEL=FILE")
        return label, Path(file)
    return shown(Path(text).name), Path(text)


def default_models(workdir: Workdir, named: str = "one with --model") -> list[str]:
    """The newest export's GGUF files, or MLX folders if it has no others; an error says to name `named`."""
    folder = workdir.newest("export", named=named)
    models = sorted(map(str, folder.glob("[!.]*.gguf"))) or sorted(map(str, folder.glob("[!.]*-mlx-*")))
    if not models:
        raise BadInput(f"the newest export holds no model; name {named}", path=folder)
    return models


def default_teachers(datasets: Sequence[str]) -> list[str]:
    """The teacher expansions that ship with the built-in data sets among these."""
    found = []
    for name in datasets:
        base, split = split_name(name)
        if base in BUILTIN and not Path(base).is_dir():
            found.append(str(builtin_folder(base) / "expansions" / f"{split or 'test'}.jsonl"))
    return found
