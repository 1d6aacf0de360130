"""What the tests of training share: a tiny task, small settings, a run's log, and a run that is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from qe_edge.records import Expansion, Pair, encode_jsonl
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.work.folder import Workdir

QUERIES = ("what causes tides", "how does bread rise", "what is a gene", "why is iron good for blood")
GOOD = ("The moon's gravity.", "Yeast makes gas.", "A stretch of DNA.", "Doctors measure ferritin in adults.")
BAD = ("A short query.", "Long documents.", "The tax rate.", "A laptop or a phone.")
DEV = "demo-en@train"
SMALL = {"rank": 4, "alpha": 8, "batch_size": 4, "accumulate": 1, "logging_steps": 1, "save_steps": 2}
SMALL_DPO = {"batch_size": 4, "accumulate": 1, "logging_steps": 1, "save_steps": 2}


def expansion(query: str, text: str, number: int = 0) -> Expansion:
    return Expansion("tiny", f"q{number}", query, "en", "teacher", "zero-shot", text)


def pair(query: str, chosen: str, rejected: str, number: int = 0) -> Pair:
    origin = ("teacher", "zero-shot") * 2
    return Pair("tiny", f"q{number}", query, "en", chosen, rejected, 1.0, 0.0, 1.0, 0.0, *origin)


def write_task(folder: Path) -> Path:
    """Both answers of every query as expansions.jsonl, and the good before the bad one as pairs.jsonl."""
    rows = [
        expansion(query, text, i)
        for texts in (GOOD, BAD)
        for i, (query, text) in enumerate(zip(QUERIES, texts, strict=True))
    ]
    (folder / "expansions.jsonl").write_bytes(encode_jsonl(rows))
    pairs = [pair(q, good, bad, i) for i, (q, good, bad) in enumerate(zip(QUERIES, GOOD, BAD, strict=True))]
    (folder / "pairs.jsonl").write_bytes(encode_jsonl(pairs))
    return folder


def run_sft(student: Path, data: Path, work: Path, **settings: Any) -> Path:
    from qe_edge.train.sft import sft

    config = SftConfig(student=str(student), **{**SMALL, **settings})
    return sft([data / "expansions.jsonl"], config, workdir=Workdir(work))


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in log_of(folder) if "loss" in entry]


def evaluations(folder: Path) -> dict[int, float]:
    return {entry["step"]: entry["eval_ndcg"] for entry in log_of(folder) if "eval_ndcg" in entry}


_KILLED = """
import os, signal, sys
from pathlib import Path
import msgspec
import qe_edge.train.loop as loop
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.train.dpo import dpo
from qe_edge.train.sft import sft
from qe_edge.work.folder import Workdir
step, config, work, *inputs = sys.argv[1:]
original = loop._callback_class()
class Killed(original):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_step_end(args, state, control, **kw)
loop._callback_class = lambda: Killed
if len(inputs) == 1:
    sft(inputs, msgspec.json.decode(config, type=SftConfig), workdir=Workdir(work))
else:
    dpo(*map(Path, inputs), msgspec.json.decode(config, type=DpoConfig), workdir=Workdir(work))
"""


def train_until_killed(step: int, config: SftConfig | DpoConfig, work: Path, *inputs: Path) -> None:
    """SFT on expansions, or DPO on pairs and an adapter, in a process that gets kill -9 after a step."""
    command = [sys.executable, "-c", _KILLED, step, msgspec.json.encode(config).decode(), work, *inputs]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
