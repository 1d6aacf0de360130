"""Checkpoints of others, loaded by transformers without any code that they bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qe_edge.errors import BadInput


def load_pretrained(kind: Any, source: Path | str, **settings: Any) -> Any:
    """What one of transformers' Auto classes makes of a folder or a hub id.

    Raises:
        BadInput: the checkpoint wants code of its own to be run. (Unless told not to, transformers asks for
            that on stdin.)
    """
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
