"""How fast is training, and how much memory does it take? Ours beside TRL's defaults, in one run.

    python -m qe_edge.bench.programs.train_speed --shape qwen3-0.6b --shape qwen3-1.7b --shape qwen3-4b \\
        --sft-batch 16 --dpo-batch 8 --rounds 2 --out gpu.json                                     # on a GPU
    python -m qe_edge.bench.programs.train_speed --shape smollm2-135m --steps 6                    # on a CPU

Random weights of a real shape; rows of about 60 + 128 tokens, whose lengths vary as ours do. Both ways get
the same rows and the same LoRA adapter. TRL's defaults are what its trainers do when they are told nothing
else: float32 weights, activations computed twice, eight rows at a time in any order, bfloat16 arithmetic.
Where that is emulated (a CPU without it), it is far slower, so there TRL gets float32 as we do.

Each way runs in a process of its own, in turns. Tokens are those of the rows, padding not counted; of DPO,
those of both sides. The share of the peak counts 4 N operations a token: 2 forward, 2 backward through frozen
weights.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, get_args

import msgspec
import typer

from qe_edge.bench import synthetic
from qe_edge.bench.child import Died, in_child
from qe_edge.bench.speed import peak_memory_mb
from qe_edge.console import note
from qe_edge.errors import QeEdgeError, require
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.train.estimate import estimate
from qe_edge.train.hardware import Hardware, hardware
from qe_edge.train.lora import lora_config
from qe_edge.work.files import write_json
from qe_edge.work.machine import usable_cores

Way = Literal["ours", "trl"]
Method = Literal["sft", "dpo"]
WAYS: tuple[Way, ...] = get_args(Way)
PROMPT, EXPANSION, SPREAD = 60, 128, 32
RANK = 16
WARM_UP = 2  # steps
# Dense bfloat16 operations per second, from the makers' data sheets; elsewhere a matrix product is measured.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "L4": 121e12}


class Task(msgspec.Struct, frozen=True):
    """What a child process measures."""

    way: Way
    method: Method
    shape: str
    layers: int | None
    steps: int
    batch: int


class Measured(msgspec.Struct, frozen=True):
    """What it found; `estimated_gb` is what `qe-edge train` would have announced."""

    tokens_per_s: float
    peak_gb: float
    estimated_gb: float
    parameters: int
    peak_flops: float
    peak_from: str
    device: str
    precision: str


def main(
    shape: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(synthetic.SHAPES)}; repeat it (default: qwen3-0.6b)."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the model has.")] = None,
    steps: Annotated[int, typer.Option(min=WARM_UP + 1, help="Steps of a turn; two warm up.")] = 12,
    sft_batch: Annotated[int, typer.Option(min=1, help="Our rows at a time; TRL's default is 8.")] = 8,
    dpo_batch: Annotated[int, typer.Option(min=0, help="Our pairs at a time; 0 leaves DPO out.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Write all that was measured to this JSON file.")] = None,
) -> None:
    """Print a table of tokens per second, peak memory and share of the device's peak."""
    on = hardware(SftConfig())
    found: dict[str, dict[str, list[Measured | None]]] = {}
    for name in shape or ["qwen3-0.6b"]:
        what = f"{name}, {layers} layers" if layers else name
        print(f"\n{what}; {on.name} ({usable_cores()} cores) in {on.precision}")
        print(f"{rounds} rounds of {steps} steps\n")
        print("| method | way | tokens/s | times TRL | of the peak | memory GB | estimated GB |")
        print("| :-- | :-- | --: | --: | --: | --: | --: |")
        found[name] = {}
        batches: dict[Method, int] = {"sft": sft_batch, "dpo": dpo_batch}
        for method, batch in batches.items():
            if batch:
                turns = _in_turns(method, name, layers, steps, batch, rounds)
                for way in WAYS:
                    print(_row(method, way, turns), flush=True)
                    found[name][f"{method} {way}"] = turns[way]
        if out:  # after each shape: a run that is cut keeps what it has
            write_json(out, {"layers": layers, "steps": steps, "measured": found})


