"""A recipe: the whole way from teacher expansions to a benchmarked student, in one TOML file.

    pairs ─────────────┐
    expansions → SFT → DPO → merge → export → bench → report

Without pairs there is no DPO. Run again after an interruption, finished stages are skipped and the
interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable
from functools import partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from qe_edge.bench.bench import bench
from qe_edge.bench.config import BenchConfig
from qe_edge.bench.result import read_result
from qe_edge.console import note
from qe_edge.errors import BadInput, NotFound, require
from qe_edge.export.config import ExportConfig
from qe_edge.export.export import check_choices, export_model
from qe_edge.retrieval.datasets import builtin_folder, load_dataset
from qe_edge.student.join import DEFAULT_JOIN, Join
from qe_edge.student.models import resolve
from qe_edge.train.config import DpoConfig, PairsConfig, SftConfig, TrainConfig
from qe_edge.train.dpo import dpo
from qe_edge.train.merge import merge
from qe_edge.train.pairs import PAIRS, pairs
from qe_edge.train.sft import sft
from qe_edge.work.files import read_json, sha256, write_json
from qe_edge.work.folder import Workdir

STATE = "recipe.json"
T = TypeVar("T", bound=TrainConfig)


class PairsPart(PairsConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where preference pairs come from: judged queries and their candidate expansions."""

    dataset: str
    expansions: tuple[str, ...]


class SftPart(SftConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the student learns to write."""

    expansions: tuple[str, ...]


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A recipe file. In its paths `{data}` stands for --data and `{builtin}` for the shipped collections."""

    title: str
    join: str = ""
    pairs: PairsPart | None = None
    sft: SftPart
    dpo: DpoConfig | None = None
    export: ExportConfig = ExportConfig()
    bench: BenchConfig

    def __post_init__(self) -> None:
        if self.dpo and not self.pairs:
            raise ValueError("DPO needs a [pairs] section with a dataset and expansions")


def read_recipe(path: Path | str, *, data: Path | None = None) -> dict[str, Any]:
    """A recipe file, or the one of that name that ships with the package, as it is written.

    Raises:
        NotFound, BadInput: there is none, or it is no TOML; `{data}` is used and no folder was given.
    """
    file = Path(path)
    if not file.is_file():
        shipped = resources.files("qe_edge") / "recipes"
        file = Path(str(shipped / f"{path}.toml"))
        if not file.is_file():
            names = sorted(entry.name.removesuffix(".toml") for entry in shipped.iterdir())
            raise NotFound(
                f"no recipe {path}: neither a file nor one that ships, which are {', '.join(names)}"
            )
    try:
        text = file.read_text(encoding="utf-8-sig").replace("{builtin}", builtin_folder("").as_posix())
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 text: {error}", path=path) from None
    if "{data}" in text:
        if data is None:
            raise BadInput("uses {data}; name that folder with --data", path=path)
        text = text.replace("{data}", data.as_posix())
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"not a valid recipe: {error}", path=path) from None


def load_recipe(
    path: Path | str, *, data: Path | None = None, given: dict[str, dict[str, Any]] | None = None
) -> Recipe:
    """A whole recipe; `given` has settings by section, which override the file's.

    Expansions alone make no pairs where the file has none: that takes a dataset.

    Raises:
        NotFound, BadInput: there is none, or it doesn't fit.
    """
    content = read_recipe(path, data=data)
    for section, settings in (given or {}).items():
        if section != "pairs" or "pairs" in content or "dataset" in settings:
            content[section] = content.get(section, {}) | settings
    try:
        return msgspec.convert(content, Recipe)
    except msgspec.ValidationError as error:
        hint = ""
        if "missing required field" in str(error):
            hint = "; name your data with --dataset, --expansions and --test, or write it into the recipe"
        raise BadInput(f"not a valid recipe: {error}{hint}", path=path) from None


def run_recipe(recipe: Recipe, *, workdir: Workdir) -> dict[str, Path]:
    """Run every stage that is not done yet; returns each stage's output folder.

    Everything that can be wrong with a recipe is looked for before the first stage.
    """
    _check(recipe)
    join = Join.parse(recipe.join or (recipe.pairs.join if recipe.pairs else str(DEFAULT_JOIN)))
    stages = _Stages(workdir, join)
    note(f"recipe: {recipe.title}")
    trainings = [recipe.sft, recipe.dpo or DpoConfig()]
    for name in {training.eval_dataset for training in trainings} & set(recipe.bench.datasets):
        note(f"{name} chooses the checkpoint that is kept, so the student's figure on it is no test")
    if recipe.pairs:
        stages.pairs(recipe.pairs)
    stages.sft(recipe.sft)
    exports = {"sft": recipe.export}
    if recipe.pairs:
        stages.dpo(recipe.dpo or DpoConfig())
        # SFT alone is then exported for comparison only, so one small file is enough.
        alone = ExportConfig(kinds=recipe.export.kinds[:1], formats=("gguf",))
        exports = {"sft": alone, "dpo": recipe.export}
    for trained, config in exports.items():
        stages.export(trained, config)
    stages.bench(recipe.bench, untrained=recipe.sft.student, exported=list(exports))
    return stages.out


