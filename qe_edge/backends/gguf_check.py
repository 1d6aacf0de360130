"""What llama.cpp divides by, indexes with or asserts on in a GGUF's header, looked at before it.

llama.cpp says no to some damaged files; on others it ends the whole process, in load or at the first token.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qe_edge.backends.gguf_header import (
    ARRAY,
    FLOAT32,
    FLOAT64,
    INT32,
    STRING,
    UINT16,
    UINT32,
    Array,
    Damaged,
    Tensor,
    Value,
    get,
    read_header,
)
from qe_edge.errors import BadInput

NAMES = {STRING: "texts", INT32: "int32", FLOAT32: "float32"}
# ggml's types: how many elements a block has, and how many bytes.
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip
F32 = 0
NEVER_WEIGHTS = (9, 15, 24, 25, 26, 27, 28)  # Q8_1, Q8_K, whole numbers, F64: nothing multiplies by them
PLACE = 32  # llama.cpp wants what it maps into memory at multiples of it
MOST = 2**31 - 1  # llama.cpp hands many numbers on as an int
LAYERS, EXPERTS = 512, 1024  # llama.cpp's arrays have so many entries
NO_TOKEN = 2**32 - 1
TOKEN_TYPES = 6  # the last of llama.cpp's enum
TOKENIZERS = ("gpt2", "llama")  # those of the architectures below
ROPE_SCALING = ("none", "linear", "yarn", "longrope")
# Dimensions of the tensors that each layer needs, and of the others; `_dimensions` says how long they are.
OUTER = {"token_embd": ("width", "tokens"), "output_norm": ("width",)}
ATTENTION = {
    "attn_norm": ("width",),
    "attn_q": ("width", "queries"),
    "attn_k": ("width", "keys"),
    "attn_v": ("width", "keys"),
    "attn_output": ("queries", "width"),
    "ffn_norm": ("width",),
}
DENSE = {"ffn_gate": ("width", "inner"), "ffn_up": ("width", "inner"), "ffn_down": ("inner", "width")}
NORMS = {"attn_q_norm": ("head",), "attn_k_norm": ("head",)}
LAYER: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": ATTENTION | DENSE,
    "qwen2": ATTENTION | DENSE,
    "qwen3": ATTENTION | DENSE | NORMS,
}


class Checked(NamedTuple):
    """What a file is: its architecture, and ggml's numbers of its tensors' types."""

    architecture: str | None
    types: frozenset[int]


class _Unusable(Exception):
    """It can be read, but not run."""


def check_gguf(path: Path) -> Checked:
    """Refuse a file on which llama.cpp may end the process.

    Files of LAYER's architectures are checked as a whole, of others only what holds for all of them.

    Raises:
        BadInput: names the key or the tensor, and what helps.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            keys, tensors, start = read_header(data)
            _check_places(keys, tensors, start, len(data))
        header = _Header(keys, tensors)
        header.check()
        return Checked(header.architecture, frozenset(tensor.kind for tensor in tensors.values()))
    except (Damaged, ValueError) as found:  # the latter for an empty file
        raise BadInput(
            f"the file is damaged or truncated ({found}); download or export it again", path=path
        ) from None
    except _Unusable as found:
        message = f"{found}, so llama.cpp can't run it; download or export it again"
        raise BadInput(message, path=path) from None


def _check_places(keys: dict[str, Value], tensors: dict[str, Tensor], start: int, size: int) -> None:
    """Each tensor has a known type and a whole number of blocks, and lies in the file where it should."""
    kind, alignment = get(keys, "general.alignment", UINT32, PLACE)
    if kind != UINT32 or alignment == 0 or alignment & (alignment - 1):
        raise _Unusable(f"general.alignment is {alignment!r:.60}, not a power of two")
    start += -start % alignment
    expected = 0
    for name, tensor in tensors.items():
        if tensor.kind not in BLOCKS:
            raise _Unusable(f"{name} is of the unknown type {tensor.kind}")
        elements, size_of_block = BLOCKS[tensor.kind]
        if 0 in tensor.shape or (tensor.shape or (1,))[0] % elements:
            raise _Unusable(f"{name} has the shape {_text(tensor.shape)}: no whole blocks of {elements}")
        if tensor.offset != expected:
            raise Damaged(f"{name} lies at {tensor.offset}, not at {expected}")
        if (start + expected) % PLACE:
            raise _Unusable(f"general.alignment is {alignment}, which puts {name} at no multiple of {PLACE}")
        length = math.prod(tensor.shape) // elements * size_of_block
        if start + expected + length > size:
            raise Damaged(f"{name} ends after the file")
        expected += length + -length % alignment


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


