"""The source as transformers computes it, in float32, with one matrix in memory at a time.

A 4B model has 16 GB in float32, but its answers can be had from a laptop: each matrix is read from the source
when it is needed, and dropped. One pass costs as much as reading the file once, so texts go through together.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qe_edge.backends.pretrained import load_pretrained
from qe_edge.console import progress
from qe_edge.errors import BadInput, require
from qe_edge.export.source import EMBEDDING, HEAD, Source

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY_ROWS = 16_384  # of the output matrix at a time
M_MMAP_THRESHOLD, MAPPED = -3, 4 * 2**20  # of glibc's malloc.h, and the bytes from which it maps


class Streamed:
    """A model whose weights stay on the disk.

    `network` is transformers' own, without weights: hooks of accelerate bring each matrix for the moment
    that it is used. The embeddings and the output matrix, the largest, come in parts.

    Raises:
        BadInput: transformers doesn't know the folder's configuration.
    """

    def __init__(self, source: Source):
        torch, transformers = require("torch", "train"), require("transformers", "train")
        accelerate = require("accelerate", "train")
        from accelerate.hooks import attach_align_device_hook

        _give_back_what_is_freed()
        self.source = source
        try:
            config = load_pretrained(transformers.AutoConfig, source.model)
            with accelerate.init_empty_weights():
                self.network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(f"transformers can't load it: {error}", path=source.model) from None
        self.network.eval()
        decoder = self.network.model
        for name, part in [("layers", decoder.layers), ("norm", decoder.norm)]:
            attach_align_device_hook(
                part,
                execution_device="cpu",
                offload=True,
                weights_map=_Weights(self),
                module_name=f"model.{name}",
            )
        decoder.embed_tokens.forward = self._embed
        self.network.lm_head.forward = self.output

    def _embed(self, ids: Tensor) -> Tensor:
        """[texts, tokens] -> [texts, tokens, hidden]; only the rows of these tokens are read."""
        torch = require("torch", "train")
        used, places = ids.unique(return_inverse=True)
        rows = [self.weight(EMBEDDING, slice(row, row + 1)) for row in used.tolist()]
        return torch.cat(rows)[places]

    def output(self, hidden: Tensor) -> Tensor:
        """[…, hidden] -> [..., vocabulary]."""
        torch = require("torch", "train")
        name = EMBEDDING if self.source.config.tie_word_embeddings else HEAD
        size = self.source.config.vocab_size
        logits = torch.empty(*hidden.shape[:-1], size)
        for start in range(0, size, VOCABULARY_ROWS):
            end = min(start + VOCABULARY_ROWS, size)
            logits[..., start:end] = hidden @ self.weight(name, slice(start, end)).T
        return logits

    def weight(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A weight, or some of its rows, in float32; a subclass may take it from elsewhere."""
        return self.source.tensor(name, require("torch", "train").float32, rows=rows)

    def greedy(self, prompts: Sequence[Sequence[int]], *, end: int, most: int) -> list[list[int]]:
        """The likeliest tokens after each prompt, up to `most` or to `end`, which is kept."""
        torch, transformers = require("torch", "train"), require("transformers", "train")
        width = max(map(len, prompts))
        padded = [[end] * (width - len(ids)) + list(ids) for ids in prompts]
        real = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        config = transformers.GenerationConfig(max_new_tokens=most, eos_token_id=end, pad_token_id=end)
        asked = {"attention_mask": torch.tensor(real), "generation_config": config}
        with (
            torch.inference_mode(),
            progress("asking the source model", most) as advance,
            self.network.register_forward_hook(lambda *_: advance()),
        ):
            whole = self.network.generate(torch.tensor(padded), **asked)
        answers = whole[:, width:].tolist()
        return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]

    def hidden(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The decoder's output, [tokens, hidden], for each row of token ids, all in one pass."""
        torch = require("torch", "train")
        width = max(map(len, rows))
        # What stands at the right of a row changes nothing of what is at its left, so no mask is needed.
        padded = torch.tensor([list(ids) + [0] * (width - len(ids)) for ids in rows])
        with torch.inference_mode():
            found = self.network.model(padded, use_cache=False).last_hidden_state
        return [hidden[: len(ids)] for hidden, ids in zip(found, rows, strict=True)]

    def logits(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """[tokens, vocabulary] for each row of token ids."""
        torch = require("torch", "train")
        with torch.inference_mode():
            return [self.output(hidden) for hidden in self.hidden(rows)]


def _give_back_what_is_freed() -> None:
    """Have matrices leave the memory when they are dropped.

    glibc learns from large blocks that are freed to keep the next ones of up to 32 MB, between which nothing
    else fits: a gigabyte for Qwen3-0.6B. Smaller ones stay with it, which is quicker.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)


class _Weights(Mapping[str, Any]):
    """Name -> tensor in float32, fetched when it is asked for."""

    def __init__(self, model: Streamed):
        self.model = model

    def __getitem__(self, name: str) -> Tensor:
        return self.model.weight(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.model.source.shapes)

    def __len__(self) -> int:
        return len(self.model.source.shapes)
