"""How a merged student came to be: the run.json of merge, and of the SFT and DPO before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qe_edge.console import warn
from qe_edge.records import configured
from qe_edge.student.spec import ModelSpec
from qe_edge.train.config import SftConfig
from qe_edge.work.files import sha256
from qe_edge.work.runs import read_record

_MAY_BE_PATHS = ("student", "eval_dataset")


def training_records(model: Path) -> list[dict[str, Any]]:
    """The records of the trainings behind a merged model, in order, as far as they are still there."""
    records: list[dict[str, Any]] = []
    record = read_record(model)
    while record.get("command") in ("merge", "train dpo", "prune"):
        made_from = "model" if record["command"] == "prune" else "adapter"
        record = read_record(Path(record["inputs"][made_from]["path"]))
        if str(record.get("command")).startswith("train"):
            records.insert(0, record)
    return records


def training_data(model: Path) -> list[Path]:
    """The expansions that a merged model was trained on, where they are at hand and haven't changed."""
    files = []
    for record in training_records(model):
        for name, made_from in record["inputs"].items():
            if name.startswith("expansions"):
                file = Path(made_from["path"])
                if file.is_file() and sha256(file) == made_from["sha256"]:
                    files.append(file)
                else:
                    warn(f"{file}, which the student was trained on, is gone or has changed")
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
