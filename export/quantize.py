"""GGUF -> smaller GGUF, by llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qe_edge.errors import BadArgument, BadInput, NotFound, QeEdgeError, require
from qe_edge.manifest import atomic_path

# `enum llama_ftype` in llama.h; the file states its own under `general.file_type`.
KINDS: dict[str, int] = {
    "Q4_0": 2,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K_M": 12,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}
_WARNING, _ERROR = 3, 4  # enum ggml_log_level in ggml.h


def quantize_gguf(source: Path, out: Path, kind: str, *, threads: int | None = None) -> Path:
    """Quantize an F16, BF16 or F32 GGUF; all metadata is kept. `threads`: all of the machine's if None.

    Matrices whose width is no multiple of 256 can't take a K-quant; llama.cpp stores those in the
    nearest larger type of 32-element blocks.

    Raises:
        BadArgument: an unknown kind.
        NotFound, BadInput: no such source, or not a GGUF.
        QeEdgeError: llama.cpp failed; the message holds the last of what it said.
    """
    if kind not in KINDS:
        raise BadArgument(f"no quantization {kind!r}; choose one of: {', '.join(KINDS)}")
    if not source.is_file():
        raise NotFound(f"{source}: no such file")
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BadInput("not a GGUF file", path=source)
    llama_cpp = require("llama_cpp", "llama")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = KINDS[kind]
    params.nthread = threads or 0
    with atomic_path(out) as partial, captured_log() as log:
        paths = str(source).encode(), str(partial).encode()
        if llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)) != 0:
            raise QeEdgeError(f"llama.cpp could not quantize {source} to {kind}: {'; '.join(log[-3:])}")
    return out


def bits_of(kind: str) -> int:
    """The bits per weight in a kind's name, scales not counted: 4 for Q4_K_M and IQ4_XS, 16 for BF16."""
    return int("".join(c for c in kind.split("_")[0] if c.isdigit()))


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Keep llama.cpp's log off the terminal; yields its warnings and errors, line by line."""
    llama_cpp = require("llama_cpp", "llama")
    from llama_cpp._logger import llama_log_callback as default_callback

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        if level in (_WARNING, _ERROR) and text.strip():
            lines.append(text.decode(errors="replace").strip())

    # C holds a bare pointer to `keep`, so it must be taken back before `keep` goes out of scope.
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(default_callback, ctypes.c_void_p(0))
