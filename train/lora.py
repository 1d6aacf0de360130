"""Which layers the adapter adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qe_edge.errors import require

# Every linear layer of Qwen3 and Llama but the output: with tied embeddings, an adapted lm_head
# would be merged into the input embeddings as well.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_config(rank: int, alpha: int) -> Any:
    """LoRA (Hu et al., arXiv 2106.09685) on every linear layer but the output."""
    peft = require("peft", "train")
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")


def rank_of(adapter: Path) -> int:
    """The rank of a saved adapter."""
    peft = require("peft", "train")
    return peft.PeftConfig.from_pretrained(str(adapter)).r
