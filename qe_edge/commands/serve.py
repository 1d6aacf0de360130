"""`serve` and `mcp`: a student for other programs."""

from __future__ import annotations

import ipaddress
import math
from pathlib import Path
from typing import Annotated

import typer

from qe_edge.arguments import LONGEST_MS
from qe_edge.commands.common import WORKDIR, ModelOption, PassagesOption, ThreadsOption, WorkdirOption, finite
from qe_edge.commands.use import load_expander
from qe_edge.console import note
from qe_edge.errors import BadArgument, require
from qe_edge.serve.collection import Collection

IndexOption = Annotated[
    list[str] | None,
    typer.Option("--index", "-i", help="A data set to be searched: NAME=DATASET, or DATASET. Repeat it."),
]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="A SQLite file that keeps expansions (default: none).")
]
BudgetOption = Annotated[
    int | None, typer.Option("--budget-tokens", help="Token budget (default: the model's own).")
]


def serve(
    model: ModelOption = None,
    index: IndexOption = None,
    host: Annotated[str, typer.Option(help="Other machines can reach no loopback address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8017,
    token: Annotated[
        str, typer.Option(envvar="QE_EDGE_TOKEN", help="Clients must send it as a bearer token.")
    ] = "",
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Queries that are decoded together.")] = 16,
    queue: Annotated[int, typer.Option(min=0, max=192, help="Queries that may wait beside them.")] = 64,
    deadline_ms: Annotated[
        float, typer.Option(min=1, max=LONGEST_MS, callback=finite, help="The most that a query may take.")
    ] = 10_000,
    budget_tokens: BudgetOption = None,
    passages: PassagesOption = None,
    threads: ThreadsOption = None,
    cache: CacheOption = None,
    workdir: WorkdirOption = WORKDIR,
) -> None:
    """Serve expansions and searches over HTTP (documentation at /docs)."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    loopback = is_loopback(host)
    if not loopback and not token:
        raise BadArgument(f"{host} can be reached from elsewhere: give a --token that clients must send")
    from qe_edge.serve.guard import run
    from qe_edge.serve.http import Limits, create_app

    collections = open_collections(index, workdir)
    settings = {"budget_tokens": budget_tokens, "passages": passages, "threads": threads, "cache": cache}
    expander = load_expander(model, workdir, parallel=parallel, **settings)
    expander.expand("what causes tides").terms()  # what the first query would wait for
    hosts = ["localhost", "127.0.0.1", "[::1]", host] if loopback else None
    limits = Limits(parallel + queue, deadline_ms)
    app = create_app(expander, collections, limits=limits, token=token, hosts=hosts)
    last = math.ceil(deadline_ms / 1000) + 5  # seconds until what was begun is answered
    run(app, host=host, port=port, last=last)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name but localhost may be anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_collections(named: list[str] | None, workdir: Path) -> dict[str, Collection]:
    """Name -> collection of each NAME=DATASET.

    Raises:
        BadArgument: a name is there twice.
        NotFound: there is no such data set.
    """
    collections: dict[str, Collection] = {}
    for text in named or []:
        name, equals, dataset = text.partition("=")
        if Path(text).exists():  # as it is written
            name, equals = text, ""
        if name in collections:
            raise BadArgument(f"two indexes have the name {name}; tell them apart with --index NAME=DATASET")
        collection = Collection.open(dataset if equals else text, workdir / "index")
        note(f"index {name}: {collection.data}, {len(collection.index.ids)} documents")
        collections[name] = collection
    return collections


def mcp(
    model: ModelOption = None,
    index: IndexOption = None,
    budget_tokens: BudgetOption = None,
    passages: PassagesOption = None,
    threads: ThreadsOption = None,
    cache: CacheOption = None,
    workdir: WorkdirOption = WORKDIR,
) -> None:
    """Offer expansion and search to an MCP client over stdin and stdout."""
    require("mcp", "mcp")
    from qe_edge.serve.mcp import create_mcp

    collections = open_collections(index, workdir)
    settings = {"budget_tokens": budget_tokens, "passages": passages, "threads": threads, "cache": cache}
    with load_expander(model, workdir, **settings) as expander:
        create_mcp(expander, collections).run("stdio")
