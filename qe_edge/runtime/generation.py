"""What a decoder does for whoever waits for it: an answer to write, prompts to read, or a call in between."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal


@dataclass(eq=False, kw_only=True)
class Work:
    """Something for the thread to do until its `deadline`, on `time.perf_counter`'s clock.

    The future is done when the work is. Cancel it where nobody waits for it any more.
    """

    deadline: float = math.inf
    future: Future[None] = field(default_factory=Future)

    @property
    def over(self) -> bool:
        """Whether it need not go on: its time is up, or nobody waits for it."""
        return self.future.done() or time.perf_counter() >= self.deadline

    def end(self, error: BaseException | None = None) -> None:
        """Tell whoever waits that it is done, or has failed."""
        with suppress(InvalidStateError):  # it was cancelled, or has ended before
            if error:
                self.future.set_exception(error)
            else:
                self.future.set_result(None)


@dataclass(eq=False)
class Generation(Work):
    """An answer to write, and what is written of it so far.

    The first `prefix` tokens of the prompt are those of many prompts. The answer also ends where `enough`
    says so of its tokens. Seconds are on `time.perf_counter`'s clock; `first` and `last` are those of its
    first and of its last token. `finish` is None while it is written, and where its time was up.
    """

    prompt: list[int]
    prefix: int
    budget: int
    temperature: float = 0.0
    seed: int = 0
    enough: Callable[[list[int]], bool] | None = None
    on_token: Callable[[], None] | None = None
    tokens: list[int] = field(default_factory=list)
    finish: Literal["stop", "length", "dry"] | None = None
    begin: float = 0.0
    first: float = 0.0
    last: float = 0.0

    def take(self, token: int, end_token: int) -> None:
        """Add a token, or finish with it."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        if token == end_token:
            self.finish = "stop"
        else:
            self.tokens.append(token)
            if len(self.tokens) == self.budget:
                self.finish = "length"
            elif self.enough and self.enough(self.tokens):
                self.finish = "dry"
        if self.finish:
            self.end()
        if self.on_token:
            self.on_token()


@dataclass(eq=False)
class Reading(Work):
    """Passages to read: `values` gets what each is worth, a few at a time, as `start` yields it.

    Each takes so many tokens as `sizes` says, after `prefix` that all begin with.
    """

    start: Callable[[], Iterator[list[float]]]
    sizes: list[int]
    prefix: int = 0
    values: list[float] = field(default_factory=list)
    turns: Iterator[list[float]] | None = None


@dataclass(eq=False)
class Call(Work):
    """Something that must not happen in the middle of a step."""

    call: Callable[[], None]
