"""PyTerrier: expansion from queries to queries, and feedback from results to queries.

from qe_edge.adapters.pyterrier import Feedback, QueryExpansion

pipeline = QueryExpansion(expander) >> bm25
pipeline = bm25 % 10 >> pt.text.get_text(index, "text") >> Feedback(expander) >> bm25
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pyterrier as pt

from qe_edge.adapters import check_expander
from qe_edge.runtime.expander import Expander
from qe_edge.runtime.expansion import ExpandedQuery

ToQuery = Callable[[ExpandedQuery], str]


def terrier(expanded: ExpandedQuery) -> str:
    """Weighted words in Terrier's own query language; its index stems them."""
    return " ".join(f"{word}^{weight:.4g}" for word, weight in expanded.words().items())


class QueryExpansion(pt.Transformer):
    """Q -> Q: `query` becomes the expanded one, and `query_0` what it was.

    Args:
        to_query: what an expansion becomes; for other engines, such as `ExpandedQuery.to_text`.
    """

    def __init__(self, expander: Expander, to_query: ToQuery = terrier):
        check_expander(expander)
        self.expander, self.to_query = expander, to_query

    def transform(self, queries: pd.DataFrame) -> pd.DataFrame:
        pt.validate.query_frame(queries, extra_columns=["query"])
        pushed = pt.model.push_queries(queries)
        expanded = self.expander.expand_many(queries["query"])
        return pushed.assign(query=[self.to_query(one) for one in expanded])


class Feedback(pt.Transformer):
    """R -> Q: queries expanded by what was found for them, whose texts are in the column `text`."""

    def __init__(self, expander: Expander, to_query: ToQuery = terrier):
        check_expander(expander)
        self.expander, self.to_query = expander, to_query

    def transform(self, found: pd.DataFrame) -> pd.DataFrame:
        pt.validate.result_frame(found, extra_columns=["query", "text"])
        by_query = found.sort_values("rank").groupby("qid", sort=False)
        queries = by_query.first().reset_index()[["qid", "query"]]
        expanded = [
            self.expander.feedback(query, list(by_query.get_group(qid)["text"]))
            for qid, query in zip(queries["qid"], queries["query"], strict=True)
        ]
        return pt.model.push_queries(queries).assign(query=[self.to_query(one) for one in expanded])
