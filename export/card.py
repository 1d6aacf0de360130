"""What an export folder says about itself: a model card, and a Modelfile for Ollama."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qe_edge.export.imatrix import Importance
from qe_edge.student.spec import ModelSpec
from qe_edge.train.card import base_name, metadata

CARD, MODELFILE = "README.md", "Modelfile"
_STAGES = {"base": "not trained", "sft": "supervised fine-tuning", "dpo": "supervised fine-tuning, then DPO"}
# What stands in a rendered prompt where the user's query goes.
_QUERY = {"en": "a query", "zh": "一个查询"}


def write_card(
    folder: Path,
    spec: ModelSpec,
    files: dict[str, int],
    checks: dict[str, Any],
    importance: Importance | None,
) -> None:
    """Write README.md for a hub, with metadata, usage and what was checked of each file.

    `files` has the bytes of each file or folder, `checks` what `verify_gguf` and `verify_mlx` found.
    """
    # Smallest first: the one meant for the device, which the commands take as well.
    ggufs = sorted((name for name in files if name.endswith(".gguf")), key=files.__getitem__)
    mlx = [name for name in files if "-mlx-" in name]
    formats = [name for name, made in (("gguf", ggufs), ("mlx", mlx)) if made]
    lines = [
        *metadata(spec, formats[0], formats),
        *("# A query expansion student", ""),
        f"Made with qe-edge from `{base_name(spec)}` ({_STAGES[spec.stage]}). It writes a short text for a",
        "search query; the words of both together find more under BM25. Its licence is the base model's"
        f"{f' ({spec.license})' if spec.license else ''}.",
        *("", "## Use", ""),
        "The file knows its prompt and how the passage is joined with the query:",
        *("", "```python", "from qe_edge import Expander", ""),
        f'expander = Expander.load("{(ggufs or mlx)[0]}")',
        *('print(expander.expand("what causes tides").terms())', "```", ""),
        "Without qe-edge, give the model exactly this text and stop at the end token:",
        *(line for lang in spec.prompt.languages for line in _prompt(spec, _QUERY[lang])),
        "",
        *_elsewhere(spec, ggufs, mlx, "adapter" in files),
        *("", "## Join", ""),
        f"`{spec.join}`, at most {spec.prompt.max_tokens} tokens an expansion.",
        *("", "## Checked against the model it was made from", ""),
        "On the probes of `qe-edge verify`: the same token ids, and logits as close as this, in prompts and",
        "answers or in answers alone. Greedy is how much of the source's greedy answers a file writes before",
        "it differs.",
        "",
        "| file | MB | logit cosine | KL divergence | of answers | top-1 | greedy |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
        *(_row(name, size, checks.get(name)) for name, size in files.items()),
        *_calibrated(importance),
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_modelfile(folder: Path, spec: ModelSpec, gguf: str) -> None:
    """Write the Modelfile that makes a GGUF of the folder an Ollama model, with our prompt as its template.

    Ollama's template has one text, so it is that of the first language.
    """
    first = spec.prompt.texts[spec.prompt.languages[0]]
    markup = "".join(piece.text for piece in spec.prompt.chat(first.system, first.user))
    (folder / MODELFILE).write_text(
        f"FROM ./{gguf}\n"
        f'TEMPLATE """{markup.replace("{query}", "{{ .Prompt }}")}"""\n'
        "PARAMETER temperature 0\n"
        f"PARAMETER num_predict {spec.prompt.max_tokens}\n"
        f"PARAMETER stop {json.dumps(spec.prompt.end)}\n",
        encoding="utf-8",
    )


def _elsewhere(spec: ModelSpec, ggufs: Sequence[str], mlx: Sequence[str], lora: bool) -> list[str]:
    budget, lines = spec.prompt.max_tokens, []
    if ggufs:
        lines += [
            f"- llama.cpp: `llama-cli -m {ggufs[0]} -no-cnv --temp 0 -n {budget} -p …`",
            *(["- llama.cpp, on a GGUF of the base model: add `--lora adapter/student-lora.gguf`"] * lora),
            "- Ollama: `ollama create student -f Modelfile`, then `ollama run student 'what causes tides'`",
        ]
    if mlx:
        limits = f"--ignore-chat-template --temp 0 --max-tokens {budget}"
        lines += [f"- mlx-lm: `mlx_lm.generate --model {mlx[0]} {limits} --prompt …`"]
    return lines


def _prompt(spec: ModelSpec, query: str) -> list[str]:
    return ["", "```text", spec.prompt.render(query), "```"]


def _row(name: str, size: int, check: dict[str, Any] | None) -> str:
    if not check:
        return f"| {name} | {size / 1e6:.1f} | not checked | – | – | – | – |"
    close = [f"{check[key]:.4f}" for key in ("logit_cosine", "kl_divergence", "answer_divergence")]
    same = [f"{check[key]:.0%}" for key in ("top1_agreement", "greedy_agreement")]
    return f"| {' | '.join([name, f'{size / 1e6:.1f}', *close, *same])} |"


def _calibrated(importance: Importance | None) -> list[str]:
    if importance is None:
        return []
    return [
        "",
        f"The GGUFs below 8 bits were quantized with an importance matrix of {importance.tokens:,} tokens",
        f"({importance.rows} expansions, from {', '.join(name for name, _ in importance.files)}).",
    ]
