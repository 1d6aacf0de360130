"""Native memory that is freed once, and never while a call is inside it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from threading import Condition

from qe_edge.errors import QeEdgeError

# Seconds that an ending interpreter waits for calls of other threads; a step of a model takes less.
AT_EXIT = 10.0


def check_not_forked(process: int) -> None:
    """Refuse to use in one process what was loaded in another one, from which it was forked.

    Raises:
        QeEdgeError: engines compute in threads, which a fork doesn't copy: the first call would never end.
    """
    if os.getpid() != process:
        raise QeEdgeError(
            "this process was forked from one that had loaded a model, and has none of its threads; start it "
            'by multiprocessing\'s "spawn", or load the first model after the fork'
        )


class Lifetime:
    """The time in which an owner's native objects may be used: `with lifetime:` is around every call.

    It ends with `close`, with its owner or with the interpreter: no call begins any more, those that are
    inside are waited for, then `free` is called. What lives within a `parent` goes before it.
    """

    def __init__(self, owner: object, free: Callable[[], None], parent: Lifetime | None = None):
        self._free, self._parent = free, parent
        self._changed = Condition()
        self._inside, self._closed, self._freed = 0, False, False
        self._process = os.getpid()
        self._children: list[Lifetime] = []
        if parent:
            parent._children.append(self)
        weakref.finalize(owner, self.close, patience=AT_EXIT)

    def __enter__(self) -> None:
        check_not_forked(self._process)
        if self._parent:
            self._parent.__enter__()
        with self._changed:
            if not self._closed:
                self._inside += 1
                return
        if self._parent:
            self._parent.__exit__()
        raise QeEdgeError("the model was closed; load it again")

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()
        if self._parent:
            self._parent.__exit__()

    def close(self, *, patience: float | None = None) -> None:
        """End it; whoever comes later gets an error.

        With `patience` (in seconds), what is still in use after that stays allocated.
        """
        if os.getpid() != self._process:
            return  # what a fork copied is its parent's
        with self._changed:
            self._closed = True
        for child in list(self._children):
            child.close(patience=patience)
        with self._changed:
            if not self._changed.wait_for(lambda: not self._inside, patience) or self._freed:
                return
            self._freed = True
        self._free()
        if self._parent:
            self._parent._children.remove(self)
