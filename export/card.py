"""What an export folder says about itself: a model card, and a Modelfile for Ollama."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qe_edge.console import several
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
        "search query; the words of both are searched together. Its licence is the base model's"
        f"{f' ({spec.license})' if spec.license else ''}.",
        *("", "## Use", ""),
        "The file knows its prompt and how the passage is joined with the query:",
        *("", "```python", "from qe_edge import Expander", ""),
        f'expander = Expander.load("{(ggufs or mlx)[0]}")',
        *('print(expander.expand("what causes tides").terms())', "```", ""),
        "In JavaScript, with the package `qe-edge`: `Student.load(file, nodeLlama(model, sequence))`.",
        "",
        "Chat programs write the same for **one message that holds the query alone**: the chat template",
        "is the student's own prompt. Take temperature 0 and no penalty for repetition.",
        "",
        *_elsewhere(spec, ggufs, mlx, "adapter" in files),
        *("", "Where there is no template, this is the whole prompt; stop at the end token:"),
        *(line for lang in spec.prompt.languages for line in _prompt(spec, _QUERY[lang])),
        *("", "## Join", ""),
        f"`{spec.join}`, at most {spec.prompt.max_tokens} tokens an expansion.",
        *("", "## Checked against the model it was made from", ""),
        "On the probes of `qe-edge verify`: the same token ids, and logits as close as this, in prompts and",
        "answers or in answers alone. Greedy is how much of the source's greedy answers a file writes before",
        "it differs. “Compared on” counts the queries, and the places in their prompts and answers.",
        "",
        "| file | MB | compared on | logit cosine | KL divergence | within answers | top-1 | greedy |",
        "| :-- | --: | :-- | --: | --: | --: | --: | --: |",
        *(_row(name, size, checks.get(name)) for name, size in files.items()),
        *_unlike([checks[name] for name in files if name in checks]),
        *_calibrated(importance),
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_modelfile(folder: Path, spec: ModelSpec, gguf: str) -> None:
    """Write what makes a GGUF of the folder an Ollama model, with our prompt as its template.

    That is a Modelfile, and for a model pulled from the hub the files `template` and `params`
    (https://huggingface.co/docs/hub/ollama). Ollama's templates are Go's, which go through no characters: a
    query that begins with a Chinese one is asked in Chinese, all others in the first other language.
    """
    template = _ollama(spec)
    end = spec.prompt.end
    parameters = {"temperature": 0, "repeat_penalty": 1, "num_predict": spec.prompt.max_tokens, "stop": end}
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER {name} {json.dumps(value)}" for name, value in parameters.items()]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "template").write_text(template, encoding="utf-8")
    (folder / "params").write_text(json.dumps(parameters | {"stop": [end]}) + "\n", encoding="utf-8")


def _ollama(spec: ModelSpec) -> str:
    markup = {
        lang: "".join(piece.text for piece in spec.prompt.chat(text.system, text.user))
        for lang, text in spec.prompt.texts.items()
    }
    filled = {lang: text.replace("{query}", "{{ .Prompt }}") for lang, text in markup.items()}
    given = "".join(piece.text for piece in spec.prompt.chat("{{ .System }}", "{{ .Prompt }}"))
    chinese, others = filled.pop("zh", ""), list(filled.values())
    own = chinese or others[0]
    if chinese and others:
        is_chinese = 'and (ge .Prompt "\u4e00") (lt .Prompt "\ua000")'
        own = f"{chinese}{{{{ else }}}}{others[0]}"
        return f"{{{{ if .System }}}}{given}{{{{ else if {is_chinese} }}}}{own}{{{{ end }}}}"
    return f"{{{{ if .System }}}}{given}{{{{ else }}}}{own}{{{{ end }}}}"


def _elsewhere(spec: ModelSpec, ggufs: Sequence[str], mlx: Sequence[str], lora: bool) -> list[str]:
    budget, lines = spec.prompt.max_tokens, []
    if ggufs:
        lines += [
            f"- llama.cpp: `llama-server -m {ggufs[0]} --jinja`, then ask `/v1/chat/completions`",
            *(["- llama.cpp, on a GGUF of the base model: add `--lora adapter/student-lora.gguf`"] * lora),
            "- Ollama: `ollama create student -f Modelfile`, then `ollama run student 'what causes tides'`",
            f'- llama-cpp-python: `Llama("{ggufs[0]}").create_chat_completion([{{"role": "user", "content": '
            f'"what causes tides"}}], temperature=0, max_tokens={budget})`',
        ]
    if mlx:
        limits = f"--temp 0 --max-tokens {budget}"
        lines += [f"- mlx-lm: `mlx_lm.generate --model {mlx[0]} {limits} --prompt 'what causes tides'`"]
    return lines


def _prompt(spec: ModelSpec, query: str) -> list[str]:
    return ["", "```text", spec.prompt.render(query), "```"]


def _row(name: str, size: int, check: dict[str, Any] | None) -> str:
    if not check:
        return f"| {name} | {size / 1e6:.1f} | not checked | – | – | – | – | – |"
    sample = f"{several(check['queries'], 'query', 'queries')}, {several(check['positions'], 'place')}"
    close = [f"{check[key]:.4f}" for key in ("logit_cosine", "kl_divergence", "answer_divergence")]
    same = [f"{check[key]:.0%}" for key in ("top1_agreement", "greedy_agreement")]
    return f"| {' | '.join([name, f'{size / 1e6:.1f}', sample, *close, *same])} |"


def _unlike(checks: Sequence[dict[str, Any]]) -> list[str]:
    """What to say below rows that stand side by side, but were compared on other queries."""
    if len({check["queries"] for check in checks}) < 2:
        return []
    return [
        "",
        "**Not all files were compared on the same queries.** Compare only rows with the same number of",
        "queries. Between others the queries make a difference, too, and one query says little.",
    ]


def _calibrated(importance: Importance | None) -> list[str]:
    if importance is None:
        return []
    return [
        "",
        f"The GGUFs below 8 bits were quantized with an importance matrix of {importance.tokens:,} tokens",
        f"({importance.rows} expansions, from {', '.join(name for name, _ in importance.files)}).",
    ]
