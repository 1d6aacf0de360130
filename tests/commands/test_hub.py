"""Exports on the hub: pushed, and loaded from there, against a stand-in for it on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import Hub, hub
from tiny_encoder import save_tiny_encoder

from qe_edge.errors import BadArgument
from qe_edge.export.config import ExportConfig
from qe_edge.export.export import export_model
from qe_edge.student.hub import fetch

pytest.importorskip("huggingface_hub")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def export(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp")
    out = tmp_path_factory.mktemp("hub") / "export"
    export_model(tiny_qwen3, out, ExportConfig(kinds=("Q4_K_M", "Q8_0"), formats=("gguf",), verify=False))
    return out


@pytest.fixture
def there() -> Iterator[Hub]:
    with hub() as state:
        yield state


@pytest.fixture
def run(there: Hub, tmp_path: Path) -> Run:
    """The command line; the hub's client reads its environment once, so each gets a process of its own."""

    def command(*arguments: str, token: str = "hf_test", **more: str) -> subprocess.CompletedProcess[str]:
        ours = os.environ | {
            "HF_ENDPOINT": there.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_TOKEN": token,
        }
        return subprocess.run(
            [sys.executable, "-m", "qe_edge", *arguments],
            env=ours | {"HF_HUB_DISABLE_XET": "1"} | more,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return command


def test_an_export_is_pushed_with_what_was_measured_and_loaded_again(
    export: Path, there: Hub, run: Run, tmp_path: Path
) -> None:
    file = export / "student-Q4_K_M.gguf"
    done = run("bench", "--dataset", "demo-en", "--model", f"mine={file}", "--budget-tokens", "4", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    done = run("push", "me/student", str(export), "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["artifacts"]["url"].startswith(f"{there.url}/me/student/commit/")

    files = there.repos["me/student"]
    assert there.private == {"me/student"}
    assert files.keys() == {path.name for path in export.iterdir()} - {"run.json"}
    assert files["student-Q8_0.gguf"] == (export / "student-Q8_0.gguf").read_bytes()
    for line in files["SHA256SUMS"].decode().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256(files[name]).hexdigest() == digest
    card = files["README.md"].decode()
    assert "model-index:" in card and "type: ndcg_at_10" in card and "name: demo-en@test (" in card
    assert "student-Q4_K_M.gguf, joined by mass:0.7" in card
    assert "student-Q8_0.gguf, joined" not in card  # which was not measured
    assert str(tmp_path) not in card and str(export.parent) not in card

    for name in ("hf:me/student:Q4_K_M", "hf:me/student:q4_k_m", "hf:me/student/student-Q4_K_M.gguf@main"):
        done = run("expand", "what causes tides", "--model", name, "--budget-tokens", "2", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["inputs"]["model"] == name
    there.asked.clear()
    there.repos.clear()  # as good as no network
    done = run("expand", "tides", "-m", "hf:me/student:Q4_K_M", "--budget-tokens", "2", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert there.asked == []
    dead = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # no network, which nobody said
    done = run("expand", "tides", "-m", "hf:me/student:Q4_K_M", "--budget-tokens", "2", **dead)
    assert done.returncode == 0, done.stderr
    assert "etry" not in done.stderr  # the hub's client would try for 23 seconds


def test_what_the_hub_lacks_or_refuses_is_said_in_one_line(
    export: Path, there: Hub, run: Run, tmp_path: Path
) -> None:
    there.repos["me/two"] = {"a-Q4_K_M.gguf": b"GGUF", "b-Q4_K_M.gguf": b"GGUF"}
    for name, message in (
        (
            "hf:me/nothing:Q4_K_M",
            "it was not fetched before, and the hub has none for you",
        ),
        ("hf:me/two:Q8_0", "me/two has no file *Q8_0.gguf; it has a-Q4_K_M.gguf, b-Q4_K_M.gguf"),
        ("hf:me/two:Q4_K_M", "name one of them: hf:me/two/a-Q4_K_M.gguf, hf:me/two/b-Q4_K_M.gguf"),
    ):
        done = run("expand", "tides", "--model", name)
        assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr

    done = run("push", "me/student", str(export), token="hf_wrong")
    assert done.returncode == 6
    assert "the hub refuses it" in done.stderr and "hf auth login" in done.stderr
    there.repos["me/public"] = {}
    done = run("push", "me/public", str(export), "--private")
    assert done.returncode == 2 and "me/public is there already and public" in done.stderr
    assert there.repos["me/public"] == {}
    done = run("push", "me/student", str(tmp_path))
    assert done.returncode == 5 and "holds no run.json of `qe-edge export`" in done.stderr
    assert "me/student" not in there.repos


def test_an_encoder_on_the_hub_reads(export: Path, there: Hub, run: Run, tmp_path: Path) -> None:
    there.repos["me/encoder"] = {"tiny-F32.gguf": save_tiny_encoder(tmp_path / "tiny.gguf").read_bytes()}
    student, encoder = str(export / "student-Q8_0.gguf"), "hf:me/encoder:F32"
    asked = ("tides", "-d", "demo-en", "-m", student, "--refine", "--reader", encoder)
    done = run("search", *asked)
    assert done.returncode == 0 and " 1. en-" in done.stdout, done.stderr
    measured = (
        "-d",
        "demo-en",
        "-m",
        student,
        "--refine",
        "--reader",
        encoder,
        "--baseline",
        f"dense:{encoder}",
    )
    work = tmp_path / "work"
    done = run("bench", *measured, "--budget-tokens", "2", "--columns", "ndcg", QE_EDGE_WORKDIR=str(work))
    assert done.returncode == 0, done.stderr
    assert "refine by tiny-F32" in done.stdout and "dense tiny-F32" in done.stdout, done.stdout
    record = json.loads((work / "bench" / "001" / "run.json").read_text(encoding="utf-8"))
    assert record["settings"]["reader"] == [encoder]


def test_a_changed_file_is_not_published(export: Path, there: Hub, run: Run, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(export, tmp_path / "copy")
    with (copy / "student-Q4_K_M.gguf").open("ab") as file:
        file.write(b"x")
    done = run("push", "me/student", str(copy))
    assert done.returncode == 5 and "it is damaged or was changed" in done.stderr
    assert not there.repos


@pytest.mark.parametrize("name", ["hf:", "hf:me", "hf:me/student", "hf:me/student/model.bin", "hf:a/b:c d"])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(BadArgument, match=r"a model on the hub is hf:OWNER/NAME/FILE\.gguf"):
        fetch(name)
