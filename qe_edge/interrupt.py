"""Ctrl-C where Python can't act on it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held() -> Iterator[None]:
    """Hold a Ctrl-C back until the block has ended, and act on it then.

    Inside a function that C code calls back, Python reports a KeyboardInterrupt and forgets it. Nothing is
    held in other threads, which get no Ctrl-C, nor where a program has its own way with it.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
