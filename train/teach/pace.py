"""How fast a teacher is asked, and how much it may cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

FIRST = 4  # requests in flight at the start
SHORTEST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; LONGEST unless the endpoint names a longer time
WORTH_TELLING = 30.0


class Stopped(Exception):
    """The session ends: the request is not sent."""


class Pace:
    """How many requests may be in flight at once, found as TCP finds its rate.

    It grows with every answer, doubling per round until the first "too many requests", by one per round
    after it; an answer that took long doesn't let it grow, since a small server keeps requests waiting. At
    "too many requests" and at an answer that didn't come in time it halves, once for all requests that were
    in flight together. At the former all requests wait, too, since a rate limit is the account's: as long as
    Retry-After says, else 1 second, doubling while no answer comes.
    """

    def __init__(self, most: int):
        self.most = most
        self.stopping = asyncio.Event()
        self.allowed = float(min(FIRST, most))
        self._flying = 0
        self._changed = asyncio.Condition()
        self._cut_at = float("-inf")
        self._closed_until = 0.0
        self._backoff = SHORTEST_WAIT

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[float]:
        """Wait for a free place; yields the time at which the request starts.

        Raises:
            Stopped: nothing is to be sent any more.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._flying < int(self.allowed))
            self._flying += 1
        try:
            while (wait := self._closed_until - time.monotonic()) > 0 and not self.stopping.is_set():
                await self.sleep(wait)
            if self.stopping.is_set():
                raise Stopped
            yield time.monotonic()
        finally:
            async with self._changed:
                self._flying -= 1
                self._changed.notify_all()

    async def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until the session is to stop."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    @property
    def flying(self) -> int:
        """Requests on their way."""
        return self._flying

    def answered(self, *, slowly: bool = False) -> None:
        """An answer came."""
        step = 1.0 if self._cut_at < 0 else 1.0 / self.allowed
        if not slowly:
            self.allowed = min(float(self.most), self.allowed + step)
        self._backoff = SHORTEST_WAIT

    def late(self, started: float) -> bool:
        """No answer came in time; `started` is when the request went out. Returns whether it is news."""
        if started <= self._cut_at:
            return False
        before, self.allowed = int(self.allowed), max(1.0, self.allowed / 2)
        self._cut_at = time.monotonic()
        return int(self.allowed) < before

    def throttled(self, started: float, retry_after: float | None) -> float:
        """The endpoint asked for less; `started` is when that request went out.

        Returns for how many seconds everything now waits, if that is news worth telling, else 0.
        """
        now = time.monotonic()
        wait = retry_after
        if started > self._cut_at:
            self.allowed = max(1.0, self.allowed / 2)
            self._cut_at = now
            if wait is None:
                wait, self._backoff = self._backoff, min(2 * self._backoff, LONGEST_WAIT)
        if wait is None or now + wait <= self._closed_until:
            return 0.0
        news = wait >= WORTH_TELLING and self._closed_until <= now
        self._closed_until = now + wait
        return wait if news else 0.0


class Budget:
    """Tokens and money spent, and what the requests in flight may still take.

    A request is let out only if the limit holds even when it takes all of its token budget. How long a
    prompt is, is not known before its answer: it is taken to have the most tokens per byte seen so far.
    Prices are per million tokens; cost is in their currency.
    """

    def __init__(self, *, tokens: int, cost: float, price_in: float, price_out: float):
        self._tokens, self._cost = tokens or float("inf"), cost or float("inf")
        self._price_in, self._price_out = price_in, price_out
        self.prompt_tokens = self.completion_tokens = 0
        self._held_in, self._held_out = 0.0, 0
        self._changed = asyncio.Condition()
        self._per_byte = 0.5  # about a Chinese character in two tokens; English has half of it

    @property
    def limited(self) -> bool:
        return min(self._tokens, self._cost) < float("inf")

    @property
    def cost(self) -> float:
        return self.price(self.prompt_tokens, self.completion_tokens)

    def price(self, prompt: float, completion: float) -> float:
        return (prompt * self._price_in + completion * self._price_out) / 1e6

    async def hold(self, prompt_bytes: int, max_tokens: int) -> tuple[float, int] | None:
        """Set the most that a request may take aside, when need be after others have come back.

        None: what is left is too little for it.
        """
        wanted = (prompt_bytes * self._per_byte, max_tokens)
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(*wanted) or not self._held_out)
            if not self._fits(*wanted):
                return None
            self._held_in += wanted[0]
            self._held_out += wanted[1]
        return wanted

    def _fits(self, wanted_in: float, wanted_out: int) -> bool:
        prompt = self.prompt_tokens + self._held_in + wanted_in
        completion = self.completion_tokens + self._held_out + wanted_out
        return prompt + completion <= self._tokens and self.price(prompt, completion) <= self._cost

    async def release(self, held: tuple[float, int]) -> None:
        """Give back what was set aside."""
        async with self._changed:
            self._held_in -= held[0]
            self._held_out -= held[1]
            self._changed.notify_all()

    def spend(self, prompt_tokens: int | None, completion_tokens: int | None, prompt_bytes: int = 0) -> None:
        """Count an answer, and what it shows of the length of prompts."""
        self.prompt_tokens += prompt_tokens or 0
        self.completion_tokens += completion_tokens or 0
        if prompt_tokens and prompt_bytes:
            self._per_byte = max(self._per_byte, prompt_tokens / prompt_bytes)
