"""What the processor's own meter says: powercap (RAPL) on Linux, IOReport on Apple's processors.

Both count all that runs on the machine, without its memory chips. Linux often lets only root read it;
Apple's is what `powermetrics` shows, read by zeus-apple-silicon, which needs no root.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules between two readings, of all packages together; None where the machine tells none."""

    def __init__(self, powercap: Path = POWERCAP):
        # On AMD too. Other zones count parts of a package again, or the platform with all of it (psys).
        self._packages = [
            name.parent
            for name in sorted(powercap.glob("intel-rapl:*/name"))
            if _text(name).startswith("package")
        ]
        self._apple = _apple_meter()
        self._before = self._read()

    def joules(self) -> float | None:
        """Since the last call, or since the meter was made."""
        before, now = self._before, self._read()
        self._before = now
        if not before or not now:
            return None
        used = 0
        for i, (start, end) in enumerate(zip(before, now, strict=True)):
            used += end - start
            if end < start:  # the counter starts again from 0 past its range
                used += _number(self._packages[i] / "max_energy_range_uj")
        return used / 1e6

    def _read(self) -> list[int]:
        """Microjoules of each package, or part of Apple's."""
        if self._apple:
            return self._apple()
        try:
            return [_number(folder / "energy_uj") for folder in self._packages]
        except (OSError, ValueError):
            return []


def _apple_meter() -> Callable[[], list[int]] | None:
    """Reads the microjoules that CPU, GPU and neural engine used since some moment; None elsewhere."""
    try:
        from zeus_apple_silicon import AppleEnergyMonitor

        monitor = AppleEnergyMonitor()
    except (ImportError, RuntimeError):  # not installed, or the system tells nothing
        return None

    def read() -> list[int]:
        used = monitor.get_cumulative_energy()
        parts = (used.cpu_total_mj, used.gpu_mj, used.ane_mj)
        return [1000 * part for part in parts if part is not None]  # what this processor meters

    return read


def _number(file: Path) -> int:
    return int(_text(file))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")
