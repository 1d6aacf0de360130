"""What a benchmark measures, said once: recipes are read into it, flags are made of it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from qe_edge.records import ANALYZER, RETRIEVER, Count, Threads
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

    Several `joins` make several rows of one generation. The best of the teachers is what retention refers to.
    `tune_on` names another data set, on whose queries each model's join is chosen among `tune_joins`.
    What a model reads has a join of its own (`Expander.feedback`).
    """

    datasets: Annotated[
        tuple[str, ...],
        Meta(
            description="NAME or NAME@SPLIT; repeat for several.", extra={"flag": "--dataset", "short": "-d"}
        ),
    ]
    models: Annotated[
        tuple[str, ...],
        Meta(
            description="MODEL or LABEL=MODEL; repeat for several (default: the newest export).",
            extra={"flag": "--model", "short": "-m"},
        ),
    ] = ()
    joins: Annotated[
        tuple[str, ...],
        Meta(
            description="Instead of the models' own join; several make several rows.",
            extra={"flag": "--join"},
        ),
    ] = ()
    tune_on: Annotated[
        str, Meta(description="Choose each model's join on this data set's queries instead.")
    ] = ""
    tune_joins: Annotated[tuple[str, ...], Meta(description="What is chosen from.", extra={"flag": ""})] = (
        TUNE_JOINS
    )
    measures: Annotated[
        tuple[str, ...],
        Meta(
            description="Another measure of ir_measures, such as R@100; repeat for more.",
            extra={"flag": "--measure"},
        ),
    ] = ()
    teachers: Annotated[
        tuple[str, ...],
        Meta(description="Teacher expansions of these queries (JSON Lines).", extra={"flag": "--teacher"}),
    ] = ()
    teacher_models: Annotated[
        tuple[str, ...],
        Meta(description="Take only this teacher's rows.", extra={"flag": "--teacher-model"}),
    ] = ()
    teacher_join: Annotated[str, Meta(description="How a teacher's texts are joined.")] = str(TEACHER_JOIN)
    threads: Annotated[Threads | None, Meta(description="CPU threads (default: all cores).")] = None
    max_tokens: Annotated[Count | None, Meta(description="Instead of the models' own token budget.")] = None
    feedback: Annotated[bool, Meta(description="Also have each model read what the plain query finds.")] = (
        False
    )
    passages: Annotated[
        Passages | None,
        Meta(description="That feedback reads for each query (default: the model's own number)."),
    ] = None
    analyzer: Annotated[str, Meta(description=ANALYZER)] = ""
    retriever: Annotated[str, Meta(description=RETRIEVER)] = ""
    label: Annotated[
        str, Meta(description="What to call this machine in reports.", extra={"flag": "--hardware-label"})
    ] = ""

    def __post_init__(self) -> None:
        if self.passages and not self.feedback:
            raise ValueError("passages are read with feedback only")
