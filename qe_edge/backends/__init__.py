"""One file per engine behind one small protocol; `open_backend` picks the engine of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from qe_edge.errors import BadArgument
from qe_edge.manifest import usable_cores
from qe_edge.models import Engine, ModelRef
from qe_edge.prompt import prompt_for
from qe_edge.spec import ModelSpec


class Backend(Protocol):
    """An engine with a model in it. Token ids are the only language spoken with it."""

    engine: Engine
    context: int
    spec: ModelSpec

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids of the text without BOS; special tokens are parsed only where asked for."""
        ...

    def detokenize(self, tokens: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        ...

    def generate(self, prompt: list[int], *, temperature: float = 0.0, seed: int = 0) -> Iterator[int]:
        """Yield the tokens that follow the prompt, one by one, until the caller stops asking.

        Temperature 0 is greedy; above it the full distribution is sampled (no top-k, no top-p), so
        that engines agree on what a temperature means.
        """
        ...

    def reset(self) -> None:
        """Forget the KV cache of earlier prompts, so that the next prompt is prefilled whole."""
        ...

    def close(self) -> None: ...


def default_spec(ref: ModelRef, chat_template: str | None) -> ModelSpec:
    """The spec of a model that qe-edge has not trained: our default prompt in its chat format."""
    from qe_edge.join import DEFAULT_JOIN

    prompt = prompt_for(chat_template, languages=ref.languages)
    return ModelSpec(prompt=prompt, join=DEFAULT_JOIN, base_model=ref.public_name)


def open_backend(ref: ModelRef, *, engine: Engine | None = None, threads: int | None = None) -> Backend:
    """Load a model into its engine.

    `engine` overrides the model's own, for the folders that both MLX and transformers can read.
    `threads` (all usable cores by default) applies to llama.cpp and transformers on a CPU; MLX takes no
    such setting.
    """
    engine = engine or ref.engine
    threads = threads or usable_cores()  # llama.cpp's own default is half of them
    if (engine == "llama.cpp") != ref.is_gguf:
        raise BadArgument(
            f"{engine} can't run {ref.name}: llama.cpp runs .gguf files, and they run nowhere else"
        )
    if engine == "llama.cpp":
        from qe_edge.backends.llama_cpp import LlamaCppBackend

        return LlamaCppBackend(ref, threads=threads)
    if engine == "mlx":
        from qe_edge.backends.mlx import MlxBackend

        return MlxBackend(ref)
    from qe_edge.backends.transformers import TransformersBackend

    return TransformersBackend(ref, threads=threads)
