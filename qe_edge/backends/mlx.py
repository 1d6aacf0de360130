"""MLX folders on mlx-lm: Apple silicon; on Linux a CPU build that serves correctness, not speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from qe_edge.backends.lifetime import Lifetime
from qe_edge.backends.mlx_batch import MlxBatch
from qe_edge.backends.one_thread import OneThread
from qe_edge.backends.protocol import Batch, groups, whole
from qe_edge.errors import BadArgument, BadInput, require
from qe_edge.student.models import Engine, ModelRef, default_spec
from qe_edge.student.prompt import hugging_face
from qe_edge.student.spec import read_spec

# All of MLX happens here, whatever the number of models: Metal's command buffers are shared by all threads,
# and two that evaluate at once crash.
THREAD = OneThread("mlx")
# Neither the architecture nor the tokenizer may bring code of its own.
NO_CODE: dict[str, Any] = {"trust_remote_code": False, "tokenizer_config": {"trust_remote_code": False}}


class MlxBackend:
    engine: Engine = "mlx"
    parallel = 64  # more would wait for each other's prompts

    def __init__(self, ref: ModelRef):
        mlx_lm = require("mlx_lm", "mlx")
        if ref.path is None:
            raise BadArgument(f"{ref.name} is a hub id; export it first, then give the MLX folder")
        try:
            # Our renderer makes the prompt: only the inner tokenizer is used.
            self._model, tokenizer = THREAD.submit(partial(mlx_lm.load, str(ref.path), **NO_CODE)).result()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BadInput(f"mlx-lm can't load this folder: {error}", path=ref.path) from None
        self._tokenizer = tokenizer._tokenizer
        self._encode = hugging_face(self._tokenizer)
        self._lifetime = Lifetime(self, lambda: None)  # only so that all engines end alike
        self.context = self._model.args.max_position_embeddings
        self.spec = read_spec(ref.path) or default_spec(ref, self._tokenizer.chat_template)

    def tokenize(self, text: str, special: bool) -> list[int]:
        with self._lifetime:
            return self._encode(text, special)

    def detokenize(self, tokens: list[int]) -> str:
        with self._lifetime:
            return whole(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def batch(self, slots: int) -> Batch:
        with self._lifetime:
            return MlxBatch(self._model, slots, self.context, THREAD)

    def reader(self) -> _Reader:
        with self._lifetime:
            return _Reader(self._model, self._lifetime)

    def close(self) -> None:
        self._lifetime.close()
        self._model = None


class _Reader:
    """A loaded model that reads, in the thread where it also writes."""

    def __init__(self, model: Any, lifetime: Lifetime):
        self._mx, self._model, self._lifetime = require("mlx.core", "mlx"), model, lifetime

    def log_likelihoods(
        self, prompts: Sequence[list[int]], answer: list[int], *, prefix: int
    ) -> Iterator[list[float]]:
        for group in groups(prompts, answer, prefix):
            with self._lifetime:
                values = THREAD.submit(self._read, group, answer).result()
            yield values

    def _read(self, group: list[list[int]], answer: list[int]) -> list[float]:
        mx, longest = self._mx, max(map(len, group))
        # What follows a sequence is seen by nothing before it.
        logits = self._model(mx.array([row + [0] * (longest - len(row)) for row in group]))
        found = []
        for row, tokens in zip(logits, group, strict=True):
            foretold = row[len(tokens) - len(answer) - 1 : len(tokens) - 1].astype(mx.float32)
            chosen = mx.take_along_axis(foretold, mx.array(answer)[:, None], axis=-1)[:, 0]
            found.append(float((chosen - mx.logsumexp(foretold, axis=-1)).sum()))
        return found

    def forget(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is held."""
