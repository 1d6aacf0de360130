"""What a training runs on: device, precision and processes; and what to change where memory runs out."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from qe_edge.errors import BadArgument, QeEdgeError, require
from qe_edge.train.config import DpoConfig, SftConfig, TrainConfig
from qe_edge.work.machine import cpu_name

# How torch says so where it doesn't raise its own error; oneDNN, for which it found no room, the last way.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA out of memory",
    "could not create a primitive",
)


class Hardware(NamedTuple):
    """A device and the precision it computes in; `processes` share the rows, each on a device of its own."""

    device: Literal["cuda", "cpu"]
    precision: Literal["bfloat16", "float16", "float32"]
    processes: int
    name: str

    def weights(self, full: bool) -> Any:
        """The dtype the weights are held in.

        Frozen weights can be bfloat16 as they are; weights that are trained need float32, or small updates
        are lost in rounding.
        """
        torch = require("torch", "train")
        frozen_bf16 = self.precision == "bfloat16" and not full
        return torch.bfloat16 if frozen_bf16 else torch.float32

    def autocast(self) -> Any:
        """Torch's context for arithmetic in this precision."""
        torch = require("torch", "train")
        return torch.autocast(
            self.device, dtype=getattr(torch, self.precision), enabled=self.precision != "float32"
        )

    def attention(self, packing: bool) -> str | None:
        """Which of transformers' implementations; FlashAttention keeps packed rows apart without a mask."""
        from transformers.utils import is_flash_attn_2_available

        # It computes in 16 bits alone, on GPUs that have bfloat16.
        able = packing and self.device == "cuda" and self.precision == "bfloat16"
        return "flash_attention_2" if able and is_flash_attn_2_available() else None

    def main_process_first(self) -> AbstractContextManager[None]:
        """The main process goes through the block before the others do."""
        accelerate = require("accelerate", "train")
        if self.processes > 1:
            # Its functions' default is the group there is when it is imported, which they then hold for good.
            require("torch.distributed.nn", "train")
        # It may unpack a model or index a collection while the others wait, for longer than NCCL's minutes.
        state = accelerate.PartialState(cpu=self.device == "cpu", timeout=timedelta(hours=6))
        return state.main_process_first()

    def memory_gb(self) -> float:
        """What the device has, of which something is in use already."""
        import psutil

        if self.device == "cuda":
            torch = require("torch", "train")
            return torch.cuda.get_device_properties(0).total_memory / 2**30
        return psutil.virtual_memory().available / 2**30 / self.processes


def hardware(config: TrainConfig) -> Hardware:
    """The device and precision that a configuration asks for.

    `auto` takes CUDA where it is, and bfloat16 where the device computes it natively: emulated, it is slower
    than float32. GPUs without it get float16.

    Raises:
        BadArgument: there is no such device, or it lacks the precision.
    """
    torch = require("torch", "train")
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        built = torch.version.cuda
        why = f"torch {torch.__version__} is a build without CUDA" if not built else "no usable GPU was found"
        raise BadArgument(
            f"device cuda was asked for, but {why}. Install a CUDA build of torch and its driver, "
            "or train on the CPU with --device cpu"
        )
    on_cuda = cuda and config.device != "cpu"
    if on_cuda and torch.cuda.device_count() > 1 and "RANK" not in os.environ:
        raise BadArgument(
            f"this machine has {torch.cuda.device_count()} GPUs: start one process on each with `accelerate "
            "launch --multi_gpu --no_python qe-edge train …`, or show one alone with CUDA_VISIBLE_DEVICES=0"
        )
    name = torch.cuda.get_device_name(0) if on_cuda else cpu_name()
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else _cpu_has_bf16()
    if config.precision == "bfloat16" and not bf16:
        raise BadArgument(
            f"{name} doesn't compute in bfloat16; use --precision "
            + ("float16 or auto" if on_cuda else "float32 or auto")
        )
    if config.precision == "float16" and not on_cuda:
        raise BadArgument("float16 training needs CUDA; use --precision float32 or auto on a CPU")
    best: Literal["bfloat16", "float16", "float32"] = (
        "bfloat16" if bf16 else "float16" if on_cuda else "float32"
    )
    return Hardware(
        "cuda" if on_cuda else "cpu",
        best if config.precision == "auto" else config.precision,
        int(os.environ.get("WORLD_SIZE", "1")),
        name,
    )


def leave_group() -> None:
    """Part with the processes that were started together: the last thing that a successful command does.

    The group's threads end with its last reference. One of Gloo's that freed a tensor while the interpreter
    ends would abort the process (https://github.com/pytorch/pytorch/pull/179291). After an error, don't: NCCL
    would wait for the other processes.
    """
    torch = require("torch", "train")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # the trainer holds the group, and is part of a reference cycle
        torch.distributed.destroy_process_group()


def _cpu_has_bf16() -> bool:
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def explain_out_of_memory(config: TrainConfig, on: Hardware, full: bool) -> Iterator[None]:
    """Turn torch's out-of-memory errors into what to change; `full` says that all weights are trained.

    Raises:
        QeEdgeError: memory ran out.
    """
    torch = require("torch", "train")
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(s in str(error) for s in OUT_OF_MEMORY):
            raise
        advice = []
        if config.batch_size > 1:
            fewer = max(n for n in range(1, config.batch_size) if config.batch_size % n == 0)
            more = config.accumulate * config.batch_size // fewer
            advice.append(f"--batch-size {fewer} --accumulate {more}, which trains the same")
        if not config.checkpointing:
            advice.append("--checkpointing")
        if full:
            advice.append("--tuning lora" if isinstance(config, SftConfig) else "an adapter of `train sft`")
        if full and isinstance(config, DpoConfig) and not config.precompute:
            advice.append("--precompute, which holds the reference only before the training")
        advice += ["a smaller --max-length", "a smaller student"]
        raise QeEdgeError(
            f"out of memory on {on.name} ({on.memory_gb():.1f} GB) with {config.batch_size} rows of up to "
            f"{config.max_length} tokens at a time. Try {'; or '.join(advice)}. With other settings a run "
            "starts anew: where this one left a checkpoint, name another folder with --out"
        ) from None
