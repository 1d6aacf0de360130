"""What a benchmark measures."""

from __future__ import annotations

import msgspec

from qe_edge.records import Count, Threads
from qe_edge.student.feedback import Passages
from qe_edge.student.join import TEACHER_JOIN

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


class BenchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to measure.

    `models` are files, folders, hub ids or built-ins, each as `MODEL` or `LABEL=MODEL`. `joins` replaces
    the models' own join; several make several rows of one generation. `teachers` are expansion files, of
    which `teacher_models` selects (empty: all); the best of them is what retention refers to. `tune_on`
    names another data set, on whose queries each model's join is chosen among `tune_joins`. `measures` are
    ir_measures to report beside nDCG@10.
    `max_tokens` replaces the models' own token budget, `analyzer` the one of the collection's language.
    With `feedback` each model also gets a row for what it reads, by a join of its own (`Expander.feedback`);
    `passages` replaces its own number of them.
    `retriever` is the address of an OpenSearch index, which is searched instead of our own.
    `label` names the machine in reports.
    """

    datasets: tuple[str, ...]
    models: tuple[str, ...] = ()
    joins: tuple[str, ...] = ()
    tune_on: str = ""
    tune_joins: tuple[str, ...] = TUNE_JOINS
    measures: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    teacher_models: tuple[str, ...] = ()
    teacher_join: str = str(TEACHER_JOIN)
    threads: Threads | None = None
    max_tokens: Count | None = None
    feedback: bool = False
    passages: Passages | None = None
    analyzer: str = ""
    retriever: str = ""
    label: str = ""

    def __post_init__(self) -> None:
        if self.passages and not self.feedback:
            raise ValueError("passages are read with feedback only")
