"""LlamaIndex: a query transform, for its `TransformQueryEngine` or to be called by itself.

from qe_edge.adapters.llama_index import QueryExpansion

engine = TransformQueryEngine(engine, query_transform=QueryExpansion(expander))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_index.core.indices.query.query_transform.base import BaseQueryTransform
from llama_index.core.schema import QueryBundle

from qe_edge.adapters import check_expander
from qe_edge.runtime.expander import Expander
from qe_edge.runtime.expansion import ExpandedQuery


class QueryExpansion(BaseQueryTransform):
    """Replaces the query's string; what is embedded stays the query as it was asked.

    `render` is how your retriever wants it; by default plain text, its words repeated by their weights.
    """

    def __init__(self, expander: Expander, render: Callable[[ExpandedQuery], str] = ExpandedQuery.to_text):
        check_expander(expander)
        self.expander, self.render = expander, render

    def _get_prompts(self) -> dict[str, Any]:
        """None that could be changed: the student's own is part of it."""
        return {}

    def _update_prompts(self, prompts_dict: dict[str, Any]) -> None:
        """As there are none, there is nothing to change."""

    def _run(self, query_bundle: QueryBundle, metadata: dict[str, Any]) -> QueryBundle:
        expanded = self.expander.expand(query_bundle.query_str)
        return QueryBundle(
            query_str=self.render(expanded),
            custom_embedding_strs=query_bundle.custom_embedding_strs or [query_bundle.query_str],
        )
