"""How many threads find a processor free: a team waits for the one of its threads that has none."""

from __future__ import annotations

import time

import psutil

EVERY = 0.25  # seconds between two looks; the system counts in hundredths


class FreeCores:
    """Called before each step of an engine: `most`, less what other processes keep at work now.

    On two cores beside one busy process, one thread wrote 1.8 times the tokens of two
    (`python -m qe_edge.bench.programs.thread_speed`). What this process does besides counts as its own.
    """

    def __init__(self, most: int):
        self._most, self._cores = most, psutil.cpu_count() or most
        self._own = psutil.Process()
        self._free = most
        self._at, self._busy = time.perf_counter(), self._others()

    def __call__(self) -> int:
        now = time.perf_counter()
        if now - self._at >= EVERY:
            busy = self._others()
            others = max(0.0, (busy - self._busy) / (now - self._at))
            self._free = max(1, min(self._most, round(self._cores - others)))
            self._at, self._busy = now, busy
        return self._free

    def _others(self) -> float:
        """Seconds of all processors that went to other processes, or to other machines on this one."""
        system, own = psutil.cpu_times(), self._own.cpu_times()
        working = (
            system.user
            + system.system
            + sum(
                getattr(system, kind, 0.0) for kind in ("nice", "irq", "softirq", "steal", "interrupt", "dpc")
            )
        )
        return working - own.user - own.system
