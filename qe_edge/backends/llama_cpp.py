"""GGUF files on llama.cpp, through its C functions."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from qe_edge.backends import default_spec, whole
from qe_edge.backends.gguf_check import check_gguf
from qe_edge.backends.lifetime import Lifetime
from qe_edge.backends.llama_batch import CONTEXT, KEPT, LlamaBatch
from qe_edge.backends.llama_reader import LlamaReader
from qe_edge.errors import BadInput, require
from qe_edge.models import Engine, ModelRef
from qe_edge.spec import GGUF_KEY, parse_spec


class LlamaCppBackend:
    engine: Engine = "llama.cpp"

    def __init__(self, ref: ModelRef, *, threads: int):
        self.lib = lib = require("llama_cpp", "llama")
        assert ref.path is not None
        architecture = check_gguf(ref.path)
        # llama.cpp tells what it does, and how a load failed; we say it in our own words.
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = -1  # all of them where llama.cpp was built for a GPU; ignored elsewhere
        params.use_extra_bufts = not has_amx(lib)
        self.model = lib.llama_model_load_from_file(os.fsencode(ref.source), params)
        if not self.model:
            raise BadInput(
                f"llama.cpp can't load it (architecture {architecture!r}); qe-edge exports qwen3 and llama, "
                "and this build of llama.cpp may not know others",
                path=ref.path,
            )
        self.lifetime = Lifetime(self, partial(lib.llama_model_free, self.model))
        self._vocab = lib.llama_model_get_vocab(self.model)
        self.vocabulary: int = lib.llama_vocab_n_tokens(self._vocab)
        self.threads = threads
        self.parallel = lib.llama_max_parallel_sequences() - KEPT
        # Enough for a query of a page and its expansion; a cache for the whole 32 k context would cost
        # gigabytes that an expansion never uses.
        self.context = min(CONTEXT, lib.llama_model_n_ctx_train(self.model))
        spec = self._metadata(GGUF_KEY)
        if spec is not None:
            self.spec = parse_spec(spec, source=ref.source)
        else:
            self.spec = default_spec(ref, self._metadata("tokenizer.chat_template"))

    def _metadata(self, key: str) -> str | None:
        size = self.lib.llama_model_meta_val_str(self.model, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self.lib.llama_model_meta_val_str(self.model, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", errors="replace")

    def tokenize(self, text: str, special: bool) -> list[int]:
        encoded = text.encode()
        room = len(encoded) + 1
        while True:
            tokens = (self.lib.llama_token * room)()
            with self.lifetime:
                count = self.lib.llama_tokenize(
                    self._vocab, encoded, len(encoded), tokens, room, False, special
                )
            if count >= 0:
                return tokens[:count]
            room = -count

    def detokenize(self, tokens: list[int]) -> str:
        with self.lifetime:
            pieces = list(map(self._piece, tokens))
        return whole(b"".join(pieces).decode("utf-8", errors="replace"))

    def _piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            written = self.lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if written >= 0:
                return buffer.raw[:written]
            size = -written

    def batch(self, slots: int) -> LlamaBatch:
        with self.lifetime:
            return LlamaBatch(self, slots)

    def reader(self) -> LlamaReader:
        with self.lifetime:
            return LlamaReader(self)

    def close(self) -> None:
        self.lifetime.close()


def has_amx(lib: Any) -> bool:
    """Whether this build of llama.cpp multiplies on Intel's AMX, which ends the process.

    A compiler whose `_tile_loadconfig` doesn't say that it reads all of its argument (GCC 12) leaves most of
    the tiles' shapes out of the program: https://github.com/ggml-org/llama.cpp/pull/26954. Whether a build
    was spared isn't told, so it keeps to the kernels that need no weights in another layout. (Without them,
    Q4_0 reads at .7 of the speed of a build that knows no AMX; other kinds and writing don't change.)
    """
    return b"AMX_INT8 = 1" in lib.llama_print_system_info()


@contextmanager
def kept_off_amx(lib: Any) -> Iterator[None]:
    """The same for a `llama_cpp.Llama` that is made within, which takes no such setting."""
    functions, defaults = lib.llama_cpp, lib.llama_cpp.llama_model_default_params

    def without() -> Any:
        params = defaults()
        params.use_extra_bufts = not has_amx(lib)
        return params

    functions.llama_model_default_params = without
    try:
        yield
    finally:
        functions.llama_model_default_params = defaults


class FileName(str):
    """A path for a `llama_cpp.Llama`, which encodes it itself: as the bytes of its name, UTF-8 or not."""

    def encode(self, *_: object) -> bytes:
        return os.fsencode(str(self))
