"""A thread that makes all calls into an engine, one after the other, whoever asks for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

T = TypeVar("T")


class OneThread:
    """It is started by the first call, in each process anew, and never ends.

    `concurrent.futures` would end it with the interpreter. But what MLX keeps for a thread asks for the
    interpreter's lock when it is destroyed, too late by then, which ends the process.
    """

    def __init__(self, name: str):
        self._name, self._lock, self._process = name, Lock(), 0
        self._calls: SimpleQueue[Callable[[], None]]

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        if self._process != os.getpid():
            self._start()
        future: Future[T] = Future()

        def call() -> None:
            try:
                future.set_result(work(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        return future

    def _start(self) -> None:
        with self._lock:
            if self._process != os.getpid():  # a fork copies what was asked for, but not the thread
                self._calls, self._process = SimpleQueue(), os.getpid()
                Thread(target=self._run, args=[self._calls], name=self._name, daemon=True).start()

    @staticmethod
    def _run(calls: SimpleQueue[Callable[[], None]]) -> None:
        while True:
            calls.get()()
