"""An expansion on its way, for which threads and tasks wait alike."""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from contextlib import suppress
from typing import Any

from qe_edge.errors import QeEdgeError
from qe_edge.runtime.expansion import ExpandedQuery

PATIENCE = 0.01  # seconds beyond the deadline, in which most have noticed it themselves


class Pending(ABC):
    """Begin it, then wait for it, in one way or the other. It is `ready` once nothing need be waited for.

    The future is that of the decoder's work (see `qe_edge.runtime.generation.Work`); the deadline is on
    `time.perf_counter`'s clock.
    """

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.future: Future[None] = Future()
        self.ready: ExpandedQuery | None = None

    @abstractmethod
    def begin(self) -> None:
        """Have it written or read from now on, unless that is needless. It may wait, for a cache.

        Raises:
            BadInput: the query can't be expanded.
        """

    @abstractmethod
    def finish(self) -> ExpandedQuery:
        """What there is by now, begun or not; it is called once the future is done, or the time is up.

        Raises:
            QeEdgeError: the engine failed, or was closed.
        """

    @property
    def error(self) -> BaseException | None:
        """Why it failed, if it did."""
        return self.future.exception() if self.future.done() and not self.future.cancelled() else None

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.future.cancel()

    def wait(self) -> ExpandedQuery:
        """What became of it, at the deadline at the latest.

        Raises:
            QeEdgeError: the engine failed or was closed, or it was given up.
        """
        if not self.ready:
            try:
                self.future.exception(self._left())
            except TimeoutError:  # the thread is in the middle of a step
                self.cancel()
            except CancelledError:
                raise QeEdgeError("the expansion was given up") from None
            except BaseException:  # Ctrl-C
                self.cancel()
                raise
            self.ready = self.finish()
        return self.ready

    async def arrive(self, helpers: Executor, *, begun: bool = False) -> ExpandedQuery:
        """Begin and `wait` for asyncio, whose loop waits for neither; cancelled with its task.

        `helpers` are threads for what takes a moment: there need be only a few.
        """

        def helped(work: Callable[[], Any]) -> Any:
            return asyncio.wrap_future(helpers.submit(work))

        try:
            async with asyncio.timeout(self._left(PATIENCE)):
                if not begun:
                    await helped(self.begin)
                if not self.ready:
                    with suppress(Exception):  # `wait` says what it was
                        await asyncio.wrap_future(self.future)
                return await helped(self.wait)
        except TimeoutError:
            self.cancel()
            self.ready = self.ready or self.finish()
            return self.ready
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _left(self, more: float = 0.0) -> float | None:
        left = self.deadline - time.perf_counter()
        return None if left == math.inf else max(0.0, left + more)
