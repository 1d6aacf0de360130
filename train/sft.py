"""Supervised fine-tuning: the student learns to write what the teacher wrote, through TRL."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from qe_edge.console import note, several, warn
from qe_edge.errors import BadArgument, BadInput, require
from qe_edge.records import Expansion
from qe_edge.student.prompt import Tokenize, hugging_face
from qe_edge.student.spec import ModelSpec
from qe_edge.train.base_model import (
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    prepare_student,
)
from qe_edge.train.config import SPEAKS_BOTH, SftConfig, Task
from qe_edge.train.dev import load_dev
from qe_edge.train.estimate import announce, estimate
from qe_edge.train.hardware import Hardware, explain_out_of_memory, hardware
from qe_edge.train.loop import TrainingRun, counted, trainer_arguments
from qe_edge.train.lora import lora_config
from qe_edge.train.output_layer import compute_answers_alone
from qe_edge.train.rows import CHECKED, OTHER_LANGUAGE, Row, check_batch, check_texts, tell_language
from qe_edge.train.teach.ledger import read_texts
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record


def sft(
    expansions: Sequence[Path | str],
    config: SftConfig | None = None,
    *,
    out: Path | None = None,
    workdir: Workdir,
) -> Path:
    """Train a LoRA adapter, or all weights, on teacher expansions; returns the folder.

    Killed or interrupted, the same call goes on from the last checkpoint.

    Raises:
        BadInput: a malformed row, or no usable row at all.
        BadArgument: a device or precision that isn't there.
    """
    require("trl", "train")
    config = config or SftConfig()
    if config.eval_dataset and "write" not in config.tasks:
        raise BadArgument("--eval-dataset measures what a student writes; train it to --task write, too")
    on = hardware(config)
    texts = read_texts(expansions)
    rows = select_rows(texts, config)
    if told := _left_out(texts, config):
        warn(f"sft: {told}")
    if len(models := sorted({row.model for row in rows})) > 1:
        warn(f"sft: texts of several models: {', '.join(models)} (--teacher-model takes those of one)")
    out = out or workdir.new("sft")
    inputs = {f"expansions[{i}]": path for i, path in enumerate(expansions)}
    with on.main_process_first():
        source, spec = _prepare(config, workdir)
        run = TrainingRun("train sft", config, on, inputs, out)
    tokenizer, shape = load_tokenizer(source), load_config(source)
    check_vocabulary(source, shape, tokenizer)
    check_texts(spec, tokenizer, [(r.query, r.text) for r in rows if r.query.strip()][:CHECKED])
    encoded, dropped = encode_rows(rows, spec, hugging_face(tokenizer), config.max_length, config.tasks)
    known = [row for row in rows if row.lang in spec.prompt.languages]
    learnt = _learnt(known, expansions)
    queries = several(len({r.query for r in known}), "query", "queries")
    note(f"sft: {several(len(encoded), 'row')} from {queries}{counted(dropped)}")
    tell_language("sft", dropped)
    longest = max(len(row["input_ids"]) for row in encoded)
    answer = max(len(row.ids) - row.answer for row in map(_row, encoded))
    full = config.tuning == "full"
    needs = estimate(
        shape,
        config,
        on,
        rank=0 if full else config.rank,
        longest=longest,
        answer=answer,
    )
    dev = load_dev(config, spec, tokenizer, on, workdir)

    with explain_out_of_memory(config, on, full):
        announce("sft", needs, on)
        model = load_model(source, dtype=on.weights(full), attention=on.attention(config.packing))
        trainer = make_trainer(config, on, model, tokenizer, encoded, run.partial)
    check_batch(trainer, [_row(row) for row in encoded])
    run.train(trainer, dev, full)
    return run.finish_training(
        trainer,
        msgspec.structs.replace(spec, stage="sft"),
        tokenizer if full else None,
        base=source,
        rows=len(encoded),
        dropped=dict(dropped),
        learnt=learnt,
    )


def _learnt(rows: Iterable[Expansion], files: Sequence[Path | str]) -> list[str]:
    """The data sets of the rows, with their splits where the record of `teach` beside a file tells them."""
    records = [read_record(Path(file).parent) for file in files]
    taught = {
        str(record["settings"].get("dataset")) for record in records if record.get("command") == "teach"
    }
    found = set()
    for name in {row.dataset for row in rows}:
        splits = {full for full in taught if full.rpartition("@")[0] == name}
        if f"{name}@test" in splits:
            warn(
                f"sft: texts for the test queries of {name}: what is measured on them says nothing of others"
            )
        found |= splits or {name}
    return sorted(found)


def _prepare(config: SftConfig, workdir: Workdir) -> tuple[str, ModelSpec]:
    """`prepare_student`, whose spec has the configuration's budget."""
    source, spec = prepare_student(config.student, workdir)
    budget = config.budget_tokens or spec.prompt.max_tokens
    prompt = msgspec.structs.replace(spec.prompt, max_tokens=budget)
    return source, msgspec.structs.replace(spec, prompt=prompt)


