"""What an exported student knows about itself, so that `Expander.load(file)` needs nothing but the file.

In a GGUF it is one custom key, in a Hugging Face or MLX folder one file.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from qe_edge.errors import BadInput
from qe_edge.student.feedback import Feedback
from qe_edge.student.gate import Gate
from qe_edge.student.join import Join
from qe_edge.student.prompt import PromptSpec

GGUF_KEY = "qe_edge.spec"
KIND_KEY = "qe_edge.quantization"  # the kind of a quantized file, which llama.cpp has no word for if mixed
PROVENANCE_KEY = "qe_edge.provenance"
SPEC_FILE = "qe_edge.json"
PROVENANCE_FILE = "qe_edge_provenance.json"
# Of a spec. In 1, feedback's temperature divided the sum over a query's tokens, not their mean.
SCHEMA_VERSION = 2
# A spec holds a few short texts; anything larger is not one of ours.
MAX_BYTES = 64 * 1024


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contract between a student and whoever runs it.

    `stage` says what was done to the base model: `base`, `sft` or `dpo`; `license` is the base model's,
    in the hub's words (`apache-2.0`), empty where it isn't known.
    """

    prompt: PromptSpec
    join: Join
    base_model: str
    stage: str = "base"
    license: str = ""
    gate: Gate = Gate()
    feedback: Feedback = msgspec.field(default_factory=Feedback)  # its texts are read from a file
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()


class _Version(msgspec.Struct):
    schema_version: int = 1


def is_hub_id(model: str) -> bool:
    """Whether a base model's name is one of the hub, `owner/name`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None


def parse_spec(content: str | bytes, *, source: Path | str) -> ModelSpec:
    """Decode a spec and check it; a malformed or oversized one, or another version's, is refused by name."""
    if len(content) > MAX_BYTES:
        raise BadInput(
            f"its qe-edge spec is {len(content)} bytes, over the limit of {MAX_BYTES}", path=source
        )
    try:
        version = msgspec.json.decode(content, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            remedy = "update qe-edge" if version > SCHEMA_VERSION else "train and export the student again"
            raise BadInput(
                f"its qe-edge spec is of version {version}, and this qe-edge reads version {SCHEMA_VERSION}: "
                + remedy,
                path=source,
            )
        return msgspec.json.decode(content, type=ModelSpec)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"its qe-edge spec is malformed: {error}", path=source) from None


def read_spec(folder: Path) -> ModelSpec | None:
    """The spec beside the weights of a model folder, or None when there is none."""
    path = folder / SPEC_FILE
    return parse_spec(path.read_bytes(), source=path) if path.is_file() else None


def write_spec(folder: Path, spec: ModelSpec) -> None:
    (folder / SPEC_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(spec), indent=2) + b"\n")
