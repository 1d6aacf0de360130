"""The loss on a CPU is TRL's own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "label_mask")


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_it_gives_what_trls_layer_gives(family: str, request: pytest.FixtureRequest) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from qe_edge.train.output_layer import compute_answers_alone

    folder: Path = request.getfixturevalue(f"tiny_{family}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    add_fused_lm_head(model, outputs=FIELDS[:-1])
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (3, 12))
    labels = ids.clone()
    labels[0, :5] = labels[1, :11] = labels[2, 8:] = -100
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0

    def computed() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        model.zero_grad()
        found = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        found.log_probs.sum().backward()
        gradient = model.model.layers[0].mlp.up_proj.weight.grad
        return {name: getattr(found, name).detach().float() for name in FIELDS}, gradient.clone()

    theirs, their_gradient = computed()
    compute_answers_alone(model)
    ours, our_gradient = computed()
    for name in FIELDS:
        assert torch.allclose(ours[name], theirs[name], atol=1e-4), name
    assert torch.allclose(our_gradient, their_gradient, atol=1e-4, rtol=1e-3)
    logits = model(input_ids=ids, attention_mask=mask).logits  # as ever where nobody asks for the layer
    assert logits.shape == (3, 12, model.config.vocab_size)
