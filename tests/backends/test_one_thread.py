"""A thread that makes all calls into an engine."""

from __future__ import annotations

import os
import threading

import pytest

from qe_edge.backends.one_thread import OneThread


def test_all_calls_are_made_by_it_in_their_order() -> None:
    thread, made = OneThread("engine"), []

    def call(number: int) -> int:
        made.append((number, threading.get_ident()))
        return number

    futures = [thread.submit(call, number) for number in range(50)]
    assert [future.result(10) for future in futures] == list(range(50))
    assert [number for number, _ in made] == list(range(50))
    assert len({ident for _, ident in made} - {threading.get_ident()}) == 1


def test_an_error_is_its_callers_and_the_next_call_is_made() -> None:
    thread = OneThread("engine")
    failed = thread.submit(int, "no number")
    assert thread.submit(int, "7").result(10) == 7
    with pytest.raises(ValueError, match="no number"):
        failed.result(10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_fork_starts_its_own() -> None:
    thread, inherited = OneThread("engine"), []
    wait, busy = threading.Event(), threading.Event()
    thread.submit(lambda: (busy.set(), wait.wait(20)))
    busy.wait(20)
    thread.submit(inherited.append, os.getpid())
    child = os.fork()
    if not child:
        answer = thread.submit(os.getpid).result(10)
        os._exit(0 if answer == os.getpid() and not inherited else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    wait.set()
    thread.submit(int).result(10)
    assert inherited == [os.getpid()]
