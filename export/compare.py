"""What an export's precision costs where it counts: nDCG@10 before and after, query by query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from qe_edge.console import progress
from qe_edge.errors import BadArgument
from qe_edge.retrieval.datasets import Dataset, load_dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.measures import mean, mean_interval, per_query
from qe_edge.runtime.expander import Expander
from qe_edge.student.gate import OPEN
from qe_edge.student.models import Engine
from qe_edge.student.spec import read_spec
from qe_edge.work.folder import Workdir


def check_language(source: Path, data: Dataset) -> None:
    """Refuse queries in a language that a student doesn't know.

    Raises:
        BadArgument: they are.
    """
    spec = read_spec(source)
    if spec and data.lang not in spec.prompt.languages:
        known = ", ".join(spec.prompt.languages)
        raise BadArgument(
            f"{source} knows {known} only, and {data} is in {data.lang}; name another --dataset"
        )


def compare_retrieval(exported: Path, source: Path, dataset: str, *, workdir: Workdir) -> dict[str, Any]:
    """Expand the queries of a data set with an export and with its source, by transformers in its precision.

    Returns:
        `dataset`, `queries` (how many), `before` and `after` (mean nDCG@10 of source and export) and
        `difference` (after - before: `mean`, and `low` and `high` of its paired 95 % bootstrap interval).
    """
    data = load_dataset(dataset)
    index = Index.for_dataset(data, workdir.root / "index")
    before = _ndcg(source, "transformers", data, index)
    after = _ndcg(exported, None, data, index)
    difference = mean_interval([after[query_id] - before[query_id] for query_id in before])
    return {
        "dataset": str(data),
        "queries": len(before),
        "before": round(mean(before), 4),
        "after": round(mean(after), 4),
        "difference": msgspec.to_builtins(difference),
    }


def _ndcg(model: Path, engine: Engine | None, data: Dataset, index: Index) -> dict[str, float]:
    with (
        Expander.load(model, engine=engine, gate=OPEN) as expander,
        progress(f"expanding with {model}", len(data.queries)) as advance,
    ):
        run = {}
        for query_id, query in data.queries.items():
            expanded = expander.expand(query)
            run[query_id] = index.search_text(query, expanded.text, join=expanded.join)
            advance(1)
    return per_query(data.qrels, run)
