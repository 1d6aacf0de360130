"""`qe-edge serve`: expansion and search over HTTP, with one resident model for all clients.

Requests are decoded together (see `qe_edge.runtime.decoder`), as many wait as the queue holds, and whoever
comes then is told when to come again.
"""

# No postponed annotations: FastAPI reads those of functions inside a function.

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

import prometheus_client as prometheus
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from starlette.middleware.trustedhost import TrustedHostMiddleware

from qe_edge import __version__
from qe_edge.errors import QeEdgeError
from qe_edge.runtime.expander import ROUNDS, Expander
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.runtime.refining import AsyncSearch
from qe_edge.serve.collection import Collection
from qe_edge.serve.config import ServeConfig
from qe_edge.serve.guard import Guard
from qe_edge.serve.messages import (
    BODY_BYTES,
    Expanded,
    ExpandReply,
    ExpandRequest,
    FeedbackRequest,
    Health,
    Result,
    SearchReply,
    SearchRequest,
    StreamRequest,
)
from qe_edge.student.join import DEFAULT_JOIN

REQUESTS: dict[str, type[BaseModel]] = {
    "/expand": ExpandRequest,
    "/expand/stream": StreamRequest,
    "/feedback": FeedbackRequest,
    "/search": SearchRequest,
}


class Service:
    """The model, the collections, and who waits for them."""

    def __init__(self, expander: Expander, collections: Mapping[str, Collection], config: ServeConfig):
        self.expander, self.collections = expander, collections
        self.most, self.longest_ms = config.parallel + config.queue, config.deadline_ms
        self.pending = 0
        self.registry = prometheus.CollectorRegistry()
        count, seconds = prometheus.Counter, prometheus.Histogram
        self.requests = count("qe_edge_requests", "Requests.", ["path", "status"], registry=self.registry)
        self.queries = count("qe_edge_queries", "Expanded queries.", registry=self.registry)
        self.tokens = count("qe_edge_tokens", "Tokens written.", registry=self.registry)
        self.fallbacks = count("qe_edge_fallbacks", "Queries left as they are.", registry=self.registry)
        self.cached = count("qe_edge_cached", "Queries whose expansion was kept.", registry=self.registry)
        self.refused = count(
            "qe_edge_refused", "Queries refused, the queue being full.", registry=self.registry
        )
        self.seconds = seconds("qe_edge_expansion_seconds", "From request to text.", registry=self.registry)
        waiting = prometheus.Gauge("qe_edge_pending", "Queries not answered yet.", registry=self.registry)
        waiting.set_function(lambda: self.pending)
        self._pace = 0.1  # seconds between two answers, lately

    @asynccontextmanager
    async def place(self, queries: int) -> AsyncIterator[None]:
        """Room for so many queries; 429 if there is none, with the time until there may be."""
        if queries > self.most:
            raise HTTPException(413, f"this server takes at most {self.most} queries at once, not {queries}")
        if self.pending + queries > self.most:
            self.refused.inc(queries)
            over = self.pending + queries - self.most
            wait = max(1, round(min(over, self.most) * self._pace + 0.5))
            raise HTTPException(
                429,
                f"{self.pending} queries are under way or wait; try again",
                headers={"Retry-After": str(wait)},
            )
        self.pending += queries
        start = time.perf_counter()
        try:
            yield
        finally:
            # Of those that are answered together, each takes a share.
            self._pace += 0.1 * ((time.perf_counter() - start) / self.pending - self._pace)
            self.pending -= queries

    def deadline(self, wanted: float | None) -> float:
        return self.longest_ms if wanted is None else min(wanted, self.longest_ms)

    async def expand(
        self,
        query: str,
        deadline_ms: float | None,
        scores: Sequence[float] = (),
        passages: list[str] | None = None,
        search: AsyncSearch | None = None,
        written: ExpandedQuery | None = None,
    ) -> ExpandedQuery:
        """By what the student writes, by the passages if there are any, or by what the search finds.

        For what is `written` already, it searches once.
        """
        start = time.perf_counter()
        when: Any = {"deadline_ms": self.deadline(deadline_ms), "scores": scores}
        try:
            if search:
                rounds = 1 if written else ROUNDS
                expanded = await self.expander.arefine(query, search, written=written, rounds=rounds, **when)
            elif passages is not None:
                expanded = await self.expander.afeedback(query, passages, **when)
            else:
                expanded = await self.expander.aexpand(query, **when)
        except QeEdgeError as error:  # the query is searched as it is
            expanded = ExpandedQuery(query, "", DEFAULT_JOIN, fallback=str(error))
        self.note(expanded, time.perf_counter() - start)
        return expanded

    def note(self, expanded: ExpandedQuery, seconds: float) -> None:
        self.seconds.observe(seconds)
        self.queries.inc()
        self.fallbacks.inc(bool(expanded.fallback))
        self.cached.inc(expanded.cached)
        if not expanded.cached:
            self.tokens.inc(expanded.tokens)


