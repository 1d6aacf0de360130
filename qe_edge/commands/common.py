"""What the commands share: their common options, and how a result is printed."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import msgspec
import typer

from qe_edge.arguments import MOST_THREADS
from qe_edge.console import note, print_json, several, warn, warned
from qe_edge.errors import BadArgument, Interrupted, NotFound, PartlyDone
from qe_edge.redact import redact
from qe_edge.student.models import DEFAULT_STUDENT
from qe_edge.text import detect_language
from qe_edge.train.config import SPEAKS_BOTH
from qe_edge.work.files import size_of
from qe_edge.work.folder import DEFAULT_WORKDIR, Workdir

if TYPE_CHECKING:
    from qe_edge.retrieval.datasets import Dataset
    from qe_edge.runtime.expander import Expander
    from qe_edge.train.teach.session import Outcome


def _no_file(workdir: Path) -> Path:
    """Refuse before the work what can't become a work folder."""
    for path in (workdir, *workdir.absolute().parents):
        if path.is_file():
            raise BadArgument(f"--workdir {workdir}: {path} is a file; name a folder")
    return workdir


WorkdirOption = Annotated[
    Path,
    typer.Option(
        "--workdir",
        envvar="QE_EDGE_WORKDIR",
        help="Where outputs go and inputs are found.",
        callback=_no_file,
    ),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Output folder (default: a new one in the work folder).")
]
NamedOutOption = Annotated[
    Path | None, typer.Option("--out", help="Output folder (default: of its name, in the work folder).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A .gguf file, a model folder, hf:OWNER/NAME:Q4_K_M or builtin:NAME (default: newest export).",
    ),
]
IndexOption = Annotated[
    list[str] | None,
    typer.Option("--index", "-i", help="A data set to be searched: NAME=DATASET, or DATASET. Repeat it."),
]
ColumnsOption = Annotated[
    str,
    typer.Option(
        "--columns",
        help="Columns beside each --measure, such as ndcg,of-teacher,file; an unknown one lists all.",
    ),
]


def finite(value: float | None) -> float | None:
    """A number that a flag gave, but nan, which is within all bounds."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number that can be used")
    return value


ThreadsOption = Annotated[
    int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads (default: all cores).")
]
WORKDIR = Path(DEFAULT_WORKDIR)
PROGRAM = "qe-edge"


def named_columns(columns: str) -> list[str]:
    """The keys that --columns gave."""
    return [key.strip() for key in columns.split(",") if key.strip()]


def took(what: str, path: Path | str, which: str = "the newest") -> None:
    """Say which earlier output a command took because none was named."""
    note(f"{what}: {path} ({which}; name another to use that)")


def took_trained(what: str, folder: Path, shown: str = "") -> None:
    """As `took`, of what holds a student, with the data sets that it learnt from, where they are known."""
    from qe_edge.work.runs import learnt_by

    learnt = " + ".join(learnt_by(folder).get("learnt", []))
    took(what, shown or folder, f"the newest{learnt and f', which learnt from {learnt}'}")


def measured_on(made: Path) -> str:
    """What to measure a student on where nothing is named: a data set of which it learnt another part."""
    from qe_edge.export.lineage import taught_folders
    from qe_edge.work.files import near
    from qe_edge.work.runs import learnt_by

    learnt = [name.partition("@")[0] for name in learnt_by(made).get("learnt", [])]
    learnt += [str(near(folder)) for folder in taught_folders(made)]
    return next(filter(has_test_queries, learnt), "demo-en")


def has_test_queries(name: str) -> bool:
    """Whether a bare name, of a built-in data set or a folder, means test queries."""
    from qe_edge.retrieval.datasets import BUILTIN, splits

    return name in BUILTIN or "test" in splits(Path(name))


def student_for(lang: str) -> list[str]:
    """The flags of `train sft` for a language that its default student, which knows English, does not."""
    return [] if lang == "en" else ["--student", SPEAKS_BOTH]


def tell_split(named: str, data: Dataset) -> None:
    """A bare name means the test queries; of these, what is to be trained on is soon made by mistake."""
    from qe_edge.retrieval.datasets import split_name, splits

    if not split_name(named)[1] and data.folder and data.split != "train" and "train" in splits(data.folder):
        warn(f"{named}: its {data.split} queries; {named}@train has those to train on")


_BUILT_IN = f"a model, such as --model {DEFAULT_STUDENT}"


def one_that_knows(query: str) -> str:
    """What `--model` may name for a query; the built-in student knows English only."""
    lang = detect_language(query)
    return f"a model that knows {lang} with --model" if lang != "en" else _BUILT_IN


def chosen_model(model: str | None, workdir: Path, *, named: str = _BUILT_IN) -> str:
    """The model that is named, else the smallest of the newest export: the one meant for the device."""
    from qe_edge.bench.inputs import default_models

    if model is None:
        models = default_models(Workdir(workdir), named)
        model = min(models, key=lambda path: size_of(Path(path)))
        took_trained("model", Path(model).parent, model)
    return model


def knows(expander: Expander, query: str) -> bool:
    """Whether the student writes in the query's language."""
    return detect_language(query) in expander.spec.prompt.languages


