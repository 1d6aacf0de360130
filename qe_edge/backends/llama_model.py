"""A GGUF file that llama.cpp has loaded: what its batches and readers compute with."""

from __future__ import annotations

import ctypes
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from qe_edge.backends.amx import may_repack
from qe_edge.backends.free_cores import FreeCores
from qe_edge.backends.gguf_check import check_gguf
from qe_edge.backends.lifetime import Lifetime
from qe_edge.backends.one_thread import OneThread
from qe_edge.errors import BadInput, QeEdgeError, require
from qe_edge.interrupt import held
from qe_edge.work.machine import drowsy_threads, usable_cores

# All models compute here. GNU's OpenMP starts as many threads for each thread that calls it; as soon as it
# has more than there are processors none of them waits awake, which halves the speed.
THREAD = OneThread("llama.cpp")


class LlamaModel:
    """The model's own memory, which is freed when nothing refers to this object any more, or by `lifetime`.

    `context` is the most tokens of a sequence that a cache is made for, `longest` at most. Without a number
    of `threads` each step takes as many as find a core free. `repack` lays out the weights anew for the
    processor, by default where that is safe.

    Raises:
        BadInput: the file is damaged, or of an architecture that llama.cpp doesn't know.
    """

    def __init__(self, path: Path, *, threads: int | None, longest: int, repack: bool | None = None):
        with held():  # llama.cpp calls back to log
            self._load(path, threads=threads, longest=longest, repack=repack)

    def _load(self, path: Path, *, threads: int | None, longest: int, repack: bool | None) -> None:
        self.lib = lib = load_library()
        self.threads = threads or usable_cores()  # llama.cpp's own default is half of them
        self._free = FreeCores(self.threads) if threads is None and self.threads > 1 else None
        architecture, types = check_gguf(path)
        # llama.cpp tells what it does, and how a load failed; we say it in our own words.
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = -1  # all of them where llama.cpp was built for a GPU; ignored elsewhere
        params.use_extra_bufts = may_repack(lib, path, types) if repack is None else repack
        # Here too, since laying out weights anew takes all cores.
        self.pointer = THREAD.submit(lib.llama_model_load_from_file, os.fsencode(path), params).result()
        if not self.pointer:
            raise BadInput(
                f"llama.cpp can't load it (architecture {architecture!r}); qe-edge exports qwen3, qwen2 and "
                "llama, and this build of llama.cpp may not know others",
                path=path,
            )
        self.lifetime = Lifetime(self, partial(lib.llama_model_free, self.pointer))
        self.vocab = lib.llama_model_get_vocab(self.pointer)
        self.vocabulary: int = lib.llama_vocab_n_tokens(self.vocab)
        self.context = min(longest, lib.llama_model_n_ctx_train(self.pointer))

    def tokenize(self, text: str, *, special: bool = False, marked: bool = False) -> list[int]:
        """Token ids; special tokens are parsed only where asked for.

        `marked` adds those that the model wants before and after a text.
        """
        encoded = text.encode()
        room = len(encoded) + 8
        while True:
            tokens = (self.lib.llama_token * room)()
            with self.lifetime:
                count = self.lib.llama_tokenize(
                    self.vocab, encoded, len(encoded), tokens, room, marked, special
                )
            if count >= 0:
                return tokens[:count]
            room = -count

    def context_of(
        self, cells: int, *, batch: int, sequences: int, unified: bool = True, embeddings: bool = False
    ) -> tuple[Any, Any]:
        """A context whose cache has room for so many tokens, and a batch for it; the caller frees both.

        Raises:
            QeEdgeError: there is no memory for the cache.
        """
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = cells, sequences
        params.n_batch = params.n_ubatch = batch
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified, params.embeddings = unified, embeddings
        with held():  # llama.cpp calls back to log
            context = self.lib.llama_init_from_model(self.pointer, params)
        if not context:
            raise QeEdgeError(f"llama.cpp can't make a cache of {cells} tokens: memory is short")
        return context, self.lib.llama_batch_init(batch, 0, 1)

    def decode(self, context: Any, batch: Any) -> None:
        """Compute a batch of tokens in one of the model's contexts.

        Raises:
            QeEdgeError: llama.cpp can't.
        """
        if code := THREAD.submit(self._compute, context, batch).result():
            raise QeEdgeError(f"llama.cpp could not compute {batch.n_tokens} tokens (code {code})")

    def _compute(self, context: Any, batch: Any) -> int:
        if self._free:
            self.lib.llama_set_n_threads(context, threads := self._free(), threads)
        return int(self.lib.llama_decode(context, batch))

    def metadata(self, key: str) -> str | None:
        """The text of a key in the file's header, None where there is none."""
        size = self.lib.llama_model_meta_val_str(self.pointer, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self.lib.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", errors="replace")


def load_library() -> Any:
    """llama_cpp, with OpenMP threads that soon sleep, unless the user's environment says how they wait."""
    with drowsy_threads():
        return require("llama_cpp", "llama")


class FileName(str):
    """A path for a `llama_cpp.Llama`, which encodes it itself: as the bytes of its name, UTF-8 or not."""

    def encode(self, *_: object) -> bytes:
        return os.fsencode(str(self))
