"""Direct preference optimisation on retrieval's own pairs, continuing the SFT student, through TRL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from qe_edge.console import note, several
from qe_edge.errors import BadArgument, BadInput, require
from qe_edge.records import Pair, read_jsonl
from qe_edge.student.prompt import Tokenize, hugging_face
from qe_edge.student.spec import ModelSpec
from qe_edge.train.base_model import load_config, load_model, load_tokenizer, load_trained, open_trained
from qe_edge.train.config import DpoConfig
from qe_edge.train.dev import load_dev
from qe_edge.train.estimate import announce, estimate
from qe_edge.train.hardware import Hardware, explain_out_of_memory, hardware
from qe_edge.train.loop import TrainingRun, counted, trainer_arguments
from qe_edge.train.lora import rank_of
from qe_edge.train.output_layer import compute_answers_alone
from qe_edge.train.rows import CHECKED, OTHER_LANGUAGE, Row, check_batch, check_texts, tell_language
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record


def dpo(
    pairs: Path | str,
    adapter: Path,
    config: DpoConfig | None = None,
    *,
    out: Path | None = None,
    workdir: Workdir,
) -> Path:
    """Train the SFT student further on preference pairs; returns the new folder.

    The reference is the SFT model itself (a frozen copy of its adapter, or of its weights), not the base.
    The result holds SFT and DPO together: an adapter is merged once.

    Raises:
        BadInput: `adapter` is no SFT folder, or there is no usable pair.
        BadArgument: a device or precision that isn't there, or `precompute` on several processes.
    """
    require("trl", "train")
    config = config or DpoConfig()
    on = hardware(config)
    if config.precompute and on.processes > 1:
        raise BadArgument(
            "TRL can't precompute for pairs in memory on several processes; leave out --precompute, "
            "or train on one"
        )
    trained = open_trained(adapter)
    rows = list(read_jsonl(pairs, Pair))
    out = out or workdir.new("dpo")
    with on.main_process_first():
        run = TrainingRun("train dpo", config, on, {"pairs": pairs, "adapter": adapter}, out)
    spec, tokenizer, shape = trained.spec, load_tokenizer(trained.base), load_config(trained.base)
    check_texts(spec, tokenizer, [(r.query, r.chosen) for r in rows if r.query.strip()][:CHECKED])
    encoded, dropped = encode_pairs(rows, spec, hugging_face(tokenizer), config.max_length)
    known = [row for row in rows if row.lang in spec.prompt.languages]
    queries = several(len({r.query for r in known}), "query", "queries")
    note(f"dpo: {several(len(encoded), 'pair')} from {queries}{counted(dropped)}")
    tell_language("dpo", dropped)
    sides = [row for pair in encoded for row in _rows(pair)]
    longest, answer = max(len(row.ids) for row in sides), max(len(row.ids) - row.answer for row in sides)
    rank = 0 if trained.full else rank_of(adapter)
    needs = estimate(
        shape,
        config,
        on,
        rank=rank,
        longest=longest,
        answer=answer,
    )
    dev = load_dev(config, spec, tokenizer, on, workdir)

    with explain_out_of_memory(config, on, trained.full):
        announce("dpo", needs, on)
        model = load_trained(trained, dtype=on.weights(trained.full), trainable=True)
        # Of an adapter, TRL makes a frozen copy itself; precomputing needs no copy at all.
        copied = trained.full and not config.precompute
        reference = load_model(str(adapter), dtype=on.weights(full=True)) if copied else None
        trainer = make_trainer(config, on, model, reference, tokenizer, encoded, run.partial)
    check_batch(trainer, sides)
    # TRL's frozen copy of the adapter is not for keeping.
    run.train(trainer, dev, trained.full, **({} if trained.full else {"selected_adapters": ["default"]}))
    return run.finish_training(
        trainer,
        msgspec.structs.replace(spec, stage="dpo"),
        tokenizer if trained.full else None,
        base=trained.base,
        rows=len(encoded),
        dropped=dict(dropped),
        learnt=_learnt(known, read_record(adapter).get("learnt", [])),
    )


def _learnt(rows: Iterable[Pair], before: Sequence[str]) -> list[str]:
    """The data sets of an adapter, which may have their splits, and of the rows."""
    of_adapter = {name.partition("@")[0] for name in before}
    return sorted({*before, *({row.dataset for row in rows} - of_adapter)})


def make_trainer(
    config: DpoConfig,
    on: Hardware,
    model: Any,
    reference: Any,
    tokenizer: Any,
    encoded: list[dict[str, list[int]]],
    folder: Path,
) -> Any:
    """TRL's trainer for pairs of ids, as `encode_pairs` gives them."""
    trl, datasets = require("trl", "train"), require("datasets", "train")

    class TokenizedDPOTrainer(trl.DPOTrainer):  # type: ignore[name-defined]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # TRL would apply a chat template; these are token ids already, exactly ours

    trainer = TokenizedDPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(
            **trainer_arguments(config, on, folder),
            beta=config.beta,
            loss_type=list(config.loss),
            loss_weights=list(config.loss_weights) or None,
            ld_alpha=config.length_weight if config.length_weight < 1 else None,
            precompute_ref_log_probs=config.precompute,
        ),
        train_dataset=datasets.Dataset.from_list(encoded),
        processing_class=tokenizer,
    )
    if on.device == "cpu":
        for part in filter(None, (trainer.model, trainer.ref_model)):
            compute_answers_alone(part)
    return trainer


def example(pairs: Path | str, adapter: Path, config: DpoConfig) -> str:
    """Both sides of the first pair as they would be trained on, for people; nothing is trained."""
    trained = open_trained(adapter)
    tokenizer = load_tokenizer(trained.base)
    tokenize = hugging_face(tokenizer)
    encoded, _ = encode_pairs(read_jsonl(pairs, Pair), trained.spec, tokenize, config.max_length)
    chosen, rejected = (row.describe(tokenizer) for row in _rows(encoded[0]))
    return f"chosen\n{chosen}\nrejected\n{rejected}"


def _rows(pair: dict[str, list[int]]) -> list[Row]:
    prompt = pair["prompt_ids"]
    return [Row(tuple(prompt + pair[side]), len(prompt)) for side in ("chosen_ids", "rejected_ids")]


def encode_pairs(
    rows: Iterable[Pair], spec: ModelSpec, tokenize: Tokenize, max_length: int
) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """Pairs -> {"prompt_ids", "chosen_ids", "rejected_ids"}, and how many were dropped, by reason.

    Texts are cut where the student's budget ends.
    """
    encoded, dropped = [], Counter[str]()
    for row in rows:
        if not row.query.strip() or not row.chosen.strip() or not row.rejected.strip():
            dropped["empty"] += 1
            continue
        if row.lang not in spec.prompt.languages:
            dropped[OTHER_LANGUAGE] += 1
            continue
        prompt = spec.prompt.encode(row.query, tokenize)
        chosen, rejected = (
            spec.prompt.encode_answer(text, tokenize)[: spec.prompt.max_tokens]
            for text in (row.chosen, row.rejected)
        )
        if chosen == rejected:
            dropped["equal sides"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > max_length:
            dropped["too long"] += 1
        else:
            encoded.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    if not encoded:
        known = ", ".join(spec.prompt.languages)
        raise BadInput(
            f"no pair is left to train on, by a student that knows {known}{counted(dropped)}; "
            "--adapter takes one that learnt from them"
        )
    return encoded, dropped
