"""Answers written together: whoever waits for one advances all, in whichever thread they were asked for.

There is no thread of our own. One caller at a time leads: it lets new prompts in, in the order in which they
came, and computes one step for everybody, until its own answer is done; then another one leads.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition
from typing import Literal

from qe_edge.backends.protocol import Backend, Batch
from qe_edge.errors import BadInput, QeEdgeError

QUERY = 512  # tokens that a prompt may have of its own
PIECE = 64  # tokens of prompts that are read between two steps of those who write


@dataclass(eq=False)
class Answer:
    """What is asked of the model, and what it has written so far.

    Its first `prefix` tokens are those of many prompts. It also ends where `enough` says so of its tokens,
    and at the `deadline`. Seconds are on `time.perf_counter`'s clock; `first` and `end` are those of the
    first and of the last token.
    """

    prompt: list[int]
    prefix: int
    budget: int
    temperature: float = 0.0
    seed: int = 0
    enough: Callable[[list[int]], bool] | None = None
    deadline: float = math.inf
    streamed: bool = False  # somebody waits for each token
    tokens: list[int] = field(default_factory=list)
    finish: Literal["stop", "length", "dry", "deadline"] | None = None
    error: Exception | None = None
    abandoned: bool = False  # nobody waits for it any more
    begin: float = 0.0
    first: float = 0.0
    end: float = 0.0

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None

    def take(self, token: int, end_token: int) -> None:
        """Add a token, or finish with it."""
        self.end = time.perf_counter()
        self.first = self.first or self.end
        if token == end_token:
            self.finish = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) == self.budget:
            self.finish = "length"
        elif self.enough and self.enough(self.tokens):
            self.finish = "dry"

    def is_late(self) -> bool:
        """Whether its time is up; then it is done with what is there."""
        if not self.done and time.perf_counter() >= self.deadline:
            self.finish = "deadline"
        return self.finish == "deadline"


class Decoder:
    """All answers that a loaded model is writing: several together, and longer ones alone beside them."""

    def __init__(self, backend: Backend, end_token: int):
        self._backend, self._end = backend, end_token
        self._alone = backend.batch(1)
        self._several: Batch | None = None
        self._slots = self._made = 1  # wished for, and of `_several`
        self._waiting: deque[Answer] = deque()
        self._running: dict[tuple[Batch, int], Answer] = {}
        self._changed = Condition()
        self._led = self._closed = False
        self._steps = 0

    def ask(self, answer: Answer) -> None:
        """Let it be written from now on, by whoever waits.

        Raises:
            BadInput: the query is too long, or prompt and budget don't fit the model's context.
        """
        if self._closed:
            raise QeEdgeError("the model was closed")
        if not answer.prompt:
            raise BadInput("the prompt is empty")
        own = len(answer.prompt) - answer.prefix
        if own > QUERY:  # a page; some scripts take a token for each byte
            raise BadInput(f"the query takes {own} tokens, over {QUERY}. Shorten the query")
        if len(answer.prompt) + answer.budget > self._backend.context:
            raise BadInput(
                f"the query takes {len(answer.prompt)} tokens with its prompt; with {answer.budget} for the "
                f"expansion that is over the model's context of {self._backend.context}. Shorten the query"
            )
        self._waiting.append(answer)

    def room(self, slots: int) -> None:
        """Write so many answers together from now on, or as many as the engine can."""
        self._slots = max(self._slots, min(slots, self._backend.parallel))

    def wait(self, answer: Answer, *, beyond: float = math.inf) -> None:
        """Return when it is done, or has more than `beyond` tokens (if it is `streamed`).

        Raises:
            QeEdgeError: the engine failed, or was closed.
        """
        while self._lead(answer, beyond):
            try:
                while not (self._closed or answer.is_late() or answer.done or self._advance()):
                    pass
            finally:
                with self._changed:
                    self._led = False
                    self._changed.notify_all()
        if answer.error:
            raise answer.error

    def _lead(self, answer: Answer, beyond: float) -> bool:
        """Wait until the answer is there, or until nobody leads: then it's the caller's turn."""

        def ready() -> bool:
            # What is late is done with what is there, though it may have been abandoned too.
            return answer.is_late() or answer.done or answer.abandoned or len(answer.tokens) > beyond

        with self._changed:
            left = answer.deadline - time.perf_counter()
            # Whoever leads may be in the middle of a step when the time is up.
            self._changed.wait_for(lambda: ready() or not self._led, None if left == math.inf else left)
            if ready():
                return False
            if self._closed:
                raise QeEdgeError("the model was closed")
            self._led = True
            return True

    def wake(self) -> None:
        """Let those look up whose answer was abandoned."""
        with self._changed:
            self._changed.notify_all()

    def _advance(self) -> bool:
        """One step of all answers; returns whether somebody got what they wait for."""
        try:
            self._drop_ended()
            self._admit()
            if not self._running:
                if self._waiting:
                    raise QeEdgeError("the engine has no room for a prompt")
                return True
            finished = False
            # Whoever writes waits for at most a piece of somebody's prompt at each token.
            writing = any(answer.tokens for answer in self._running.values())
            for batch in self._turn():
                for number, token in batch.step(PIECE if writing else None).items():
                    answer = self._running[batch, number]
                    if not answer.done:  # it may have become late meanwhile
                        answer.take(token, self._end)
                    if answer.done or answer.is_late():
                        self._remove(batch, number)
                    finished |= answer.done or answer.streamed
            return finished
        except Exception as error:
            for answer in self._running.values():
                answer.error = error
            while self._waiting:  # one may just be coming
                self._waiting.popleft().error = error
            self._clear()
            return True
        except BaseException:  # Ctrl-C: the others' answers start again
            for answer in reversed(self._running.values()):
                answer.tokens.clear()
                answer.first = 0.0
                if answer not in self._waiting:
                    self._waiting.appendleft(answer)
            self._clear()
            raise

    def _turn(self) -> list[Batch]:
        """The batches that compute this step.

        A step of an answer alone costs about as much as one of several together. With n of these running,
        it gets every n-th, so that each answer has its share.
        """
        self._steps += 1
        together = sum(batch is self._several for batch, _ in self._running)
        turn = {batch for batch, _ in self._running}
        if together and self._steps % together:
            turn.discard(self._alone)
        return list(turn)

    @property
    def _batches(self) -> list[Batch]:
        return [self._several, self._alone] if self._several else [self._alone]

    def _clear(self) -> None:
        self._running.clear()
        for batch in self._batches:
            batch.clear()

    def _drop_ended(self) -> None:
        """Those that nobody waits for any more, and those whose time is up."""
        over = [place for place, answer in self._running.items() if answer.abandoned or answer.is_late()]
        for batch, number in over:
            self._remove(batch, number)

    def _remove(self, batch: Batch, number: int) -> None:
        del self._running[batch, number]
        batch.remove(number)

    def _admit(self) -> None:
        """Start those who wait, as far as there is room.

        A long one waits for the place of those alone, and nobody behind it waits for that as well. Among
        those that want the same batch the first one is first, so none is passed over for ever.
        """
        if self._slots > self._made:
            if any(batch is self._several for batch, _ in self._running):
                return  # when these are done, there will be a larger one
            self._make_room()
        full: set[Batch] = set()
        for answer in list(self._waiting):
            if not (answer.abandoned or answer.is_late()):
                tokens = len(answer.prompt) + answer.budget
                batch = next(batch for batch in self._batches if tokens <= batch.longest)
                if batch in full or not batch.fits(tokens):
                    full.add(batch)
                    continue
                answer.begin = time.perf_counter()
                number = batch.add(
                    answer.prompt,
                    prefix=answer.prefix,
                    answer=answer.budget,
                    temperature=answer.temperature,
                    seed=answer.seed,
                )
                self._running[batch, number] = answer
            self._waiting.remove(answer)

    def _make_room(self) -> None:
        """A batch of as many slots as were wished for, or as memory has room for."""
        if self._several:
            self._several.close()  # first, or there would be both
        self._several, self._made = None, 1
        while self._slots > 1:
            try:
                self._several, self._made = self._backend.batch(self._slots), self._slots
                return
            except QeEdgeError:
                self._slots //= 2

    def forget(self) -> None:
        """Drop what is kept of earlier prompts, so that the next one is computed whole."""
        with self._changed:
            self._changed.wait_for(lambda: not self._led)
            if not self._closed:
                for batch in self._batches:
                    batch.forget()

    def close(self) -> None:
        """End all answers; whoever waits for one gets an error."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.wait_for(lambda: not self._led)
            self._running.clear()
            for batch in self._batches:
                batch.close()
            self._changed.notify_all()
