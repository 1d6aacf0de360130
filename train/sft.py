"""Supervised fine-tuning: the student learns to write what the teacher wrote, with LoRA through TRL."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from qe_edge.console import note
from qe_edge.errors import BadInput, require
from qe_edge.manifest import MANIFEST
from qe_edge.models import DEFAULT_STUDENT
from qe_edge.prompt import Tokenize, hugging_face
from qe_edge.records import Count, Expansion, Mode, Positive, Problem, read_jsonl
from qe_edge.spec import ModelSpec, write_spec
from qe_edge.train.loop import TrainingRun, counted, load_dtype, trainer_arguments
from qe_edge.train.rows import CHECKED, Row, check_batch, check_texts
from qe_edge.train.student import load_base, load_tokenizer, prepare_student
from qe_edge.workdir import Workdir

# Every linear layer of Qwen3 and Llama but the output: with tied embeddings, an adapted lm_head
# would be merged into the input embeddings as well.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class SftConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """SFT settings.

    `models` and `modes` select teacher rows, empty meaning all; rows that `teach` marked with a problem
    are left out, but for the problems in `accept`. Of what is left, `max_rows` are drawn at random, 0
    meaning all. `max_length` is in tokens, prompt included; longer rows are dropped and counted, never
    cut. A step takes `batch_size * accumulate` rows.
    """

    student: str = DEFAULT_STUDENT
    models: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = ()
    max_rows: Annotated[int, msgspec.Meta(ge=0)] = 0
    accept: tuple[Problem, ...] = ()
    rank: Count = 32
    alpha: Count = 64
    learning_rate: Positive = 3e-4
    epochs: Positive = 1.0
    batch_size: Count = 4
    accumulate: Count = 2
    max_length: Count = 512
    seed: int = 0
    save_steps: Count = 20
    logging_steps: Count = 5


def sft(
    expansions: Sequence[Path | str],
    config: SftConfig | None = None,
    *,
    out: Path | None = None,
    workdir: Workdir,
) -> Path:
    """Train a LoRA adapter on teacher expansions; returns its folder.

    Killed or interrupted, the same call goes on from the last checkpoint.

    Raises:
        BadInput: a malformed row, or no usable row at all.
    """
    trl, peft, datasets = require("trl", "train"), require("peft", "train"), require("datasets", "train")
    config = config or SftConfig()
    rows = select_rows(expansions, config)
    source, spec = prepare_student(config.student, workdir)
    inputs = {f"expansions[{i}]": path for i, path in enumerate(expansions)}
    run = TrainingRun("train sft", msgspec.to_builtins(config), inputs, out or workdir.new("sft"))
    model, tokenizer = load_base(source, dtype=load_dtype())
    check_texts(spec, tokenizer, [(r.query, r.text) for r in rows if r.query.strip()][:CHECKED])
    encoded, dropped = encode_rows(rows, spec, hugging_face(tokenizer), config.max_length)
    note(f"sft: {len(encoded)} rows from {len({r.query_id for r in rows})} queries{counted(dropped)}")

    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            **trainer_arguments(config, run.partial),
            dataset_kwargs={"skip_prepare_dataset": True},  # the rows are token ids already, exactly ours
            train_sampling_strategy="group_by_length",
        ),
        train_dataset=datasets.Dataset.from_list(encoded),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
        ),
    )
    check_batch(trainer, [_row(row) for row in encoded])
    metrics = run.train(trainer, "sft")
    trainer.model.save_pretrained(str(run.partial))
    write_spec(run.partial, msgspec.structs.replace(spec, stage="sft"))
    return run.finish_training(
        trainer, base=source, rows=len(encoded), dropped=dict(dropped), metrics=metrics
    )


def example(expansions: Sequence[Path | str], config: SftConfig, *, workdir: Workdir) -> str:
    """The first row as it would be trained on, for people; nothing is trained."""
    rows = select_rows(expansions, config)
    source, spec = prepare_student(config.student, workdir)
    tokenizer = load_tokenizer(source)
    encoded, _ = encode_rows(rows[:32], spec, hugging_face(tokenizer), config.max_length)
    return _row(encoded[0]).describe(tokenizer)


def _row(encoded: dict[str, list[int]]) -> Row:
    return Row(tuple(encoded["input_ids"]), encoded["labels"].count(-100))


def select_rows(paths: Iterable[Path | str], config: SftConfig) -> list[Expansion]:
    """The teacher rows that the configuration selects.

    Raises:
        BadInput: there is none.
    """
    rows = [row for path in paths for row in read_jsonl(path, Expansion)]
    selected = [
        row
        for row in rows
        if (row.problem is None or row.problem in config.accept)
        and (not config.models or row.model in config.models)
        and (not config.modes or row.mode in config.modes)
    ]
    if not selected:
        found = ", ".join(sorted({f"{row.model} {row.mode}" for row in rows})) or "no rows"
        raise BadInput(f"no expansion left to train on; the files hold: {found}")
    if 0 < config.max_rows < len(selected):
        return random.Random(config.seed).sample(selected, config.max_rows)
    return selected


def encode_rows(
    rows: Iterable[Expansion], spec: ModelSpec, tokenize: Tokenize, max_length: int
) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """Rows -> {"input_ids", "labels"}: prompt, expansion, one end token; the prompt's labels are -100.

    Also returns how many rows were dropped, by reason.
    """
    encoded, dropped, seen = [], Counter[str](), set()
    for row in rows:
        if not row.text.strip() or not row.query.strip():
            dropped["empty"] += 1
            continue
        if (row.query, row.text) in seen:
            dropped["duplicate"] += 1
            continue
        seen.add((row.query, row.text))
        prompt = spec.prompt.encode(row.query, tokenize)
        answer = spec.prompt.encode_answer(row.text, tokenize)
        if len(prompt) + len(answer) > max_length:
            dropped["too long"] += 1
            continue
        encoded.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    if not encoded:
        raise BadInput(f"no expansion left to train on; dropped: {dict(dropped)}")
    return encoded, dropped


def base_of(adapter: Path) -> str:
    """What an adapter folder was trained on."""
    from qe_edge.manifest import read_record

    base = read_record(adapter).get("base")
    if not base or not (adapter / "adapter_config.json").is_file():
        raise BadInput(f"holds no {MANIFEST} of `qe-edge train` with an adapter; train first", path=adapter)
    return base