def make_trainer(
    config: SftConfig,
    on: Hardware,
    model: Any,
    tokenizer: Any,
    encoded: list[dict[str, list[int]]],
    folder: Path,
) -> Any:
    """TRL's trainer for rows of ids and labels, as `encode_rows` gives them."""
    trl, datasets = require("trl", "train"), require("datasets", "train")
    dataset = datasets.Dataset.from_list(encoded)
    if config.packing:
        dataset = trl.pack_dataset(dataset, config.max_length, "bfd")
        note(f"sft: packed into {len(dataset)} rows of up to {config.max_length} tokens")
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            **trainer_arguments(config, on, folder),
            dataset_kwargs={"skip_prepare_dataset": True},  # the rows are token ids already, exactly ours
            padding_free=config.packing,
            train_sampling_strategy="random" if config.packing else "group_by_length",
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=None if config.tuning == "full" else lora_config(config.rank, config.alpha),
    )
    if on.device == "cpu":
        compute_answers_alone(trainer.model)
    return trainer


def example(expansions: Sequence[Path | str], config: SftConfig, *, workdir: Workdir) -> str:
    """The first row as it would be trained on, for people; nothing is trained."""
    rows = select_rows(read_texts(expansions), config)
    source, spec = _prepare(config, workdir)
    tokenizer = load_tokenizer(source)
    encoded, _ = encode_rows(rows[:32], spec, hugging_face(tokenizer), config.max_length, config.tasks)
    return _row(encoded[0]).describe(tokenizer)


def _row(encoded: dict[str, list[int]]) -> Row:
    return Row(tuple(encoded["input_ids"]), encoded["labels"].count(-100))


def select_rows(rows: Sequence[Expansion], config: SftConfig) -> list[Expansion]:
    """The rows that the configuration selects.

    Raises:
        BadInput: there is none.
    """
    selected = [
        row
        for row in rows
        if (row.problem is None or row.problem in config.accept)
        and (not config.teacher_models or row.model in config.teacher_models)
        and (not config.modes or row.mode in config.modes)
    ]
    if not selected:
        found = ", ".join(sorted({f"{row.model} {row.mode}" for row in rows}))
        told = _left_out(rows, config)
        raise BadInput(f"no expansion left to train on; the files hold: {found}{told and f'; {told}'}")
    if 0 < config.max_rows < len(selected):
        return random.Random(config.seed).sample(selected, config.max_rows)
    return selected


def _left_out(rows: Iterable[Expansion], config: SftConfig) -> str:
    """How many rows have a problem that isn't accepted, and the flags that take them; "" if none has."""
    problems = [row.problem for row in rows if row.problem]
    marked = Counter(problem for problem in problems if problem not in config.accept)
    kinds = ", ".join(f"{problem} ({count})" for problem, count in marked.items())
    takes = "; --accept cut takes those that were cut" if "cut" in marked else ""
    return kinds and f"left out, as `teach` marked them: {kinds}{takes}"


def encode_rows(
    rows: Iterable[Expansion],
    spec: ModelSpec,
    tokenize: Tokenize,
    max_length: int,
    tasks: Sequence[Task] = ("write",),
) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """Rows -> {"input_ids", "labels"}: prompt, answer, one end token; the prompt's labels are -100.

    One for each task: the answer to a query is its expansion, that to an expansion its query. Expansions are
    cut where the student's budget ends. Also returns how many were dropped, by reason.
    """
    encoded, dropped, seen = [], Counter[str](), set()
    for row in rows:
        if not row.text.strip() or not row.query.strip():
            dropped["empty"] += 1
            continue
        if row.lang not in spec.prompt.languages:
            dropped[OTHER_LANGUAGE] += 1
            continue
        if (row.query, row.text) in seen:
            dropped["duplicate"] += 1
            continue
        seen.add((row.query, row.text))
        for task in tasks:
            if task == "write":
                prompt = spec.prompt.encode(row.query, tokenize)
                answer = spec.prompt.encode_answer(row.text, tokenize)[: spec.prompt.max_tokens]
            else:
                (prompt,), answer, _ = spec.feedback.encode(row.query, [row.text], spec.prompt, tokenize)
                answer += tokenize(spec.prompt.end, True)
            if len(prompt) + len(answer) > max_length:
                dropped["too long"] += 1
                continue
            encoded.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    if not encoded:
        known = ", ".join(spec.prompt.languages)
        raise BadInput(
            f"no expansion is left to train on, by a student that knows {known}{counted(dropped)}; "
            f"--student takes another one, such as {SPEAKS_BOTH}"
        )
    return encoded, dropped
