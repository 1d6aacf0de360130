"""The importance matrix: how strongly a student uses each input of its weight matrices on our own texts.

llama.cpp's quantizer weighs the error of a weight with it. The statistic is that of its `llama-imatrix`
tool: the mean over tokens of the squared activation at each input of a matrix.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qe_edge.console import progress
from qe_edge.errors import BadInput, require
from qe_edge.export.source import Source
from qe_edge.export.streamed import Streamed
from qe_edge.student.spec import ModelSpec
from qe_edge.train.config import SftConfig
from qe_edge.work.files import sha256

ROWS = 128  # of about 190 tokens; llama.cpp's usual hundred chunks of 512 are twice that
BATCH = 16  # of rows that go through the model together, which is read once for them


class Importance(NamedTuple):
    """GGUF tensor name -> float32 [inputs of the matrix], and what it was measured on."""

    values: dict[str, np.ndarray]
    files: list[tuple[str, str]]  # name and SHA-256
    rows: int
    tokens: int

    def describe(self) -> dict[str, Any]:
        files = [{"name": name, "sha256": digest} for name, digest in self.files]
        return {"files": files, "rows": self.rows, "tokens": self.tokens}


def calibration_rows(
    expansions: Sequence[Path], selection: SftConfig, spec: ModelSpec, tokenizer: Any
) -> list[tuple[list[int], int]]:
    """Token ids of prompt and expansion, and where the expansion starts, of ROWS rows drawn from the files.

    `selection` says which rows may be drawn, as it does for a training.

    Raises:
        BadInput: the files hold no usable row.
    """
    from qe_edge.student.prompt import hugging_face
    from qe_edge.train.sft import encode_rows, select_rows
    from qe_edge.train.teach.ledger import read_texts

    rows = select_rows(read_texts(expansions), selection)
    rows = [row for row in rows if row.lang in spec.prompt.languages]
    rows = random.Random(0).sample(rows, min(ROWS, len(rows)))
    # To write, whatever it was trained to: answers of a few tokens are too little to compare types by.
    encoded, _ = encode_rows(rows, spec, hugging_face(tokenizer), selection.max_length)
    return [(row["input_ids"], row["labels"].count(-100)) for row in encoded]


def measure_importance(
    source: Source, rows: Sequence[tuple[list[int], int]], expansions: Sequence[Path]
) -> Importance:
    """Run the source over `calibration_rows` in float32; `expansions` are the files that these are from.

    The output layer is left out, as by llama.cpp.

    Raises:
        BadInput: the model can't be loaded, or its activations aren't finite.
    """
    gguf, torch = require("gguf", "llama"), require("torch", "train")
    streamed = Streamed(source)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[source.architecture], source.config.num_hidden_layers)
    sums: dict[str, Any] = {}
    real: Any = None  # [rows of the batch, tokens]: whether it is a token or padding

    def add(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            squares = inputs[0][real].square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    for name, module in streamed.network.model.named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(add(names.get_name(name) + ".weight"))
    ordered = sorted((ids for ids, _ in rows), key=len)  # little padding
    with progress("importance matrix", len(ordered)) as advance:
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            real = torch.arange(len(batch[-1])) < torch.tensor([[len(ids)] for ids in batch])
            streamed.hidden(batch)
            advance(len(batch))
    tokens = sum(map(len, ordered))
    values = {name: (total / tokens).numpy() for name, total in sums.items()}
    if not all(np.isfinite(value).all() for value in values.values()):
        raise BadInput("its activations are not finite; the training diverged", path=source.model)
    files = [(path.name, sha256(path)) for path in expansions]
    return Importance(values, files, len(rows), tokens)
