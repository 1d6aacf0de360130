"""GGUF files on llama.cpp, through its C functions."""

from __future__ import annotations

import ctypes

from qe_edge.backends.llama_batch import CONTEXT, KEPT, LlamaBatch
from qe_edge.backends.llama_model import LlamaModel
from qe_edge.backends.llama_reader import LlamaReader
from qe_edge.backends.protocol import whole
from qe_edge.student.models import Engine, ModelRef, default_spec
from qe_edge.student.spec import GGUF_KEY, parse_spec


class LlamaCppBackend:
    engine: Engine = "llama.cpp"

    def __init__(self, ref: ModelRef, *, threads: int | None):
        assert ref.path is not None
        # Enough for a query of a page and its expansion; a cache for the whole 32 k context would cost
        # gigabytes that an expansion never uses.
        self.model = LlamaModel(ref.path, threads=threads, longest=CONTEXT)
        self._lib, self._lifetime, self.context = self.model.lib, self.model.lifetime, self.model.context
        self.parallel = self._lib.llama_max_parallel_sequences() - KEPT
        spec = self.model.metadata(GGUF_KEY)
        if spec is not None:
            self.spec = parse_spec(spec, source=ref.source)
        else:
            self.spec = default_spec(ref, self.model.metadata("tokenizer.chat_template"))

    def tokenize(self, text: str, special: bool) -> list[int]:
        return self.model.tokenize(text, special=special)

    def detokenize(self, tokens: list[int]) -> str:
        with self._lifetime:
            pieces = list(map(self._piece, tokens))
        return whole(b"".join(pieces).decode("utf-8", errors="replace"))

    def _piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            written = self._lib.llama_token_to_piece(self.model.vocab, token, buffer, size, 0, False)
            if written >= 0:
                return buffer.raw[:written]
            size = -written

    def batch(self, slots: int) -> LlamaBatch:
        with self._lifetime:
            return LlamaBatch(self.model, slots)

    def reader(self) -> LlamaReader:
        with self._lifetime:
            return LlamaReader(self.model)

    def close(self) -> None:
        self._lifetime.close()