def to_learn(query: str, workdir: Path) -> tuple[object, ...]:
    """The command by which another student learns a query's language, where `teach` collected texts in it."""
    lang = detect_language(query)
    if texts := Workdir(workdir).taught_in(lang):
        return ("qe-edge", "train", "sft", *student_for(lang), "--expansions", texts)
    return ()


def exports_language(workdir: Path, lang: str) -> bool:
    """Whether the newest export, which a command takes where no model is named, writes in a language."""
    from qe_edge.work.runs import read_record

    try:
        record = read_record(Workdir(workdir).newest("export"))
    except NotFound:
        return False
    return lang in record.get("languages", [lang])


def emit_asked(
    as_json: bool,
    command: str,
    text: str,
    outcome: Outcome,
    *,
    inputs: dict[str, Any],
    artifacts: dict[str, Any],
    metrics: dict[str, Any],
    following: Sequence[object],
) -> None:
    """The result of a session with a teacher; where answers are missing, it is partial and ends so."""
    bad = ", ".join(f"{count} {what}" for what, count in outcome.problems.items())
    tokens = outcome.prompt_tokens + outcome.completion_tokens
    text += (
        f"\nthis session: {several(outcome.asked, 'answer')}, {tokens:,} tokens"
        + (f", cost {outcome.cost:.4f}" if outcome.cost else "")
        + (f"; unusable: {bad}" if bad else "")
    )
    from qe_edge.train.teach.session import INTERRUPTED, SPENT

    missing, ended = [], PartlyDone.exit_code
    if outcome.done < outcome.candidates:
        why = f"stopped: {outcome.stopped}" if outcome.stopped else f"{outcome.failed} got no answer"
        if outcome.stopped == INTERRUPTED:
            why, ended = INTERRUPTED, Interrupted.exit_code
        larger = ", with a larger --max-tokens-total or --max-cost" if outcome.stopped == SPENT else ""
        missing.append(f"{why}. Run the same command again for the others{larger}")
    emit(
        as_json,
        command,
        text,
        inputs=inputs,
        artifacts=artifacts,
        metrics=msgspec.to_builtins(outcome) | metrics,
        status="partial" if missing else "ok",
        errors=missing,
        following=() if missing else following,
    )
    if missing:
        note(f"error: {missing[0]}")
        sys.exit(ended)  # not by Typer's Exit: 130 of that is a Ctrl-C which nobody told yet


def emit(
    as_json: bool,
    command: str,
    text: str,
    *,
    inputs: dict[str, Any] | None = None,
    artifacts: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    warnings: list[str] | None = None,
    errors: list[str] | None = None,
    status: str = "ok",
    following: Sequence[object] = (),
    following_to: TextIO | None = None,
) -> None:
    """The result on stdout: the text and the command `following` it, or with --json the envelope.

    Where the text is to be piped on, that command goes to another stream, `following_to`.
    """
    if as_json:
        envelope = {
            "schema_version": 1,
            "command": command,
            "status": status,
            "inputs": redact(inputs or {}),
            "artifacts": artifacts or {},
            "metrics": metrics or {},
            "warnings": redact(list(dict.fromkeys([*warned, *(warnings or [])]))),
            "errors": redact(errors or []),
        }
        print_json(envelope)
    else:
        print(text)
        tell_next(following, following_to)


def tell_next(following: Sequence[object], stream: TextIO | None = None) -> None:
    """The command to go on with, on stdout or another stream."""
    if following:
        print(f"next:   {command_line(following)}", file=stream, flush=True)


def last_words(text: str) -> tuple[str, ...]:
    """A text as the last words of a command; one like a flag needs a mark before it."""
    return ("--", text) if text.startswith("-") else (text,)


def command_line(words: Sequence[object]) -> str:
    """A command as it can be copied into a shell, one of ours in the work folder that this one was given.

    Where a shell wouldn't find us by our name, as in an environment that isn't activated, it has our path.
    """
    first, *others = map(str, words)
    if first == PROGRAM:
        asked = sys.argv[1:]
        given = [word.partition("=")[2] for word in asked if word.startswith("--workdir=")]
        given += [value for word, value in pairwise(asked) if word == "--workdir"]
        flags = others.index("--") if "--" in others else len(others)  # what is behind it is no flag
        others[flags:flags] = ["--workdir", given[-1]] if given else []
        if Path(sys.argv[0]).stem == PROGRAM and not shutil.which(PROGRAM):
            first = sys.argv[0]
    elif not shutil.which(first):  # Python
        first = sys.executable
    return shlex.join([first, *others])
