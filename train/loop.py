"""What SFT and DPO share: the run's folder, trainer arguments, progress, a clean Ctrl-C, and resuming."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from qe_edge.backends.free_cores import FreeCores
from qe_edge.console import is_main_process, note, progress, warn
from qe_edge.errors import BadInput, Interrupted, require
from qe_edge.student.spec import ModelSpec, write_spec
from qe_edge.train.card import CARD, write_card
from qe_edge.train.config import TrainConfig
from qe_edge.train.curve import draw
from qe_edge.train.dev import BEST, Best, DevSet, keep_best, take_best
from qe_edge.train.hardware import Hardware, explain_out_of_memory
from qe_edge.work.files import read_json, remove, write_bytes
from qe_edge.work.machine import usable_cores
from qe_edge.work.runs import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = "log.jsonl"
# What ends a training after its step, with its state saved; a second one ends it at once.
STOPS = (signal.SIGINT, signal.SIGTERM)
TENSORBOARD = "tensorboard"


class TrainingRun(RunFolder):
    """A training run's folder, with checkpoints in it while it is not whole."""

    work = "checkpoint-*/trainer_state.json"

    def __init__(
        self, command: str, config: TrainConfig, on: Hardware, inputs: dict[str, Path | str], out: Path
    ):
        settings = msgspec.to_builtins(config) | {"processes": on.processes}
        super().__init__(command, settings, inputs, out)
        self.label = command.removeprefix("train ")
        self.config = config
        self.on = on
        self.kept: Best | None = None  # the evaluation whose weights are kept
        self.resumed = False

    def checkpoint(self) -> str | None:
        """The last whole checkpoint of an interrupted run; what is not whole is deleted."""
        whole = {}
        for path in self.partial.glob("checkpoint-*"):
            if self._is_whole(path):
                whole[int(path.name.rpartition("-")[2])] = str(path)
            else:
                remove(path)
        return whole[max(whole)] if whole else None

    def _is_whole(self, checkpoint: Path) -> bool:
        """Each process leaves its random state; trainer_state.json is the last file of the main one."""
        each = range(self.on.processes)
        random_states = [f"rng_state_{i}.pth" for i in each] if len(each) > 1 else ["rng_state.pth"]
        try:
            read_json(checkpoint / "trainer_state.json")
        except BadInput:
            return False
        return all((checkpoint / name).is_file() for name in random_states)

    def train(self, trainer: Any, dev: DevSet | None, full: bool, **saved: Any) -> None:
        """Train to the end, from the last checkpoint if there is one, and leave the weights in the folder.

        With a dev set, the weights of the best evaluation are kept, else the last ones. `full` says that all
        weights are trained; `saved` goes to `save_pretrained`.

        Raises:
            Interrupted: Ctrl-C; the step's state is saved first.
            QeEdgeError: memory ran out.
        """
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        for noisy in (PrinterCallback, ProgressCallback):  # they print to stdout
            trainer.remove_callback(noisy)
        trainer.create_model_card = lambda *_, **__: None  # TRL's; ours comes at the end
        checkpoint = self.checkpoint()
        if checkpoint:
            note(f"{self.label}: resuming from step {checkpoint.rpartition('-')[2]}")
        self.resumed = checkpoint is not None
        watch = _callback_class()(self.label, self.partial / LOG, self.on.processes)
        trainer.add_callback(watch)
        if self.on.device == "cpu" and self.on.processes == 1 and "OMP_NUM_THREADS" not in os.environ:
            trainer.add_callback(_threads_class()(FreeCores(usable_cores())))
        if dev:
            trainer.add_callback(keep_best(trainer, dev, self.partial, self.config.eval_steps, saved))
        with watch, explain_out_of_memory(self.config, self.on, full):
            trainer.train(resume_from_checkpoint=checkpoint)
        if watch.stopped:
            raise Interrupted(
                f"interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}, "
                "which is saved; run the same command again to go on"
            )
        if dev:  # on the main process alone
            self.kept = take_best(self.partial)
            note(f"{self.label}: kept step {self.kept.step}, nDCG@10 {self.kept.ndcg:.3f} on {dev}")
        elif is_main_process():
            trainer.model.save_pretrained(str(self.partial), **saved)

    def finish_training(
        self,
        trainer: Any,
        spec: ModelSpec,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        rows: int,
        **extra: Any,
    ) -> Path:
        """Add spec, log and picture to the weights, drop the checkpoints and give the folder its name.

        Whole weights get their tokenizer as well.
        """
        if not is_main_process():
            return self.out
        if tokenizer is not None:
            tokenizer.save_pretrained(self.partial)
        write_spec(self.partial, spec)
        # A training of few steps doesn't come to all of them. Packed, a row of its data holds several.
        at_once = self.config.batch_size * self.config.accumulate * self.on.processes
        share = trainer.state.global_step * at_once / len(trainer.train_dataset)
        seen = round(rows * min(1.0, share))
        write_card(self.partial, spec, rows=seen, full=tokenizer is not None)
        write_log(self.partial / LOG, trainer.state.log_history)
        draw(self.partial, trainer.state.log_history)
        metrics = last_figures(trainer.state.log_history, self.resumed)
        device = {"device": self.on.name, "precision": self.on.precision}
        self.finish(metrics=metrics, kept=self.kept, rows=rows, rows_seen=seen, **device, **extra)
        for leftover in (*self.out.glob("checkpoint-*"), self.out / BEST):  # no more needed, now it is whole
            remove(leftover)
        return self.out


