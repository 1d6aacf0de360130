"""`qe-edge bench speed`: what a machine does with a model, beside the plainest loop over llama.cpp.

A synthetic model has a real shape and random weights, so that nothing is downloaded. Its GGUF is put together
from one quantized layer: each layer of the real mixture of types is a copy of it.
"""

from __future__ import annotations

import ctypes
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from qe_edge.bench import synthetic
from qe_edge.bench.child import in_child
from qe_edge.bench.speed import peak_memory_mb
from qe_edge.console import note, progress, several
from qe_edge.errors import BadArgument, require
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.quantize import KINDS, NEED_IMPORTANCE, quantize_gguf
from qe_edge.runtime.expander import PARALLEL
from qe_edge.student.models import ModelRef, resolve
from qe_edge.work.files import atomic_path
from qe_edge.work.machine import usable_cores

if TYPE_CHECKING:
    from qe_edge.backends.llama_batch import LlamaBatch
    from qe_edge.backends.llama_cpp import LlamaCppBackend

# Our typical query: the prompt with its query, and an expansion.
PROMPT, ANSWER = 60, 128


class EngineSpeed(msgspec.Struct, frozen=True):
    """Of one GGUF. Rates are medians over the rounds; `of_loop` is ours by the loop's, round by round.

    `batch_tokens_per_s` is what PARALLEL sequences, decoded together, write in all.

    `bandwidth_share` is what decoding reads of the weights per second by what a copy in memory moves.
    """

    model: str
    threads: int
    file_mb: float
    load_s: float
    first_token_ms: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    loop_tokens_per_s: float
    of_loop: float
    batch_tokens_per_s: float
    bandwidth_gb_s: float
    bandwidth_share: float
    peak_memory_mb: float


class Task(msgspec.Struct, frozen=True):
    """What a child measures."""

    model: str
    threads: int
    rounds: int


def engine_speed(ref: ModelRef, *, threads: int | None = None, rounds: int = 3) -> EngineSpeed:
    """Measure a GGUF through our backend and through the plain loop, in turns, in a process of its own.

    Raises:
        BadArgument: it is no GGUF.
        QeEdgeError: it can't be run.
    """
    if not ref.is_gguf or ref.path is None:
        raise BadArgument(f"{ref.name} is no GGUF file, which the plain loop over llama.cpp needs")
    task = Task(str(ref.path), threads or usable_cores(), rounds)
    return in_child(measure, task, what=f"running {ref.name}")


def measure(task: Task) -> EngineSpeed:
    """In a child."""
    from qe_edge.backends.llama_cpp import LlamaCppBackend

    ref, threads, rounds = resolve(task.model), task.threads, task.rounds
    assert ref.path is not None
    with progress(f"bench: {ref.name}: loading", None):
        start = time.perf_counter()
        backend = LlamaCppBackend(ref, threads=threads)
        load_s = time.perf_counter() - start
    prompt = np.random.default_rng(0).integers(0, backend.model.vocabulary, PROMPT).tolist()
    ours, loop = [], []
    with closing(backend), progress(f"bench: {ref.name}", 2 * rounds + 1) as advance:
        batch = backend.batch(1)
        for turn in range(rounds + 1):  # the first one warms up
            begin = time.perf_counter()
            number = batch.add(prompt, prefix=0, answer=ANSWER)
            batch.step()
            first = time.perf_counter()
            for _ in range(ANSWER - 1):
                batch.step()
            end = time.perf_counter()
            batch.remove(number)
            rate, _ = plain_loop(batch, prompt)
            if turn:
                ours.append((first - begin, (ANSWER - 1) / (end - first)))
                loop.append(rate)
            advance()
        peak_mb = peak_memory_mb()  # of one sequence at a time
        together = []
        for _ in range(rounds):
            together.append(_together(backend, prompt))
            advance()
        read = _bytes_read_per_token(ref.path)
    bandwidth = memory_bandwidth(threads)
    decode = median(rate for _, rate in ours)
    prefill_s = median(seconds for seconds, _ in ours)
    return EngineSpeed(
        model=ref.path.name,
        threads=threads,
        file_mb=ref.size_bytes() / 1e6,
        load_s=load_s,
        first_token_ms=prefill_s * 1000,
        prefill_tokens_per_s=PROMPT / prefill_s,
        decode_tokens_per_s=decode,
        loop_tokens_per_s=median(loop),
        batch_tokens_per_s=median(together),
        of_loop=median(a / b for (_, a), b in zip(ours, loop, strict=True)),
        bandwidth_gb_s=bandwidth / 1e9,
        bandwidth_share=decode * read / bandwidth,
        peak_memory_mb=peak_mb,
    )


