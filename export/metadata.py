"""Every key of an exported GGUF beside what its export writes: a template is compared, never rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qe_edge.console import progress
from qe_edge.errors import QeEdgeError, require
from qe_edge.export.gguf import add_header
from qe_edge.export.source import Source
from qe_edge.student.spec import GGUF_KEY, KIND_KEY, PROVENANCE_KEY, ModelSpec

# What differs between the kinds of one export; the spec is compared as what it means, not as a text.
_OWN = {"general.file_type", "general.quantization_version", KIND_KEY, PROVENANCE_KEY, GGUF_KEY}
_OF_QUANTIZER = "quantize.imatrix."


def check_metadata(found: dict[str, Any], file: Path, model: Path, spec: ModelSpec) -> None:
    """Compare the keys of an export, as `read_keys` found them, with those that its source folder gives.

    Raises:
        QeEdgeError: one is missing, was added or has another value.
    """
    expected = expected_keys(model, spec)
    for name in sorted(expected.keys() | found.keys()):
        if name in _OWN or name.startswith(_OF_QUANTIZER):
            continue
        if name not in found:
            raise QeEdgeError(f"{file} lacks the key {name}, which its export writes: don't use it")
        if name not in expected:
            raise QeEdgeError(f"{file} has a key {name}, which no export writes: don't use it")
        if not _same(expected[name], found[name]):
            raise QeEdgeError(f"{file}: its {name} is not what its export wrote: don't use it")


def expected_keys(model: Path, spec: ModelSpec) -> dict[str, Any]:
    """Key -> value, as an export writes them."""
    gguf, source = require("gguf", "llama"), Source(model)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[source.architecture]])
    add_header(writer, source, spec, None)
    return {name: field.value for part in writer.kv_data for name, field in part.items()}


def read_keys(file: Path) -> dict[str, Any]:
    """Key -> value of a GGUF.

    Raises:
        QeEdgeError: it is damaged.
    """
    gguf = require("gguf", "llama")
    try:
        with progress(f"reading {file.name}", None):  # its vocabulary takes seconds, on a busy machine many
            fields = gguf.GGUFReader(str(file)).fields
        return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    except Exception as error:  # it maps arrays over the file, and fails in many ways where one doesn't fit
        raise QeEdgeError(f"{file} is damaged: {error}") from None


def _same(expected: Any, found: Any) -> bool:
    if isinstance(expected, float):  # stored in 32 bits
        return isinstance(found, float) and np.float32(expected) == np.float32(found)
    if isinstance(expected, list | tuple):
        return isinstance(found, list) and list(expected) == found
    return type(found) is not float and bool(expected == found)