def counted(dropped: Counter[str]) -> str:
    """What was dropped and why, to end a sentence with."""
    return "".join(f"; dropped {count} ({reason})" for reason, count in dropped.items())


def last_figures(history: list[dict[str, Any]], resumed: bool) -> dict[str, float]:
    """Each figure's last value in the log; `train_loss` is the mean of the steps that were logged.

    transformers' own mean, time and speed are those of the last sitting, divided by the steps of all.
    """
    figures = {
        key: value
        for entry in history
        for key, value in entry.items()
        if isinstance(value, (int, float)) and not (resumed and key.startswith("train_"))
    }
    logged = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if logged:
        starts = [0, *(step for step, _ in logged)]
        weighted = sum(loss * (step - start) for (step, loss), start in zip(logged, starts, strict=False))
        figures["train_loss"] = weighted / logged[-1][0]
    return figures


def write_log(file: Path, history: list[dict[str, Any]]) -> None:
    """The log as JSON Lines, an entry a line: whole at any time, also after a resumed run took steps back."""
    write_bytes(file, b"".join(msgspec.json.encode(entry) + b"\n" for entry in history))


def trainer_arguments(config: TrainConfig, on: Hardware, folder: Path) -> dict[str, Any]:
    """The arguments that SFTConfig and DPOConfig share."""
    if config.tensorboard:
        require("tensorboard", "tensorboard")
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / TENSORBOARD)
    return {
        "output_dir": str(folder),
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # below 1: a share of all steps
        "max_grad_norm": 1.0,
        "seed": config.seed,
        "data_seed": config.seed,
        "bf16": on.precision == "bfloat16",
        "fp16": on.precision == "float16",
        "use_cpu": on.device == "cpu",
        "gradient_checkpointing": config.checkpointing,
        "max_length": None,  # our rows are measured before; nothing is cut silently
        "logging_steps": config.logging_steps,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 1,
        "report_to": ["tensorboard"] if config.tensorboard else "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": on.device == "cuda",
    }


def _threads_class() -> type:
    import torch
    from transformers import TrainerCallback

    class FreeThreads(TrainerCallback):
        """Computes each batch in as many threads as find a core free: beside other work fewer are faster."""

        def __init__(self, free: FreeCores):
            self._free = free

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.set_num_threads(self._free())

        on_substep_end = on_step_begin

        def on_train_end(self, *_: Any, **__: Any) -> None:
            torch.set_num_threads(usable_cores())

    return FreeThreads


def _callback_class() -> type:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Draws progress and writes the log; turns the first of STOPS into: finish the step, save, stop.

        Of several processes, one that stopped by itself would leave the others waiting: they stop at once.
        """

        def __init__(self, label: str, log: Path, processes: int):
            self.label = label
            self.log = log
            self.processes = processes
            self.stopped = False
            self._bar: Any = None
            self._info = ""
            self._began = 0.0
            self._took: float | None = None  # seconds of the last step

        def __enter__(self) -> None:
            self._before = {number: signal.getsignal(number) for number in STOPS}
            if self.processes == 1:
                for number in STOPS:
                    signal.signal(number, self._interrupt)

        def __exit__(self, *error: object) -> None:
            self._restore()
            if self._bar:
                self._bar.__exit__(None, None, None)

        def _interrupt(self, *_: object) -> None:
            within = f", within about {self._took:.0f} s" if self._took and self._took >= 1 else ""
            note(f"{self.label}: stopping after this step{within} (Ctrl-C again to stop at once)")
            self.stopped = True
            self._restore()

        def _restore(self) -> None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.max_steps == 1 and state.is_world_process_zero:
                warn(
                    f"{self.label}: its only step warms up, at a rate of 0, so nothing is learnt: "
                    "take more rows or epochs, or let max_steps be more"
                )
            self._bar = progress(self.label, state.max_steps, done=state.global_step)
            self._advance = self._bar.__enter__()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self._info = f"loss {float(logs['loss']):.3f}"
            if state.is_world_process_zero:
                write_log(self.log, state.log_history)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # PEFT's card says nothing, and names a path of this machine.
            if state.is_world_process_zero:
                (Path(args.output_dir) / f"checkpoint-{state.global_step}" / CARD).unlink(missing_ok=True)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._took = time.monotonic() - self._began
            self._advance(1, info=self._info)
            if state.global_step == state.max_steps:
                control.should_log = True  # a short training, too, has a loss to tell
            elif self.stopped:
                control.should_log = control.should_save = control.should_training_stop = True

    return Watch
