"""A model that was found, loaded into its engine."""

from __future__ import annotations

import os
from typing import get_args

from qe_edge.backends.lifetime import check_not_forked
from qe_edge.backends.protocol import Backend
from qe_edge.console import warn
from qe_edge.errors import BadArgument, require
from qe_edge.student.models import Engine, ModelRef
from qe_edge.work.machine import usable_cores

# The process that loaded the first model.
_loaded_in: int | None = None


def without_metal() -> bool:
    """Whether MLX has none here; then it may take minutes for a query."""
    return not require("mlx.core", "mlx").metal.is_available()


def open_backend(ref: ModelRef, *, engine: Engine | None = None, threads: int | None = None) -> Backend:
    """Load a model into its engine.

    `engine` overrides the model's own, for the folders that both MLX and transformers can read.
    `threads` applies to llama.cpp, where none means as many as find a core free at each step, and to
    transformers on a CPU, where it means all cores; MLX takes no such setting.
    """
    global _loaded_in
    _loaded_in = _loaded_in or os.getpid()
    check_not_forked(_loaded_in)  # a model of its own would hang just so
    if engine is not None and engine not in get_args(Engine):
        raise BadArgument(f"engine must be one of {', '.join(get_args(Engine))}, not {engine!r}")
    engine = engine or ref.engine
    if (engine == "llama.cpp") != ref.is_gguf:
        raise BadArgument(
            f"{engine} can't run {ref.name}: llama.cpp runs .gguf files, and they run nowhere else"
        )
    if engine == "llama.cpp":
        from qe_edge.backends.llama_cpp import LlamaCppBackend

        return LlamaCppBackend(ref, threads=threads)
    if engine == "mlx":
        from qe_edge.backends.mlx import MlxBackend

        if without_metal():
            warn(f"{ref.name}: without Metal MLX may take minutes for a query; for use, take a GGUF")
        return MlxBackend(ref)
    from qe_edge.backends.transformers import TransformersBackend

    return TransformersBackend(ref, threads=threads or usable_cores())
