"""Models of real shapes with random weights: what a machine will do, before gigabytes are downloaded.

Speed, memory, file layout and token ids are those of the real model; only what it writes is not.
"""

from __future__ import annotations

from typing import Any

from qe_edge.errors import NotFound, require

# The published shapes of Qwen3's dense models (arXiv 2505.09388 and their config.json):
# hidden size, feed-forward size, layers, attention heads, key-value heads, input and output embeddings tied.
QWEN3 = {
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, False),
}
VOCABULARY = 151_936
END, PAD = 151_645, 151_643  # <|im_end|>, <|endoftext|>


def shape(name: str, *, layers: int | None = None) -> Any:
    """The transformers configuration of a known model; `layers` below its own make a smaller one.

    Raises:
        NotFound: no such shape.
    """
    transformers = require("transformers", "train")
    if name not in QWEN3:
        raise NotFound(f"no synthetic shape {name!r}; there are: {', '.join(QWEN3)}")
    hidden, feed_forward, all_layers, heads, key_value_heads, tied = QWEN3[name]
    return transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers or all_layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=128,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )


def model(name: str, *, layers: int | None = None, dtype: Any, device: str = "cpu", seed: int = 0) -> Any:
    """Seeded random weights in a known shape, on the device."""
    torch, transformers = require("torch", "train"), require("transformers", "train")
    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(shape(name, layers=layers), dtype=dtype)
