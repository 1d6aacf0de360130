"""Ask a teacher for candidate expansions: every one paid for once, whatever happens meanwhile."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qe_edge.records import Expansion
from qe_edge.retrieval.datasets import Dataset
from qe_edge.train.teach.config import TeachConfig
from qe_edge.train.teach.ledger import Ledger
from qe_edge.train.teach.plan import Candidates
from qe_edge.train.teach.session import Outcome, ask_all, check_done, open_local, open_teacher
from qe_edge.train.teach.teacher import Teacher
from qe_edge.work.files import MANIFEST, write_json
from qe_edge.work.runs import check_output, read_record, run_record

EXPANSIONS = "expansions.jsonl"


def teach(data: Dataset, config: TeachConfig, *, out: Path) -> Outcome:
    """Ask for every candidate that `out/expansions.jsonl` does not hold yet.

    When it could not get all, the outcome says so; the same call asks for the others.

    Raises:
        QeEdgeError: nothing could be got at all. What was answered in earlier sessions is kept.
    """
    check_output(out, "teach")
    # A wrong address or key is told before anything is written.
    teacher: Teacher | None = None
    own = None
    if config.endpoint:
        teacher = open_teacher(config, max_tokens=config.max_tokens)
    elif "student" in config.modes:
        teacher = student = open_local(config, max_tokens=config.max_tokens)
        own = student.prompt
    plan = Candidates(data, config, own)
    settings = {"dataset": str(data), **msgspec.to_builtins(config)}
    with Ledger(out / EXPANSIONS, Expansion, "teach", "candidates") as ledger:
        before, outcome = read_record(out), None
        record = run_record("teach", settings, {}, sessions=before.get("sessions", []), **at_hand(data))
        write_json(out / MANIFEST, record)
        try:
            outcome, error = ask_all(plan, ledger, config, teacher, max_tokens=config.max_tokens)
            record["sessions"].append(msgspec.to_builtins(outcome))
        finally:
            if before and not (outcome and outcome.asked):  # the texts there are as they were asked for
                record = before | {"sessions": record["sessions"]}
            write_json(out / MANIFEST, record)
    check_done(outcome, error)
    return outcome


def at_hand(data: Dataset) -> dict[str, str]:
    """Where a data set's folder is, for its record."""
    return {"folder": str(data.folder.resolve())} if data.folder else {}
