from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_tiny_llama, save_tiny_qwen3


@pytest.fixture(autouse=True)
def _own_workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes outside its own folder, or finds what another one left."""
    monkeypatch.setenv("QE_EDGE_WORKDIR", str(tmp_path / "work"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged Qwen3 folder, tied; copy it before changing anything."""
    return save_tiny_qwen3(tmp_path_factory.mktemp("tiny") / "qwen3")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged Llama folder, untied; copy it before changing anything."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
