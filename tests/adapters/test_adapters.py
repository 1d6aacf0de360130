"""The adapters in the real frameworks, and the MCP server with the official client."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from qe_edge import Expander
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.student.gate import OPEN

pytest.importorskip("llama_cpp")
QUERY = "what causes tides"


@pytest.fixture(scope="module")
def expander(gguf: Path) -> Iterator[Expander]:
    with Expander.load(gguf, budget_tokens=12, gate=OPEN) as loaded:
        yield loaded


def test_langchain_puts_it_before_a_retriever(expander: Expander) -> None:
    pytest.importorskip("langchain_core", reason="needs the extra langchain")
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    from qe_edge.adapters.langchain import query_expansion

    class Echo(BaseRetriever):
        def _get_relevant_documents(
            self, query: str, *, run_manager: CallbackManagerForRetrieverRun
        ) -> list[Document]:
            return [Document(query)]

    with pytest.raises(TypeError, match="expander must be an Expander, such as"):
        query_expansion("student.gguf")  # type: ignore[arg-type]
    expanded = expander.expand(QUERY)
    chain = query_expansion(expander) | Echo()
    assert [found.page_content for found in chain.invoke(QUERY)] == [expanded.to_text()]
    assert [found.page_content for found in asyncio.run(chain.ainvoke(QUERY))] == [expanded.to_text()]
    assert [len(found) for found in chain.batch([QUERY, "moon"])] == [1, 1]
    assert query_expansion(expander, ExpandedQuery.to_lucene).invoke(QUERY) == expanded.to_lucene()


def test_llama_index_transforms_the_query_and_not_what_is_embedded(expander: Expander) -> None:
    pytest.importorskip("llama_index.core", reason="needs the extra llama-index")
    from llama_index.core.query_engine import CustomQueryEngine, TransformQueryEngine

    from qe_edge.adapters.llama_index import QueryExpansion

    class Echo(CustomQueryEngine):
        def custom_query(self, query_str: str) -> str:
            return query_str

    expanded = expander.expand(QUERY)
    bundle = QueryExpansion(expander)(QUERY)
    assert bundle.query_str == expanded.to_text()
    assert bundle.embedding_strs == [QUERY]
    engine = TransformQueryEngine(Echo(), query_transform=QueryExpansion(expander, str))
    assert str(engine.query(QUERY)) == expanded.text


def test_pyterrier_expands_queries_and_reads_results(expander: Expander) -> None:
    pytest.importorskip("pyterrier", reason="needs the extra pyterrier")
    import pandas as pd
    import pyterrier as pt

    from qe_edge.adapters.pyterrier import Feedback, QueryExpansion, terrier

    queries = pd.DataFrame({"qid": ["1", "2"], "query": [QUERY, "2023 tax"]})
    notes = ["The moon pulls the sea.", "Yeast raises dough."]

    def search(asked: pd.DataFrame) -> pd.DataFrame:
        rows = [
            {"qid": row.qid, "query": row.query, "docno": str(i), "text": text, "rank": i, "score": -i}
            for row in asked.itertuples()
            for i, text in enumerate(notes)
        ]
        return pd.DataFrame(rows[::-1])  # a frame need not be sorted

    retriever = pt.apply.generic(search)
    found = (QueryExpansion(expander) >> retriever)(queries)
    expanded = expander.expand(QUERY)
    assert set(found["query"]) == {terrier(expanded), terrier(expander.expand("2023 tax"))}
    assert terrier(expanded).startswith("what^1 causes^1 tides^1 ")
    plain = QueryExpansion(expander, ExpandedQuery.to_text)(queries)
    assert list(plain["query_0"]) == [QUERY, "2023 tax"]
    assert plain["query"][0] == expanded.to_text()

    read = (retriever >> Feedback(expander))(queries).set_index("qid")
    assert read.loc["1", "query_0"] == QUERY
    assert read.loc["1", "query"] == terrier(expander.feedback(QUERY, notes))


def test_haystack_runs_it_in_a_pipeline_that_can_be_saved(gguf: Path) -> None:
    pytest.importorskip("haystack", reason="needs the extra haystack")
    from haystack import Document, Pipeline
    from haystack.components.retrievers import InMemoryBM25Retriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    from qe_edge.adapters.haystack import QueryExpansion

    store = InMemoryDocumentStore()
    store.write_documents([Document(content="The moon makes tides."), Document(content="Bread is baked.")])
    pipeline = Pipeline()
    pipeline.add_component("expansion", QueryExpansion(str(gguf), budget_tokens=12))
    pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=1))
    pipeline.connect("expansion.query", "retriever.query")
    saved = Pipeline.loads(pipeline.dumps(), allowed_modules=["qe_edge.*"])
    parts = saved.to_dict()["components"]["expansion"]
    assert parts["init_parameters"] == {"model": str(gguf), "budget_tokens": 12, "threads": None}
    found = pipeline.run({"expansion": {"query": QUERY}})
    assert [document.content for document in found["retriever"]["documents"]] == ["The moon makes tides."]


def test_an_mcp_client_expands_and_searches(gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("mcp", reason="needs the extra mcp")
    from mcp import Client, StdioServerParameters
    from mcp.client.stdio import stdio_client

    command = [
        "-m",
        "qe_edge",
        "mcp",
        "--model",
        str(gguf),
        "--budget-tokens",
        "12",
        "--index",
        "demo-en",
    ]
    server = StdioServerParameters(command=sys.executable, args=command, cwd=tmp_path)

    async def ask(errors: TextIO) -> None:
        async with Client(stdio_client(server, errors)) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert tools.keys() == {"expand", "search"}
            assert "words.\n\nWhere" in tools["expand"].description
            expanded = await client.call_tool("expand", {"query": QUERY})
            assert not expanded.is_error
            assert expanded.structured_content and "words" in str(expanded.structured_content)
            found = await client.call_tool("search", {"query": "what makes bread rise", "k": 2})
            assert not found.is_error and "doc_id" in str(found.structured_content)
            both = await client.call_tool("search", {"query": "x", "refine": True, "feedback": True})
            assert both.is_error and "either feedback or refine" in str(both.content)
            wrong = await client.call_tool("search", {"query": "x", "index": "nothing"})
            assert wrong.is_error and "the indexes here: demo-en" in str(wrong.content)
            blank = await client.call_tool("expand", {"query": " "})
            assert blank.is_error and "the query is empty" in str(blank.content)

    with (tmp_path / "errors.txt").open("w") as errors:
        asyncio.run(ask(errors))


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_mcp_server_ends_while_its_client_is_there(
    gguf: Path, tmp_path: Path, how: signal.Signals, code: int
) -> None:
    pytest.importorskip("mcp", reason="needs the extra mcp")
    # A shell's background jobs ignore SIGINT, and hand that on.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "import qe_edge.__main__ as program; program.main()"
    command = [sys.executable, "-c", program, "mcp", "--model", str(gguf)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path)
    assert process.stdin and process.stdout
    process.stdin.write(b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n')
    process.stdin.flush()
    assert b'"id":1' in process.stdout.readline()
    process.send_signal(how)
    assert process.wait(20) == code
    process.stdin.close()
