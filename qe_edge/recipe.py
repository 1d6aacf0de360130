"""A recipe: the whole way from teacher expansions to a benchmarked student, in one TOML file.

    pairs ─────────────┐
    expansions → SFT → DPO → merge → export → bench → report

Without pairs there is no DPO. With `[samples]` there is no teacher: the untrained student writes several
texts for each query, retrieval decides which are better, and the best are what it learns from.

    untrained student → samples → pairs → the best → SFT → DPO → …

With `[notes]` there are no judged queries either: a model writes them, and then their expansions.

    notes → passages → queries → expansions → pairs → SFT → DPO → …

Run again after an interruption, finished stages are skipped and the
interrupted one goes on.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import msgspec

from qe_edge.bench.bench import check_config
from qe_edge.bench.config import ITSELF, BenchConfig
from qe_edge.bench.inputs import parse_run
from qe_edge.documents.passages import WORDS
from qe_edge.errors import BadInput, NotFound, QeEdgeError, require
from qe_edge.export.config import ExportConfig
from qe_edge.export.export import check_choices
from qe_edge.records import Count, Positive, misfit, no_setting
from qe_edge.retrieval.datasets import builtin_folder, load_dataset
from qe_edge.student.hub import local_file
from qe_edge.student.join import Join
from qe_edge.student.models import resolve
from qe_edge.student.prompt import load_teacher_prompt
from qe_edge.train.config import DpoConfig, PairsConfig, SftConfig, TrainConfig
from qe_edge.train.scoring import Reward
from qe_edge.train.synthetic.config import QueriesConfig
from qe_edge.train.teach.config import TeachConfig

NAME_NOTES = (
    "name your notes with --dataset, who writes for them with --model, and its server with --endpoint"
)
NAME_WRITER = "name who writes with --model, and its server with --endpoint"
NAME_YOURS = "name your data with --dataset, --expansions and --test, or write it into the recipe"


class SamplesPart(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={"datasets": "dataset"},
):
    """Judged queries for which the student itself writes what it then learns from."""

    datasets: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    n: Count = 4
    temperature: Positive = 1.0


class NotesPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A folder of notes, of which passages of about so many words are made."""

    folder: str
    words: Annotated[int, msgspec.Meta(ge=20, le=2000)] = WORDS


class PairsPart(PairsConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where preference pairs come from: judged queries and their candidate expansions."""

    dataset: str = ""
    expansions: tuple[str, ...] = ()


class SftPart(SftConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the student learns to write."""

    expansions: tuple[str, ...] = ()


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A recipe file. In its paths `{data}` stands for --data and `{builtin}` for the shipped collections."""

    title: str
    join: str = ""
    notes: NotesPart | None = None
    queries: QueriesConfig | None = None
    teach: TeachConfig | None = None
    samples: SamplesPart | None = None
    pairs: PairsPart | None = None
    sft: SftPart
    dpo: DpoConfig | None = None
    export: ExportConfig = ExportConfig()
    bench: BenchConfig

    def __post_init__(self) -> None:
        own = self.samples is not None
        if (self.notes is None) != (self.queries is None) or (self.notes is None) != (self.teach is None):
            raise ValueError("[notes], [queries] and [teach] go together")
        if self.notes:
            named = own or self.sft.expansions or self.bench.datasets or (self.pairs and self.pairs.dataset)
            if named:
                raise ValueError("[notes] is all that a student is made of: name no other data")
            return
        if self.dpo and not (self.pairs or own):
            raise ValueError("DPO needs a [pairs] section with a dataset and expansions")
        pairs = self.pairs or PairsPart()
        if own and (self.sft.expansions or pairs.expansions or pairs.dataset):
            raise ValueError("[samples] has datasets and makes expansions: [pairs] and [sft] name none then")
        if self.pairs and not own and not (pairs.dataset and pairs.expansions):
            raise ValueError(f"[pairs] needs a dataset and expansions; {NAME_YOURS}")
        if not own and not self.sft.expansions:
            raise ValueError(f"[sft] needs expansions; {NAME_YOURS}")


def recipe_file(path: Path | str) -> Path:
    """A recipe's file: the one named, or that of this name which ships with the package.

    Raises:
        NotFound: there is none.
    """
    file = Path(path)
    if file.is_file():
        return file
    shipped = resources.files("qe_edge") / "recipes"
    file = Path(str(shipped / f"{path}.toml"))
    if not file.is_file():
        names = sorted(entry.name.removesuffix(".toml") for entry in shipped.iterdir())
        raise NotFound(f"no recipe {path}: neither a file nor one that ships, which are {', '.join(names)}")
    return file


def read_recipe(path: Path | str, *, data: Path | None = None) -> dict[str, Any]:
    """A recipe, as it is written.

    Raises:
        NotFound, BadInput: there is none, or it is no TOML, or has a section that no recipe has; `{data}`
            is used and no folder was given.
    """
    file = recipe_file(path)
    try:
        text = file.read_text(encoding="utf-8-sig").replace("{builtin}", builtin_folder("").as_posix())
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 text: {error}", path=path) from None
    if "{data}" in text:
        if data is None:
            raise BadInput("uses {data}; name that folder with --data", path=path)
        text = text.replace("{data}", data.as_posix())
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"not a valid recipe: {error}", path=path) from None
    if unknown := [name for name in content if name not in Recipe.__struct_encode_fields__]:
        kind = "section" if isinstance(content[unknown[0]], dict) else "key"
        raise BadInput(f"not a valid recipe: {no_setting(unknown[0], Recipe, kind)}", path=path)
    return content


def load_recipe(
    path: Path | str, *, data: Path | None = None, given: dict[str, dict[str, Any]] | None = None
) -> Recipe:
    """A whole recipe; `given` has settings by section, which override the file's.

    Expansions alone make no pairs where the file has none: that takes a dataset. Settings of samples are left
    out where the recipe makes none.

    Raises:
        NotFound, BadInput: there is none, or it doesn't fit.
    """
    content = read_recipe(path, data=data)
    for section, settings in (given or {}).items():
        if section not in ("pairs", "samples") or section in content or "dataset" in settings:
            content[section] = content.get(section, {}) | settings
    try:
        return msgspec.convert(content, Recipe)
    except msgspec.ValidationError as error:
        where, what = misfit(error, _struct_of)
        section = f"[{where}] " if where else ""
        if what.startswith("lacks"):
            notes = content.get("notes")
            hint = NAME_NOTES if notes is not None and not notes.get("folder") else NAME_YOURS
            if hint == NAME_YOURS and what == "lacks `model`":
                hint = NAME_WRITER
            raise BadInput(f"not complete: {section}{what}; {hint}", path=path) from None
        raise BadInput(f"not a valid recipe: {section}{what}", path=path) from None


def _struct_of(section: str) -> type | None:
    """The settings of a section, or a whole recipe's; of what stands deeper, none."""
    if not section:
        return Recipe
    hint = get_type_hints(Recipe).get(section)
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, msgspec.Struct)), None)


