"""A Hugging Face tokenizer.json -> the `tokenizer.ggml.*` keys of a GGUF. Byte-level BPE only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qe_edge.errors import BadInput, require
from qe_edge.work.files import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

# One regex apart from how many digits stay together: Qwen2 and 3 split each, Llama 3 takes up to three.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = _SPLIT % ""
_GPT2 = "ByteLevel with GPT-2's regex"
# How text is cut before the merges -> llama.cpp's name for it (`tokenizer.ggml.pre`). llama.cpp holds the
# cutting in code by that name, so it can't be stored, only recognised. What the tokenizer does decides, not
# the model's name: transformers rebuilds some tokenizers differently when it loads and saves them.
_PRE = {
    ("Split " + QWEN2_SPLIT, "ByteLevel"): "qwen2",
    ("Split " + _SPLIT % "{1,3}", "ByteLevel"): "llama-bpe",
    ("each digit", _GPT2): "smollm",
    (_GPT2,): "gpt-2",
}
# Whether a word that is in the vocabulary is taken whole, past the merges; llama.cpp holds this by name too.
_IGNORES_MERGES = {"llama-bpe"}


def add_vocabulary(writer: GGUFWriter, model: Path, vocab_size: int) -> None:
    """Write the tokens, their types, the merges, the special ids and the chat template.

    Ids that the tokenizer leaves free below `vocab_size` (the rows of the embedding) are filled.

    Raises:
        BadInput: not a byte-level BPE, cut in a way that llama.cpp doesn't know, or too large.
    """
    gguf = require("gguf", "llama")
    path = model / "tokenizer.json"
    tokenizer = read_json(path)
    tokens, types = _token_table(tokenizer, vocab_size, path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_name(tokenizer, path))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(model, load_merges=True, n_vocab=vocab_size)
    special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)


def _token_table(tokenizer: dict[str, Any], vocab_size: int, path: Path) -> tuple[list[str], list[int]]:
    """The text and the `gguf.TokenType` of every id below `vocab_size`."""
    gguf = require("gguf", "llama")
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not isinstance(model.get("vocab"), dict):
        raise BadInput("not a byte-level BPE tokenizer, the only kind that can be converted", path=path)
    kind = gguf.TokenType
    table = {number: (text, kind.NORMAL) for text, number in model["vocab"].items()}
    for token in tokenizer.get("added_tokens") or []:
        # As llama.cpp's script: some that are markup by their looks (Qwen's `<|fim_pad|>`) aren't marked so.
        markup = token["special"] or re.fullmatch(r"<\|.*\|>|<｜.*｜>", token["content"])
        table[token["id"]] = (token["content"], kind.CONTROL if markup else kind.USER_DEFINED)
    if max(table, default=0) >= vocab_size:
        raise BadInput(
            f"holds {len(table)} tokens up to id {max(table)}, but the model's vocab_size is {vocab_size}",
            path=path,
        )
    rows = [table.get(number, (f"[PAD{number}]", kind.UNUSED)) for number in range(vocab_size)]
    return [text for text, _ in rows], [int(kind) for _, kind in rows]


def _pre_name(tokenizer: dict[str, Any], path: Path) -> str:
    # llama.cpp doesn't normalize. NFC, which Qwen's tokenizer asks for, is done by the prompt renderer.
    if (normalizer := tokenizer.get("normalizer")) not in (None, {"type": "NFC"}):
        raise BadInput(f"its normalizer {normalizer} has no counterpart in llama.cpp", path=path)
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = tuple(_describe(step) for step in pre.get("pretokenizers", [pre]))
    name = _PRE.get(steps)
    if name is None or (name in _IGNORES_MERGES) != bool(tokenizer["model"].get("ignore_merges")):
        raise BadInput(
            f"cuts text in a way that isn't known to match llama.cpp ({'; '.join(steps)}); the tokenizers of "
            "Qwen2.5, Qwen3, SmolLM2 and Llama 3 can be converted",
            path=path,
        )
    return name


def _describe(step: dict[str, Any]) -> str:
    """A step of the cutting in the words of `_PRE`; one that isn't known describes itself."""
    match step:
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return f"Split {regex}"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return _GPT2 if use_regex else "ByteLevel"
        case {"type": "Digits", "individual_digits": True}:
            return "each digit"
    return str(step)
