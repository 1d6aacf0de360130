"""How fast and in how much memory a model is converted, beside the engines' own converters.

    python -m qe_edge.bench.programs.export_speed --shape qwen3-4b --folder DIR --llama-cpp LLAMA_CPP

Random weights of a real shape are written to DIR (two bytes a weight) and converted in turns, each in a
process of its own, from a source that was just read and so lies in the system's cache where that has room.
`write` copies the weights and waits until they are on the disk, the least that a conversion takes.
`export` is the whole of `qe-edge export --q8`: both conversions, a quantization and all checks, which
random weights don't pass with 4 bits.

Memory is the process's peak: all of it, with the pages of files that it maps, which the system drops when
somebody else needs the room; and its own alone.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Annotated, Any

import msgspec
import psutil
import typer

from qe_edge.bench import synthetic
from qe_edge.bench.child import in_child
from qe_edge.bench.speed import peak_memory_mb
from qe_edge.console import note
from qe_edge.student.join import DEFAULT_JOIN
from qe_edge.student.prompt import PromptText, prompt_for
from qe_edge.student.spec import ModelSpec, write_spec
from qe_edge.work.files import atomic_path, remove, write_json

# Runs llama.cpp's own script. It knows a tokenizer by what that does to a text; one that it can't know, such
# as a synthetic one, is named.
LLAMA_CPP_SCRIPT = """
import runpy, sys
folder, known = sys.argv.pop(1), sys.argv.pop(1)
sys.path.insert(0, folder)
import conversion.base
if known:
    conversion.base.TextModel.get_vocab_base_pre = lambda *_: known
runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""


class Measured(msgspec.Struct, frozen=True):
    """A turn: seconds, the process's peak memory, that without mapped files, and the bytes that it left."""

    seconds: float
    peak_mb: float
    own_peak_mb: float
    bytes: int


def main(
    folder: Annotated[Path, typer.Option(help="Where the model and its conversions go; may be large.")],
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(synthetic.SHAPES)}.")] = "qwen3-0.6b",
    only: Annotated[
        list[str] | None, typer.Option("--way", help="Only these, beside `write` (default: all).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way.")] = 2,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="llama.cpp's source, to convert by its script too.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write all that was measured to this JSON file.")] = None,
) -> None:
    """Print a table of seconds, ratios to writing the bytes, and peak memory."""
    model = folder / shape
    if not model.is_dir():
        note(f"writing random weights to {model}")
        _child("weights", shape, model)
    theirs = ["gguf llama.cpp"] if llama_cpp else []
    ways = ["gguf ours", *theirs, "mlx ours", "mlx mlx-lm", "Q4_K_M", "export"]
    if unknown := set(only or ()) - set(ways):
        raise typer.BadParameter(f"no way {', '.join(unknown)}; there are {', '.join(ways)}")
    ways = ["write", *(name for name in ways if not only or name in only)]
    turns: dict[str, list[Measured]] = {way: [] for way in ways}
    target, base = folder / "converted", folder / f"{shape}.gguf"
    for _ in range(rounds):
        for way in ways:
            note(way)
            if way == "Q4_K_M":
                _child("gguf ours", model, base)
            source = base if way == "Q4_K_M" else model
            _read(source)
            os.sync()  # or one turn would pay for the writing of the one before
            more = [llama_cpp] if way == "gguf llama.cpp" else []
            turns[way].append(_child(way, source, target, *more))
            remove(target)
            remove(base)
    sizes = synthetic.shape(shape)
    largest = sizes.vocab_size * sizes.hidden_size * 2 / 1e6  # the embeddings
    print(f"{shape}; the largest tensor has {largest:.0f} MB in the source; {rounds} rounds\n")
    print("| way | MB | seconds | times writing the bytes | peak memory MB | without mapped files |")
    print("| :-- | --: | --: | --: | --: | --: |")
    for way, found in turns.items():
        seconds, size = median(turn.seconds for turn in found), found[0].bytes / 1e6
        # Of each round's own writing: the speed of a disk wanders.
        rates = [write.bytes / write.seconds for write in turns["write"]]
        times = median(turn.seconds / (turn.bytes / rate) for turn, rate in zip(found, rates, strict=True))
        peak, own = max(turn.peak_mb for turn in found), max(turn.own_peak_mb for turn in found)
        print(f"| {way} | {size:,.0f} | {seconds:.1f} | {times:.2f} | {peak:,.0f} | {own:,.0f} |")
    if out:
        write_json(out, {"shape": shape, "turns": turns})


