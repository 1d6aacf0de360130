"""A GGUF's header, read as it stands: its keys, and where its tensors lie.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader takes
seconds for a large vocabulary, and fails in many ways on a damaged file.
"""

from __future__ import annotations

import mmap
from struct import Struct, error
from typing import Any, NamedTuple

import numpy as np

# The types of values.
UINT16, UINT32, INT32, FLOAT32, STRING, ARRAY, UINT64, FLOAT64 = 2, 4, 5, 6, 8, 9, 10, 12
SCALARS = {
    code: Struct("<" + letter) for code, letter in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_UINT32, _UINT64 = SCALARS[UINT32], SCALARS[UINT64]


class Array(NamedTuple):
    """Texts as bytes, or numbers."""

    kind: int
    values: list[bytes] | np.ndarray

    def __repr__(self) -> str:
        return f"a list of {len(self.values)}"


class Value(NamedTuple):
    kind: int
    value: Any


def get(keys: dict[str, Value], name: str, kind: int, default: Any) -> Value:
    return keys.get(name, Value(kind, default))


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: int
    offset: int


class Damaged(Exception):
    """The header can't be read to its end."""


def read_header(data: mmap.mmap) -> tuple[dict[str, Value], dict[str, Tensor], int]:
    """Key-values, tensors, and where the header ends."""
    magic, reader = data[:4], _Reader(data, 4)
    version = reader.number(_UINT32)
    if magic != b"GGUF" or version not in (2, 3):
        raise Damaged(f"it is no GGUF of version 2 or 3, for it begins with {magic!r} and version {version}")
    tensor_count, key_count = reader.number(_UINT64), reader.number(_UINT64)
    if 13 * key_count + 24 * tensor_count > len(data):
        raise Damaged(f"it promises {key_count} keys and {tensor_count} tensors, more than it has room for")
    keys: dict[str, Value] = {}
    for _ in range(key_count):
        name = reader.string().decode(errors="backslashreplace")
        if not name or name in keys:
            raise Damaged(f"its key {name!r} is empty or there twice")
        keys[name] = reader.value(name)
    tensors: dict[str, Tensor] = {}
    for _ in range(tensor_count):
        name = reader.string().decode(errors="backslashreplace")
        if not name or name in tensors:
            raise Damaged(f"its tensor {name!r} is without a name or there twice")
        dimensions = reader.number(_UINT32)
        if dimensions > 4:
            raise Damaged(f"tensor {name} has {dimensions} dimensions, over 4")
        shape = tuple(reader.number(_UINT64) for _ in range(dimensions))
        tensors[name] = Tensor(shape, reader.number(_UINT32), reader.number(_UINT64))
    return keys, tensors, reader.at


class _Reader:
    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def number(self, layout: Struct) -> Any:
        try:
            (value,) = layout.unpack_from(self.data, self.at)
        except error:
            raise Damaged("it ends within its header") from None
        self.at += layout.size
        return value

    def string(self) -> bytes:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[bytes]:
        """So many texts; written for 150 000 of them."""
        data, at, size, unpack = self.data, self.at, len(self.data), _UINT64.unpack_from
        found: list[bytes] = []
        for _ in range(count):
            start = at + _UINT64.size
            if start > size or (at := start + unpack(data, at)[0]) > size:
                raise Damaged("a text ends after the file")
            found.append(data[start:at])
        self.at = at
        return found

    def value(self, name: str) -> Value:
        kind = self.number(_UINT32)
        if kind == STRING:  # which llama.cpp reads to its first zero byte
            return Value(kind, self.string().partition(b"\0")[0].decode(errors="backslashreplace"))
        if kind != ARRAY:
            if kind not in SCALARS:
                raise Damaged(f"{name} is of the unknown type {kind}")
            return Value(kind, self.number(SCALARS[kind]))
        kind, count = self.number(_UINT32), self.number(_UINT64)
        if kind != STRING and kind not in SCALARS:
            raise Damaged(f"{name} holds entries of the unknown type {kind}")
        size = SCALARS[kind].size if kind != STRING else _UINT64.size
        if count * size > len(self.data) - self.at:
            raise Damaged(f"{name} has {count} entries, more than the file has room for")
        if kind == STRING:
            return Value(ARRAY, Array(kind, self.strings(count)))
        numbers = np.frombuffer(self.data, SCALARS[kind].format, count, self.at).copy()
        self.at += count * size
        return Value(ARRAY, Array(kind, numbers))
