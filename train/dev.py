"""Evaluation by retrieval while training: nDCG@10 of greedy expansions; the best weights are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from qe_edge.console import is_main_process, note, warn
from qe_edge.errors import BadArgument, require
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.measures import mean, per_query
from qe_edge.student.join import Join
from qe_edge.student.prompt import hugging_face
from qe_edge.student.spec import ModelSpec
from qe_edge.train.config import TrainConfig
from qe_edge.train.hardware import Hardware
from qe_edge.work.files import atomic_path, read_json, remove, write_json
from qe_edge.work.folder import Workdir

BEST = "best"
RECORD = "best.json"
NDCG = "eval_ndcg"  # as TRL and TensorBoard name what is evaluated
BATCH = 16  # expansions written at a time, at most


class Best(msgspec.Struct, frozen=True):
    """The step whose weights are kept; step 0 is before the first one."""

    step: int
    ndcg: float


class DevSet:
    """Judged queries, of which `count` are drawn, and the index that their expansions are searched in.

    Raises:
        BadArgument: the student doesn't speak their language.
    """

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        tokenizer: Any,
        on: Hardware,
        *,
        join: Join,
        count: int,
        seed: int,
        workdir: Workdir,
        batch: int = BATCH,
    ):
        self.data = load_dataset(name)
        if self.data.lang not in spec.prompt.languages:
            raise BadArgument(
                f"{name} can't be evaluated on: its queries are in {self.data.lang}, "
                f"the student speaks {', '.join(spec.prompt.languages)}"
            )
        self.data = self.data.draw(count, seed)
        self.index = Index.for_dataset(self.data, workdir.root / "index")
        self.spec, self.tokenizer, self.on, self.join, self.batch = spec, tokenizer, on, join, batch
        tokenize = hugging_face(tokenizer)
        prompts = {
            query_id: spec.prompt.encode(text, tokenize) for query_id, text in self.data.queries.items()
        }
        # By length, so that little is padded.
        self.prompts = dict(sorted(prompts.items(), key=lambda item: len(item[1])))
        (self.end,) = tokenize(spec.prompt.end, True)

    def __str__(self) -> str:
        return f"{len(self.data.queries)} queries of {self.data}"

    def ndcg(self, model: Any) -> float:
        """Mean nDCG@10 of the queries, expanded greedily and joined by the rule of the dev set."""
        expansions = self._expand(model)
        run = {
            query_id: self.index.search_text(text, expansions[query_id], join=self.join)
            for query_id, text in self.data.queries.items()
        }
        return mean(per_query(self.data.qrels, run))

    def _expand(self, model: Any) -> dict[str, str]:
        torch, transformers = require("torch", "train"), require("transformers", "train")
        # Not the model's own settings, which may sample.
        greedy = transformers.GenerationConfig(
            max_new_tokens=self.spec.prompt.max_tokens, eos_token_id=self.end, pad_token_id=self.end
        )
        training, ids = model.training, list(self.prompts)
        model.eval()
        texts: dict[str, str] = {}
        for batch in (ids[i : i + self.batch] for i in range(0, len(ids), self.batch)):
            width = max(len(self.prompts[query_id]) for query_id in batch)
            pads = [width - len(self.prompts[query_id]) for query_id in batch]
            rows = [
                [self.end] * pad + self.prompts[query_id] for pad, query_id in zip(pads, batch, strict=True)
            ]
            mask = [[0] * pad + [1] * (width - pad) for pad in pads]
            with torch.inference_mode(), self.on.autocast():
                written = model.generate(
                    torch.tensor(rows, device=model.device),
                    attention_mask=torch.tensor(mask, device=model.device),
                    generation_config=greedy,
                )
            answers = self.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
            texts |= dict(zip(batch, answers, strict=True))
        model.train(training)
        return texts


def load_dev(
    config: TrainConfig, spec: ModelSpec, tokenizer: Any, on: Hardware, workdir: Workdir
) -> DevSet | None:
    """The dev set that the configuration names, on the main process, which evaluates for all."""
    if not config.eval_dataset or not is_main_process():
        return None
    return DevSet(
        config.eval_dataset,
        spec,
        tokenizer,
        on,
        join=Join.parse(config.eval_join) if config.eval_join else spec.join,
        count=config.eval_queries,
        seed=config.seed,
        workdir=workdir,
        # Writing a row takes less than training on one, and what makes a training smaller shrinks this too.
        batch=min(BATCH, 2 * config.batch_size),
    )


def keep_best(trainer: Any, dev: DevSet, folder: Path, every: int, saved: dict[str, Any]) -> Any:
    """A callback that evaluates before the first step, every so many, and at the end, and keeps the best.

    The best weights lie in `folder / BEST` with their record, replaced as one.
    """
    from transformers import TrainerCallback

    class KeepBest(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                remove(folder / BEST)
                self._evaluate(state, control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self._evaluate(state, control)

        def _evaluate(self, state: Any, control: Any) -> None:
            if not state.is_world_process_zero:
                return
            model = trainer.model
            ndcg = dev.ndcg(model)
            training, due = model.training, control.should_log
            model.eval()  # TRL would add this step's training figures to the entry
            trainer.log({NDCG: ndcg})
            model.train(training)
            control.should_log = due  # an entry of the loss that is due is still to come
            best = read_best(folder)
            note(f"step {state.global_step}: nDCG@10 {ndcg:.3f} on {dev}")
            if best is None or ndcg >= best.ndcg:  # of equals, the one that learned more
                with atomic_path(folder / BEST) as partial:
                    model.save_pretrained(str(partial), **saved)
                    write_json(partial / RECORD, Best(state.global_step, ndcg))

    return KeepBest()


def read_best(folder: Path) -> Best | None:
    """The best evaluation so far."""
    file = folder / BEST / RECORD
    return msgspec.convert(read_json(file), Best) if file.is_file() else None


def take_best(folder: Path) -> Best:
    """Put the best weights in their place in the run's folder."""
    best = read_best(folder)
    assert best is not None  # the last step was evaluated
    for file in (folder / BEST).iterdir():
        if file.name != RECORD:
            file.replace(folder / file.name)
    if best.step == 0:
        warn("no evaluation was better than the one before training, so the untrained weights were kept")
    return best
