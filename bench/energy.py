"""What the processor's own meter says: Linux's powercap (RAPL) counts the joules of each package.

It counts all that runs on the machine, and often only root may read it. Elsewhere nothing is reported.
"""

from __future__ import annotations

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
        self._before = self._read()

    def joules(self) -> float | None:
        """Since the last call, or since the meter was made."""
        before, now = self._before, self._read()
        self._before = now
        if not before or not now:
            return None
        used = 0
        for start, end, folder in zip(before, now, self._packages, strict=True):
            # The counter starts again from 0 past its range.
            used += end - start if end >= start else end - start + _number(folder / "max_energy_range_uj")
        return used / 1e6

    def _read(self) -> list[int]:
        try:
            return [_number(folder / "energy_uj") for folder in self._packages]
        except (OSError, ValueError):
            return []


def _number(file: Path) -> int:
    return int(_text(file))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")