@contextmanager
def _within(section: str) -> Iterator[None]:
    """Say in which section of the recipe the mistake is that is found meanwhile."""
    try:
        yield
    except QeEdgeError as error:
        place = section if section == "join" else f"[{section}]"
        error.args = (f"{place} of the recipe: {error}",)
        raise


def _check_files(*paths: str) -> None:
    for path in paths:
        if not Path(path).is_file():
            raise NotFound(f"{path}: no such file")


def _check_training(config: TrainConfig) -> None:
    if config.eval_dataset:
        load_dataset(config.eval_dataset)
    if config.eval_join:
        Join.parse(config.eval_join)


def check(recipe: Recipe) -> None:
    """Look for everything that can be wrong with a recipe: before hours of work, not after them.

    Raises:
        QeEdgeError: something is.
    """
    needed = {"trl": "train", "llama_cpp": "llama", "gguf": "llama", "altair": "report"}
    if "mlx" in recipe.export.formats:
        needed["mlx_lm"] = "mlx"
    for module, extra in needed.items():
        if find_spec(module) is None:
            require(module, extra)
    with _within("join"):
        if recipe.join:
            Join.parse(recipe.join)
    if recipe.notes and not Path(recipe.notes.folder).is_dir():
        raise NotFound(f"{recipe.notes.folder}: no such folder of notes")
    with _within("teach"):
        if recipe.teach:
            load_teacher_prompt(recipe.teach.prompt)
    with _within("samples"):
        for name in recipe.samples.datasets if recipe.samples else ():
            load_dataset(name)
    with _within("pairs"):
        pairs = recipe.pairs or PairsPart()
        if pairs.dataset:
            load_dataset(pairs.dataset)
        if pairs.join:
            Join.parse(pairs.join)
        Reward.parse(pairs.reward, pairs.length_penalty)
        _check_files(*pairs.expansions)
    with _within("sft"):
        resolve(recipe.sft.student)
        _check_training(recipe.sft)
        _check_files(*recipe.sft.expansions)
    with _within("dpo"):
        if recipe.dpo:
            _check_training(recipe.dpo)
    with _within("export"):
        check_choices(recipe.export)
    with _within("bench"):
        check_config(recipe.bench)
        readers = [str(local_file(reader)) for reader in recipe.bench.readers if reader != ITSELF]
        runs = [str(parse_run(text)[1]) for text in recipe.bench.runs]
        _check_files(*readers, *runs, *recipe.bench.teachers)
