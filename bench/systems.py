"""The systems that are compared on one data set: BM25, RM3, models and teachers, one after the other."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qe_edge.bench.baselines import EncoderSystem, digest_of, fused, label_of, parse_baseline
from qe_edge.bench.config import ITSELF, BenchConfig
from qe_edge.bench.generations import generate_once
from qe_edge.bench.inputs import Model
from qe_edge.bench.quality import DEPTH, MEASURE, compare_all, retrieve, values_of
from qe_edge.bench.result import DatasetResult, Kind, Speed, System, Tuning
from qe_edge.bench.speed import BUDGETS, Generated, ReadTask, Task, WrongLanguage
from qe_edge.console import note, several, shown, warn
from qe_edge.errors import QeEdgeError
from qe_edge.records import Expansion, read_jsonl
from qe_edge.retrieval.datasets import Dataset, describe
from qe_edge.retrieval.index import Index, Retriever
from qe_edge.retrieval.measures import Interval, depth, evaluate, mean_interval
from qe_edge.retrieval.opensearch import OpenSearchIndex
from qe_edge.retrieval.prf import found_texts, rm3
from qe_edge.retrieval.trec import Ranking, Run, write_qrels, write_run
from qe_edge.student.join import DEFAULT_JOIN, Join
from qe_edge.student.spec import ModelSpec
from qe_edge.work.files import sha256
from qe_edge.work.folder import Workdir

PARTIAL = 0.1  # a teacher that lacks a text for a larger share of the queries is no measure of others
OURS = {"BM25", "BM25 + RM3"}  # names of rows that are always there


class Systems:
    """One data set, its index, and the rows measured on it so far.

    Runs and generations are written below `folder`. What went wrong is in `warnings`, and models that could
    not be run are in `failures`.
    """

    def __init__(self, data: Dataset, config: BenchConfig, folder: Path, workdir: Workdir):
        self.data, self.config, self.folder = data, config, folder
        # Two collections may have the same name, and two labels the same slug: a hash tells them apart.
        self.slug = f"{_slug(str(data))}-{data.fingerprint()[:8]}"
        self.cache, self.indexes = workdir.root / "generations", workdir.root / "index"
        self.index: Retriever
        if config.retriever:
            self.index = OpenSearchIndex(config.retriever)
            self.info = describe(data, documents=self.index.documents)
        else:
            self.index = Index.for_dataset(data, self.indexes, analyzer=config.analyzer)
            self.info = describe(data, self.index.ids)
        self.systems: list[System] = []
        self.runs: dict[str, dict[str, Ranking]] = {}  # by the rows' names; of several joins, the last
        self.workdir = workdir
        self.warnings: list[str] = []
        self.failures: list[str] = []

    def measure(self, models: Sequence[Model], runs: Mapping[str, Run] | None = None) -> DatasetResult:
        """All rows: `runs` are other systems' rankings, by their label."""
        write_qrels(self.folder / "runs" / self.slug / "qrels.txt", self.data.qrels)
        plain = self.retrieve({}, DEFAULT_JOIN)
        self.add("BM25", "bm25", "", plain)
        if empty := sum(not ranking for ranking in plain.values()):
            self.warn(
                f"BM25 finds nothing at all for {several(empty, 'query', 'queries')} of {self.data}"
                + (f": does --analyzer {self.config.analyzer} fit them?" if self.config.analyzer else "")
            )
        if isinstance(self.index, Index):  # feedback needs the postings
            texts = found_texts(self.data, plain)
            self.add("BM25 + RM3", "feedback", "", rm3(self.data, self.index, plain, texts, self.depth))
        elif self.config.feedback or self.config.refine:
            self.warn(f"nothing was read on {self.data}: that needs our own index")
        for name, run in (runs or {}).items():
            self.add_run(name, run)
        for model in models:
            if seen := model.learnt.intersection(self.data.queries.values()):
                self.warn(
                    f"{model.label} was trained on {len(seen)} of the {len(self.data.queries)} queries of "
                    f"{self.data}, so that its figures say little of others"
                )
            try:
                rows = self.add_model(model, plain)
                if rows and isinstance(self.index, Index):
                    self.add_read(model, self.index, rows)
            except QeEdgeError as error:
                self.fail(model, error)
        for name, expansions in self.teachers():
            missing = len(self.data.queries) - len(expansions)
            if missing:
                lacking = several(missing, "query", "queries")
                warn(f"{name} has no expansion of {lacking} of {self.data}, searched without one")
            run = self.retrieve(expansions, Join.parse(self.config.teacher_join))
            more = {"failed": missing, "expansions": expansions}
            self.add(name, "teacher", self.config.teacher_join, run, **more)
        if isinstance(self.index, Index):
            self.add_baselines(self.index)
        # The best of the teacher's rows, the strictest one to be compared with; not one that wrote for some.
        teachers = [s for s in self.systems if s.kind == "teacher"]
        whole = [s for s in teachers if s.failed <= PARTIAL * len(self.data.queries)]
        teacher = max(whole or teachers, key=lambda s: s.ndcg.mean, default=None)
        return DatasetResult(
            info=self.info,
            fingerprint=self.data.fingerprint(),
            measure=MEASURE,
            queries=self.data.queries,
            teacher=teacher.name if teacher else None,
            systems=compare_all(self.systems, teacher),
            warnings=self.warnings,
        )

    def fail(self, model: Model, error: QeEdgeError) -> None:
        self.failures.append(f"{model.label} on {self.data}: {error}")
        note(f"bench: {self.failures[-1]}")

    def tune(self, models: Sequence[Model]) -> list[Tuning]:
        """Choose each model's join by its nDCG@10 here."""
        found = []
        for model in models:
            try:
                rows, *_ = self.generate(model.label, model)
            except QeEdgeError as error:
                self.fail(model, error)
                continue
            texts = {row.query_id: row.text for row in rows}
            curve = {}
            for join in self.config.tune_joins:
                run = retrieve(self.data, self.index, texts, Join.parse(join), depth=10)
                curve[join] = mean_interval(list(values_of(self.data, run).values()))
            chosen = max(curve, key=lambda join: curve[join].mean)
            note(f"bench: {model.label}: {chosen}, chosen on {self.data}")
            found.append(Tuning(model.label, str(self.data), curve, chosen))
        return found

    @property
    def depth(self) -> int:
        return max(DEPTH, depth(self.config.measures)) if self.config.measures else DEPTH

    def warn(self, message: str) -> None:
        """Tell it at once, and in the result."""
        warn(message)
        self.warnings.append(message)

    def retrieve(self, expansions: dict[str, str], join: Join) -> dict[str, Ranking]:
        return retrieve(self.data, self.index, expansions, join, depth=self.depth)

    def add(self, name: str, kind: Kind, join: str, run: dict[str, Ranking], **more: Any) -> None:
        """Write the run and add its row; `more` goes to `System`."""
        file = f"{_slug(f'{name} {join}')}-{_hash(name + join)}.trec"
        write_run(self.folder / "runs" / self.slug / file, run, _slug(name))
        self.runs[name] = run
        values = values_of(self.data, run)
        wanted = self.config.measures
        others = evaluate(self.data.qrels, run, wanted) if wanted else {}
        self.systems.append(
            System(
                name=name,
                kind=kind,
                join=join,
                ndcg=mean_interval(list(values.values())),
                per_query=values,
                measures={measure: mean_interval(list(v.values())) for measure, v in others.items()},
                **more,
            )
        )

    def add_run(self, name: str, run: Run) -> None:
        """A row for another system's run; queries that it lacks count as nothing found."""
        known = {query_id: list(run.get(query_id, [])) for query_id in self.data.queries}
        missing = sum(not ranking for ranking in known.values())
        if missing == len(known):
            self.warn(f"{name} holds no query of {self.data}")
            return
        if missing:
            lacking = several(missing, "query", "queries")
            self.warn(f"{name} lacks {lacking} of {self.data}, counted as nothing found")
        if isinstance(self.index, Index):
            found = {doc_id for ranking in known.values() for doc_id, _ in ranking}
            if unknown := len(found.difference(self.index.ids)):
                self.warn(
                    f"{name}: {unknown:,} of its {several(len(found), 'document')} are not in {self.data}"
                )
        self.add(name, "run", "", known)

    def add_baselines(self, index: Index) -> None:
        """Rows for encoders, alone and with the texts of what writes."""
        texts = {
            system.name: system.expansions
            for system in self.systems
            if system.expansions and " + " not in system.name
        }
        asked = [parse_baseline(text) for text in self.config.baselines]
        for model in dict.fromkeys(baseline.model for baseline in asked):
            kinds = {baseline.kind: baseline.name for baseline in asked if baseline.model == model}
            kept = self.workdir.root / "vectors"
            ours = EncoderSystem(model, self.data, index.ids, kept, self.config.threads)
            if lost := ours.unknown():
                self.warn(
                    f"{label_of(model)} has no tokens for {several(lost, 'query', 'queries')} of {self.data}"
                )
            more: dict[str, Any] = {"sha256": digest_of(model)}
            if name := kinds.get("rerank"):
                run, speed = ours.rerank(self.runs["BM25"])
                self.add(name, "run", "", run, speed=speed, **more)
            if kinds.keys() & {"dense", "hybrid"}:
                for label, expansions in {"": dict[str, str](), **texts}.items():
                    run, speed = ours.dense(expansions, self.depth)
                    more |= {"speed": speed, "encoding": ours.encoding}
                    above = f"{label} + " if label else ""
                    if name := kinds.get("dense"):
                        self.add(above + name, "run", "", run, **more)
                    if name := kinds.get("hybrid"):
                        both = fused(self.runs[label or "BM25"], run, self.depth)
                        self.add(above + name, "run", "", both, **more)
            if ours.encoding:
                note(f"bench: {label_of(model)}: {self.data} was encoded in {ours.encoding.seconds:.0f} s")
            ours.close()

    def generate(
        self, label: str, model: Model, read: ReadTask | None = None
    ) -> tuple[list[Generated], Speed, ModelSpec]:
        task = Task(
            model=model.name,
            lang=self.info.lang,
            queries=self.data.queries,
            out=str(self.folder / "generated" / self.slug / f"{_slug(label)}-{_hash(label)}.jsonl"),
            label=f"{label} on {self.data}",
            threads=self.config.threads,
            budget_tokens=self.config.budget_tokens,
            read=read,
        )
        also = [self.data.collection_hash()] if read else []
        if read and read.reader:
            also.append(sha256(Path(read.reader)))
        return generate_once(task, model.sha256, self.cache, also=also)

    def add_read(self, model: Model, index: Index, rows: Sequence[Generated]) -> None:
        """Rows for reading what the plain query finds, and what the written one finds, by each reader."""
        by_query = {row.query_id: row for row in rows}
        for asked, written in ((self.config.feedback, None), (self.config.refine, by_query)):
            for reader in self.config.readers if asked else ():
                self.add_reading(model, index, "" if reader == ITSELF else reader, written)

    def add_reading(
        self, model: Model, index: Index, reader: str, written: dict[str, Generated] | None
    ) -> None:
        """A row for reading what a search finds."""
        most = self.config.passages
        name = f"{model.label} + {'refine' if written else 'feedback'}" + (f" {most}" if most else "")
        name += f" by {shown(Path(reader).stem)}" if reader else ""
        read = ReadTask(
            dataset=self.data.source,
            indexes=str(self.indexes),
            analyzer=self.config.analyzer,
            written=written,
            reader=reader or None,
            passages=most,
        )
        rows, speed, spec = self.generate(name, model, read)
        run = {}
        for row in rows:
            terms = row.terms or DEFAULT_JOIN(index.analyze(self.data.queries[row.query_id]), [])
            run[row.query_id] = index.search(terms, self.depth)
        expansions = {row.query_id: row.text for row in rows}
        more: dict[str, Any] = {"failed": sum(not row.read for row in rows), "expansions": expansions}
        join = f"{spec.join} + {spec.feedback.join}" if written else str(spec.feedback.join)
        self.add(name, "model", join, run, sha256=model.sha256, speed=speed, **more)
        note(f"bench: {name} on {self.data}: {speed.ms_per_query_p50:.0f} ms a query")

    def add_model(self, model: Model, plain: dict[str, Ranking]) -> Sequence[Generated]:
        """A row for each join and, where the student's gate holds something back, another one with it.

        Returns what it wrote; nothing in a language that it doesn't speak.
        """
        label = model.label
        try:
            rows, speed, spec = self.generate(label, model)
        except WrongLanguage as error:
            self.warn(f"{label} was not run on {self.data}: {error}")
            return []
        failed = sum(row.finish_reason == "failed" or not row.text for row in rows)
        expansions = {row.query_id: row.text for row in rows if row.text}
        more: dict[str, Any] = {"failed": failed, "speed": speed, "sha256": model.sha256}
        let_through = self.let_through(expansions, spec, plain)
        for join in [Join.parse(text) for text in model.joins] or [spec.join]:
            run = self.retrieve(expansions, join)
            budgets = self.by_budget(rows, join)
            self.add(label, "model", str(join), run, budgets=budgets, expansions=expansions, **more)
            if let_through != expansions:
                run = self.retrieve(let_through, join)
                self.add(f"{label} + gate", "model", str(join), run, expansions=let_through, **more)
        if speed.engine == "mlx" and sys.platform == "linux":
            self.warn(f"{label} ran on MLX's CPU build for Linux: its speed says nothing about MLX")
        cut = sum(row.finish_reason == "length" for row in rows)
        note(
            f"bench: {label} on {self.data}: {speed.decode_tokens_per_s:.0f} tokens/s, "
            f"{cut} of {len(rows)} expansions cut by the budget, {failed} failed"
        )
        return rows

    def let_through(
        self, expansions: dict[str, str], spec: ModelSpec, plain: dict[str, Ranking]
    ) -> dict[str, str]:
        """The expansions that an `Expander` would use, with the student's own gate."""
        kept = {}
        for query_id, text in expansions.items():
            query = self.data.queries[query_id]
            scores = [score for _, score in plain[query_id][:2]]
            held = spec.gate.before(query, scores, languages=spec.prompt.languages)
            if not (held or spec.gate.after(query, text)):
                kept[query_id] = text
        return kept

    def by_budget(self, rows: Sequence[Generated], join: Join) -> dict[int, Interval]:
        """nDCG@10 when each expansion ends after so many tokens; only budgets that cut one."""
        found = {}
        for budget in BUDGETS:
            if any(budget in row.cut for row in rows):
                texts = {row.query_id: row.at(budget) for row in rows}
                run = retrieve(self.data, self.index, texts, join, depth=10)
                found[budget] = mean_interval(list(values_of(self.data, run).values()))
        return found

    def teachers(self) -> Iterator[tuple[str, dict[str, str]]]:
        """(model and mode, each query's first expansion) of every teacher that knows these queries.

        Of one that was asked again with other settings, what it wrote last counts.
        """
        found: dict[str, dict[str, Expansion]] = {}
        again: Counter[str] = Counter()
        for path in self.config.teachers:
            for row in read_jsonl(path, Expansion):
                wanted = not self.config.teacher_models or row.model in self.config.teacher_models
                if wanted and is_of(row, self.data):
                    name = f"{row.model} {row.mode}"
                    before = found.setdefault(name, {}).setdefault(row.query_id, row)
                    if row is not before and row.sample is not None and row.sample == before.sample:
                        found[name][row.query_id] = row
                        again[name] += 1
        for name, rows in sorted(found.items(), key=lambda item: "few-shot" in item[0]):
            cut = sum(row.problem == "cut" for row in rows.values())
            if cut:
                self.warn(
                    f"{cut} of {len(rows)} texts of {name} on {self.data} were cut where `teach` ended them"
                )
            if again[name]:
                left = several(again[name], "earlier answer")
                self.warn(f"{name} was asked again about {self.data}; without {left}")
            # A cut answer still expands its query; any other that `teach` marked does not.
            kept = [row for row in rows.values() if row.text and row.problem in (None, "cut")]
            yield name, {row.query_id: row.text for row in kept}


def is_of(row: Expansion, data: Dataset) -> bool:
    """Whether a row expands a query of this data set; ids alone may be another set's."""
    return data.queries.get(row.query_id) == row.query


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.@-]+", "_", text).strip("_.") or "_"
