"""LangChain: a runnable from query to query, to stand before any retriever.

from qe_edge.adapters.langchain import query_expansion

retriever = query_expansion(expander) | BM25Retriever.from_documents(documents)
"""

from __future__ import annotations

from collections.abc import Callable

from langchain_core.runnables import Runnable, RunnableLambda

from qe_edge.adapters import check_expander
from qe_edge.runtime.expander import Expander
from qe_edge.runtime.expansion import ExpandedQuery

Render = Callable[[ExpandedQuery], str]


def query_expansion(expander: Expander, render: Render = ExpandedQuery.to_text) -> Runnable[str, str]:
    """A query's expanded form, by default as plain text whose words are repeated by their weights.

    `render` is how your retriever wants it, such as `ExpandedQuery.to_lucene`; for one that embeds its
    queries, write `lambda expanded: f"{expanded.query} {expanded.text}"`.
    """

    check_expander(expander)

    def expand(query: str) -> str:
        return render(expander.expand(query))

    async def aexpand(query: str) -> str:
        return render(await expander.aexpand(query))

    return RunnableLambda(expand, aexpand, name="qe-edge")
