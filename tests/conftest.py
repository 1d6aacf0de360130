from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from tiny import save_tiny_llama, save_tiny_qwen2, save_tiny_qwen3

# Fixtures that the examples share are the point; and a machine may be slow.
SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("short", max_examples=150, **SHARED)
settings.register_profile("long", max_examples=30_000, **SHARED)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def _own_workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes outside its own folder, or finds what another one left."""
    monkeypatch.setenv("QE_EDGE_WORKDIR", str(tmp_path / "work"))
    monkeypatch.setenv("QE_EDGE_DATA", str(tmp_path / "data-home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session", autouse=True)
def _own_user_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept for a user is kept for the session's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("user")))
        yield


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged Qwen3 folder, tied; copy it before changing anything."""
    return save_tiny_qwen3(tmp_path_factory.mktemp("tiny") / "qwen3")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged Qwen2 folder, tied; copy it before changing anything."""
    return save_tiny_qwen2(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged Llama folder, untied; copy it before changing anything."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def gguf(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen3 as a GGUF; copy it before changing anything."""
    pytest.importorskip("llama_cpp")
    from qe_edge.export.gguf import convert_gguf
    from qe_edge.student.spec import read_spec

    out = tmp_path_factory.mktemp("gguf") / "student-F32.gguf"
    return convert_gguf(tiny_qwen3, out, dtype="f32", spec=read_spec(tiny_qwen3))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that a tiny student can learn: expansions.jsonl and pairs.jsonl (see `write_task`)."""
    from training import write_task

    return write_task(tmp_path_factory.mktemp("data"))


@pytest.fixture
def three(tmp_path: Path) -> Any:
    """A data set of three queries without judgments."""
    from qe_edge.retrieval.datasets import load_queries

    file = tmp_path / "three.jsonl"
    texts = ("what causes tides", "how does bread rise", "why is the sky blue")
    file.write_text("".join(json.dumps({"_id": f"q{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    return load_queries(file)


@pytest.fixture
def altered(tiny_qwen3: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny Qwen3 with changed config keys (None removes one) or tensors."""

    def alter(tensors: Callable[[dict[str, Any]], object] | None = None, **config: Any) -> Path:
        folder = shutil.copytree(tiny_qwen3, tmp_path / "altered")
        path = folder / "config.json"
        content = json.loads(path.read_text()) | config
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        if tensors:
            from safetensors.torch import load_file, save_file

            weights = load_file(folder / "model.safetensors")
            tensors(weights)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return alter
