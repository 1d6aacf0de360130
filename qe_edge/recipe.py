"""A recipe: the whole way from teacher expansions to a benchmarked student, in one TOML file.

    pairs ─────────────┐
    expansions → SFT → DPO → merge → export → bench → report

Run again after an interruption, finished stages are skipped and the interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from qe_edge.bench.harness import BenchConfig, bench
from qe_edge.console import note
from qe_edge.datasets import builtin_folder
from qe_edge.errors import BadInput, NotFound, require
from qe_edge.export import export_model
from qe_edge.join import Join
from qe_edge.manifest import sha256, write_json
from qe_edge.train.dpo import DpoConfig, dpo
from qe_edge.train.merge import merge
from qe_edge.train.pairs import PAIRS, PairsConfig, pairs
from qe_edge.train.sft import SftConfig, sft
from qe_edge.workdir import Workdir

STATE = "recipe.json"


class PairsPart(PairsConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where preference pairs come from: judged queries and their candidate expansions."""

    dataset: str
    expansions: tuple[str, ...]


class SftPart(SftConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the student learns to write."""

    expansions: tuple[str, ...]


class ExportPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which files the student becomes."""

    kinds: tuple[str, ...] = ("Q4_K_M",)
    formats: tuple[str, ...] = ("gguf", "mlx")


class BenchPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is compared with BM25, the untrained student, SFT alone and the teachers: the exported files."""

    datasets: tuple[str, ...]
    teachers: tuple[str, ...] = ()
    teacher_models: tuple[str, ...] = ()


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A recipe file. In its paths `{data}` stands for --data and `{builtin}` for the shipped collections."""

    title: str
    join: str = ""
    pairs: PairsPart
    sft: SftPart
    dpo: DpoConfig = DpoConfig()
    export: ExportPart = ExportPart()
    bench: BenchPart


def load_recipe(path: Path | str, *, data: Path | None = None) -> Recipe:
    """Read a recipe file, or the one of that name that ships with the package.

    Raises:
        NotFound, BadInput: there is none, or it doesn't fit; `{data}` is used and no folder was given.
    """
    file = Path(path)
    if not file.is_file():
        shipped = resources.files("qe_edge") / "recipes" / f"{path}.toml"
        if not shipped.is_file():
            raise NotFound(f"no recipe {path}: neither a file nor a recipe that ships with qe-edge")
        file = Path(str(shipped))
    text = file.read_text(encoding="utf-8").replace("{builtin}", builtin_folder("").as_posix())
    if "{data}" in text:
        if data is None:
            raise BadInput("uses {data}; name that folder with --data", path=path)
        text = text.replace("{data}", data.as_posix())
    try:
        return msgspec.convert(tomllib.loads(text), Recipe)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise BadInput(f"not a valid recipe: {error}", path=path) from None


def run_recipe(recipe: Recipe, *, workdir: Workdir) -> dict[str, Path]:
    """Run every stage that is not done yet; returns each stage's output folder."""
    _check_installed(recipe)
    stages = _Stages(workdir)
    p, s = recipe.pairs, recipe.sft
    note(f"recipe: {recipe.title}")
    sft_files = [Path(path) for path in s.expansions]
    pair_files = [Path(path) for path in p.expansions]

    stages.run(
        "pairs", p, pair_files, lambda: pairs(p.dataset, pair_files, _as(PairsConfig, p), workdir=workdir)
    )
    stages.run("sft", s, sft_files, lambda: sft(sft_files, _as(SftConfig, s), workdir=workdir))
    adapter = stages.out["sft"]
    pair_file = stages.out["pairs"] / PAIRS
    stages.run(
        "dpo", recipe.dpo, [pair_file, adapter], lambda: dpo(pair_file, adapter, recipe.dpo, workdir=workdir)
    )
    join = Join.parse(recipe.join or p.join)
    for trained in ("sft", "dpo"):
        folder = stages.out[trained]
        stages.run(f"merge {trained}", join, [folder], partial(merge, folder, join=join, workdir=workdir))
    # SFT alone is exported for comparison only, so one small file is enough.
    sft_export = ExportPart(kinds=recipe.export.kinds[:1], formats=("gguf",))
    for trained, part in (("sft", sft_export), ("dpo", recipe.export)):
        folder = stages.out[f"merge {trained}"]
        stages.run(f"export {trained}", part, [folder], partial(_export, folder, part, workdir))
    config = BenchConfig(
        datasets=recipe.bench.datasets,
        models=(f"untrained={s.student}", *_ggufs(stages.out, "sft"), *_ggufs(stages.out, "dpo")),
        teachers=recipe.bench.teachers,
        teacher_models=recipe.bench.teacher_models,
    )
    stages.run("bench", config, [stages.out["export dpo"]], lambda: bench(config, workdir=workdir))
    return stages.out


def _check_installed(recipe: Recipe) -> None:
    """Fail before hours of work, not after them."""
    needed = {"trl": "train", "llama_cpp": "llama", "gguf": "llama", "altair": "report"}
    if "mlx" in recipe.export.formats:
        needed["mlx_lm"] = "mlx"
    for module, extra in needed.items():
        if find_spec(module) is None:
            require(module, extra)


def _export(model: Path, part: ExportPart, workdir: Workdir) -> Path:
    out = workdir.new("export")
    export_model(model, out, kinds=part.kinds, formats=part.formats, progress=note)
    return out


def _ggufs(out: dict[str, Path], trained: str) -> list[str]:
    label = {"sft": "SFT", "dpo": "SFT+DPO"}[trained]
    files = sorted(out[f"export {trained}"].glob("*.gguf"))
    return [f"{label} {file.stem.removeprefix('student-')}={file}" for file in files]


def _as(kind: Any, part: Any) -> Any:
    """The part of a section that is the verb's own configuration."""
    return kind(**{name: getattr(part, name) for name in kind.__struct_fields__})


class _Stages:
    """Which stages are done. A stage's key covers its settings and the content of its inputs."""

    def __init__(self, workdir: Workdir):
        self.file = workdir.root / STATE
        self.out: dict[str, Path] = {}
        self.done: dict[str, dict[str, str]] = (
            msgspec.json.decode(self.file.read_bytes()) if self.file.is_file() else {}
        )

    def run(self, stage: str, settings: Any, inputs: Sequence[Path], make: Callable[[], Path]) -> None:
        content = [msgspec.to_builtins(settings), [sha256(path) for path in inputs if path.exists()]]
        key = hashlib.sha256(msgspec.json.encode(content)).hexdigest()
        before = self.done.get(stage, {})
        if before.get("key") == key and Path(before["out"]).exists():
            self.out[stage] = Path(before["out"])
            note(f"{stage}: done before, in {before['out']}")
            return
        note(f"{stage}: started")
        self.out[stage] = make()
        self.done[stage] = {"key": key, "out": str(self.out[stage])}
        write_json(self.file, self.done)
