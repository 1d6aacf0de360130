"""What retrieval is given and gives, in TREC's terms: qrels, rankings and runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qe_edge.errors import BadInput
from qe_edge.lines import read_lines
from qe_edge.work.files import write_bytes

Ranking = list[tuple[str, float]]
"""(document id, score), best first; equal scores in the collection's order."""
Qrels = dict[str, dict[str, int]]
"""query id -> document id -> grade."""
Run = Mapping[str, Ranking]
"""query id -> ranking."""


def write_qrels(path: Path | str, qrels: Qrels) -> None:
    """Write judgments as TREC has them: `qid 0 docid grade`."""
    lines = [
        f"{query_id} 0 {doc_id} {grade}\n"
        for query_id, grades in qrels.items()
        for doc_id, grade in grades.items()
    ]
    write_bytes(path, "".join(lines).encode())


def read_run(path: Path | str) -> dict[str, Ranking]:
    """Read a TREC run file, each query's documents by score as trec_eval orders them: of equal scores, the
    later name first.

    Raises:
        BadInput: a line is not `qid Q0 docid rank score tag`, or names a document twice.
    """
    found: dict[str, dict[str, float]] = {}
    for number, line in read_lines(path):
        try:
            query_id, _, doc_id, _, score, _ = line.split()
            value = float(score)
            if not math.isfinite(value):
                raise ValueError(score)
        except ValueError:
            raise BadInput(
                "not a line of a TREC run: qid Q0 docid rank score tag", path=path, line=number
            ) from None
        ranking = found.setdefault(query_id, {})
        if doc_id in ranking:
            raise BadInput(f"has document {doc_id} twice for query {query_id}", path=path, line=number)
        ranking[doc_id] = value
    return {
        query_id: sorted(ranking.items(), key=lambda item: (item[1], item[0]), reverse=True)
        for query_id, ranking in found.items()
    }


def write_run(path: Path | str, run: Run, tag: str) -> None:
    """Write a TREC run file: `qid Q0 docid rank score tag`.

    Scores decrease strictly as float32, which trec_eval holds them in, so that every tool sees this order.
    """
    lines = []
    for query_id, ranking in run.items():
        previous = np.float32(np.inf)
        for rank, (doc_id, exact) in enumerate(ranking, 1):
            score = min(np.float32(exact), np.nextafter(previous, np.float32(-np.inf)))
            lines.append(f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n")
            previous = score
    write_bytes(path, "".join(lines).encode())
