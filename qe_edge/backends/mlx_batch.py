"""Many token sequences in one of mlx-lm's batches, with the prefix that prompts share computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from qe_edge.backends.one_thread import OneThread
from qe_edge.errors import require

T = TypeVar("T")
KEPT = 2  # prefixes: a student's prompt in each of its languages


class MlxBatch:
    """Up to `slots` sequences over a loaded model, on mlx-lm's `BatchGenerator`.

    All of it happens in the one `thread` to which MLX's streams belong.
    """

    def __init__(self, model: Any, slots: int, longest: int, thread: OneThread):
        self.longest = longest
        self._mx, self._model, self._slots = require("mlx.core", "mlx"), model, slots
        self._running: set[int] = set()
        self._prefixes: dict[tuple[int, ...], Any] = {}  # the one used last at the end
        self._thread = thread
        self._generator: Any = self._in_thread(self._new_generator)

    def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return self._thread.submit(work, *arguments).result()

    def _new_generator(self) -> Any:
        from mlx_lm.generate import BatchGenerator

        return BatchGenerator(
            self._model, completion_batch_size=self._slots, prefill_batch_size=min(8, self._slots)
        )

    def fits(self, tokens: int) -> bool:
        return len(self._running) < self._slots and tokens <= self.longest

    def add(
        self, prompt: Sequence[int], *, prefix: int, answer: int, temperature: float = 0.0, seed: int = 0
    ) -> int:
        number = self._in_thread(self._add, list(prompt), prefix, answer, temperature, seed)
        self._running.add(number)
        return number

    def _add(self, prompt: list[int], prefix: int, answer: int, temperature: float, seed: int) -> int:
        start = min(prefix, len(prompt) - 1)
        caches = [self._keep(tuple(prompt[:start]))] if start else None
        sampler = self._sampler(temperature, seed) if temperature else None
        # One more than will be asked for, or the generator would end it, and copy its cache out.
        (number,) = self._generator.insert([prompt[start:]], [answer + 1], caches, samplers=[sampler])
        return number

    def _sampler(self, temperature: float, seed: int) -> Callable[[Any], Any]:
        random = self._mx.random
        key = random.key(seed % 2**32)

        def draw(logprobs: Any) -> Any:
            nonlocal key
            key, own = random.split(key)
            return random.categorical(logprobs / temperature, key=own)

        return draw

    def _keep(self, prefix: tuple[int, ...]) -> Any:
        """The cache of a prefix, computed now if it isn't there; the generator copies it."""
        from mlx_lm.models.cache import make_prompt_cache

        cache = self._prefixes.pop(prefix, None)
        if cache is None:
            if len(self._prefixes) == KEPT:
                del self._prefixes[next(iter(self._prefixes))]
            cache = make_prompt_cache(self._model)
            with self._mx.stream(self._generator.stream):
                self._model(self._mx.array([list(prefix)]), cache=cache)
                self._mx.eval([layer.state for layer in cache])
        self._prefixes[prefix] = cache
        return cache

    def step(self, piece: int | None = None) -> dict[int, int]:
        found = self._in_thread(self._generator.next_generated)
        return {answer.uid: answer.token for answer in found}

    def remove(self, number: int) -> None:
        self._running.remove(number)
        self._in_thread(self._generator.remove, [number])

    def forget(self) -> None:
        self._prefixes.clear()

    def clear(self) -> None:
        self._running.clear()
        self._prefixes.clear()
        self._generator = self._in_thread(self._new_generator)

    def close(self) -> None:
        self._in_thread(self._generator.close)
