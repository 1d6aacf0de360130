"""Run a recipe, stage by stage. Run again, finished stages are skipped and an interrupted one goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from qe_edge.bench.baselines import digest_of, parse_baseline
from qe_edge.bench.bench import bench
from qe_edge.bench.config import ITSELF, BenchConfig
from qe_edge.bench.inputs import parse_run
from qe_edge.bench.result import read_result
from qe_edge.console import note, several, warn
from qe_edge.documents.folder import make_collection
from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.export.config import ExportConfig
from qe_edge.export.export import export_model
from qe_edge.export.prune import fingerprint_of, prune
from qe_edge.recipe import PairsPart, Recipe, SamplesPart, SftPart, check
from qe_edge.retrieval.datasets import Dataset, load_dataset
from qe_edge.student.hub import local_file
from qe_edge.student.join import DEFAULT_JOIN, Join
from qe_edge.student.models import resolve
from qe_edge.student.spec import read_spec
from qe_edge.train.base_model import untrained
from qe_edge.train.config import DpoConfig, PairsConfig, SftConfig, TrainConfig
from qe_edge.train.dpo import dpo
from qe_edge.train.merge import merge
from qe_edge.train.pairs import BEST, PAIRS, REPORT, pairs
from qe_edge.train.sft import sft
from qe_edge.train.synthetic.queries import write_queries
from qe_edge.train.teach.config import TeachConfig
from qe_edge.train.teach.session import Outcome
from qe_edge.train.teach.teach import EXPANSIONS, teach
from qe_edge.work.files import read_json, sha256, write_bytes, write_json
from qe_edge.work.folder import Workdir

STATE = "recipe.json"
T = TypeVar("T", bound=TrainConfig)


def run_recipe(recipe: Recipe, *, workdir: Workdir) -> dict[str, Path]:
    """Run every stage that is not done yet; returns each stage's output folder.

    Raises:
        QeEdgeError: something is wrong with the recipe, found before the first stage, or a stage failed.
    """
    check(recipe)
    join = Join.parse(recipe.join or (recipe.pairs.join if recipe.pairs else str(DEFAULT_JOIN)))
    stages = _Stages(workdir, join)
    note(f"recipe: {recipe.title}")
    if recipe.notes:
        recipe = from_notes(recipe, workdir)
    trainings = [recipe.sft, recipe.dpo or DpoConfig()]
    for name in {training.eval_dataset for training in trainings} & set(recipe.bench.datasets):
        warn(f"{name} chooses the checkpoint that is kept, so the student's figure on it is no test")
    plain: str | Path = recipe.sft.student
    made, learnt = list[Path](), recipe.sft.expansions
    if recipe.samples:
        plain, folders = stages.samples(recipe.samples, recipe.sft, recipe.pairs or PairsPart())
        made = [folder / PAIRS for folder in folders]
        learnt = tuple(str(folder / BEST) for folder in folders)
    elif recipe.pairs:
        made = [stages.pairs("pairs", recipe.pairs) / PAIRS]
    stages.sft(replace(recipe.sft, expansions=learnt))
    exports = {"sft": recipe.export}
    if made:
        stages.dpo(recipe.dpo or DpoConfig(), made)
        # SFT alone is then exported for comparison only, so one small file is enough.
        alone = ExportConfig(kinds=recipe.export.kinds[:1], formats=("gguf",))
        exports = {"sft": alone, "dpo": recipe.export}
    for trained, config in exports.items():
        stages.export(trained, config)
    stages.bench(recipe.bench, untrained=str(plain), exported=list(exports))
    return stages.out


def from_notes(recipe: Recipe, workdir: Workdir) -> Recipe:
    """Have queries and expansions written; returns the recipe that goes on with them.

    All of it is taken up where it was left: what was answered is not asked for again.
    """
    assert recipe.notes and recipe.queries and recipe.teach
    notes = Path(recipe.notes.folder)
    folder = workdir.made_folder(notes)
    made = make_collection(notes, folder, words=recipe.notes.words)
    note(f"notes: {made.passages:,} passages of {made.files:,} files in {folder}")
    outcome, report = write_queries(folder, recipe.queries, workdir=workdir)
    _complete(outcome)
    assert report
    dropped = ", ".join(f"{count} {why}" for why, count in report.dropped.items())
    note(f"queries: {report.train} to train on, {report.test} to test on; synthetic, as their judgments are")
    if dropped:
        note(f"queries: dropped {dropped}")
    if not report.train or not report.test:
        raise BadInput("has too few queries; ask about more passages, with --passages", path=folder)
    written = {}
    for split in ("train", "test"):
        data = load_dataset(f"{folder}@{split}")
        out = workdir.teach_folder(str(data))
        _complete(teach(data, recipe.teach, out=out))
        written[split] = str(out / EXPANSIONS)
    learnt = (written["train"],)
    return replace(
        recipe,
        notes=None,
        queries=None,
        teach=None,
        pairs=replace(recipe.pairs or PairsPart(), dataset=f"{folder}@train", expansions=learnt),
        sft=replace(recipe.sft, expansions=learnt),
        bench=replace(recipe.bench, datasets=(f"{folder}@test",), teachers=(written["test"],)),
    )


def _complete(outcome: Outcome) -> None:
    """Raises QeEdgeError where answers are missing, or Ctrl-C was meant for all that follows."""
    if outcome.stopped or outcome.done < outcome.candidates:
        why = outcome.stopped or f"{outcome.failed} requests got no answer"
        raise QeEdgeError(f"{why}; run it again: it goes on")


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

    def samples(self, part: SamplesPart, student: SftPart, of: PairsPart) -> tuple[Path, list[Path]]:
        """The untrained student's file, and for each data set the pairs of what it writes."""
        base = untrained(student.student, self.workdir)
        spec = read_spec(base)
        assert spec
        quick = ExportConfig(kinds=("Q4_K_M",), formats=("gguf",), no_calibrate=True)
        self.run("export untrained", quick, [sha256(base)], partial(self._export, base, quick))
        (file,) = self.out["export untrained"].glob("[!.]*.gguf")
        config = TeachConfig(
            model=str(file),
            modes=("student",),
            n=part.n,
            temperature=part.temperature,
            max_tokens=student.budget_tokens or spec.prompt.max_tokens,
        )
        folders = []
        for name in part.datasets:
            data = load_dataset(name)
            # A folder for each student and setting: what another one wrote is not its own.
            made_by = msgspec.json.encode([msgspec.to_builtins(config), sha256(file), data.fingerprint()])
            mark = hashlib.sha256(made_by).hexdigest()[:8]
            out = self.workdir.root / "samples" / f"{str(data).replace('/', '-')}-{mark}"
            make = partial(self._sample, data, config, out)
            self.run(f"samples {data}", config, [data.fingerprint(), sha256(file)], make)
            part_of_it = replace(of, dataset=name, expansions=(str(out / EXPANSIONS),))
            folders.append(self.pairs(f"pairs {data}", part_of_it))
        return file, folders

    @staticmethod
    def _sample(data: Dataset, config: TeachConfig, out: Path) -> Path:
        _complete(teach(data, config, out=out))
        return out

    def pairs(self, stage: str, part: PairsPart) -> Path:
        inputs = [load_dataset(part.dataset).fingerprint(), *map(sha256, part.expansions)]
        config = _as(PairsConfig, part)
        make = partial(pairs, part.dataset, part.expansions, config, workdir=self.workdir)
        self.run(stage, part, inputs, make)
        report = read_json(self.out[stage] / REPORT)
        found, queries = several(report["pairs"], "pair"), report["queries_with_pairs"]
        note(f"{stage}: {found} of {several(queries, 'query', 'queries')}")
        return self.out[stage]

    def sft(self, part: SftPart) -> None:
        part, student = self._with_join(part), resolve(part.student)
        inputs = [sha256(student.path) if student.path else student.name, *map(sha256, part.expansions)]
        make = partial(sft, part.expansions, _as(SftConfig, part), workdir=self.workdir)
        self.run("sft", part, inputs, make)

    def dpo(self, config: DpoConfig, made: list[Path]) -> None:
        config, file, adapter = self._with_join(config), made[0], self.out["sft"]
        if len(made) > 1:
            file = self.workdir.root / "samples" / PAIRS
            write_bytes(file, b"".join(part.read_bytes() for part in made))
        make = partial(dpo, file, adapter, config, workdir=self.workdir)
        self.run("dpo", config, [sha256(file), sha256(adapter)], make)

    def _with_join(self, config: T) -> T:
        if config.eval_dataset and not config.eval_join:
            return replace(config, eval_join=str(self.join))
        return config

    def export(self, trained: str, config: ExportConfig) -> None:
        adapter = self.out[trained]
        make = partial(merge, adapter, join=self.join, workdir=self.workdir)
        self.run(f"merge {trained}", self.join, [sha256(adapter)], make)
        model = self.out[f"merge {trained}"]
        inputs = [sha256(model), *map(fingerprint_of, config.vocab_of)]
        self.run(f"export {trained}", config, inputs, partial(self._export, model, config))

    def _export(self, model: Path, config: ExportConfig) -> Path:
        if config.prune_vocab:
            model = prune(model, config, workdir=self.workdir)
        out = self.workdir.new("export")
        export_model(model, out, config, progress=note)
        return out

    def bench(self, part: BenchConfig, *, untrained: str, exported: list[str]) -> None:
        models = [f"untrained={untrained}"]
        for trained in exported:
            for file in sorted(self.out[f"export {trained}"].glob("[!.]*.gguf")):
                label = {"sft": "SFT", "dpo": "SFT+DPO"}[trained]
                models.append(f"{label} {file.stem.removeprefix('student-')}={file}")
        joins = part.joins or (str(self.join),)
        config = replace(part, models=(*models, *part.models), joins=joins)
        inputs = [load_dataset(name).fingerprint() for name in part.datasets]
        files: list[str | Path] = [
            *part.teachers,
            *(local_file(reader) for reader in part.readers if reader != ITSELF),
        ]
        files += [parse_run(text)[1] for text in part.runs]
        inputs += [digest_of(parse_baseline(text).model) for text in part.baselines]
        inputs += [*map(sha256, files), *(sha256(self.out[f"export {name}"]) for name in exported)]
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
        try:
            self.out[stage] = make()
        except KeyboardInterrupt:
            note(f"{stage}: interrupted; run it again: finished stages are kept, and this one goes on")
            raise
        self.done[key] = str(self.out[stage])
        write_json(self.file, self.done)
        return key
