"""GGUF -> smaller GGUF, by llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qe_edge.console import progress
from qe_edge.errors import BadArgument, BadInput, NotFound, QeEdgeError, require
from qe_edge.export.imatrix import Importance
from qe_edge.student.spec import KIND_KEY
from qe_edge.work.files import atomic_path

# `enum llama_ftype` in llama.h; the file states its own under `general.file_type`. All of llama.cpp's but
# those for mixtures of experts and for models that were trained with weights of one to two bits.
KINDS: dict[str, int] = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q2_K_S": 21,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ1_S": 24,
    "IQ1_M": 31,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ3_XXS": 23,
    "IQ3_XS": 22,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}
MIXED = "mixed"  # the types of all matrices are given; the file calls itself a Q4_K_M, which llama.cpp knows
# llama.cpp refuses to guess at these.
NEED_IMPORTANCE = ("Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS")
_WARNING, _ERROR = 3, 4  # enum ggml_log_level in ggml.h
_START = struct.Struct("<4sIQ")  # of a GGUF: its magic, its version and the number of its tensors
_TENSOR = re.compile(rb"\[ *\d+/ *\d+\]")  # what llama.cpp says first as it comes to a tensor


def quantize_gguf(
    source: Path,
    out: Path,
    kind: str,
    *,
    importance: Importance | None = None,
    types: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> Path:
    """Quantize an F16, BF16 or F32 GGUF; all metadata is kept. `threads`: all of the machine's if None.

    `importance` weighs the errors; what it was measured on is added under llama.cpp's own `quantize.imatrix`
    keys. `types` gives single tensors another type of ggml than the kind would, and all of a MIXED file's.
    A matrix whose width is no multiple of 256 can't take a K-quant; llama.cpp stores it in the nearest
    larger type of 32-element blocks.

    Raises:
        BadArgument: an unknown kind.
        NotFound, BadInput: no such source, or not a GGUF.
        QeEdgeError: llama.cpp failed; the message holds the last of what it said.
    """
    if kind not in KINDS and not (kind == MIXED and types):
        raise BadArgument(f"no quantization {kind!r}; choose one of: {', '.join(KINDS)}")
    if not source.is_file():
        raise NotFound(f"{source}: no such file")
    with source.open("rb") as file:
        start = file.read(_START.size)
    if len(start) < _START.size or not start.startswith(b"GGUF"):
        raise BadInput("not a GGUF file", path=source)
    *_, tensors = _START.unpack(start)
    llama_cpp = require("llama_cpp", "llama")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = KINDS["Q4_K_M" if kind == MIXED else kind]
    params.nthread = threads or 0
    described: dict[str, str | int] = {KIND_KEY: kind}
    if importance:
        params.imatrix = _importance_array(importance)
        described |= _imatrix_keys(importance)
    params.kv_overrides = _metadata_array(described)
    if types:
        params.tt_overrides = _types_array(types)
    with (
        atomic_path(out) as partial,
        progress(f"quantizing to {kind}", tensors) as advance,
        captured_log(lambda text: advance() if _TENSOR.match(text) else None) as log,
    ):
        paths = os.fsencode(source), os.fsencode(partial)
        if llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)) != 0:
            said = "; ".join(log[-3:])
            # llama.cpp's own words for a full disk are those of C++.
            if "iostream error" in said or "basic_ios" in said:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
            raise QeEdgeError(f"llama.cpp could not quantize {source} to {kind}: {said}")
    return out


# Each array ends with an entry of zeros. ctypes keeps what an array's entries point to alive with it.


def _importance_array(importance: Importance) -> Any:
    llama_cpp = require("llama_cpp", "llama")
    array = (llama_cpp.llama_model_imatrix_data * (len(importance.values) + 1))()
    for entry, (name, values) in zip(array, importance.values.items(), strict=False):
        data = (ctypes.c_float * len(values))(*values)
        entry.name, entry.size = name.encode(), len(values)
        entry.data = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
    return ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))


def _imatrix_keys(importance: Importance) -> dict[str, str | int]:
    """Under the keys that llama.cpp's own tool writes; a text may have 127 bytes."""
    files = ", ".join(f"{name} sha256:{digest[:12]}" for name, digest in importance.files)
    return {
        "quantize.imatrix.dataset": files.encode()[:127].decode(errors="ignore"),
        "quantize.imatrix.entries_count": len(importance.values),
        "quantize.imatrix.chunks_count": importance.rows,
    }


def _metadata_array(found: Mapping[str, str | int]) -> Any:
    llama_cpp = require("llama_cpp", "llama")
    array = (llama_cpp.llama_model_kv_override * (len(found) + 1))()
    for entry, (key, value) in zip(array, found.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, str):
            entry.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            entry.value.val_str = value.encode()
        else:
            entry.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            entry.value.val_i64 = value
    return ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_kv_override))


def _types_array(types: Mapping[str, str]) -> Any:
    gguf, llama_cpp = require("gguf", "llama"), require("llama_cpp", "llama")
    array = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, kind) in zip(array, types.items(), strict=False):
        entry.pattern = f"^{re.escape(name)}$".encode()
        entry.type = gguf.GGMLQuantizationType[kind]
    return ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_tensor_override))


def bits_of(kind: str) -> int:
    """The bits per weight in a kind's name, scales not counted: 4 for Q4_K_M and IQ4_XS, 16 for BF16."""
    return int("".join(c for c in kind.split("_")[0] if c.isdigit()))


@contextmanager
def captured_log(heard: Callable[[bytes], None] = lambda text: None) -> Iterator[list[str]]:
    """Keep llama.cpp's log off the terminal; yields its warnings and errors, line by line.

    `heard` gets all that it says, piece by piece.
    """
    llama_cpp = require("llama_cpp", "llama")
    from llama_cpp._logger import llama_log_callback as default_callback

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        heard(text)
        if level in (_WARNING, _ERROR) and text.strip():
            lines.append(text.decode(errors="replace").strip())

    # C holds a bare pointer to `keep`, so it must be taken back before `keep` goes out of scope.
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(default_callback, ctypes.c_void_p(0))
