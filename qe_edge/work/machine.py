"""What figures were measured with: the machine, and the versions that decide results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Reported when installed; looked up by distribution name so that nothing heavy is imported.
_PACKAGES = (
    *(
        "qe-edge",
        "bm25s",
        "ir-measures",
        "PyStemmer",
        "jieba",
        "numpy",
        "torch",
        "transformers",
        "trl",
        "peft",
        "datasets",
    ),
    *("gguf", "llama-cpp-python", "mlx", "mlx-lm"),
)


# Turns that a thread of GNU's OpenMP waits awake. Its own 300,000 take the processor from the one that is
# waited for, as soon as another process wants some of it too: on two cores beside a busy process, 3,000
# brought llama.cpp 3 to 6 times the tokens and halved the time of training, and cost next to nothing alone.
SPIN = "3000"


@contextmanager
def drowsy_threads() -> Iterator[None]:
    """Libraries that are loaded within it have threads that soon sleep, unless the user says how they wait.

    OpenMP reads its environment when it is loaded.
    """
    own = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.isdisjoint(os.environ)
    if own:
        os.environ["GOMP_SPINCOUNT"] = SPIN
    try:
        yield
    finally:
        if own:
            os.environ.pop("GOMP_SPINCOUNT", None)


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cpu_name() -> str:
    """The processor's marketing name where the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy() -> float:
    """The share of the processors that is at work now, 0 to 1; looks for half a second."""
    import psutil

    return float(psutil.cpu_percent(interval=0.5)) / 100


def machine() -> dict[str, Any]:
    """What the figures of a run were measured on. No host or user name."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
    }
