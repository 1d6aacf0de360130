"""How many threads compute beside other processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from qe_edge import OPEN, Expander
from qe_edge.backends import free_cores
from qe_edge.backends.free_cores import EVERY, FreeCores


class Machine:
    """Four cores, whose clock and load a test moves on."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now, self.all, self.own = 100.0, 50.0, 5.0
        patch.setattr(free_cores.psutil, "cpu_count", lambda: 4)
        patch.setattr(
            free_cores.psutil, "cpu_times", lambda: SimpleNamespace(user=self.all, system=1.0, nice=0.5)
        )
        process = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=self.own, system=0.0))
        patch.setattr(free_cores.psutil, "Process", lambda: process)
        patch.setattr(free_cores.time, "perf_counter", lambda: self.now)

    def work(self, seconds: float, *, others: float, own: float) -> None:
        """So many cores are kept at work for so long."""
        self.now += seconds
        self.all += (others + own) * seconds
        self.own += own * seconds


@pytest.mark.parametrize(
    ("others", "free"), [(0.0, 4), (0.3, 4), (1.0, 3), (2.0, 2), (3.0, 1), (4.0, 1), (2.6, 1)]
)
@pytest.mark.parametrize("own", [0.0, 1.0, 4.0])
def test_what_others_keep_at_work_is_left_to_them(
    monkeypatch: pytest.MonkeyPatch, others: float, free: int, own: float
) -> None:
    machine = Machine(monkeypatch)
    cores = FreeCores(4)
    assert cores() == 4  # nothing is known yet
    machine.work(1.0, others=others, own=own)
    assert cores() == free


def test_it_looks_now_and_then_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    cores = FreeCores(2)
    machine.work(EVERY, others=3.0, own=1.0)
    assert cores() == 1
    machine.work(EVERY / 2, others=0.0, own=1.0)
    assert cores() == 1  # too short a time to tell
    machine.work(EVERY, others=0.0, own=1.0)
    assert cores() == 2  # two of four cores, however many are free


def test_without_a_number_each_step_takes_the_free_ones(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    asked = []
    monkeypatch.setattr(FreeCores, "__call__", lambda self: asked.append(1) or 1)
    monkeypatch.setattr("qe_edge.backends.llama_model.usable_cores", lambda: 2)
    with Expander.load(gguf, gate=OPEN, budget_tokens=4) as expander:
        text = expander.expand("what causes tides").text
    assert asked
    asked.clear()
    with Expander.load(gguf, gate=OPEN, budget_tokens=4, threads=2) as expander:
        assert expander.expand("what causes tides").text == text
    assert not asked
