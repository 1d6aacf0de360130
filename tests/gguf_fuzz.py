"""What damaged GGUF files do to a process that loads them and asks them for an expansion.

    python tests/gguf_fuzz.py --mutations 500 --seed 0

Small models with random weights are made, and of each a mutation: other numbers, texts, types, tokens,
shapes, offsets or bytes, or less of them. A child process loads one after the other, expands a query and
reads passages, until a file ends it. None may: a death is a check that `qe_edge.backends.gguf_check` lacks.
"""

from __future__ import annotations

import math
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from struct import pack
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer

from qe_edge.backends import gguf_check
from qe_edge.backends.gguf_check import BLOCKS, LAYER
from qe_edge.backends.gguf_header import ARRAY, FLOAT32, INT32, SCALARS, STRING, UINT32
from qe_edge.bench.synthetic import CHATML
from qe_edge.console import progress
from qe_edge.errors import QeEdgeError, require

OUTCOMES = ("refused by our check", "refused by llama.cpp", "worked", "raised", "died", "hung")
LIMIT_S = 60  # for a load, an expansion and two passages, which take a tenth of a second
F16, BOOL = 1, 7
QUERY = "what causes tides"
PASSAGES = ("The moon pulls at the sea, which rises and falls.", "Yeast turns sugar into gas.")
NUMBERS = (0, 1, 2, 3, 7, 63, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
FLOATS = (0.0, -0.0, -1.0, 1e-45, 1e-6, 1.0, 3e38, math.inf, -math.inf, math.nan)
TEXTS = (b"", b"none", b"llama", b"gpt2", b"yarn", b"qwen3\0", b"phi3", b"\xff\xfe", b"a\0b", b"x" * 5000)


@dataclass
class File:
    """A GGUF before it is written. A value is (type, value), with (ARRAY, (type, values)) for a list."""

    keys: dict[str, tuple[int, Any]]
    tensors: list[tuple[str, tuple[int, ...], int, bytes]]  # name, shape, type, data

    def write(self, shifts: dict[int, int]) -> tuple[bytes, int]:
        """Its bytes, and how many of them are the header; `shifts` moves the offsets of single tensors."""
        header = b"GGUF" + pack("<IQQ", 3, len(self.tensors), len(self.keys))
        for name, value in self.keys.items():
            header += _text(name.encode()) + _value(*value)
        data = b""
        for number, (name, shape, kind, content) in enumerate(self.tensors):
            offset = (len(data) + shifts.get(number, 0)) % 2**64
            header += _text(name.encode()) + pack(f"<I{len(shape)}Q", len(shape), *shape)
            header += pack("<IQ", kind, offset)
            data += content + bytes(-len(content) % 32)
        header += bytes(-len(header) % 32)
        return header + data, len(header)


def _text(value: bytes) -> bytes:
    return pack("<Q", len(value)) + value


def _value(kind: int, value: Any) -> bytes:
    if kind != ARRAY:
        return pack("<I", kind) + _plain(kind, value)
    inner, values = value
    return pack("<IIQ", kind, inner, len(values)) + b"".join(_plain(inner, each) for each in values)


def _plain(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    layout = SCALARS[kind]
    if layout.format[-1] in "fd":
        return layout.pack(value)
    return (int(value) % 2 ** (8 * layout.size)).to_bytes(layout.size, "little")


def make(rng: random.Random, odd: bool = False) -> File:
    """A model that works or, if it is to be odd, one whose numbers at least fit its tensors."""
    architecture = rng.choice(tuple(LAYER))
    head = rng.choice((1, 2, 3, 16, 33, 64, 256, 1024)) if odd else 64
    heads = rng.choice((1, 2, 3, 4, 5)) if odd else 4
    groups = rng.choice((1, 2, 3, 7)) if odd else 2
    width = heads * head if architecture == "qwen2" else rng.choice((1, 32, 100, 256)) if odd else 256
    inner = rng.choice((1, 31, 256)) if odd else 256
    layers = rng.choice((1, 3)) if odd else 2
    pieces = architecture == "llama" and rng.random() < 0.5  # SentencePiece
    tokens = _pieces() if pieces else _letters()
    own = {
        "block_count": layers,
        "context_length": 512,
        "embedding_length": width,
        "feed_forward_length": inner,
        "attention.head_count": heads,
        "attention.head_count_kv": groups,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
    }
    keys: dict[str, tuple[int, Any]] = {
        "general.architecture": (STRING, architecture.encode()),
        "general.name": (STRING, b"Random"),
        "general.alignment": (UINT32, 32),
        **{f"{architecture}.{name}": (UINT32, number) for name, number in own.items()},
        f"{architecture}.rope.freq_base": (FLOAT32, 10_000.0),
        f"{architecture}.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-6),
        "tokenizer.ggml.model": (STRING, b"llama" if pieces else b"gpt2"),
        "tokenizer.ggml.pre": (STRING, b"qwen2"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.scores": (ARRAY, (FLOAT32, [-float(i) for i in range(len(tokens))])),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, [3, 3, 3] + [1] * (len(tokens) - 3))),
        "tokenizer.ggml.merges": (ARRAY, (STRING, [b"t i", b"ti d"])),
        "tokenizer.ggml.bos_token_id": (UINT32, 0),
        "tokenizer.ggml.eos_token_id": (UINT32, 2),
        "tokenizer.ggml.padding_token_id": (UINT32, 0),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
        "tokenizer.chat_template": (STRING, CHATML.encode()),
    }
    lengths = {
        "tokens": len(tokens),
        "width": width,
        "inner": inner,
        "head": head,
        "queries": heads * head,
        "keys": groups * head,
    }
    blocks = [
        (f"blk.{i}.{name}", shape) for i in range(layers) for name, shape in LAYER[architecture].items()
    ]
    draw = np.random.default_rng(rng.getrandbits(32))
    tensors = []
    for name, letters in (*gguf_check.OUTER.items(), *blocks):
        shape = tuple(lengths[letter] for letter in letters)
        weights = draw.normal(1 if len(shape) == 1 else 0, 0.1, math.prod(shape))
        kind = F16 if len(shape) > 1 else gguf_check.F32
        data = weights.astype(np.float16 if kind == F16 else np.float32).tobytes()
        tensors.append((f"{name}.weight", shape, kind, data))
    return File(keys, tensors)


MARKUP = [b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>"]


def _letters() -> list[bytes]:
    """A byte-level BPE's: each byte is written as a letter."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    return [*MARKUP, *(letter.encode() for letter in letters), b"ti", b"tid"]


def _pieces() -> list[bytes]:
    return [*MARKUP, *(b"<0x%02X>" % byte for byte in range(256)), "▁".encode(), b"t", b"i", b"ti", b"d"]


def mutated(seed: int, number: int) -> tuple[bytes, str]:
    """The bytes of a file, and what was done to it."""
    rng = random.Random(seed * 1_000_003 + number)
    file = make(rng, odd=rng.random() < 0.1)
    done, shifts = [], {}
    for _ in range(rng.choice((1, 1, 2))):
        change = rng.choice(CHANGES)
        done.append(f"{change.__name__.strip('_')}: {change(rng, file)}")
    if rng.random() < 0.05:
        shifts[rng.randrange(len(file.tensors))] = rng.choice((1, -32, 32, 2**40, 2**63))
        done.append(f"shift: {shifts}")
    content, header = file.write(shifts)
    if rng.random() < 0.3:
        change_bytes = rng.choice(BYTES)
        content = bytes(change_bytes(rng, bytearray(content), header))
        done.append(change_bytes.__name__.strip("_"))
    return content, "; ".join(done)


def _key(rng: random.Random, file: File, wanted: Callable[[int], bool]) -> str:
    """One of the keys whose type is wanted."""
    return rng.choice([name for name, (kind, _) in file.keys.items() if wanted(kind)] or list(file.keys))


def _extreme(rng: random.Random, kind: int) -> Any:
    if kind == STRING:
        return rng.choice(TEXTS)
    return rng.choice(FLOATS) if SCALARS[kind].format[-1] in "fd" else rng.choice(NUMBERS)


def _set_value(rng: random.Random, file: File) -> str:
    name = _key(rng, file, lambda kind: kind in SCALARS)
    kind, old = file.keys[name]
    if kind not in SCALARS:
        return "nothing"
    near = kind == UINT32 and rng.random() < 0.4
    value = rng.choice((old + 1, old - 1, old * 2, old // 2)) if near else _extreme(rng, kind)
    file.keys[name] = kind, value
    return f"{name} = {value}"


def _set_text(rng: random.Random, file: File) -> str:
    name = _key(rng, file, lambda kind: kind == STRING)
    file.keys[name] = STRING, rng.choice(TEXTS)
    return f"{name} = {file.keys[name][1][:20]!r}"


def _retype(rng: random.Random, file: File) -> str:
    name = _key(rng, file, lambda kind: True)
    kind = rng.choice((*SCALARS, STRING, ARRAY))
    inner = rng.choice((*SCALARS, STRING))
    values = (inner, [_extreme(rng, inner) for _ in range(rng.choice((0, 1, 2, 300)))])
    file.keys[name] = kind, values if kind == ARRAY else _extreme(rng, kind)
    return f"{name} of type {kind}, {inner}"


def _drop_key(rng: random.Random, file: File) -> str:
    name = _key(rng, file, lambda kind: True)
    del file.keys[name]
    return name


def _add_key(rng: random.Random, file: File) -> str:
    """One that llama.cpp knows."""
    keys = require("gguf", "llama").constants.Keys
    known = [value for part in vars(keys).values() if isinstance(part, type) for value in vars(part).values()]
    architecture = next(iter(LAYER))
    with suppress(KeyError, AttributeError):
        architecture = file.keys["general.architecture"][1].decode(errors="replace")
    names = [str(name).replace("{arch}", architecture) for name in known if "." in str(name)]
    name = rng.choice([name for name in names if name.startswith((architecture, "tokenizer", "split"))])
    kind = rng.choice((UINT32, UINT32, UINT32, FLOAT32, FLOAT32, BOOL, STRING, *SCALARS))
    file.keys[name] = kind, _extreme(rng, kind)
    return f"{name} = {file.keys[name]!r:.60}"


def _swap(rng: random.Random, file: File) -> str:
    one = _key(rng, file, lambda kind: True)
    other = _key(rng, file, lambda kind: kind == file.keys[one][0])
    file.keys[one], file.keys[other] = file.keys[other], file.keys[one]
    return f"{one}, {other}"


def _change_list(rng: random.Random, file: File) -> str:
    """One more or less, two alike, an odd one, or none at all."""
    name = _key(rng, file, lambda kind: kind == ARRAY)
    if file.keys[name][0] != ARRAY:
        return "nothing"
    inner, values = file.keys[name][1]
    values = list(values)
    way = rng.choice(("twin", "odd", "odd", "more", "less", "none", "shuffled"))
    at = rng.randrange(max(1, len(values)))
    if way == "none" or not values:
        values = []
    elif way == "twin":
        values[at] = values[rng.randrange(len(values))]
    elif way == "odd":
        values[at] = _extreme(rng, inner)
    elif way == "more":
        values.append(_extreme(rng, inner))
    elif way == "less":
        del values[at]
    else:
        rng.shuffle(values)
    file.keys[name] = ARRAY, (inner, values)
    return f"{name} {way} at {at}"


def _change_tensor(rng: random.Random, file: File) -> str:
    """Its name, place, shape or type, with as much data as that takes, or the data alone."""
    at = rng.randrange(len(file.tensors))
    name, shape, kind, data = file.tensors[at]
    way = rng.choice(("rename", "drop", "twice", "shape", "shape", "type", "type", "data", "data"))
    if way == "drop":
        del file.tensors[at]
    elif way == "twice":
        file.tensors.insert(at, file.tensors[at])
    elif way == "rename":
        other = rng.choice(("output.weight", "rope_freqs.weight", "blk.0.attn_qkv.weight", "", "x" * 70, "y"))
        file.tensors[at] = rng.choice((other, name.replace("weight", "bias"))), shape, kind, data
    elif way == "data":
        kind = rng.choice([kind for kind, (size, _) in BLOCKS.items() if shape[0] % size == 0])
        file.tensors[at] = name, shape, kind, rng.randbytes(_bytes(shape, kind))
    elif way == "type":
        kind = rng.choice((*BLOCKS, 4, 31, 43, 99, 2**31, 2**32 - 1))
        file.tensors[at] = name, shape, kind, data[: _bytes(shape, kind)].ljust(_bytes(shape, kind), b"\0")
    else:
        sizes = list(shape)
        number = rng.choice((0, 1, 2, 255, 257, 2**31, 2**63, 2**64 - 1))
        rng.choice((lambda: sizes.append(number), sizes.reverse, lambda: sizes.__setitem__(0, number)))()
        shape = tuple(sizes)
        length = _bytes(shape, kind)
        file.tensors[at] = name, shape, kind, data[:length].ljust(length, b"\0")
    return f"{name} {way}, {shape}, type {kind}"


def _bytes(shape: tuple[int, ...], kind: int) -> int:
    """What a tensor takes, or as much as we write of it."""
    elements, size = BLOCKS.get(kind, (1, 2))
    return min(math.prod(shape) // elements * size, 1 << 22)


def _flip_bits(rng: random.Random, content: bytearray, header: int) -> bytearray:
    for _ in range(rng.choice((1, 2, 8))):
        content[rng.randrange(header)] ^= 1 << rng.randrange(8)
    return content


def _overwrite(rng: random.Random, content: bytearray, header: int) -> bytearray:
    size = rng.choice((1, 4, 8, 64))
    at = rng.randrange(header - size)
    content[at : at + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return content


def _cut(rng: random.Random, content: bytearray, header: int) -> bytearray:
    return content[: rng.randrange(4, rng.choice((header, len(content))))]


def _drop_bytes(rng: random.Random, content: bytearray, header: int) -> bytearray:
    at = rng.randrange(4, header)
    del content[at : at + rng.choice((1, 4, 8, 100))]
    return content


CHANGES = (_set_value,) * 3 + (_add_key, _change_list, _change_tensor) * 2 + (
    _set_text, _retype, _drop_key, _swap,
)  # fmt: skip
BYTES = (_flip_bits, _flip_bits, _overwrite, _cut, _drop_bytes)


def fuzz(mutations: int, seed: int, checked: bool = True) -> Iterator[tuple[str, str]]:
    """The outcome of each mutation, and for one that must not be, what was done and what was said last."""
    os.environ["GGML_NO_BACKTRACE"] = "1"  # a debugger's would take seconds
    with TemporaryDirectory() as folder:
        path, log = Path(folder) / "model.gguf", Path(folder) / "log"
        child = None
        try:
            for number in range(mutations):
                content, done = mutated(seed, number)
                path.write_bytes(content)
                child = child or _Child(log, checked)
                outcome, said = child.ask(path)
                if outcome in ("died", "hung"):
                    child, said = None, f"{said} {log.read_text(errors='replace').strip()[-300:]}"
                yield outcome, f"{number}: {done}: {said}"
        finally:
            if child:
                child.end()


class _Child:
    def __init__(self, log: Path, checked: bool):
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, str(log), checked), daemon=True)
        self._process.start()
        other.close()

    def ask(self, path: Path) -> tuple[str, str]:
        self._pipe.send(str(path))
        try:
            if self._pipe.poll(LIMIT_S):
                return self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            return "died", signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self.end()
        return "hung", ""

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _work(pipe: Connection, log: str, checked: bool) -> None:
    """In the child."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if not checked:
        from qe_edge.backends import llama_model

        llama_model.check_gguf = lambda path: None
    while True:
        try:
            path = pipe.recv()
        except EOFError:
            return
        pipe.send(_tried(path))


def _tried(path: str) -> tuple[str, str]:
    from qe_edge.backends import llama_model
    from qe_edge.runtime.expander import Expander
    from qe_edge.student.gate import OPEN

    refused = "refused by our check"
    try:
        llama_model.check_gguf(Path(path))
        refused = "refused by llama.cpp"
        with Expander.load(path, budget_tokens=8, threads=1, gate=OPEN) as expander:
            expander.expand(QUERY)
            expander.feedback(QUERY, PASSAGES)
    except QeEdgeError as error:
        return refused, str(error)
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"
    return "worked", ""


def main(
    mutations: Annotated[int, typer.Option(min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Another one makes other mutations.")] = 0,
    unchecked: Annotated[bool, typer.Option(help="Leave our check out: what is it for?")] = False,
    verbose: Annotated[bool, typer.Option(help="Print what every mutation did.")] = False,
) -> None:
    """Print how many mutations had which outcome, and each that ended or held up the process."""
    found: Counter[str] = Counter()
    with progress("mutations", mutations) as advance:
        for outcome, said in fuzz(mutations, seed, checked=not unchecked):
            found[outcome] += 1
            if verbose or outcome in ("raised", "died", "hung"):
                print(f"{outcome}: {said}", flush=True)
            advance()
    print(f"| seed | {' | '.join(OUTCOMES)} |")
    print(f"| --: |{' --: |' * len(OUTCOMES)}")
    print(f"| {seed} | {' | '.join(str(found[outcome]) for outcome in OUTCOMES)} |")
    raise typer.Exit(1 if found["died"] + found["hung"] + found["raised"] else 0)


if __name__ == "__main__":
    typer.run(main)
