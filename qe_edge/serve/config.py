"""The settings of `serve` and `mcp`, said once: flags are made of them."""

from __future__ import annotations

import ipaddress
from typing import Annotated

import msgspec
from msgspec import Meta

from qe_edge.arguments import LONGEST_MS
from qe_edge.records import Count, Threads
from qe_edge.student.feedback import Passages


class StudentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a student works for other programs."""

    budget_tokens: Annotated[Count | None, Meta(description="Token budget (default: the model's own).")] = (
        None
    )
    passages: Annotated[
        Passages | None,
        Meta(description="That feedback reads for each query (default: the model's own number)."),
    ] = None
    threads: Annotated[Threads | None, Meta(description="CPU threads (default: all cores).")] = None
    cache: Annotated[str | None, Meta(description="A SQLite file that keeps expansions (default: none).")] = (
        None
    )


class ServeConfig(StudentConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A student behind an address."""

    host: Annotated[str, Meta(description="Other machines can reach no loopback address.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="0: a free one.")] = 8017
    token: Annotated[
        str, Meta(description="Clients must send it as a bearer token.", extra={"env": "QE_EDGE_TOKEN"})
    ] = ""
    parallel: Annotated[int, Meta(ge=1, le=64, description="Queries that are decoded together.")] = 16
    queue: Annotated[int, Meta(ge=0, le=192, description="Queries that may wait beside them.")] = 64
    deadline_ms: Annotated[
        float, Meta(ge=1, le=LONGEST_MS, description="The most that a query may take.")
    ] = 10_000

    def __post_init__(self) -> None:
        if not self.loopback and not self.token:
            raise ValueError(
                f"{self.host} can be reached from elsewhere: give a --token that clients must send"
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the address; a name but localhost may be anything."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
