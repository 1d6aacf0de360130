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
from typing import Any

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
from qe_edge.train.config import DpoConfig, PairsConfig, SftConfig
from qe_edge.train.dpo import dpo
from qe_edge.train.merge import merge
from qe_edge.train.pairs import PAIRS, pairs
from qe_edge.train.sft import sft
from qe_edge.work.files import read_json, sha256, write_json
from qe_edge.work.folder import Workdir

STATE = "recipe.json"


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
    _check_installed(recipe)
    p, s, d, e, b = recipe.pairs, recipe.sft, recipe.dpo or DpoConfig(), recipe.export, recipe.bench
    join = Join.parse(recipe.join or (p.join if p else str(DEFAULT_JOIN)))
    check_choices(e)
    student = resolve(s.student)
    judged = load_dataset(p.dataset) if p else None
    benched = [load_dataset(name) for name in b.datasets]
    for path in (*(p.expansions if p else ()), *s.expansions, *b.teachers):
        if not Path(path).is_file():
            raise NotFound(f"{path}: no such file; the recipe names it")

    if s.eval_dataset and not s.eval_join:
        s = msgspec.structs.replace(s, eval_join=str(join))
    if d.eval_dataset and not d.eval_join:
        d = msgspec.structs.replace(d, eval_join=str(join))
    stages = _Stages(workdir)
    note(f"recipe: {recipe.title}")
    for name in {s.eval_dataset, d.eval_dataset} & set(b.datasets):
        note(f"{name} chooses the checkpoint that is kept, so the student's figure on it is no test")
    if p and judged:
        inputs = [judged.fingerprint(), *map(sha256, p.expansions)]
        make = partial(pairs, p.dataset, p.expansions, _as(PairsConfig, p), workdir=workdir)
        stages.run("pairs", p, inputs, make)
    inputs = [sha256(student.path) if student.path else student.name, *map(sha256, s.expansions)]
    stages.run("sft", s, inputs, lambda: sft(s.expansions, _as(SftConfig, s), workdir=workdir))
    exports = {"sft": e}
    if p:
        pair_file, adapter = stages.out["pairs"] / PAIRS, stages.out["sft"]
        inputs = [sha256(pair_file), sha256(adapter)]
        stages.run("dpo", d, inputs, lambda: dpo(pair_file, adapter, d, workdir=workdir))
        # SFT alone is then exported for comparison only, so one small file is enough.
        exports = {"sft": ExportConfig(kinds=e.kinds[:1], formats=("gguf",)), "dpo": e}
    for trained, part in exports.items():
        folder = stages.out[trained]
        made = partial(merge, folder, join=join, workdir=workdir)
        stages.run(f"merge {trained}", join, [sha256(folder)], made)
        model = stages.out[f"merge {trained}"]
        stages.run(f"export {trained}", part, [sha256(model)], partial(_export, model, part, workdir))
    files = [file for trained in exports for file in _ggufs(stages.out, trained)]
    models = (f"untrained={s.student}", *files, *b.models)
    config = msgspec.structs.replace(b, models=models, joins=b.joins or (str(join),))
    inputs = [*(data.fingerprint() for data in benched), *map(sha256, b.teachers)]
    inputs += [sha256(stages.out[f"export {trained}"]) for trained in exports]
    stages.run("bench", b, inputs, lambda: bench(config, workdir=workdir))
    if read_result(stages.out["bench"]).failures:
        stages.forget("bench")  # so that the next run tries the failed models again
    return stages.out


def _check_installed(recipe: Recipe) -> None:
    """Fail before hours of work, not after them."""
    needed = {"trl": "train", "llama_cpp": "llama", "gguf": "llama", "altair": "report"}
    if "mlx" in recipe.export.formats:
        needed["mlx_lm"] = "mlx"
    for module, extra in needed.items():
        if find_spec(module) is None:
            require(module, extra)


def _export(model: Path, config: ExportConfig, workdir: Workdir) -> Path:
    out = workdir.new("export")
    export_model(model, out, config, progress=note)
    return out


def _ggufs(out: dict[str, Path], trained: str) -> list[str]:
    label = {"sft": "SFT", "dpo": "SFT+DPO"}[trained]
    files = sorted(out[f"export {trained}"].glob("[!.]*.gguf"))
    return [f"{label} {file.stem.removeprefix('student-')}={file}" for file in files]


def _as(kind: Any, part: Any) -> Any:
    """The part of a section that is the verb's own configuration."""
    return kind(**{name: getattr(part, name) for name in kind.__struct_fields__})


class _Stages:
    """Which stages are done, each under a key that covers its settings and the content of its inputs."""

    def __init__(self, workdir: Workdir):
        self.file = workdir.root / STATE
        self.out: dict[str, Path] = {}
        self.keys: dict[str, str] = {}
        self.done: dict[str, str] = read_json(self.file) if self.file.is_file() else {}

    def run(self, stage: str, settings: Any, inputs: list[str], make: Callable[[], Path]) -> None:
        """Make the stage's output, unless the same was made before and is still there."""
        content = msgspec.json.encode([stage, msgspec.to_builtins(settings), inputs])
        key = self.keys[stage] = hashlib.sha256(content).hexdigest()
        before = self.done.get(key)
        if before and Path(before).exists():
            self.out[stage] = Path(before)
            note(f"{stage}: done before, in {before}")
            return
        note(f"{stage}: started")
        self.out[stage] = make()
        self.done[key] = str(self.out[stage])
        write_json(self.file, self.done)

    def forget(self, stage: str) -> None:
        """Have the next run make a stage again."""
        del self.done[self.keys[stage]]
        write_json(self.file, self.done)
