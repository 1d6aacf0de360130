"""The pages that are made of the code are as the code is."""

import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "program"), [("cli.md", "cli.py"), ("python-api.md", "api.py")])
def test_a_generated_page_is_as_the_code_is(page, program):
    done = subprocess.run(
        [sys.executable, DOCS / "site" / program], capture_output=True, text=True, check=True
    )
    assert done.stdout == (DOCS / page).read_text(encoding="utf-8"), "run `make docs`"


def test_the_page_of_commands_has_the_rare_options_too():
    assert "--checkpointing" in (DOCS / "cli.md").read_text(encoding="utf-8")
