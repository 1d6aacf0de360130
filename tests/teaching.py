"""What the tests of `teach` share."""

from pathlib import Path
from typing import Any

from qe_edge.records import Expansion, read_jsonl
from qe_edge.retrieval.datasets import Dataset, load_dataset
from qe_edge.train.teach.config import TeachConfig


def rows(out: Path) -> list[Expansion]:
    return list(read_jsonl(out / "expansions.jsonl", Expansion))


def zero_shot(**settings: Any) -> TeachConfig:
    return TeachConfig(**({"model": "big", "modes": ("zero-shot",)} | settings))


def many() -> Dataset:
    return load_dataset("demo-en@train")
