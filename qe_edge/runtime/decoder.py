"""The one thread that computes with a loaded model: it writes and reads for everybody.

Whoever wants something hands it over and waits for its future. The thread takes what has come, lets new
prompts into a batch, computes one step of all that are in one, then looks again, until nothing is left.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import deque
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock, Thread

from qe_edge.backends.lifetime import check_not_forked
from qe_edge.backends.protocol import Backend, Batch, Reader
from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.runtime.generation import Call, Generation, Reading

QUERY = 512  # tokens that a prompt may have of its own
PIECE = 64  # tokens of prompts that are read between two steps of those who write


class Decoder:
    """All that a loaded model is asked for: answers, several together and longer ones alone, and readings.

    Its thread ends with `close`, with this object, or with the interpreter.

    Raises:
        BadInput: the model has no token to end an answer with.
    """

    def __init__(self, backend: Backend):
        end = backend.tokenize(backend.spec.prompt.end, True)
        if len(end) != 1:
            raise BadInput(
                f"the model's vocabulary has no single token {backend.spec.prompt.end!r} to end an answer"
            )
        self._backend, self._end_token = backend, end[0]
        self._alone = backend.batch(1)
        self._several: Batch | None = None
        self._slots = self._made = 1  # wished for, and of `_several`
        self._waiting: deque[Generation] = deque()
        self._running: dict[tuple[Batch, int], Generation] = {}
        self._steps = 0
        self._reader: Reader | None = None  # made when it is wanted: it has a cache of its own
        self._readings: deque[Reading] = deque()
        self._wrote = self._read = 0.0  # seconds, since there were both
        self._inbox: SimpleQueue[Generation | Reading | Call | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._lock, self._closed, self._process = Lock(), False, os.getpid()
        weakref.finalize(self, self._inbox.put, None)

    def write(self, generation: Generation) -> None:
        """Have an answer written.

        Raises:
            BadInput: the query is too long, or prompt and budget don't fit the model's context.
        """
        if not generation.prompt:
            raise BadInput("the prompt is empty")
        own = len(generation.prompt) - generation.prefix
        if own > QUERY:  # a page; some scripts take a token for each byte
            raise BadInput(f"the query takes {own} tokens, over {QUERY}. Shorten the query")
        size, budget, context = len(generation.prompt), generation.budget, self._backend.context
        if size + budget > context:
            raise BadInput(
                f"the query takes {size} tokens with its prompt; with {budget} for the expansion that is "
                f"over the model's context of {context}. Shorten the query"
            )
        self._hand_over(generation)

    def read(self, reading: Reading) -> None:
        """Have passages read; others' work is done in between."""
        self._hand_over(reading)

    def room(self, slots: int) -> None:
        """Write so many answers together from now on, or as many as the engine can."""
        self._slots = max(self._slots, min(slots, self._backend.parallel))

    def forget(self) -> None:
        """Drop what is kept of earlier prompts, so that the next one is computed whole."""
        if not self._closed:
            call = Call(self._forget)
            self._hand_over(call)
            call.future.result()

    def close(self) -> None:
        """End all work; whoever waits for some gets an error."""
        if os.getpid() != self._process:
            return  # what a fork copied is its parent's
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._inbox.put(None)
        if self._thread:
            self._thread.join()
        for batch in self._batches:
            batch.close()
        if self._reader:
            self._reader.close()

    def _hand_over(self, item: Generation | Reading | Call) -> None:
        check_not_forked(self._process)  # a fork has no thread that would take it
        with self._lock:
            if self._closed:
                raise QeEdgeError("the model was closed; load it again")
            if self._thread is None:
                arguments = self._inbox, weakref.ref(self)
                # Not waited for when the interpreter ends: `Lifetime` sees to what is native by then.
                self._thread = Thread(target=_serve, args=arguments, name="qe-edge decoder", daemon=True)
                self._thread.start()
            self._inbox.put(item)

    # What follows is called by the thread alone.

    def _work(self, item: Generation | Reading | Call) -> None:
        """Do this and all that comes meanwhile."""
        self._take(item)
        while self._running or self._waiting or self._readings:
            while not self._inbox.empty():
                coming = self._inbox.get()
                if coming is None:
                    self._closed = True  # the interpreter ends, if it wasn't yet
                    self._fail(QeEdgeError("the model was closed; load it again"))
                    self._inbox.put(None)  # for `_serve`
                    return
                self._take(coming)
            self._step()

    def _take(self, item: Generation | Reading | Call) -> None:
        if isinstance(item, Generation):
            self._waiting.append(item)
        elif isinstance(item, Reading):
            self._readings.append(item)
        else:
            try:
                item.call()
                item.end()
            except QeEdgeError as error:
                item.end(error)

    def _step(self) -> None:
        """Compute on, for those who write and for those who read, half of the time each."""
        try:
            self._drop_ended()
            self._admit()
            begin = time.perf_counter()
            if self._readings and (self._read <= self._wrote or not self._running):
                self._read_on(self._readings.popleft())
                self._read += time.perf_counter() - begin
            elif self._running:
                self._write_on()
                self._wrote += time.perf_counter() - begin
            elif self._waiting:
                raise QeEdgeError("the engine has no room for a prompt")
            if not (self._readings and self._running):
                self._wrote = self._read = 0.0
        except BaseException as error:
            self._fail(error)

    def _write_on(self) -> None:
        """One step of all answers that have their turn."""
        # Whoever writes waits for at most a piece of somebody's prompt at each token.
        writing = any(generation.tokens for generation in self._running.values())
        for batch in self._turn():
            for number, token in batch.step(PIECE if writing else None).items():
                generation = self._running[batch, number]
                generation.take(token, self._end_token)
                if generation.finish:
                    self._remove(batch, number)

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

    def reader(self) -> Reader:
        """The engine's, for readings."""
        self._reader = self._reader or self._backend.reader()
        return self._reader

    def _read_on(self, reading: Reading) -> None:
        """A few of its passages, then it's the next one's turn."""
        try:
            reading.turns = reading.turns or reading.start()
            values = next(reading.turns, None)
        except Exception as error:  # which is this one's own
            reading.end(error)
            return
        if values is None:
            reading.end()
        else:
            reading.values += values
            self._readings.append(reading)

    def _drop_ended(self) -> None:
        """Those that nobody waits for any more, and those whose time is up."""
        for (batch, number), generation in list(self._running.items()):
            if generation.over:
                self._remove(batch, number)
                generation.end()
        for reading in [reading for reading in self._readings if reading.over]:
            self._readings.remove(reading)
            reading.end()

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
        for generation in list(self._waiting):
            if generation.over:
                generation.end()
            else:
                tokens = len(generation.prompt) + generation.budget
                batch = next(batch for batch in self._batches if tokens <= batch.longest)
                if batch in full or not batch.fits(tokens):
                    full.add(batch)
                    continue
                generation.begin = time.perf_counter()
                number = batch.add(
                    generation.prompt,
                    prefix=generation.prefix,
                    answer=generation.budget,
                    temperature=generation.temperature,
                    seed=generation.seed,
                )
                self._running[batch, number] = generation
            self._waiting.remove(generation)

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

    @property
    def _batches(self) -> list[Batch]:
        return [self._several, self._alone] if self._several else [self._alone]

    def _forget(self) -> None:
        for batch in self._batches:
            batch.forget()
        if self._reader:
            self._reader.forget()

    def _fail(self, error: BaseException) -> None:
        """End all work with an error, in which case nothing of a batch can be relied on."""
        for work in (*self._running.values(), *self._waiting, *self._readings):
            work.end(error)
        self._running.clear()
        self._waiting.clear()
        self._readings.clear()
        with suppress(QeEdgeError):  # closed
            for batch in self._batches:
                batch.clear()


def _serve(inbox: SimpleQueue[Generation | Reading | Call | None], reference: weakref.ref[Decoder]) -> None:
    """The thread. It has the decoder only while there is work, so that one that nobody has can be freed."""
    while (item := inbox.get()) is not None:
        if decoder := reference():
            decoder._work(item)
        del decoder, item
