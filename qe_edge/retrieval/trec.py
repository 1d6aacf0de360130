"""What retrieval is given and gives, in TREC's terms: qrels, rankings and runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qe_edge.work.files import write_bytes

Ranking = list[tuple[str, float]]
"""(document id, score), best first; equal scores in the collection's order."""
Qrels = dict[str, dict[str, int]]
"""query id -> document id -> grade."""
Run = Mapping[str, Ranking]
"""query id -> ranking."""


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