def _in_turns(
    method: Method, shape: str, layers: int | None, steps: int, batch: int, rounds: int
) -> dict[Way, list[Measured | None]]:
    turns: dict[Way, list[Measured | None]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            turns[way].append(_run(Task(way, method, shape, layers, steps, batch)))
    return turns


def _row(method: str, way: Way, turns: dict[Way, list[Measured | None]]) -> str:
    done = [turn for turn in turns[way] if turn]
    if not done:
        return f"| {method} | {way} | out of memory | – | – | – | – |"
    rate = median(turn.tokens_per_s for turn in done)
    # Within a round, so that a machine whose speed wanders does not decide.
    ratios = [
        a.tokens_per_s / b.tokens_per_s for a, b in zip(turns[way], turns["trl"], strict=True) if a and b
    ]
    times = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "–"
    share = 4 * done[0].parameters * rate / done[0].peak_flops
    estimated = f"{done[0].estimated_gb:.1f}" if way == "ours" else "–"
    memory = max(turn.peak_gb for turn in done)
    return f"| {method} | {way} | {rate:,.0f} | {times} | {share:.0%} | {memory:.1f} | {estimated} |"


def _run(task: Task) -> Measured | None:
    """One turn in a child process; None where memory ran out."""
    note(f"{task.method} {task.way}")
    try:
        return in_child(measured, task, what=f"of {task.method} {task.way}")
    except Died:
        raise
    except QeEdgeError as error:
        note(str(error))
        return None


def rows(count: int, method: Method, name: str, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows or pairs of random ids, as `encode_rows` and `encode_pairs` give them."""
    import numpy as np

    draw = np.random.default_rng(seed)
    shape = synthetic.SHAPES[name]
    end, _ = synthetic.ENDS[shape.family]

    def ids(size: int) -> list[int]:
        return draw.integers(3, shape.vocabulary - 1000, size).tolist()

    def expansion() -> list[int]:
        return [*ids(max(8, round(draw.normal(EXPANSION, SPREAD)))), end]

    if method == "dpo":
        return [
            {"prompt_ids": ids(PROMPT), "chosen_ids": expansion(), "rejected_ids": expansion()}
            for _ in range(count)
        ]
    made = [(ids(PROMPT), expansion()) for _ in range(count)]
    return [{"input_ids": p + e, "labels": [-100] * len(p) + e} for p, e in made]


def tokens_of(row: dict[str, list[int]], method: str) -> int:
    """The tokens that are computed for a row; a pair's prompt goes with both sides."""
    if method == "sft":
        return len(row["input_ids"])
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def measure(task: Task) -> Measured:
    """In the child: train for some steps on random weights and time all but the first ones."""
    torch = require("torch", "train")
    common = {"accumulate": 1, "logging_steps": 1_000_000, "save_steps": 1_000_000}
    kind = SftConfig if task.method == "sft" else DpoConfig
    batch = task.batch if task.way == "ours" else 8
    config = kind(batch_size=batch, **common)  # type: ignore[arg-type]
    on = hardware(config)
    encoded = rows(batch * task.steps, task.method, task.shape)
    tokens = [tokens_of(row, task.method) for row in encoded]
    needs = estimate(
        synthetic.shape(task.shape, layers=task.layers),
        config,
        on,
        rank=RANK,
        longest=max(tokens) if task.method == "sft" else max(tokens) // 2,
        answer=EXPANSION + SPREAD,
    )
    with TemporaryDirectory() as folder:
        if task.way == "ours":
            trainer = _ours(task, config, on, encoded, Path(folder))
        else:
            trainer = _trl(task, on, encoded, Path(folder))
        clock = _clock(torch, on.device)
        trainer.add_callback(clock)
        trainer.train()
        parameters = sum(p.numel() for p in trainer.model.parameters() if not p.requires_grad)
    seconds = (clock.times[-1] - clock.times[WARM_UP - 1]) / (len(clock.times) - WARM_UP)
    known = next((flops for name, flops in PEAKS.items() if name in on.name), None)
    cuda = on.device == "cuda"
    return Measured(
        tokens_per_s=sum(tokens) / len(clock.times) / seconds,
        peak_gb=torch.cuda.max_memory_allocated() / 2**30 if cuda else peak_memory_mb() * 1e6 / 2**30,
        estimated_gb=needs.memory_gb,
        parameters=parameters,
        peak_flops=known or matmul_rate(on),
        peak_from="data sheet" if known else "a matrix product, measured",
        device=on.name,
        precision=on.precision,
    )


def matmul_rate(on: Hardware) -> float:
    """Operations per second of one matrix product in the training's precision, measured now."""
    torch = require("torch", "train")
    dtype = getattr(torch, on.precision)
    a, b = (torch.randn(2048, 2048, device=on.device).to(dtype) for _ in range(2))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def _model(task: Task, dtype: Any, device: str) -> Any:
    return synthetic.model(task.shape, layers=task.layers, dtype=dtype, device=device)


def _ours(task: Task, config: Any, on: Any, encoded: list[dict[str, list[int]]], folder: Path) -> Any:
    """The trainer as `qe-edge train` makes it."""
    from qe_edge.train import dpo, sft

    model = _model(task, on.weights(full=False), on.device)
    if task.method == "sft":
        config = msgspec.structs.replace(config, rank=RANK, alpha=RANK)
        return sft.make_trainer(config, on, model, synthetic.tokenizer(task.shape), encoded, folder)
    peft = require("peft", "train")
    adapted = peft.get_peft_model(model, lora_config(RANK, RANK))
    return dpo.make_trainer(config, on, adapted, None, synthetic.tokenizer(task.shape), encoded, folder)


def _trl(task: Task, on: Any, encoded: list[dict[str, list[int]]], folder: Path) -> Any:
    """TRL's trainer with its defaults; only where it runs, and that it keeps quiet, is set."""
    trl, datasets, torch = require("trl", "train"), require("datasets", "train"), require("torch", "train")
    quiet: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "num_train_epochs": 1,
        "use_cpu": on.device == "cpu",
    }
    if on.precision == "float32":
        quiet["bf16"] = False
    model = _model(task, torch.float32, on.device)  # what TRL loads a model's name in
    shared: dict[str, Any] = {
        "model": model,
        "train_dataset": datasets.Dataset.from_list(encoded),
        "processing_class": synthetic.tokenizer(task.shape),
        "peft_config": lora_config(RANK, RANK),
    }
    if task.method == "sft":
        # The rows are ids already, which is how TRL would have them after its own preparation.
        return trl.SFTTrainer(
            args=trl.SFTConfig(**quiet, dataset_kwargs={"skip_prepare_dataset": True}), **shared
        )

    class TokenizedDPOTrainer(trl.DPOTrainer):  # type: ignore[name-defined]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return TokenizedDPOTrainer(args=trl.DPOConfig(**quiet), **shared)


def _clock(torch: Any, device: str) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """When each step was over."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    return Clock()


def measured(task: Task) -> Measured:
    """In a child."""
    from qe_edge.train.hardware import explain_out_of_memory

    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    with explain_out_of_memory(SftConfig(batch_size=task.batch), hardware(SftConfig()), False):
        return measure(task)


if __name__ == "__main__":
    typer.run(main)
