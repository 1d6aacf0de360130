"""What SFT and DPO share: trainer arguments, progress, a clean Ctrl-C, and resuming."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

from qe_edge.console import note, progress
from qe_edge.errors import QeEdgeError, require
from qe_edge.manifest import remove, write_json
from qe_edge.workdir import RunFolder

LOG = "log.json"


class Interrupted(QeEdgeError):
    """Training was stopped by Ctrl-C with its state saved."""

    exit_code = 130


class TrainingRun(RunFolder):
    """A training run's folder, with checkpoints in it while it is not whole."""

    work = "checkpoint-*/trainer_state.json"

    def checkpoint(self) -> str | None:
        """The last whole checkpoint of an interrupted run; trainer_state.json is the last file of one."""
        whole = [path.parent for path in self.partial.glob(self.work)]
        for path in self.partial.glob("checkpoint-*"):
            if path not in whole:
                remove(path)
        return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None

    def train(self, trainer: Any, label: str) -> dict[str, float]:
        """Train to the end, from the last checkpoint if there is one; return the last logged figures.

        Raises:
            Interrupted: Ctrl-C; the step's state is saved first.
        """
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        for noisy in (PrinterCallback, ProgressCallback):  # they print to stdout
            trainer.remove_callback(noisy)
        checkpoint = self.checkpoint()
        if checkpoint:
            note(f"{label}: resuming from step {checkpoint.rpartition('-')[2]}")
        callback = _callback_class()(label)
        trainer.add_callback(callback)
        with callback:
            trainer.train(resume_from_checkpoint=checkpoint)
        if callback.stopped:
            raise Interrupted(
                f"interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}, "
                "which is saved; run the same command again to go on"
            )
        return {
            key: value
            for entry in trainer.state.log_history
            for key, value in entry.items()
            if isinstance(value, (int, float))
        }

    def finish_training(self, trainer: Any, **extra: Any) -> Path:
        """Write the log, drop the checkpoints and give the folder its name."""
        write_json(self.partial / LOG, trainer.state.log_history)
        for checkpoint in self.partial.glob("checkpoint-*"):
            remove(checkpoint)
        return self.finish(**extra)


def counted(dropped: Counter[str]) -> str:
    """What was dropped and why, to end a sentence with."""
    return "".join(f"; dropped {count} ({reason})" for reason, count in dropped.items())


def trainer_arguments(config: Any, folder: Path) -> dict[str, Any]:
    """The arguments that SFTConfig and DPOConfig share, for CUDA and for a CPU.

    bf16 is used on CUDA where the GPU has it and on a CPU that computes it natively; elsewhere float32,
    because emulated bf16 is slower than float32.
    """
    torch = require("torch", "train")
    cuda = torch.cuda.is_available()
    bf16 = torch.cuda.is_bf16_supported() if cuda else _cpu_has_bf16()
    return {
        "output_dir": str(folder),
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # below 1: a share of all steps
        "max_grad_norm": 1.0,
        "seed": config.seed,
        "data_seed": config.seed,
        "bf16": bf16,
        "fp16": cuda and not bf16,
        "use_cpu": not cuda,
        "gradient_checkpointing": False,
        "max_length": None,  # our rows are measured before; nothing is cut silently
        "logging_steps": config.logging_steps,
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
    }


def load_dtype() -> Any:
    """The precision the base is held in while it is trained."""
    torch = require("torch", "train")
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def _cpu_has_bf16() -> bool:
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _callback_class() -> type:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Draws progress; turns the first Ctrl-C into: finish the step, save, stop."""

        def __init__(self, label: str):
            self.label = label
            self.stopped = False
            self._bar: Any = None
            self._info = ""

        def __enter__(self) -> None:
            self._before = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self._interrupt)

        def __exit__(self, *error: object) -> None:
            signal.signal(signal.SIGINT, self._before)
            if self._bar:
                self._bar.__exit__(None, None, None)

        def _interrupt(self, *_: object) -> None:
            note(f"{self.label}: stopping after this step (Ctrl-C again to stop at once)")
            self.stopped = True
            signal.signal(signal.SIGINT, self._before)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._bar = progress(self.label, state.max_steps, done=state.global_step)
            self._advance = self._bar.__enter__()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self._info = f"loss {float(logs['loss']):.3f}"

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._advance(1, info=self._info)
            if self.stopped and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

    return Watch
