"""An engine that writes what a test wants, for `Expander(backend)`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from qe_edge import Expander, ExpansionCache
from qe_edge.backends.open import open_backend
from qe_edge.backends.protocol import Backend, Batch, OneByOne
from qe_edge.student.models import resolve


class Scripted:
    """A real backend; what is written alone is the `script`, a list of tokens at each, once there is one."""

    def __init__(self, backend: Backend):
        self._real = backend
        self.script: Iterable[int] | None = None
        self.pause = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def batch(self, slots: int) -> Batch:
        real = self._real.batch(slots)
        return _Switched(self, real) if slots == 1 else real

    def generate(self, *_: Any, **__: Any) -> Iterator[int]:
        assert self.script is not None
        for token in self.script:
            time.sleep(self.pause)
            yield token


class _Switched:
    """One sequence, of the script or of the real engine."""

    def __init__(self, scripted: Scripted, real: Batch):
        self._scripted, self._real = scripted, real
        self._now: Batch = real
        self._told: Batch = OneByOne(lambda *a, **k: scripted.generate(*a, **k), real.longest)  # type: ignore

    def __getattr__(self, name: str) -> Any:
        return getattr(self._now, name)

    def fits(self, tokens: int) -> bool:
        return self._told.fits(tokens) and self._real.fits(tokens)

    def add(self, prompt: Sequence[int], **settings: Any) -> int:
        self._now = self._real if self._scripted.script is None else self._told
        return self._now.add(prompt, **settings)

    def close(self) -> None:
        self._real.close()


def scripted(model: Path, *, engine: Any = None, cache: Path | None = None, **settings: Any) -> Expander:
    """As `Expander.load`, with an engine that `says` what it is told."""
    backend: Any = Scripted(open_backend(resolve(model), engine=engine))
    return Expander(backend, cache=ExpansionCache(cache) if cache else None, digest="of a test", **settings)


def says(expander: Expander, text: str, *, pause: float = 0.0, end: bool = True) -> None:
    """Let the model write this text, for ever with `end` false, with a pause before each token."""
    backend: Any = expander.backend
    ids = backend.tokenize(text, False)
    last = backend.tokenize(expander.spec.prompt.end, True)
    backend.script = [*ids, *last] if end else _Endless(ids)
    backend.pause = pause


class _Endless:
    def __init__(self, ids: list[int]):
        self._ids = ids

    def __iter__(self) -> Iterator[int]:
        return (token for _ in repeat(None) for token in self._ids)