class _Header:
    """What the keys say, against each other and against the tensors."""

    def __init__(self, keys: dict[str, Value], tensors: dict[str, Tensor]):
        self.keys, self.tensors = keys, tensors
        kind, name = get(keys, "general.architecture", STRING, None)
        self.architecture: str | None = name if kind == STRING else None

    def check(self) -> None:
        if get(self.keys, "split.count", UINT16, 0).value not in (0, 1):
            raise _Unusable("split.count says that more parts belong to it (join them with llama-gguf-split)")
        known = self.architecture in LAYER
        tokens = self._vocabulary(known)
        self._experts()
        if known or self._own("block_count") in self.keys:
            layers = self._number("block_count", 1, LAYERS)
            self._number("nextn_predict_layers", 0, 0 if known else layers, 0)
        scaling = get(self.keys, self._own("rope.scaling.type"), STRING, "none").value
        if scaling not in ROPE_SCALING:
            raise _Unusable(f"{self._own('rope.scaling.type')} is {scaling!r:.60}, none of {ROPE_SCALING}")
        if known:
            self._model(tokens, layers)

    def _own(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _number(self, key: str, least: int, most: int = MOST, default: int | None = None) -> int:
        """A uint32 of the architecture's own keys, which llama.cpp takes in no other type."""
        name = self._own(key)
        if name not in self.keys:
            if default is None:
                raise _Unusable(f"{name} is missing")
            return default
        kind, value = self.keys[name]
        if kind != UINT32:
            raise _Unusable(f"{name} is no single uint32")
        if not least <= value <= most:
            raise _Unusable(f"{name} is {value}, not between {least} and {most}")
        return value

    def _float(self, key: str, least: float, most: float, default: float | None = None) -> None:
        """The same for a float32 above `least`."""
        name = self._own(key)
        kind, value = get(self.keys, name, FLOAT32, default)
        if value is None:
            raise _Unusable(f"{name} is missing")
        if kind != FLOAT32 or not least < value <= most:
            raise _Unusable(f"{name} is {value!r:.60}, not a float32 above {least:g} and up to {most:g}")

    def _experts(self) -> None:
        """Of a mixture, what llama.cpp asserts for every architecture."""
        if get(self.keys, self._own("expert_used_count"), UINT32, 0).kind == ARRAY:
            return  # a number for each layer, in architectures that llama.cpp judges
        count = self._number("expert_count", 0, EXPERTS, 0)
        self._number("expert_used_count", min(1, count), count, 0 if count == 0 else None)
        groups = self._number("expert_group_count", 0, max(0, count - 1), 0)
        if groups > 1:
            self._number("expert_group_used_count", 1, groups - 1)
            if count % groups:
                raise _Unusable(f"{self._own('expert_count')} is {count}, no multiple of {groups} groups")

    def _model(self, tokens: int, layers: int) -> None:
        """Numbers that the three dense architectures compute with, and the shapes that follow from them."""
        for name, (kind, value) in self.keys.items():
            if kind in (FLOAT32, FLOAT64) and name.startswith(self._own("")) and not math.isfinite(value):
                raise _Unusable(f"{name} is {value}")
        self._number("context_length", 1)
        self._float("attention.layer_norm_rms_epsilon", 0, 1)
        self._float("rope.freq_base", 0, math.inf, 10_000.0)
        self._float("rope.scaling.factor", -math.ulp(0), math.inf, 1.0)  # 0 is none
        self._number("rope.scaling.original_context_length", 1, MOST, 1)
        wanted = self._dimensions(tokens)
        names = OUTER | {
            f"blk.{layer}.{name}": shape
            for layer in range(layers)
            for name, shape in LAYER[str(self.architecture)].items()
        }
        if self._number("expert_count", 0, EXPERTS, 0):
            names = {name: shape for name, shape in names.items() if name.rpartition(".")[2] not in DENSE}
        for short, letters in names.items():
            self._shape(f"{short}.weight", [wanted[letter] for letter in letters])
        for name, tensor in self.tensors.items():
            part, _, rest = name.removeprefix("blk.").partition(".")
            if rest and part.isdecimal() and int(part) >= layers:
                raise _Unusable(f"{name} is there, but {self._own('block_count')} is {layers}")
            flat = max(tensor.shape[1:], default=1) == 1
            use = "vectors" if flat else "matrices"
            if tensor.kind in NEVER_WEIGHTS or (flat and tensor.kind != F32):
                raise _Unusable(f"{name} is of ggml's type {tensor.kind}, which is not for {use}")

    def _dimensions(self, tokens: int) -> dict[str, tuple[str, int]]:
        """What each of the shapes' letters is called and how long it is."""
        width = self._number("embedding_length", 1)
        heads = self._number("attention.head_count", 1, width)
        groups = self._number("attention.head_count_kv", 1, heads, heads)
        if heads % groups:
            raise _Unusable(
                f"{self._own('attention.head_count')} is {heads}, "
                f"no multiple of {self._own('attention.head_count_kv')}, {groups}"
            )
        if width % heads and self._own("attention.key_length") not in self.keys:
            raise _Unusable(
                f"{self._own('embedding_length')} is {width}, "
                f"no multiple of {self._own('attention.head_count')}, {heads}"
            )
        head = self._number("attention.key_length", 1, MOST, width // heads)
        for key, default in (("attention.value_length", width // heads), ("rope.dimension_count", head)):
            if (found := self._number(key, 1, MOST, default)) != head:
                raise _Unusable(f"{self._own(key)} is {found}, not the length of a key, {head}")
        if head % 2:
            raise _Unusable(f"{self._own('attention.key_length')} is {head}, which is odd")
        if self.architecture == "qwen2" and heads * head != width:
            raise _Unusable(f"{self._own('attention.key_length')} is {head}, not embedding over heads")
        count = self._own("attention.head_count")
        return {
            "tokens": ("tokenizer.ggml.tokens", tokens),
            "width": (self._own("embedding_length"), width),
            "inner": (self._own("feed_forward_length"), self._number("feed_forward_length", 1)),
            "head": (self._own("attention.key_length"), head),
            "queries": (f"{count} times the length of a key", heads * head),
            "keys": (f"{count}_kv times the length of a key", groups * head),
        }

    def _shape(self, name: str, wanted: list[tuple[str, int]]) -> None:
        if name not in self.tensors:
            fused = name.replace(".attn_q.", ".attn_qkv.").replace(".attn_k.", ".attn_qkv.")
            if fused.replace(".attn_v.", ".attn_qkv.") in self.tensors:
                return  # llama.cpp compares the shape of all three in one
            raise _Unusable(f"the tensor {name} is missing")
        found = self.tensors[name].shape
        if tuple(size for _, size in wanted) + (1,) * (len(found) - len(wanted)) != found:
            raise _Unusable(
                f"{name} has the shape {_text(found)}, but "
                + " and ".join(f"{key} is {size}" for key, size in wanted)
            )

    def _vocabulary(self, known: bool) -> int:
        """How many tokens there are."""
        kind, model = get(self.keys, "tokenizer.ggml.model", STRING, None)
        if known and (kind != STRING or model not in TOKENIZERS):
            raise _Unusable(f"tokenizer.ggml.model is {model!r:.60}, none of {TOKENIZERS}")
        tokens = self._array("tokenizer.ggml.tokens", known, STRING)
        if tokens is None:
            return 0
        if not len(tokens):
            raise _Unusable("tokenizer.ggml.tokens is empty")
        _check_distinct(tokens)
        if known:
            self._tokens(model, tokens)
        return len(tokens)

    def _tokens(self, model: str, tokens: list[bytes]) -> None:
        """What belongs to them."""
        _check_utf8(tokens)
        if model == "llama" and (missing := _missing_byte(tokens)) is not None:
            raise _Unusable(f"tokenizer.ggml.tokens has no token for the byte {missing}")
        if model == "gpt2":
            self._array("tokenizer.ggml.merges", True, STRING)
        self._array("tokenizer.ggml.scores", False, FLOAT32, len(tokens))
        types = self._array("tokenizer.ggml.token_type", False, INT32, len(tokens))
        if types is not None and (outside := np.flatnonzero((types < 0) | (types > TOKEN_TYPES))).size:
            at = outside[0]
            raise _Unusable(f"tokenizer.ggml.token_type {at} is {types[at]}, not 0 to {TOKEN_TYPES}")
        for name, (kind, value) in self.keys.items():
            if not name.startswith("tokenizer.ggml.") or not name.endswith("_token_id"):
                continue
            # Some converters write NO_TOKEN, or -1, for a token that a model lacks.
            if kind != UINT32 or (value >= len(tokens) and value != NO_TOKEN):
                raise _Unusable(
                    f"{name} is {value!r:.60}, no uint32 below the number of tokens, {len(tokens)}"
                )

    def _array(self, name: str, needed: bool, kind: int, length: int | None = None) -> Any:
        """The entries under a key, of this type; None where it is missing and isn't needed."""
        if name not in self.keys:
            if needed:
                raise _Unusable(f"{name} is missing")
            return None
        value = self.keys[name].value
        if not isinstance(value, Array) or value.kind != kind:
            raise _Unusable(f"{name} is no list of {NAMES[kind]}")
        if length is not None and len(value.values) != length:
            raise _Unusable(f"{name} has {len(value.values)} entries for {length} tokens")
        return value.values


def _check_distinct(tokens: list[bytes]) -> None:
    """They differ as llama.cpp reads them: to a zero byte, and an empty one by its place."""
    if b"\0" in b"".join(tokens):
        tokens = [token.partition(b"\0")[0] for token in tokens]
    if b"" in tokens:
        tokens = [token or b"[EMPTY_%d]" % at for at, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        first: dict[bytes, int] = {}
        at, twin = next((i, j) for i, token in enumerate(tokens) if (j := first.setdefault(token, i)) != i)
        raise _Unusable(f"tokenizer.ggml.tokens {twin} and {at} are the same, {tokens[at]!r:.60}")


def _check_utf8(tokens: list[bytes]) -> None:
    try:
        b" ".join(tokens).decode()
    except UnicodeDecodeError:
        at = next(i for i, token in enumerate(tokens) if token != token.decode(errors="replace").encode())
        raise _Unusable(f"tokenizer.ggml.tokens {at} is not UTF-8, {tokens[at]!r:.60}") from None


def _missing_byte(tokens: list[bytes]) -> int | None:
    """A byte without a token, which SentencePiece needs: llama.cpp throws where a query holds it."""
    known = set(tokens)
    for byte in range(256):
        if b"<0x%02X>" % byte not in known and (byte == 0 or bytes([byte]) not in known):
            return byte
    return None
