"""What is trained on, looked at before the first step: the text behind the ids, and the loss's place."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from qe_edge.console import warn
from qe_edge.errors import BadInput, QeEdgeError, require
from qe_edge.student.prompt import hugging_face
from qe_edge.student.spec import ModelSpec

CHECKED = 16  # rows whose text is compared: a wrong tokenizer shows at once


OTHER_LANGUAGE = "in a language that the student doesn't know"


def tell_language(label: str, dropped: Mapping[str, int]) -> None:
    """What is left out may be a whole data set: that is to be seen."""
    if count := dropped.get(OTHER_LANGUAGE):
        warn(f"{label}: {count} left out, {OTHER_LANGUAGE}")


class Row(NamedTuple):
    """Token ids, of which those from `answer` on are trained on."""

    ids: tuple[int, ...]
    answer: int

    def describe(self, tokenizer: Any) -> str:
        """The row for people: its text and its ids, prompt and answer apart."""
        parts = (("prompt, not trained on", self.ids[: self.answer]), ("trained on", self.ids[self.answer :]))
        return "\n".join(
            f"{what} ({len(ids)} tokens):\n{tokenizer.decode(ids)}\nids: {' '.join(map(str, ids))}\n"
            for what, ids in parts
        )


def check_texts(spec: ModelSpec, tokenizer: Any, texts: Iterable[tuple[str, str]]) -> None:
    """Each (query, expansion)'s ids must spell the prompt and the expansion, and end with the one end token.

    Raises:
        BadInput: they don't: the tokenizer is damaged, or another model's.
    """
    tokenize, end = hugging_face(tokenizer), spec.prompt.end
    end_ids = tokenize(end, True)
    if len(end_ids) != 1:
        raise BadInput(f"the tokenizer has no single token {end!r}; it is not this model's")
    if spec.prompt.answer_prefix and len(tokenize("<think>", True)) != 1:
        raise BadInput("the tokenizer has no single token '<think>', which the chat template uses")
    for query, text in texts:
        answer = spec.prompt.encode_answer(text, tokenize)
        for wanted, ids in (
            (spec.prompt.render(query), spec.prompt.encode(query, tokenize)),
            (text.strip() + end, answer),
        ):
            # Qwen's tokenizer puts text into Unicode's form NFC.
            spelled, wanted = (unicodedata.normalize("NFC", t) for t in (tokenizer.decode(ids), wanted))
            if spelled != wanted:
                raise BadInput(
                    f"the tokenizer doesn't give the text back: {wanted!r} becomes {spelled!r}; "
                    "it is damaged, or another model's"
                )
        if answer[-1] != end_ids[0] or answer.count(end_ids[0]) != 1:
            raise BadInput(
                f"an expansion must end with one token {end!r}, this one has {answer[-3:]}: {text!r}"
            )


def check_batch(trainer: Any, rows: Iterable[Row]) -> None:
    """The first batch, as the trainer makes it, must hold our rows: nothing added, cut or unmasked.

    Raises:
        QeEdgeError: it doesn't; this version of TRL does something to the rows.
    """
    known = {(row.ids, (False,) * row.answer + (True,) * (len(row.ids) - row.answer)) for row in rows}
    torch = require("torch", "train")
    with torch.random.fork_rng():  # looking must not change what training draws
        batch = next(iter(trainer.get_train_dataloader()))
    trained = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"].bool()
    for ids, mask in _rows_of(batch, trained):
        if (tuple(ids.tolist()), tuple(mask.tolist())) not in known:
            raise QeEdgeError(
                "the trainer changes the rows before it trains on them (ids, their order or the mask of the "
                "loss); this version of TRL is not supported, please report it with `qe-edge doctor`"
            )


def _rows_of(batch: Any, trained: Any) -> Iterator[tuple[Any, Any]]:
    """Each row's ids and its mask of the loss; packed rows start where the positions do."""
    if "attention_mask" not in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        for start, end in pairwise([*starts, batch["input_ids"].shape[1]]):
            yield batch["input_ids"][0, start:end], trained[0, start:end]
        return
    for ids, mask, there in zip(batch["input_ids"], trained, batch["attention_mask"].bool(), strict=True):
        # A padded position that is trained on makes the mask longer than any row's.
        yield ids[there], mask[there] if not mask[~there].any() else mask
