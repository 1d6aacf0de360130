"""Write, search, read, search: what the written query finds is read, and weighs in."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Generator, Iterable
from concurrent.futures import Executor
from dataclasses import replace
from inspect import isawaitable

from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.runtime.pending import Pending
from qe_edge.runtime.reader import Passage
from qe_edge.runtime.weighing import Weighing
from qe_edge.runtime.writer import Writing

Search = Callable[[ExpandedQuery], Iterable[str | Passage]]
"""The passages that an expanded query finds, best first."""
AsyncSearch = Callable[[ExpandedQuery], Awaitable[Iterable[str | Passage]]]
Steps = Generator["Pending | ExpandedQuery", "ExpandedQuery | Iterable[str | Passage]", ExpandedQuery]
"""Yields what is to be waited for, and gets what came of it, or what is to be searched for, and gets what it
found; returns the query with all that there is by its end."""


def refined(
    writing: Writing | ExpandedQuery,
    weigh: Callable[[ExpandedQuery, Iterable[str | Passage], dict[str, float]], Weighing],
    rounds: int,
    deadline: float,
) -> Steps:
    """The steps of `Expander.refine`."""
    written = writing if isinstance(writing, ExpandedQuery) else (yield writing)
    assert isinstance(written, ExpandedQuery)
    if written.finish_reason == "skipped" and not written.text:  # by the gate
        return written
    expanded, worth = written, dict[str, float]()
    for _ in range(rounds):
        if time.perf_counter() >= deadline:
            return replace(expanded, finish_reason="deadline")
        found = yield expanded
        assert not isinstance(found, ExpandedQuery)
        # What reading took is the sum of the rounds'.
        so_far = replace(written, prompt_tokens=expanded.prompt_tokens, prefill_s=expanded.prefill_s)
        weighed = yield weigh(so_far, found, worth)
        assert isinstance(weighed, ExpandedQuery)
        expanded = weighed
        if not expanded.relevance:  # nothing was found
            break
    return expanded


def run(steps: Steps, search: Search) -> ExpandedQuery:
    """To the end, in this thread."""
    try:
        step = next(steps)
        while True:
            if isinstance(step, Pending):
                step.begin()
                step = steps.send(step.wait())
            else:
                step = steps.send(search(step))
    except StopIteration as end:
        return end.value


async def arun(steps: Steps, search: AsyncSearch, helpers: Executor, deadline: float) -> ExpandedQuery:
    """`run` for asyncio; a search that takes too long is cancelled."""
    best: ExpandedQuery | None = None
    try:
        step = next(steps)
        while True:
            if isinstance(step, Pending):
                step = steps.send(best := await step.arrive(helpers))
            else:
                left = None if deadline == math.inf else max(0.0, deadline - time.perf_counter())
                coming = search(step)
                if not isawaitable(coming):
                    raise TypeError(f"`arefine` awaits what its search returns, not {type(coming).__name__}")
                async with asyncio.timeout(left):
                    found = await coming
                step = steps.send(found)
    except StopIteration as end:
        return end.value
    except TimeoutError:
        if best is None or time.perf_counter() < deadline:  # it is the search's own
            raise
        return replace(best, finish_reason="deadline")
