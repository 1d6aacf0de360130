"""What a trained or merged folder says of itself, in place of TRL's card; and what every card begins with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qe_edge.console import several
from qe_edge.student.spec import ModelSpec, is_hub_id

CARD = "README.md"


def write_card(folder: Path, spec: ModelSpec, *, rows: int, full: bool) -> None:
    """Write README.md, with metadata for a hub; a base model that is a folder is named without its path."""
    what = "All weights" if full else "A LoRA adapter"
    dpo, count = spec.stage == "dpo", several(rows, "pair" if spec.stage == "dpo" else "expansion")
    trained = f"{count} that retrieval ordered (DPO), after SFT" if dpo else f"{count} (SFT)"
    lines = [
        *metadata(spec, "transformers" if full else "peft"),
        "# A query expansion student, in training",
        "",
        f"{what} for `{base_name(spec)}`, trained with qe-edge on {trained}.",
        "`qe_edge.json` has its prompt and how an expansion is joined with its query, `run.json` the",
        "settings and the data, `log.jsonl` the losses.",
        "",
        "`qe-edge merge` makes a plain model of it, and `qe-edge export` files that run anywhere.",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def write_student_card(folder: Path, spec: ModelSpec) -> None:
    """Write README.md of a plain model: merged, or with a smaller vocabulary."""
    lines = [
        *metadata(spec, "transformers"),
        "# A query expansion student",
        "",
        f"A plain model, made with qe-edge from `{base_name(spec)}`. Its chat template writes the student's",
        "own prompt for one message that holds the query alone; `qe_edge.json` also says how an expansion is",
        "joined with its query.",
        "",
        "`qe-edge export` makes files of it that run anywhere.",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def metadata(spec: ModelSpec, library: str, tags: Sequence[str] = ()) -> list[str]:
    """A card's first lines, which a hub reads."""
    return [
        "---",
        "pipeline_tag: text-generation",
        *([f"base_model: {spec.base_model}"] if is_hub_id(spec.base_model) else []),
        *([f"license: {spec.license}"] if spec.license else []),
        f"library_name: {library}",
        "language:",
        *(f"- {language}" for language in spec.prompt.languages),
        "tags:",
        *(f"- {tag}" for tag in ("query-expansion", "information-retrieval", *tags)),
        "---",
        "",
    ]


def base_name(spec: ModelSpec) -> str:
    """The base model, a folder without its path."""
    named = is_hub_id(spec.base_model) or ":" in spec.base_model
    return spec.base_model if named else Path(spec.base_model).name
