"""`qe-edge mcp`: expansion and search as tools of the Model Context Protocol (https://modelcontextprotocol.io)."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from qe_edge import __version__
from qe_edge.errors import BadInput
from qe_edge.runtime.expander import Expander
from qe_edge.serve.collection import Collection
from qe_edge.serve.collection import search as search_collection

QueryText = Annotated[str, Field(description="What somebody looks for.", max_length=1000)]


def create_mcp(expander: Expander, collections: Mapping[str, Collection]) -> MCPServer:
    """The tools `expand` and, where there is something to be searched, `search`."""
    server = MCPServer("qe-edge", version=__version__)

    def tool(verb: Callable[..., Any]) -> None:
        server.tool(description=inspect.getdoc(verb))(verb)

    @tool
    def expand(
        query: QueryText,
    ) -> dict[str, Any]:
        """Expand a search query by a small local model: a passage that answers it, and weighted words.

        Where `fallback` is not empty, it says why the query is better searched as it is.
        """
        try:
            expanded = expander.expand(query)
        except BadInput as error:
            raise ToolError(str(error)) from None
        return {"text": expanded.text, "words": expanded.words(), "fallback": expanded.fallback}

    if collections:
        first = next(iter(collections))

        @tool
        def search(
            query: QueryText,
            index: Annotated[str, Field(description=f"One of: {', '.join(collections)}.")] = first,
            k: Annotated[int, Field(description="How many documents.", ge=1, le=100)] = 10,
            feedback: Annotated[
                bool,
                Field(description="Expand by what the plain query finds, not by a text that is written."),
            ] = False,
            refine: Annotated[
                bool,
                Field(description="Expand by a text and by what it finds: the best results, and slower."),
            ] = False,
        ) -> list[dict[str, Any]]:
            """Search an index with the expanded query; the best documents with their texts, best first."""
            if feedback and refine:
                raise ToolError("give either feedback or refine")
            if index not in collections:
                raise ToolError(f"no index {index!r}; the indexes here: {', '.join(collections)}")
            try:
                hits, _ = search_collection(
                    query, collections[index], expander=expander, feedback=feedback, refine=refine, k=k
                )
            except BadInput as error:
                raise ToolError(str(error)) from None
            return [
                {"rank": hit.rank, "doc_id": hit.doc_id, "score": hit.score, "text": hit.text} for hit in hits
            ]

    return server
