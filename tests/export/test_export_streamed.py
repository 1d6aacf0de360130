"""The source, computed with one matrix in memory at a time, answers as the whole model does."""

from __future__ import annotations

from pathlib import Path

import pytest

from qe_edge.export import streamed
from qe_edge.export.source import Source

torch = pytest.importorskip("torch")

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40, 41, 42], [7, 7, 90, 12, 55]]


@pytest.mark.parametrize("model", ["tiny_qwen3", "tiny_llama"])
def test_it_answers_as_the_whole_model(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    folder: Path = request.getfixturevalue(model)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    monkeypatch.setattr(streamed, "VOCABULARY_ROWS", 100)  # several parts, the last one smaller
    parts = streamed.Streamed(Source(folder))
    with torch.inference_mode():
        for ids, logits in zip(PROMPTS, parts.logits(PROMPTS), strict=True):
            torch.testing.assert_close(logits, whole(torch.tensor([ids])).logits[0])
        alone = [
            whole.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=2)[0]
            for ids in PROMPTS
        ]
    written = [answer[len(ids) :].tolist() for ids, answer in zip(PROMPTS, alone, strict=True)]
    assert parts.greedy(PROMPTS, end=2, most=9) == written
    # An answer ends with the end token, though the others go on.
    end = written[0][2]
    cut = [answer[: answer.index(end) + 1] if end in answer else answer for answer in written]
    assert parts.greedy(PROMPTS, end=end, most=9) == cut


def test_no_matrix_stays(tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = streamed.Streamed(Source(tiny_qwen3))
    most = 0

    def count(*_: object) -> None:
        nonlocal most
        most = max(most, sum(not weight.is_meta for weight in parts.network.parameters()))

    for module in parts.network.model.layers.modules():
        module.register_forward_pre_hook(count)
        module.register_forward_hook(count)
    linear = torch.nn.functional.linear

    def counted(*arguments: object) -> object:
        count()
        return linear(*arguments)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    parts.logits(PROMPTS)
    assert most == 1
    assert all(weight.is_meta for weight in parts.network.parameters())
