"""Checkpoints of others, loaded by transformers without any code that they bring."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from qe_edge.console import quiet_transformers
from qe_edge.errors import BadInput, NotFound
from qe_edge.student.hub import reason

HUB_SECONDS = 10.0


def load_pretrained(kind: Any, source: Path | str, **settings: Any) -> Any:
    """What one of transformers' Auto classes makes of a folder or a hub id.

    Raises:
        NotFound: it is neither here nor on the hub.
        BadInput: the checkpoint wants code of its own to be run. (Unless told not to, transformers asks for
            that on stdin.)
    """
    quiet_transformers()
    if not Path(source).exists():
        find_on_hub(str(source))
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **settings)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise BadInput(
            "wants to run code of its own, which qe-edge never does; take a model whose architecture "
            "transformers knows itself",
            path=source,
        ) from None


@cache
def find_on_hub(name: str) -> None:
    """Ask the hub for a model once and shortly, unless it was downloaded before.

    The hub's own clients try many times, for most of a minute, also for a folder's mistyped name.

    Raises:
        NotFound: it has none of that name, or can't be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if os.environ.get("HF_HUB_OFFLINE") or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except Exception as error:  # its errors come from several packages
        raise NotFound(
            f"no model {name!r}: there is no such file or folder here, and {reason(error)}. "
            "Name a model's folder or GGUF that is here, or try again with a network"
        ) from None
