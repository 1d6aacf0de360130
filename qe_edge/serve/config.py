"""The settings of `search`, `serve` and `mcp`, said once: flags are made of them."""

from __future__ import annotations

import ipaddress
from typing import Annotated

import msgspec

from qe_edge.arguments import LONGEST_MS
from qe_edge.records import ANALYZER, Count, Threads, said
from qe_edge.student.feedback import Passages


class ReadingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is read, and by whom."""

    passages: Annotated[
        Passages | None, said("Found passages to read (default: the model's own number).")
    ] = None
    reader: Annotated[str | None, said("An encoder's GGUF that reads them (default: the model itself).")] = (
        None
    )


class SearchConfig(ReadingConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One search, and how the query is expanded for it."""

    dataset: Annotated[str, said("Where to look: NAME or folder.", short="-d")] = "demo-en"
    plain: Annotated[bool, said("Without expansion.")] = False
    feedback: Annotated[bool, said("Expand by what the plain query finds, as the student weighs it.")] = False
    refine: Annotated[
        bool, said("Expand by a written text and what it finds: write, search, read, search.")
    ] = False
    k: Annotated[int, said("Results to show.", flag="-k", ge=1, le=1000)] = 5
    analyzer: Annotated[str, said(ANALYZER)] = ""

    def __post_init__(self) -> None:
        if self.plain + self.feedback + self.refine > 1:
            raise ValueError("give one of --plain, --feedback and --refine")
        if (self.passages or self.reader) and not (self.feedback or self.refine):
            raise ValueError("--passages and --reader say what is read; give --feedback or --refine too")


class StudentConfig(ReadingConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a student works for other programs."""

    budget_tokens: Annotated[Count | None, said("Token budget (default: the model's own).")] = None
    threads: Annotated[Threads | None, said("CPU threads (default: the cores that are free).")] = None
    cache: Annotated[str | None, said("A SQLite file that keeps expansions (default: none).")] = None


class ServeConfig(StudentConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A student behind an address."""

    host: Annotated[
        str,
        said("Address to listen on; only this machine reaches 127.0.0.1, any other address needs a --token."),
    ] = "127.0.0.1"
    port: Annotated[int, said("Port to listen on; 0 picks a free one.", ge=0, le=65535)] = 8017
    token: Annotated[str, said("Clients must send it as a bearer token.", env="QE_EDGE_TOKEN")] = ""
    parallel: Annotated[int, said("Queries that are decoded together.", ge=1, le=64)] = 16
    queue: Annotated[int, said("Queries that may wait beside them.", ge=0, le=192)] = 64
    deadline_ms: Annotated[float, said("Time limit of a query.", ge=1, le=LONGEST_MS)] = 10_000

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
