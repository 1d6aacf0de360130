"""The pages that are made of the code are as the code is."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_commands_is_as_they_are():
    command = [Path(sys.executable).with_name("typer"), "qe_edge.cli", "utils", "docs"]
    done = subprocess.run(
        [*command, "--name", "qe-edge", "--title", "Commands"],
        env={**os.environ, "TYPER_USE_RICH": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert done.stdout.strip() == written.strip(), "run `make docs`"


def test_the_page_of_the_python_api_is_as_its_docstrings():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "site" / "api.py"], capture_output=True, text=True, check=True
    )
    written = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    assert done.stdout.strip() == written.strip(), "run `make docs`"