def _check(recipe: Recipe) -> None:
    """Fail before hours of work, not after them."""
    needed = {"trl": "train", "llama_cpp": "llama", "gguf": "llama", "altair": "report"}
    if "mlx" in recipe.export.formats:
        needed["mlx_lm"] = "mlx"
    for module, extra in needed.items():
        if find_spec(module) is None:
            require(module, extra)
    check_choices(recipe.export)
    resolve(recipe.sft.student)
    for name in ([recipe.pairs.dataset] if recipe.pairs else []) + list(recipe.bench.datasets):
        load_dataset(name)
    expansions = recipe.pairs.expansions if recipe.pairs else ()
    for path in (*expansions, *recipe.sft.expansions, *recipe.bench.teachers):
        if not Path(path).is_file():
            raise NotFound(f"{path}: no such file; the recipe names it")


def _as(kind: Any, part: Any) -> Any:
    """The part of a section that is the verb's own configuration."""
    return kind(**{name: getattr(part, name) for name in kind.__struct_fields__})


class _Stages:
    """Which stages are done, each under a key that covers its settings and the content of its inputs."""

    def __init__(self, workdir: Workdir, join: Join):
        self.workdir, self.join = workdir, join
        self.file = workdir.root / STATE
        self.out: dict[str, Path] = {}
        self.done: dict[str, str] = read_json(self.file) if self.file.is_file() else {}

    def pairs(self, part: PairsPart) -> None:
        inputs = [load_dataset(part.dataset).fingerprint(), *map(sha256, part.expansions)]
        config = _as(PairsConfig, part)
        make = partial(pairs, part.dataset, part.expansions, config, workdir=self.workdir)
        self.run("pairs", part, inputs, make)

    def sft(self, part: SftPart) -> None:
        part, student = self._with_join(part), resolve(part.student)
        inputs = [sha256(student.path) if student.path else student.name, *map(sha256, part.expansions)]
        make = partial(sft, part.expansions, _as(SftConfig, part), workdir=self.workdir)
        self.run("sft", part, inputs, make)

    def dpo(self, config: DpoConfig) -> None:
        config, pair_file, adapter = self._with_join(config), self.out["pairs"] / PAIRS, self.out["sft"]
        make = partial(dpo, pair_file, adapter, config, workdir=self.workdir)
        self.run("dpo", config, [sha256(pair_file), sha256(adapter)], make)

    def _with_join(self, config: T) -> T:
        if config.eval_dataset and not config.eval_join:
            return msgspec.structs.replace(config, eval_join=str(self.join))
        return config

    def export(self, trained: str, config: ExportConfig) -> None:
        adapter = self.out[trained]
        make = partial(merge, adapter, join=self.join, workdir=self.workdir)
        self.run(f"merge {trained}", self.join, [sha256(adapter)], make)
        model = self.out[f"merge {trained}"]

        def write() -> Path:
            out = self.workdir.new("export")
            export_model(model, out, config, progress=note)
            return out

        self.run(f"export {trained}", config, [sha256(model)], write)

    def bench(self, part: BenchConfig, *, untrained: str, exported: list[str]) -> None:
        models = [f"untrained={untrained}"]
        for trained in exported:
            for file in sorted(self.out[f"export {trained}"].glob("[!.]*.gguf")):
                label = {"sft": "SFT", "dpo": "SFT+DPO"}[trained]
                models.append(f"{label} {file.stem.removeprefix('student-')}={file}")
        joins = part.joins or (str(self.join),)
        config = msgspec.structs.replace(part, models=(*models, *part.models), joins=joins)
        inputs = [load_dataset(name).fingerprint() for name in part.datasets]
        inputs += [*map(sha256, part.teachers), *(sha256(self.out[f"export {name}"]) for name in exported)]
        key = self.run("bench", part, inputs, partial(bench, config, workdir=self.workdir))
        if read_result(self.out["bench"]).failures:  # so that the next run tries the failed models again
            del self.done[key]
            write_json(self.file, self.done)

    def run(self, stage: str, settings: Any, inputs: list[str], make: Callable[[], Path]) -> str:
        """Make the stage's output, unless the same was made before and is still there; returns its key."""
        content = msgspec.json.encode([stage, msgspec.to_builtins(settings), inputs])
        key = hashlib.sha256(content).hexdigest()
        before = self.done.get(key)
        if before and Path(before).exists():
            self.out[stage] = Path(before)
            note(f"{stage}: done before, in {before}")
            return key
        note(f"{stage}: started")
        self.out[stage] = make()
        self.done[key] = str(self.out[stage])
        write_json(self.file, self.done)
        return key
