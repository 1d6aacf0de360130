"""How a student came to be: the run.json of export, prune and merge, and of the DPO and SFT before them."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from qe_edge.console import note, warn
from qe_edge.records import Expansion, Pair, configured, read_jsonl
from qe_edge.student.spec import ModelSpec
from qe_edge.train.config import SftConfig
from qe_edge.work.files import near
from qe_edge.work.runs import read_record

_MAY_BE_PATHS = ("student", "eval_dataset")
_MADE_FROM = {"export": "model", "prune": "model", "merge": "adapter", "train dpo": "adapter"}


def training_records(model: Path) -> list[dict[str, Any]]:
    """The records of the trainings behind a folder's model, in order, as far as they are still there."""
    records: list[dict[str, Any]] = []
    while record := read_record(model):
        command = str(record.get("command"))
        if command.startswith("train"):
            records.insert(0, record)
        if command not in _MADE_FROM:
            break
        model = model / record["inputs"][_MADE_FROM[command]]["path"]  # an export's is relative to it
    return records


def _is_at_hand(made_from: dict[str, Any]) -> bool:
    """Whether an input of a record is a file that begins as it was: `teach` adds to its texts."""
    file = Path(made_from["path"])
    if not file.is_file():
        return False
    with file.open("rb") as content:
        held = content.read(made_from.get("bytes", -1))
    return hashlib.sha256(held).hexdigest() == made_from["sha256"]


def learnt_queries(model: Path) -> set[str]:
    """The queries that a folder's model was trained on, where the files that held them are still at hand.

    Those that `teach` added to a file since count, too.
    """
    found = set()
    for record in training_records(model):
        accepted = (None, *record["settings"].get("accept", ()))
        for name, made_from in record["inputs"].items():
            if not _is_at_hand(made_from):
                continue
            file = Path(made_from["path"])
            if name.startswith("expansions"):
                found |= {row.query for row in read_jsonl(file, Expansion) if row.problem in accepted}
            elif name == "pairs":
                found |= {row.query for row in read_jsonl(file, Pair)}
    return found


def taught_folders(model: Path) -> list[Path]:
    """Where the data sets are that a folder's model was taught, as `teach` recorded it beside its texts."""
    files = [
        Path(made_from["path"])
        for record in training_records(model)
        for name, made_from in record["inputs"].items()
        if name.startswith("expansions")
    ]
    return [Path(folder) for file in files if (folder := read_record(file.parent).get("folder"))]


def training_data(model: Path) -> list[Path]:
    """The expansions that a merged model was trained on, where they are at hand; they may have grown."""
    files = []
    for record in training_records(model):
        for name, made_from in record["inputs"].items():
            if name.startswith("expansions"):
                file = Path(made_from["path"])
                if _is_at_hand(made_from):
                    files.append(file)
                    if file.stat().st_size > (made_from.get("bytes") or sys.maxsize):
                        told = "has grown since the student was trained on it; the new texts count too"
                        note(f"{near(file)} {told}")
                else:
                    what = "has changed" if file.is_file() else "is gone"
                    warn(f"{near(file)}, which the student was trained on, {what}")
    return files


def training_selection(model: Path) -> SftConfig:
    """The settings by which a merged model's SFT chose its rows; the defaults where they aren't known."""
    for record in training_records(model):
        if record["command"] == "train sft":
            names = SftConfig.__struct_encode_fields__
            return configured(SftConfig, {k: v for k, v in record["settings"].items() if k in names})
    return SftConfig()


def _vocabulary(model: Path) -> dict[str, Any]:
    """How many tokens a pruned model, or one whose base was pruned, has of how many; else nothing."""
    bases = [Path(record["base"]) for record in training_records(model) if record.get("base")]
    for record in map(read_record, [model, *bases]):
        if record.get("command") == "prune":
            return {"vocabulary": [record["tokens"], record["of_tokens"]]}
    return {}


def provenance(model: Path, spec: ModelSpec) -> dict[str, Any]:
    """What an export says of its origin: base model, licence, pruning, trainings."""
    return {
        "base_model": spec.base_model,
        "license": spec.license,
        **_vocabulary(model),
        "trainings": [
            {
                "command": record["command"],
                "finished": record["finished"],
                "settings": {k: v for k, v in record["settings"].items() if k not in _MAY_BE_PATHS},
                "inputs": {name: made_from["sha256"] for name, made_from in record["inputs"].items()},
                "rows": record["rows"],
                "kept": record["kept"],
                "train_loss": record["metrics"].get("train_loss"),
                "versions": record["versions"],
            }
            for record in training_records(model)
        ],
    }
