"""Expansions of earlier benchmarks, so that no model writes the same ones twice under the same settings."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import msgspec

from qe_edge.bench.result import Speed
from qe_edge.bench.speed import Generated, Task, generate
from qe_edge.console import warn
from qe_edge.student.spec import ModelSpec
from qe_edge.work.files import atomic_path
from qe_edge.work.machine import cpu_name, usable_cores, versions


def generate_once(
    task: Task, digest: str | None, cache: Path, *, also: Sequence[str] = ()
) -> tuple[list[Generated], Speed, ModelSpec]:
    """As `generate`, but starts from what an earlier run wrote, and leaves its own for later ones.

    `digest` is the model's SHA-256, which its prompt is part of; without one (a hub id) nothing is kept.
    `also` are those of what else decides, such as a collection.
    Times are kept with the texts, so what changes them makes another file: the processor, its threads, the
    engines as they were built and the GPUs that they may use.
    """
    if digest is None:
        return generate(task)
    settings = [task.lang, task.queries, task.engine, task.threads, task.budget_tokens]
    key: list[Any] = [digest, *settings, cpu_name(), usable_cores(), versions(), *_engines()]
    if task.read:
        key += [task.read.written is not None, task.read.passages, task.read.analyzer, *also]
    name = hashlib.sha256(msgspec.json.encode(key)).hexdigest()[:24]
    task, kept = msgspec.structs.replace(task, key=name), cache / f"{name}.jsonl"
    own = Path(task.out)
    resumed = own.exists() and own.stat().st_size > 0  # a bench that was interrupted
    if again := kept.exists() and not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(own) as partial:
            shutil.copyfile(kept, partial)
        warn(f"{task.label}: texts and times of an earlier run; delete {kept} to have them anew")
    rows, speed, spec = generate(task)
    if not kept.exists():
        with atomic_path(kept) as partial:
            shutil.copyfile(own, partial)
    return rows, msgspec.structs.replace(speed, reused=again or resumed), spec


def _engines() -> list[str | None]:
    """llama.cpp as it was built, which its version doesn't tell, and the GPUs that are shown."""
    found = [os.environ.get("CUDA_VISIBLE_DEVICES")]
    with suppress(PackageNotFoundError):
        found.append(distribution("llama-cpp-python").read_text("RECORD"))
    return found
