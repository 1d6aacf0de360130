"""An engine that writes what a test wants."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import repeat
from typing import Any

from qe_edge import Expander
from qe_edge.backends.protocol import OneByOne


def says(expander: Expander, text: str, *, pause: float = 0.0, end: bool = True) -> None:
    """Let the model write this text, for ever with `end` false, with a pause before each token."""
    ids = expander.backend.tokenize(text, False)
    last = expander.backend.tokenize(expander.spec.prompt.end, True)

    def generate(*_: Any, **__: Any) -> Iterator[int]:
        for token in [*ids, *last] if end else (token for _ in repeat(None) for token in ids):
            time.sleep(pause)
            yield token

    expander._asker.decoder._alone = OneByOne(generate, 2048)  # type: ignore[arg-type]
