"""Weights are laid out for AMX where a trial in a process of its own came through, and nowhere else."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("llama_cpp")

from qe_edge.backends import amx, amx_trial
from qe_edge.backends.gguf_check import check_gguf
from qe_edge.backends.llama_model import LlamaModel, load_library
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.quantize import quantize_gguf

KNOWS, KNOWS_NOT = b"AVX512 = 1 | AMX_INT8 = 1 | ", b"AVX512 = 1 | "


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user's folder."""
    monkeypatch.setattr(amx, "user_folder", lambda: tmp_path / "user")
    return tmp_path / "user"


def library(info: bytes) -> Any:
    """A llama_cpp that says what it was built with."""
    return SimpleNamespace(__file__=load_library().__file__, llama_print_system_info=lambda: info)


class Trials:
    """Stands for the child processes: how each ends."""

    def __init__(self, *ends: subprocess.CompletedProcess[bytes] | Exception):
        self.ends = list(ends)

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def ended(code: int, printed: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.CompletedProcess([], code, printed)


def test_a_build_without_amx_needs_no_trial(user, monkeypatch):
    monkeypatch.setattr(amx.subprocess, "run", Trials())
    assert amx.may_repack(library(KNOWS_NOT), Path("any.gguf"), frozenset({8}))
    assert not user.exists()


@pytest.mark.parametrize(
    ("end", "found"),
    [
        (ended(0, b"agrees\n"), "agrees"),
        (ended(0), "differs"),
        (ended(-11), "dies"),
        (subprocess.TimeoutExpired([], 1), "dies"),
        (OSError("no such program"), "dies"),
    ],
    ids=["agrees", "differs", "dies", "hangs", "no process"],
)
def test_a_trial_decides_and_is_made_once(end, found, user, monkeypatch):
    monkeypatch.setattr(amx.subprocess, "run", Trials(end))
    for _ in range(2):
        assert amx.may_repack(library(KNOWS), Path("any.gguf"), frozenset({8, 0})) is (found == "agrees")
    assert amx.verdict(library(KNOWS), Path("any.gguf"), frozenset({0, 8})) == found


def test_other_types_of_weights_are_another_trial(user, monkeypatch):
    monkeypatch.setattr(amx.subprocess, "run", Trials(ended(0, b"agrees"), ended(-11)))
    found = [amx.may_repack(library(KNOWS), Path("any.gguf"), frozenset({kind})) for kind in (8, 2, 8, 2)]
    assert found == [True, False, True, False]


def test_a_folder_that_cant_be_written_costs_another_trial(user, monkeypatch):
    user.write_text("a file")
    monkeypatch.setattr(amx.subprocess, "run", Trials(ended(0, b"agrees"), ended(0, b"agrees")))
    for _ in range(2):
        assert amx.may_repack(library(KNOWS), Path("any.gguf"), frozenset())


@pytest.fixture
def quantized(tiny_qwen3: Path, tmp_path: Path) -> Path:
    """AMX multiplies quantized weights alone."""
    return quantize_gguf(convert_gguf(tiny_qwen3, tmp_path / "BF16.gguf"), tmp_path / "Q8_0.gguf", "Q8_0")


def test_the_real_trial_agrees_or_is_survived(quantized, user):
    """On a processor without AMX, or with a good build, it agrees; a bad build dies in it, and only there."""
    lib, types = load_library(), check_gguf(quantized).types
    safe = amx.may_repack(lib, quantized, types)
    assert safe or amx.has_amx(lib)
    if safe:
        assert amx_trial.trial(quantized)
    model = LlamaModel(quantized, threads=1, longest=64)  # by what was found
    model.lifetime.close()


def test_other_answers_are_no_agreement(gguf, monkeypatch):
    answers = amx_trial._answers

    def wrong(path: Path, repack: bool) -> Any:
        return answers(path, False) * (-1 if repack else 1)

    monkeypatch.setattr(amx_trial, "_answers", wrong)
    assert not amx_trial.trial(gguf)