def create_app(
    expander: Expander,
    collections: Mapping[str, Collection],
    config: ServeConfig | None = None,
) -> FastAPI:
    """The service over a loaded student. With a token, all but /health and the documentation want it.

    On a loopback address a request must call the server by a name of this machine: a page from elsewhere must
    not reach it by a name of its own that leads here. Nor may it ask by the right name.
    """
    config = config or ServeConfig()
    hosts = ["localhost", "127.0.0.1", "[::1]", config.host] if config.loopback else []
    service = Service(expander, collections, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(expander.close)

    app = FastAPI(
        title="qe-edge", version=__version__, lifespan=lifespan, max_body_size=BODY_BYTES,
        description="Query expansions by a small model, and search with them.",
    )  # fmt: skip
    app.state.service = service
    documentation = (app.docs_url, app.redoc_url, app.openapi_url, app.swagger_ui_oauth2_redirect_url)
    app.add_middleware(Guard, hosts=hosts, token=config.token, open_paths=["/health", *documentation])
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_middleware(_Counted, service=service)
    guarded = [Depends(HTTPBearer(auto_error=False))]  # for the documentation: `Guard` looks at the token

    @app.exception_handler(RequestValidationError)
    async def unusable(request: Request, error: RequestValidationError) -> Response:
        # Without the input, which may hold half a character that no answer can be encoded with.
        found = [{name: part[name] for name in ("type", "loc", "msg")} for part in error.errors()]
        for part in found:
            part["msg"] = part["msg"].removeprefix("Value error, ")
            if part["type"] == "extra_forbidden" and (asked := REQUESTS.get(request.url.path)):
                part["msg"] = f"there is no such field; there are {', '.join(asked.model_fields)}"
            if part["loc"] == ("body",) and "json" not in request.headers.get("Content-Type", ""):
                part["msg"] = "send the header Content-Type: application/json"
        return Response(json.dumps({"detail": found}), 422, media_type="application/json")

    @app.post("/expand", dependencies=guarded)
    async def expand(request: ExpandRequest) -> ExpandReply:
        """Expand one query, or several together."""

        queries = [request.query] if isinstance(request.query, str) else request.query
        async with service.place(len(queries)), asyncio.TaskGroup() as group:
            tasks = [group.create_task(service.expand(query, request.deadline_ms)) for query in queries]
        return ExpandReply(expansions=[Expanded.of(task.result(), request.fields) for task in tasks])

    @app.post("/feedback", dependencies=guarded)
    async def feedback(request: FeedbackRequest) -> Expanded:
        """Expand a query by passages that your own index found."""
        by: dict[str, Any] = {"passages": request.passages}
        if request.text:
            by = {"written": ExpandedQuery(request.query, request.text, expander.spec.join)}
            by["search"] = _already(request.passages)
        async with service.place(1):
            expanded = await service.expand(request.query, request.deadline_ms, **by)
        return Expanded.of(expanded, request.fields)

    async def one_place() -> AsyncIterator[None]:
        async with service.place(1):
            yield

    @app.get(
        "/expand/stream", dependencies=[*guarded, Depends(one_place)], response_class=EventSourceResponse
    )
    async def stream(asked: Annotated[StreamRequest, Query()]) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events: `text` for each piece, then `expansion` with the whole."""
        start = time.perf_counter()
        async for piece in expander.astream(asked.query, deadline_ms=service.deadline(asked.deadline_ms)):
            if isinstance(piece, str):
                yield ServerSentEvent(event="text", data=piece)
            else:
                service.note(piece, time.perf_counter() - start)
                yield ServerSentEvent(event="expansion", data=Expanded.of(piece))

    @app.post("/search", dependencies=guarded)
    async def search(request: SearchRequest) -> SearchReply:
        """The best documents of an index for the expanded query, or for the plain one."""
        if request.feedback and request.refine:
            raise HTTPException(422, "give either feedback or refine")
        if (request.feedback or request.refine) and not request.expand:
            raise HTTPException(422, "feedback and refine expand the query: leave expand out")
        name = request.index or next(iter(collections), "")
        if name not in collections:
            if not collections:
                raise HTTPException(404, "there is no index here; start the server with --index")
            raise HTTPException(404, f"no index {name!r}; the indexes here: {', '.join(collections)}")
        collection = collections[name]
        async with service.place(1):
            plain = await run_in_threadpool(collection.plain, request.query)
            expanded = ExpandedQuery(request.query, "", DEFAULT_JOIN)
            if request.expand:
                best = partial(collection.found, most=expander.passages)
                by: dict[str, Any] = {}
                if request.feedback:
                    by["passages"] = await run_in_threadpool(collection.passages, plain, expander.passages)
                elif request.refine:
                    by["search"] = lambda expanded: run_in_threadpool(best, expanded)
                scores = list(plain.values())
                expanded = await service.expand(request.query, request.deadline_ms, scores, **by)
            hits = await run_in_threadpool(
                lambda: collection.hits(collection.terms(expanded), plain, request.k)
            )
        return SearchReply(
            index=name,
            expansion=Expanded.of(expanded) if request.expand else None,
            hits=[Result(**{field: getattr(hit, field) for field in Result.model_fields}) for hit in hits],
        )

    @app.get("/health")
    async def health() -> Health:
        """Whether the server works, and with what."""
        return Health(
            status="ok",
            version=__version__,
            model=expander.spec.base_model,
            file=expander.name,
            indexes=list(collections),
            pending=service.pending,
        )

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        """Counters and times, as Prometheus reads them."""
        return Response(
            prometheus.generate_latest(service.registry), media_type=prometheus.CONTENT_TYPE_LATEST
        )

    return app


def _already(passages: list[str]) -> AsyncSearch:
    """A search whose passages are there."""

    async def search(_: ExpandedQuery) -> list[str]:
        return passages

    return search


class _Counted:
    """Counts responses by path and status."""

    def __init__(self, app: Any, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                # What no route knows would make a counter for each path that somebody tries.
                path = getattr(scope.get("route"), "path", "other")
                self.service.requests.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
