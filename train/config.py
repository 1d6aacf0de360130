"""The settings of pairs, SFT and DPO, said once: recipes are read into them, flags are made of them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from qe_edge.records import ANALYZER, RETRIEVER, Count, Mode, Problem, said
from qe_edge.student.feedback import Passages
from qe_edge.student.join import DEFAULT_JOIN
from qe_edge.student.models import DEFAULT_STUDENT

Strategy = Literal["best-worst", "all-above-gap", "best-vs-sampled"]
Executor = Literal["local", "ray"]
Device = Literal["auto", "cuda", "cpu"]
Precision = Literal["auto", "bfloat16", "float16", "float32"]
Loss = Literal["sigmoid", "sigmoid_norm", "ipo", "sft"]
Task = Literal["write", "read"]
Size = Meta(ge=1, le=10**6)
Share = Meta(gt=0, lt=1e9)


class PairsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How candidates are scored and which of them make pairs.

    - `all-above-gap`: every two that differ enough, widest gap first.
    - `best-worst`: one pair a query.
    - `best-vs-sampled`: the best against others, drawn with `seed` from those that are worse enough.
    """

    join: Annotated[str, said("How query and expansion are joined: mass:R, repeat:N or adaptive:B.")] = str(
        DEFAULT_JOIN
    )
    reward: Annotated[str, said("A measure of ir_measures, or a mix: 0.7*nDCG@10 + 0.3*R@100.")] = "nDCG@10"
    length_penalty: Annotated[float, said("Taken off the reward per hundred words.", ge=0, le=10)] = 0.0
    strategy: Annotated[Strategy, said("all-above-gap, best-worst or best-vs-sampled.")] = "all-above-gap"
    min_gap: Annotated[
        float, said("Difference of rewards from which two candidates make a pair.", gt=0, le=1)
    ] = 0.05
    max_per_query: Annotated[Count, said("Pairs kept of each query.")] = 4
    seed: Annotated[int, said("Random seed of best-vs-sampled.")] = 0
    accept: Annotated[
        tuple[Problem, ...],
        said("Also use rows that `teach` marked so, e.g. cut (others need `teach --keep-bad`)."),
    ] = ()
    analyzer: Annotated[str, said(ANALYZER)] = ""
    retriever: Annotated[str, said(RETRIEVER)] = ""
    reader: Annotated[
        str, said("An encoder's GGUF: candidates are scored as it refines them, see Expander.refine.")
    ] = ""
    passages: Annotated[
        Passages | None, said("Passages it reads in a round (default: the number of a student's spec).")
    ] = None
    executor: Annotated[Executor, said("local, or ray for a Ray cluster.")] = "local"
    workers: Annotated[int, said("Processes; 0 is one per core.", ge=0, le=512)] = 0

    def __post_init__(self) -> None:
        if self.reader and (self.retriever or self.executor != "local"):
            raise ValueError("a reader works on this machine, over our own index")
        if self.passages and not self.reader:
            raise ValueError("passages are read by a reader: name one")


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What SFT and DPO share. A step takes `batch_size * accumulate` rows on each process.

    Rows over `max_length` tokens are dropped and counted, never cut.
    """

    learning_rate: Annotated[float, Share, said("Peak learning rate; a cosine takes it to zero.")] = 1e-4
    epochs: Annotated[float, Share, said("Passes over the rows.")] = 1.0
    max_steps: Annotated[
        int, Meta(ge=0, le=10**9), said("Stop after so many steps, whatever --epochs says; 0: epochs decide.")
    ] = 0
    batch_size: Annotated[int, Size, said("Rows in memory at a time.")] = 4
    accumulate: Annotated[int, Size, said("Batches per step.")] = 2
    max_length: Annotated[
        int, Size, said("Tokens, prompt included; longer rows are dropped and counted.", rare=True)
    ] = 512
    checkpointing: Annotated[
        bool, said("Compute activations twice: less memory, about a third more time.", rare=True)
    ] = False
    device: Annotated[Device, said("auto is cuda where there is one.")] = "auto"
    precision: Annotated[
        Precision, said("Number format of the arithmetic; auto: the device's fastest.", rare=True)
    ] = "auto"
    eval_dataset: Annotated[
        str,
        said(
            "Judged dev queries, as NAME or NAME@SPLIT: nDCG@10 of the student's greedy "
            "expansions is measured while it trains, and the best checkpoint is kept."
        ),
    ] = ""
    eval_join: Annotated[
        str, said("Join of query and expansion for it (default: the student's join).", rare=True)
    ] = ""
    eval_steps: Annotated[int, Size, said("Steps between two of its measurements.", rare=True)] = 50
    eval_queries: Annotated[int, Size, said("Dev queries, drawn at random.", rare=True)] = 50
    seed: Annotated[int, Meta(ge=0, lt=2**32), said("Random seed.")] = 0
    save_steps: Annotated[int, Size, said("Steps between checkpoints to resume from.", rare=True)] = 20
    logging_steps: Annotated[int, Size, said("Steps between entries of the log.", rare=True)] = 5
    tensorboard: Annotated[bool, said("Also log for TensorBoard.", rare=True)] = False


SPEAKS_BOTH = "Qwen/Qwen3-0.6B"  # for texts in a language that the default student doesn't know


class SftConfig(
    TrainConfig,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={"teacher_models": "teacher_model", "modes": "mode", "tasks": "task"},
):
    """SFT settings.

    `teacher_models` and `modes` select rows, empty meaning all; rows that `teach` marked with a problem
    are left out, but for the problems in `accept`. Of what is left, `max_rows` are drawn at random, 0
    meaning all. Of each the student learns to `write` the query's expansion, to `read` (to find the query
    likely after the expansion's beginning, which is what corpus feedback asks of it), or both. With
    `budget_tokens` it learns so many tokens of each answer, and its spec says so. `packing` puts several
    rows into one of `max_length` tokens, apart from each other for the attention: nothing is padded.
    """

    student: Annotated[str, said("Hub id, folder, GGUF file or builtin:NAME.")] = DEFAULT_STUDENT
    teacher_models: Annotated[tuple[str, ...], said("Take only this teacher's rows.")] = ()
    modes: Annotated[tuple[Mode, ...], said("Take only zero-shot or few-shot rows.", rare=True)] = ()
    max_rows: Annotated[int, Meta(ge=0), said("Rows drawn at random; 0 takes all.")] = 0
    tasks: Annotated[
        tuple[Task, ...],
        Meta(min_length=1),
        said("write, read (for feedback), or both: each makes a row of its own."),
    ] = ("write",)
    budget_tokens: Annotated[
        int, Meta(ge=0, le=10**6), said("Tokens it will write at most (default: as its prompt says, 128).")
    ] = 0
    accept: Annotated[
        tuple[Problem, ...],
        said("Also use rows that `teach` marked so, e.g. cut (others need `teach --keep-bad`)."),
    ] = ()
    tuning: Annotated[
        Literal["lora", "full"], said("An adapter, or all weights of a small student.", rare=True)
    ] = "lora"
    rank: Annotated[int, Size, said("Rank of the LoRA adapter.")] = 32
    alpha: Annotated[int, Size, said("LoRA's alpha: its output counts alpha / rank.", rare=True)] = 64
    packing: Annotated[bool, said("Several short rows in one; for a GPU.", rare=True)] = False
    learning_rate: Annotated[float, Share, said("Peak learning rate; a cosine takes it to zero.")] = 3e-4

    def __post_init__(self) -> None:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("a task is there twice")


class DpoConfig(
    TrainConfig,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={"loss_weights": "loss_weight"},
):
    """DPO settings (Rafailov et al., arXiv 2305.18290). `beta` weighs the pull towards the SFT model.

    `loss` names TRL's losses, summed with `loss_weights` (1 each by default): `sigmoid` is DPO,
    `sigmoid_norm` divides by the lengths, adding `sft` keeps the chosen text likely (RPO, arXiv 2404.19733).
    `length_weight` below 1 counts the longer side's surplus tokens for so much less (LD-DPO, arXiv
    2409.06411). `precompute` has the reference's log-probabilities computed once, before the first step:
    less memory, and less time over several epochs.
    """

    beta: Annotated[float, Share, said("Pull towards the SFT model.")] = 0.1
    loss: Annotated[
        tuple[Loss, ...], Meta(min_length=1), said("sigmoid, sigmoid_norm, ipo or sft; several are summed.")
    ] = ("sigmoid",)
    loss_weights: Annotated[
        tuple[Annotated[float, Share], ...],
        said("A weight for each --loss, in their order.", rare=True),
    ] = ()
    length_weight: Annotated[
        float,
        Meta(ge=0, le=1),
        said("Below 1, the longer side's surplus tokens count less (LD-DPO).", rare=True),
    ] = 1.0
    precompute: Annotated[bool, said("Compute the reference's log-probabilities beforehand.", rare=True)] = (
        False
    )
    learning_rate: Annotated[float, Share, said("Peak learning rate; a cosine takes it to zero.")] = 5e-5
    batch_size: Annotated[int, Size, said("Pairs in memory at a time.")] = 2
    accumulate: Annotated[int, Size, said("Batches per step.")] = 4

    def __post_init__(self) -> None:
        if self.loss_weights and len(self.loss_weights) != len(self.loss):
            raise ValueError(f"{len(self.loss)} losses need as many weights, not {len(self.loss_weights)}")
