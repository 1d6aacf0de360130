"""Haystack: a component from query to query, to stand before a BM25 retriever.

from qe_edge.adapters.haystack import QueryExpansion

pipeline.add_component("expansion", QueryExpansion("student-Q4_K_M.gguf"))
pipeline.connect("expansion.query", "retriever.query")
"""

from __future__ import annotations

from haystack import component

from qe_edge.runtime.expander import Expander


@component
class QueryExpansion:
    """Expands queries as plain text, whose words are repeated by their weights.

    It is saved with a pipeline by the model's path; the model is loaded when the pipeline warms up. To load
    such a pipeline, tell Haystack that it may: `Pipeline.loads(…, allowed_modules=["qe_edge.*"])`.
    """

    def __init__(self, model: str, budget_tokens: int | None = None, threads: int | None = None):
        self.model, self.budget_tokens, self.threads = model, budget_tokens, threads
        self._expander: Expander | None = None

    def warm_up(self) -> None:
        """Load the model, once."""
        if self._expander is None:
            self._expander = Expander.load(self.model, budget_tokens=self.budget_tokens, threads=self.threads)

    @component.output_types(query=str, fallback=str)
    def run(self, query: str) -> dict[str, str]:
        """`query` as it is to be searched, and as `fallback` why it wasn't expanded, if it wasn't."""
        self.warm_up()
        assert self._expander
        expanded = self._expander.expand(query)
        return {"query": expanded.to_text(), "fallback": expanded.fallback}
