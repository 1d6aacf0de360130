"""The processor's energy counters, from a folder laid out as Linux's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qe_edge.bench.energy import EnergyMeter


def package(folder: Path, microjoules: int, name: str = "package-0") -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("262143328850\n")
    return folder / "energy_uj"


def test_joules_of_all_packages_since_the_last_reading(tmp_path: Path) -> None:
    one, two = (
        package(tmp_path / "intel-rapl:0", 1_000_000),
        package(tmp_path / "intel-rapl:1", 0, "package-1"),
    )
    others = [
        package(tmp_path / f"intel-rapl:{zone}", 5, name) for zone, name in (("0:0", "core"), ("2", "psys"))
    ]
    meter = EnergyMeter(tmp_path)
    for counter in others:
        counter.write_text("9000000\n")
    one.write_text("3500000\n")
    two.write_text("250000\n")
    assert meter.joules() == 2.75
    assert meter.joules() == 0.0


def test_a_counter_may_start_again(tmp_path: Path) -> None:
    counter = package(tmp_path / "intel-rapl:0", 262_143_000_000)
    meter = EnergyMeter(tmp_path)
    counter.write_text("671150\n")
    assert meter.joules() == 1.0


def test_a_machine_that_tells_nothing_reports_nothing(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path / "none").joules() is None
    package(tmp_path / "intel-rapl:0", 0).unlink()  # without a counter to read
    assert EnergyMeter(tmp_path).joules() is None


def test_apples_meter_is_read_by_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the library's published interface, which runs on Apple's processors alone."""
    used = SimpleNamespace(cpu_total_mj=100, gpu_mj=10_000, ane_mj=None, dram_mj=7)
    library = SimpleNamespace(AppleEnergyMonitor=lambda: SimpleNamespace(get_cumulative_energy=lambda: used))
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", library)
    meter = EnergyMeter(tmp_path)
    used.cpu_total_mj, used.gpu_mj, used.dram_mj = 350, 12_500, 900
    assert meter.joules() == 2.75
    assert meter.joules() == 0.0
