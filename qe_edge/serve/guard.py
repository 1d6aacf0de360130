"""How clients get to the server: bounds on their connections, and who is refused before a body is read."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import h11
import uvicorn
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from qe_edge.errors import BadArgument

ARRIVAL_S = 10.0  # in which a request's header must arrive, and then its body
MOST = 1000  # open connections
WAITING = 1024  # connections that the kernel keeps until they are accepted


class Guard:
    """Refuses what a foreign web page sends and what lacks the token, before anything is done for it.

    Args:
        hosts: the names that the server goes by; that of the request's Host header if there are none.
        token: that all but the `open_paths` want, if it isn't empty.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Collection[str], token: str, open_paths: Collection[str | None]
    ):
        self.app, self._token, self._open = app, token.encode(), open_paths
        self._hosts = {host.strip("[]").lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self._foreign(headers):
            return JSONResponse({"detail": "this server answers no other site's pages"}, 403)
        if self._token and scope["path"] not in self._open and not self._knows_token(headers):
            return JSONResponse(
                {"detail": "give the server's token"}, 401, headers={"WWW-Authenticate": "Bearer"}
            )
        return None

    def _foreign(self, headers: Headers) -> bool:
        """Whether a browser says that another site's page asks; other programs send neither header."""
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):  # the same but for the port, too
            return True
        origin = headers.get("origin")
        if origin is None:
            return False
        host = _host_of(origin)  # none of "null", which a page in a sandbox sends
        return not host or host not in (self._hosts or [_host_of(f"//{headers.get('host', '')}")])

    def _knows_token(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(
            given.strip().encode("latin-1"), self._token
        )


def _host_of(url: str) -> str | None:
    with suppress(ValueError):  # such as brackets that don't close
        return urlsplit(url).hostname
    return None


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a bound on connections and on the time in which a request must arrive."""

    most = MOST
    arrival_s = ARRIVAL_S
    _part: object = None  # of the request that was last seen to arrive
    _timer: asyncio.TimerHandle | None = None  # while a request is awaited, as a whole or the rest of it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self.most:
            # Who comes with a whole request is answered even if others hold all connections and send
            # nothing: the one that has sent none for longest goes. That is the new one at worst.
            awaited = {
                known: known._timer.when()
                for known in self.connections
                if isinstance(known, Protocol) and known._timer
            }
            min(awaited, key=awaited.__getitem__)._drop(f"there are more than {self.most}")

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def _watch(self) -> None:
        """Each part of a request has its own time: the header, the body. The answer takes what it takes."""
        part = self.conn.their_state
        if part is not self._part:
            self._unwatch()
            self._part = part
            if part in (h11.IDLE, h11.SEND_BODY):
                why = f"no whole request came within {self.arrival_s:g} s"
                self._timer = self.loop.call_later(self.arrival_s, self._drop, why)

    def _unwatch(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _drop(self, why: str) -> None:
        self.logger.warning("closed a connection: %s", why)
        self._unwatch()
        self.connections.discard(self)  # now: the next one, who may come in the same turn, counts them
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """What was begun is answered; a request that isn't whole was not begun."""
        if self._timer:
            self.transport.close()
        else:
            super().shutdown()


class _Seldom(logging.Filter):
    """Lets one record a second pass from each line of code: clients could fill a disk with them."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        place, now = (record.pathname, record.lineno), time.monotonic()
        if now < self._next.get(place, 0.0):
            return False
        self._next[place] = now + 1
        return True


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # asyncio takes the backlog for two things: how many connections it accepts in one go, which must be
        # few, and how many the kernel keeps meanwhile, which should be many.
        for server in self.servers:
            for listener in server.sockets:
                with listener.dup() as same:
                    same.listen(WAITING)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await asyncio.sleep(0.05)  # or those that are just being accepted would never hear of it
        await super().shutdown(sockets)


def most_connections() -> int:
    """Half of the files that this process may still open.

    The other half is for connections that are just being accepted or closed, and for the cache.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MOST
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MOST
    opened = len(list(Path("/dev/fd").iterdir()))
    return max(1, min(MOST, (limit - opened) // 2))


def check_free(host: str, port: int) -> None:
    """That nobody listens there yet: said before a model is loaded.

    Raises:
        BadArgument: somebody does, or it is no address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]  # behind which Python says the address once more
        raise BadArgument(f"can't listen on {host}:{port}: {why}; choose another --host or --port") from None


def run(app: ASGIApp, *, host: str, port: int, last: int, arrival_s: float = ARRIVAL_S) -> None:
    """Serve until SIGTERM or Ctrl-C, and then answer what was begun, for up to `last` seconds."""
    most = most_connections()
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(_Seldom())
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=type("BoundProtocol", (Protocol,), {"most": most, "arrival_s": arrival_s}),
        ws="none",
        loop="asyncio",  # whose way to accept connections is known
        backlog=max(1, most // 16),  # some turns later they are counted, so that four times as many are open
        access_log=False,
        timeout_graceful_shutdown=last,
    )
    with suppress(KeyboardInterrupt):
        _Server(config).run()
