"""Direct preference optimisation on retrieval's own pairs, continuing the SFT adapter, through TRL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from qe_edge.console import note
from qe_edge.errors import BadInput, require
from qe_edge.prompt import Tokenize, hugging_face
from qe_edge.records import Count, Pair, Positive, read_jsonl
from qe_edge.spec import ModelSpec, read_spec, write_spec
from qe_edge.train.loop import TrainingRun, counted, load_dtype, trainer_arguments
from qe_edge.train.rows import CHECKED, Row, check_batch, check_texts
from qe_edge.train.sft import base_of
from qe_edge.train.student import load_base, load_tokenizer
from qe_edge.workdir import Workdir

Loss = Literal["sigmoid", "sigmoid_norm", "ipo", "sft"]


class DpoConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """DPO settings (Rafailov et al., arXiv 2305.18290). `beta` weighs the pull towards the SFT model.

    `loss` names TRL's losses, summed with `loss_weights` (1 each by default): `sigmoid` is DPO,
    `sigmoid_norm` divides by the lengths, adding `sft` keeps the chosen text likely (RPO, arXiv 2404.19733).
    `length_weight` below 1 counts the longer side's surplus tokens for so much less (LD-DPO, arXiv
    2409.06411). `precompute` has the reference's log-probabilities computed once, before the first step:
    less memory, and less time over several epochs. A step takes `batch_size * accumulate` pairs.
    """

    beta: Positive = 0.1
    loss: Annotated[tuple[Loss, ...], msgspec.Meta(min_length=1)] = ("sigmoid",)
    loss_weights: tuple[Positive, ...] = ()
    length_weight: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    precompute: bool = False
    learning_rate: Positive = 5e-5
    epochs: Positive = 1.0
    batch_size: Count = 2
    accumulate: Count = 4
    max_length: Count = 512
    seed: int = 0
    save_steps: Count = 20
    logging_steps: Count = 5

    def __post_init__(self) -> None:
        if self.loss_weights and len(self.loss_weights) != len(self.loss):
            raise ValueError(f"{len(self.loss)} losses need as many weights, not {len(self.loss_weights)}")


def dpo(
    pairs: Path | str,
    adapter: Path,
    config: DpoConfig | None = None,
    *,
    out: Path | None = None,
    workdir: Workdir,
) -> Path:
    """Train the SFT adapter further on preference pairs; returns the new adapter's folder.

    The reference is the SFT model itself (a frozen copy of its adapter), not the base.
    The result holds SFT and DPO together: it is merged once.
    """
    trl, peft, datasets = require("trl", "train"), require("peft", "train"), require("datasets", "train")
    config = config or DpoConfig()
    source = base_of(adapter)
    spec = read_spec(adapter)
    if spec is None:
        raise BadInput("holds no qe-edge spec; train it with `qe-edge train sft`", path=adapter)
    rows = list(read_jsonl(pairs, Pair))
    run = TrainingRun(
        "train dpo",
        msgspec.to_builtins(config),
        {"pairs": pairs, "adapter": adapter},
        out or workdir.new("dpo"),
    )
    base, tokenizer = load_base(source, dtype=load_dtype())
    check_texts(spec, tokenizer, [(r.query, r.chosen) for r in rows if r.query.strip()][:CHECKED])
    encoded, dropped = encode_pairs(rows, spec, hugging_face(tokenizer), config.max_length)
    note(f"dpo: {len(encoded)} pairs from {len({r.query_id for r in rows})} queries{counted(dropped)}")

    class TokenizedDPOTrainer(trl.DPOTrainer):  # type: ignore[name-defined]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # TRL would apply a chat template; these are token ids already, exactly ours

    trainer = TokenizedDPOTrainer(
        model=peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True),
        args=trl.DPOConfig(
            **trainer_arguments(config, run.partial),
            beta=config.beta,
            loss_type=list(config.loss),
            loss_weights=list(config.loss_weights) or None,
            ld_alpha=config.length_weight if config.length_weight < 1 else None,
            precompute_ref_log_probs=config.precompute,
        ),
        train_dataset=datasets.Dataset.from_list(encoded),
        processing_class=tokenizer,
    )
    check_batch(trainer, [row for pair in encoded for row in _rows(pair)])
    metrics = run.train(trainer, "dpo")
    trainer.model.save_pretrained(str(run.partial), selected_adapters=["default"])
    write_spec(run.partial, msgspec.structs.replace(spec, stage="dpo"))
    return run.finish_training(
        trainer, base=source, rows=len(encoded), dropped=dict(dropped), metrics=metrics
    )


def example(pairs: Path | str, adapter: Path, config: DpoConfig) -> str:
    """Both sides of the first pair as they would be trained on, for people; nothing is trained."""
    spec = read_spec(adapter)
    if spec is None:
        raise BadInput("holds no qe-edge spec; train it with `qe-edge train sft`", path=adapter)
    tokenizer = load_tokenizer(base_of(adapter))
    encoded, _ = encode_pairs(read_jsonl(pairs, Pair), spec, hugging_face(tokenizer), config.max_length)
    chosen, rejected = (row.describe(tokenizer) for row in _rows(encoded[0]))
    return f"chosen\n{chosen}\nrejected\n{rejected}"


def _rows(pair: dict[str, list[int]]) -> list[Row]:
    prompt = pair["prompt_ids"]
    return [Row(tuple(prompt + pair[side]), len(prompt)) for side in ("chosen_ids", "rejected_ids")]


def encode_pairs(
    rows: Iterable[Pair], spec: ModelSpec, tokenize: Tokenize, max_length: int
) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """Pairs -> {"prompt_ids", "chosen_ids", "rejected_ids"}, and how many were dropped, by reason."""
    encoded, dropped = [], Counter[str]()
    for row in rows:
        if not row.query.strip() or not row.chosen.strip() or not row.rejected.strip():
            dropped["empty"] += 1
            continue
        prompt = spec.prompt.encode(row.query, tokenize)
        chosen, rejected = (spec.prompt.encode_answer(text, tokenize) for text in (row.chosen, row.rejected))
        if chosen == rejected:
            dropped["equal sides"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > max_length:
            dropped["too long"] += 1
        else:
            encoded.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    if not encoded:
        raise BadInput(f"no pair left to train on; dropped: {dict(dropped)}")
    return encoded, dropped
