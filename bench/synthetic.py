"""Models of real shapes with random weights: what a machine will do, before gigabytes are downloaded.

Speed, memory, file layout and token ids are those of the real model; only what it writes is not.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from qe_edge.errors import NotFound, require


class Shape(NamedTuple):
    """What decides a model's size; `tied` says that its input and output embeddings are one table."""

    family: Literal["qwen3", "qwen2", "llama"]
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool


# As published in the models' config.json (Qwen3: arXiv 2505.09388; Qwen2.5: arXiv 2412.15115; SmolLM2:
# arXiv 2502.02737).
SHAPES = {
    "smollm2-135m": Shape("llama", 576, 1536, 30, 9, 3, 64, 49_152, True),
    "qwen2.5-0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 64, 151_936, True),
    "qwen2.5-1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, 128, 151_936, True),
    "qwen2.5-3b": Shape("qwen2", 2048, 11008, 36, 16, 2, 128, 151_936, True),
    "qwen2.5-7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 128, 152_064, False),
    "qwen3-0.6b": Shape("qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, True),
    "qwen3-1.7b": Shape("qwen3", 2048, 6144, 28, 16, 8, 128, 151_936, True),
    "qwen3-4b": Shape("qwen3", 2560, 9728, 36, 32, 8, 128, 151_936, True),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 36, 32, 8, 128, 151_936, False),
}
# <|im_end|> and <|endoftext|> of each family, the longest context, epsilon of the norms and rotary base.
ENDS = {"qwen3": (151_645, 151_643), "qwen2": (151_645, 151_643), "llama": (2, 0)}
CONTEXT = {"qwen3": 40_960, "qwen2": 32_768, "llama": 8192}
EPSILON = {"qwen3": 1e-6, "qwen2": 1e-6, "llama": 1e-5}
ROTARY_BASE = {"qwen3": 1_000_000.0, "qwen2": 1_000_000.0, "llama": 100_000.0}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)


def shape(name: str, *, layers: int | None = None) -> Any:
    """The transformers configuration of a known model; `layers` below its own make a smaller one.

    Raises:
        NotFound: no such shape.
    """
    transformers = require("transformers", "train")
    if name not in SHAPES:
        raise NotFound(f"no synthetic shape {name!r}; there are: {', '.join(SHAPES)}")
    known = SHAPES[name]
    end, pad = ENDS[known.family]
    kinds = {
        "qwen3": transformers.Qwen3Config,
        "qwen2": transformers.Qwen2Config,  # which has no head_dim: it is hidden_size / heads
        "llama": transformers.LlamaConfig,
    }
    return kinds[known.family](
        vocab_size=known.vocabulary,
        hidden_size=known.hidden,
        intermediate_size=known.feed_forward,
        num_hidden_layers=layers or known.layers,
        num_attention_heads=known.heads,
        num_key_value_heads=known.key_value_heads,
        **({} if known.family == "qwen2" else {"head_dim": known.head_dim}),
        max_position_embeddings=CONTEXT[known.family],
        rms_norm_eps=EPSILON[known.family],
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE[known.family]},
        tie_word_embeddings=known.tied,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )


def model(name: str, *, layers: int | None = None, dtype: Any, device: str = "cpu", seed: int = 0) -> Any:
    """Seeded random weights in a known shape, on the device."""
    torch, transformers = require("torch", "train"), require("transformers", "train")
    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(shape(name, layers=layers), dtype=dtype)


def tokenizer(name: str) -> Any:
    """A byte-level BPE with one merge (llama.cpp wants some), whose padding and end token have the real ids.

    It suffices where rows are ids already, and for the converters, which want Qwen's way to cut a text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from qe_edge.export.vocab import QWEN2_SPLIT

    end, pad = ENDS[SHAPES[name].family]
    special = {"<|endoftext|>": pad, "<|im_end|>": end}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = max(pad, end) + 1 if max(pad, end) < len(alphabet) else 0  # SmolLM2's special ids are 0 and 2
    vocabulary = special | {letter: first + i for i, letter in enumerate(alphabet)}
    vocabulary["ab"] = first + len(alphabet)
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