def _together(backend: LlamaCppBackend, prompt: list[int]) -> float:
    """Tokens per second of PARALLEL answers to the same prompt, once all prompts are read."""
    batch = backend.batch(PARALLEL)
    numbers = [batch.add(prompt, prefix=0, answer=ANSWER) for _ in range(PARALLEL)]
    while len(batch.step()) < PARALLEL:
        pass
    start = time.perf_counter()
    written = sum(len(batch.step()) for _ in range(ANSWER // 2))
    rate = written / (time.perf_counter() - start)
    for number in numbers:
        batch.remove(number)
    return rate


def plain_loop(batch: LlamaBatch, prompt: list[int]) -> tuple[float, list[int]]:
    """The shortest greedy loop over llama.cpp's functions, in the same context: tokens per second, tokens."""
    llama_cpp = require("llama_cpp", "llama")
    batch.clear()
    context = batch.context

    def decode(tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        row = ctypes.cast(llama_cpp.llama_get_logits_ith(context, -1), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(row, (batch.vocabulary,)).argmax())

    tokens = [decode(prompt)]
    start = time.perf_counter()
    for _ in range(ANSWER - 1):
        tokens.append(decode(tokens[-1:]))
    rate = (ANSWER - 1) / (time.perf_counter() - start)
    batch.clear()
    return rate, tokens


def _bytes_read_per_token(file: Path) -> int:
    """All weights but an embedding table that isn't the output's too, of which one row is read."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(str(file)).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def memory_bandwidth(threads: int) -> float:
    """Bytes per second that copies of a large array read and write, the best of five, on as many threads.

    It takes a gigabyte, past every cache, however many the threads are.
    """
    from concurrent.futures import ThreadPoolExecutor

    sources = [np.ones((1 << 26) // threads) for _ in range(threads)]
    targets = [np.empty_like(source) for source in sources]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))  # NumPy lets go of the interpreter while it copies
            best = max(best, 2 * sum(s.nbytes for s in sources) / (time.perf_counter() - start))
    return best


def synthetic_gguf(shape: str, kind: str, folder: Path) -> Path:
    """A GGUF of a real shape with random weights, made once and kept in `folder`.

    Raises:
        NotFound, BadArgument: no such shape or kind, or one that needs an importance matrix.
    """
    if kind not in KINDS or kind in NEED_IMPORTANCE:
        known = ", ".join(name for name in KINDS if name not in NEED_IMPORTANCE)
        raise BadArgument(f"no kind {kind!r} for random weights; choose one of: {known}")
    file = folder / f"{shape}-{kind}.gguf"
    if file.exists():
        return file
    config = synthetic.shape(shape)  # refuses an unknown one
    note(f"making {file} of random weights (once)")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as scratch:
        types = _types_of(shape, kind, Path(scratch))
        base = _one_layer(shape, Path(scratch))
        variants: dict[str, list[str]] = defaultdict(list)  # of the one layer's tensors
        for name, found in types.items():
            own = _of_first_layer(name)
            if found not in variants[own]:
                variants[own].append(found)
        passes = []
        for i in range(max(map(len, variants.values()))):
            chosen = {name: found[min(i, len(found) - 1)] for name, found in variants.items()}
            passes.append(quantize_gguf(base, Path(scratch) / f"{i}.gguf", kind, types=chosen))
        _repeat_layers(passes, types, config.num_hidden_layers, file)
    return file


def _of_first_layer(name: str) -> str:
    prefix, dot, rest = name.partition(".")
    return f"blk.0.{rest.partition('.')[2]}" if prefix == "blk" and dot else name


def _one_layer(shape: str, scratch: Path) -> Path:
    import torch

    model = scratch / "model"
    synthetic.model(shape, layers=1, dtype=torch.bfloat16).save_pretrained(model)
    synthetic.tokenizer(shape).save_pretrained(model)
    return convert_gguf(model, scratch / "base.gguf")


def _types_of(shape: str, kind: str, scratch: Path) -> dict[str, str]:
    """Each matrix's type in a real file of this kind: llama.cpp decides it by name, layer and width alone."""
    import torch
    import transformers
    from gguf import GGUFReader

    config, narrow = synthetic.shape(shape), scratch / "narrow"
    fits = all(width % 256 == 0 for width in (config.hidden_size, config.intermediate_size))
    width = 256 if fits else 288
    config.hidden_size, config.intermediate_size, config.vocab_size = width, 512, 512
    config.eos_token_id = config.pad_token_id = 0
    config.head_dim = max(8, 256 // config.num_attention_heads) if fits else 32
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(narrow)
    synthetic.tokenizer("smollm2-135m").save_pretrained(narrow)
    quantized = quantize_gguf(convert_gguf(narrow, scratch / "n.gguf"), scratch / "nq.gguf", kind)
    tensors = GGUFReader(str(quantized)).tensors
    return {tensor.name: tensor.tensor_type.name for tensor in tensors if len(tensor.shape) == 2}


def _repeat_layers(passes: list[Path], types: dict[str, str], layers: int, out: Path) -> None:
    """Write one file of as many layers, each tensor in its type from the pass that has it."""
    import gguf

    readers = [gguf.GGUFReader(str(file)) for file in passes]
    tensors = {(t.name, t.tensor_type.name): t for reader in readers for t in reader.tensors}
    architecture = readers[0].fields["general.architecture"].contents()
    with atomic_path(out) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        for name, field in readers[0].fields.items():
            if name.startswith("GGUF.") or name == "general.architecture":
                continue
            value = layers if name.endswith(".block_count") else field.contents()
            writer.add_key_value(
                name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
        for tensor in readers[0].tensors:
            names = [tensor.name]
            if tensor.name.startswith("blk.0."):
                names = [f"blk.{i}.{tensor.name.removeprefix('blk.0.')}" for i in range(layers)]
            for name in names:
                own = tensors[tensor.name, types.get(name, tensor.tensor_type.name)]
                writer.add_tensor(name, own.data, raw_dtype=own.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def text(found: list[EngineSpeed], rounds: int) -> str:
    """A block for each model: figures, and what each is. Of at most 80 columns, unless a name is longer."""
    turns, threads = several(rounds, "turn"), several(found[0].threads, "thread")
    lines = [f"On {threads}; rates are medians of {turns} (prompt {PROMPT} tokens, answer {ANSWER})."]
    for s in found:
        of_memory = f"of memory's {s.bandwidth_gb_s:,.0f} GB/s, to read weights"
        rows = (
            ("file", f"{s.file_mb:,.0f}", "MB", "on the disk"),
            ("memory", f"{s.peak_memory_mb:,.0f}", "MB", "most that the process took for one answer"),
            ("loading", f"{s.load_s:,.2f}", "s", "until the model can be asked"),
            ("first token", f"{s.first_token_ms:,.0f}", "ms", "reading the prompt, writing one token"),
            ("prefill", f"{s.prefill_tokens_per_s:,.0f}", "tok/s", "the prompt's, until the first token"),
            ("decode", f"{s.decode_tokens_per_s:,.1f}", "tok/s", "the answer's, after the first token"),
            ("of the plain loop", f"{100 * s.of_loop:,.0f}", "%", "of what a bare llama.cpp loop decodes"),
            (f"{PARALLEL} at once", f"{s.batch_tokens_per_s:,.1f}", "tok/s", "of so many answers, in all"),
            ("of the bandwidth", f"{100 * s.bandwidth_share:,.0f}", "%", of_memory),
        )
        width = max(len(figure) for _, figure, _, _ in rows)
        lines += ["", s.model]
        lines += [
            f"  {label:17}  {figure:>{width}} {unit:5}  {meaning}" for label, figure, unit, meaning in rows
        ]
    return "\n".join(lines)
