"""GGUF files on llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator

from qe_edge.backends import default_spec
from qe_edge.errors import BadInput, require
from qe_edge.models import Engine, ModelRef
from qe_edge.spec import GGUF_KEY, parse_spec

# Enough for a query of a page and its expansion; a KV cache for the whole 32 k context would cost
# gigabytes that an expansion never uses.
CONTEXT = 2048


class LlamaCppBackend:
    engine: Engine = "llama.cpp"

    def __init__(self, ref: ModelRef, *, threads: int):
        llama_cpp = require("llama_cpp", "llama")
        try:
            self._llama = llama_cpp.Llama(
                str(ref.path),
                n_ctx=CONTEXT,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=-1,  # all of them where llama.cpp was built for a GPU; ignored elsewhere
                verbose=False,
            )
        except (ValueError, AssertionError, RuntimeError):
            raise BadInput(_why_unloadable(ref), path=ref.path) from None
        trained = self._llama._model.n_ctx_train()
        self.context = min(CONTEXT, trained)
        metadata = self._llama.metadata
        if GGUF_KEY in metadata:
            self.spec = parse_spec(metadata[GGUF_KEY], source=ref.source)
        else:
            self.spec = default_spec(ref, metadata.get("tokenizer.chat_template"))

    def tokenize(self, text: str, special: bool) -> list[int]:
        return self._llama.tokenize(text.encode(), add_bos=False, special=special)

    def detokenize(self, tokens: list[int]) -> str:
        return self._llama.detokenize(tokens).decode("utf-8", errors="replace")

    def generate(self, prompt: list[int], *, temperature: float = 0.0, seed: int = 0) -> Iterator[int]:
        self._llama.set_seed(seed)
        return self._llama.generate(prompt, temp=temperature, top_k=0, top_p=1.0, min_p=0.0)

    def reset(self) -> None:
        self._llama.reset()  # the next prompt then matches no prefix, and overwrites the cache

    def close(self) -> None:
        self._llama.close()


def _why_unloadable(ref: ModelRef) -> str:
    """llama.cpp says only that it failed; look into the file for the reason."""
    try:
        import gguf

        reader = gguf.GGUFReader(str(ref.path))
        field = reader.get_field("general.architecture")
        architecture = field.contents() if field else None
    except Exception:
        # The reader maps arrays over the file, and fails in many ways where the file ends too early.
        return "the file is damaged or truncated; download or export it again"
    return (
        f"llama.cpp can't load it (architecture {architecture!r}); qe-edge exports qwen3 and llama, "
        "and this build of llama.cpp may not know others"
    )
