"""TRL's output layer on a CPU, by torch's own functions and for the answers alone."""

from __future__ import annotations

import types
from types import SimpleNamespace
from typing import Any

from qe_edge.errors import require

# Architectures whose logits are those of the output layer, neither scaled nor capped.
PLAIN = ("llama", "qwen2", "qwen3")


def compute_answers_alone(model: Any) -> None:
    """Replace what `trl.trainer.utils.add_fused_lm_head` gave a model, where there is no GPU.

    Its tiles are made for Triton. Without it they take all positions, the prompts' too, and multiply in
    float32: of a step of Qwen2.5-0.5B that was two thirds. This one holds the logits of all answers' tokens.
    """
    if hasattr(model, "get_base_model"):  # an adapter's
        model = model.get_base_model()
    if model.config.model_type not in PLAIN:
        return
    torch, forward = require("torch", "train"), model.forward

    def plain_forward(
        self: Any, *arguments: Any, labels: Any = None, fused_lm_head: bool = False, **others: Any
    ) -> Any:
        if not fused_lm_head:
            return forward(*arguments, labels=labels, **others)
        hidden = self.base_model(*arguments, **others | {"use_cache": False}).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        mask = labels != -100
        logits, targets = self.get_output_embeddings()(hidden[mask]).float(), labels[mask]
        log_probs = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            means, hits = logits.mean(-1), logits.argmax(-1) == targets

        def placed(values: Any) -> Any:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return SimpleNamespace(
            log_probs=placed(log_probs.gather(-1, targets[:, None])[:, 0]),
            entropy=placed(entropy),
            mean_logits=placed(means),
            is_top1=placed(hits),
            label_mask=mask,
        )

    model.forward = types.MethodType(plain_forward, model)
