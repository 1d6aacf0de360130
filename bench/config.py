"""What a benchmark measures, said once: recipes are read into it, flags are made of it."""

from __future__ import annotations

from typing import Annotated

import msgspec

from qe_edge.records import ANALYZER, RETRIEVER, Count, Threads, said
from qe_edge.student.feedback import Passages
from qe_edge.student.join import TEACHER_JOIN

ITSELF = "itself"
TUNE_JOINS = (
    "mass:0.3",
    "mass:0.5",
    "mass:0.7",
    "mass:1",
    "mass:1.5",
    "mass:2",
    "mass:3",
    "repeat:5",
    "repeat:12",
)


class BenchConfig(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={
        "datasets": "dataset",
        "models": "model",
        "joins": "join",
        "measures": "measure",
        "teachers": "teacher",
        "teacher_models": "teacher_model",
        "runs": "run",
        "baselines": "baseline",
        "readers": "reader",
    },
):
    """What to measure.

    Several `joins` make several rows of one generation. The best of the teachers is what retention refers to.
    `tune_on` names another data set, on whose queries each model's join is chosen among `tune_joins`.
    What is read has a join of its own (`Expander.feedback`, `Expander.refine`).
    """

    datasets: Annotated[tuple[str, ...], said("NAME or NAME@SPLIT; repeat for several.", short="-d")]
    models: Annotated[
        tuple[str, ...],
        said(
            "MODEL or LABEL=MODEL; repeat for several (default: the newest export; none: BM25 alone).",
            short="-m",
        ),
    ] = ()
    joins: Annotated[
        tuple[str, ...], said("A join in place of each model's own; several make a row each.")
    ] = ()
    tune_on: Annotated[str, said("Choose each model's join on this data set's queries instead.")] = ""
    tune_joins: Annotated[tuple[str, ...], said("The joins that are tried.", flag="")] = TUNE_JOINS
    max_queries: Annotated[
        Count | None, said("Only so many of each data set's queries, drawn at random.")
    ] = None
    measures: Annotated[
        tuple[str, ...],
        said("Another measure of ir_measures, such as R@100; repeat for more."),
    ] = ()
    teachers: Annotated[tuple[str, ...], said("Teacher expansions of these queries (JSON Lines).")] = ()
    teacher_models: Annotated[tuple[str, ...], said("Take only this teacher's rows.")] = ()
    teacher_join: Annotated[str, said("How a teacher's texts are joined.")] = str(TEACHER_JOIN)
    runs: Annotated[
        tuple[str, ...],
        said("Another system's TREC run, for a row: FILE or LABEL=FILE; repeat for more."),
    ] = ()
    baselines: Annotated[
        tuple[str, ...],
        said(
            "A ranker without a student: dense:MODEL (all documents), rerank:MODEL (BM25's first fifty, by a "
            "cross-encoder too) or hybrid:MODEL (dense beside BM25); a GGUF, a folder or a hub id.",
        ),
    ] = ()
    threads: Annotated[Threads | None, said("CPU threads (default: the cores that are free).")] = None
    budget_tokens: Annotated[Count | None, said("A token budget in place of each model's own.")] = None
    feedback: Annotated[bool, said("Add a row per model: it reads what the plain query finds.")] = False
    refine: Annotated[bool, said("Add a row per model: write, search, read, search.")] = False
    passages: Annotated[
        Passages | None, said("Found passages to read (default: the model's own number).")
    ] = None
    readers: Annotated[
        tuple[str, ...],
        said(
            f"An encoder's GGUF that reads them, or {ITSELF} (the default) for the model; repeat for more.",
        ),
    ] = (ITSELF,)
    analyzer: Annotated[str, said(ANALYZER)] = ""
    retriever: Annotated[str, said(RETRIEVER)] = ""
    hardware_label: Annotated[str, said("What to call this machine in reports.")] = ""

    def __post_init__(self) -> None:
        if self.baselines and self.retriever:
            raise ValueError("baselines need our own index")
        if (self.passages or self.readers != (ITSELF,)) and not (self.feedback or self.refine):
            raise ValueError("passages are read with feedback or refine only")