class Task(msgspec.Struct, frozen=True):
    """What a child does: a way and its arguments, of which the second is what it writes."""

    way: str
    arguments: list[str]


def _child(way: str, *arguments: object) -> Measured:
    return in_child(measure, Task(way, list(map(str, arguments))), what=f"of {way}")


def weights(shape: str, folder: Path) -> None:
    """A model folder of random weights in shards, as the hub has them, with the spec of a student."""
    import torch

    tokenizer = synthetic.tokenizer(shape)
    # Its tokens are bytes, of which a prompt as short as this has as many as a real one has tokens.
    prompt = msgspec.structs.replace(
        prompt_for(tokenizer.chat_template), texts={"en": PromptText("Expand.", "{query}")}
    )
    spec = ModelSpec(prompt=prompt, join=DEFAULT_JOIN, base_model=shape)
    with atomic_path(folder) as partial:
        synthetic.model(shape, dtype=torch.bfloat16).save_pretrained(partial, max_shard_size="2GB")
        tokenizer.save_pretrained(partial)
        write_spec(partial, spec)


def write(model: Path, target: Path) -> None:
    """The bytes of the weights, some megabytes in memory at a time."""
    with target.open("wb") as copy:
        for path in sorted(model.glob("*.safetensors")):
            with path.open("rb") as file:
                shutil.copyfileobj(file, copy, 2**24)


def _read(source: Path) -> None:
    for path in sorted(source.glob("*.safetensors")) if source.is_dir() else [source]:
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def gguf_ours(model: Path, target: Path) -> None:
    from qe_edge.export.gguf import convert_gguf

    convert_gguf(model, target)


def gguf_llama_cpp(model: Path, target: Path, llama_cpp: Path) -> None:
    """Its script in this process, whose peak is measured."""
    sys.argv = ["-c", str(llama_cpp), "qwen2", str(model), "--outfile", str(target), "--outtype", "bf16"]
    exec(LLAMA_CPP_SCRIPT, {"__name__": "script"})


def q4_k_m(base: Path, target: Path) -> None:
    from qe_edge.export.quantize import quantize_gguf

    quantize_gguf(base, target, "Q4_K_M")


def mlx_ours(model: Path, target: Path) -> None:
    from qe_edge.export.mlx import convert_mlx

    convert_mlx(model, target)


def mlx_mlx_lm(model: Path, target: Path) -> None:
    from mlx_lm import convert

    convert(str(model), str(target), quantize=True, q_bits=4, q_group_size=64, dtype="bfloat16")


def export(model: Path, target: Path) -> None:
    from qe_edge.export.config import ExportConfig
    from qe_edge.export.export import export_model

    export_model(model, target, ExportConfig(kinds=("Q8_0",)))


WAYS: dict[str, Callable[..., None]] = {
    "weights": weights,
    "write": write,
    "gguf ours": gguf_ours,
    "gguf llama.cpp": gguf_llama_cpp,
    "Q4_K_M": q4_k_m,
    "mlx ours": mlx_ours,
    "mlx mlx-lm": mlx_mlx_lm,
    "export": export,
}


def measure(task: Task) -> Measured:
    """In the child: from the first import to the last byte on the disk."""
    way, (first, *rest) = task.way, task.arguments
    arguments: list[Any] = [first if way == "weights" else Path(first), *map(Path, rest)]
    own = 0
    over = Event()

    def watch() -> None:
        nonlocal own
        while not over.wait(0.02):
            held = psutil.Process().memory_info()
            own = max(own, held.rss - getattr(held, "shared", 0))

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    WAYS[way](*arguments)
    os.sync()
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    target = arguments[1]
    files = [target] if target.is_file() else target.rglob("*")
    return Measured(seconds, peak_memory_mb(), own / 1e6, sum(file.stat().st_size for file in files))


if __name__ == "__main__":
    typer.run(main)
