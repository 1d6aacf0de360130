"""What a trained folder says of itself, in place of TRL's card."""

from __future__ import annotations

from pathlib import Path

from qe_edge.student.spec import ModelSpec, is_hub_id

CARD = "README.md"


def write_card(folder: Path, spec: ModelSpec, *, rows: int, full: bool) -> None:
    """Write README.md, with metadata for a hub; a base model that is a folder is named without its path."""
    on_hub = is_hub_id(spec.base_model)
    base = spec.base_model if on_hub or ":" in spec.base_model else Path(spec.base_model).name
    what = "All weights" if full else "A LoRA adapter"
    trained = "pairs that retrieval ordered (DPO), after SFT" if spec.stage == "dpo" else "expansions (SFT)"
    lines = [
        "---",
        "pipeline_tag: text-generation",
        f"library_name: {'transformers' if full else 'peft'}",
        *([f"base_model: {spec.base_model}"] if on_hub else []),
        *([f"license: {spec.license}"] if spec.license else []),
        "language:",
        *(f"- {language}" for language in spec.prompt.languages),
        "tags:",
        *("- query-expansion", "- information-retrieval", "---", ""),
        "# A query expansion student, in training",
        "",
        f"{what} for `{base}`, trained with qe-edge on {rows} {trained}.",
        "`qe_edge.json` has its prompt and how an expansion is joined with its query, `run.json` the",
        "settings and the data, `log.jsonl` the losses.",
        "",
        "`qe-edge merge` makes a plain model of it, and `qe-edge export` files that run anywhere.",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")
