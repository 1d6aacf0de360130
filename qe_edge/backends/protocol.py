"""What an engine is to the rest of qe-edge, and what engines share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol

from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.student.models import Engine
from qe_edge.student.spec import ModelSpec


class Backend(Protocol):
    """An engine with a model in it. Token ids are the only language spoken with it."""

    engine: Engine
    context: int
    spec: ModelSpec
    parallel: int  # sequences that can be decoded together

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids of the text without BOS; special tokens are parsed only where asked for."""
        ...

    def detokenize(self, tokens: list[int]) -> str:
        """The text of token ids, without special tokens and a last character that is there in part."""
        ...

    def batch(self, slots: int) -> Batch:
        """Room for so many sequences, at most `parallel`."""
        ...

    def reader(self) -> Reader:
        """What tells how likely an answer is, without writing one."""
        ...

    def close(self) -> None: ...


class Reader(Protocol):
    """Reads prompts with an answer that is given. The decoder's thread uses it."""

    def log_likelihoods(
        self, prompts: Sequence[list[int]], answer: list[int], *, prefix: int
    ) -> Iterator[list[float]]:
        """ln P(answer | prompt) of a few prompts after the other, in their order; see `groups`.

        The first `prefix` tokens are those of all prompts.

        Raises:
            BadInput: a prompt is too long.
        """
        ...

    def forget(self) -> None:
        """Drop what is kept of earlier prompts."""
        ...

    def close(self) -> None: ...


class Batch(Protocol):
    """Sequences that are decoded together. The decoder's thread uses it.

    `longest` is how many tokens one may have, answer included.
    """

    longest: int

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens can be added now."""
        ...

    def add(
        self, prompt: Sequence[int], *, prefix: int, answer: int, temperature: float = 0.0, seed: int = 0
    ) -> int:
        """Start a sequence and return its number.

        Its first `prefix` tokens are those of many prompts, and may be kept; of its answer, at most
        `answer` tokens will be asked for. Temperature 0 is greedy; above it the full distribution is
        sampled (no top-k, no top-p), so that engines agree on what a temperature means.
        """
        ...

    def step(self, piece: int | None = None) -> dict[int, int]:
        """Compute on: sequence -> its next token, for those that have got one.

        Of prompts, at most `piece` tokens are read, if the engine can read them in pieces.
        """
        ...

    def remove(self, number: int) -> None:
        """End a sequence."""
        ...

    def forget(self) -> None:
        """Drop what is kept of earlier prompts."""
        ...

    def clear(self) -> None:
        """End all sequences and drop all that is kept, also after an error in the middle of a step."""
        ...

    def close(self) -> None: ...


def whole(text: str) -> str:
    """A decoded text without the mark of a last character that was cut: one may need several tokens."""
    return text.rstrip("\ufffd")


class OneByOne:
    """A batch of one sequence, for an engine that yields an answer's tokens one by one."""

    def __init__(self, generate: Callable[..., Generator[int, None, None]], longest: int):
        self._generate, self.longest = generate, longest
        self._tokens: Generator[int, None, None] | None = None

    def fits(self, tokens: int) -> bool:
        return self._tokens is None

    def add(
        self, prompt: Sequence[int], *, prefix: int, answer: int, temperature: float = 0.0, seed: int = 0
    ) -> int:
        self._tokens = self._generate(prompt, temperature=temperature, seed=seed)
        return 0

    def step(self, piece: int | None = None) -> dict[int, int]:
        assert self._tokens is not None
        token = next(self._tokens, None)
        if token is None:
            raise QeEdgeError("the engine stopped in the middle of an answer")
        return {0: token}

    def remove(self, number: int) -> None:
        self.clear()

    def forget(self) -> None:
        """Nothing is kept."""

    def clear(self) -> None:
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None

    def close(self) -> None:
        self.clear()


READ = 512  # tokens that a prompt may have where it is only read
# Prompts, and tokens of several, that are computed at a time: a deadline is looked at in between. On
# two idle cores 256 read ten passages in 1.14 s and 128 in 1.19; a query that came meanwhile waited .66 s and
# .22, beside other work 3.7 and 1.4.
PROMPTS, TOGETHER = 32, 128


def groups(prompts: Sequence[list[int]], answer: list[int], prefix: int) -> Iterator[list[list[int]]]:
    """Prompts with the answer, several together up to TOGETHER tokens and PROMPTS; a longer one is alone.

    The first `prefix` tokens, which all begin with, are not counted.

    Raises:
        BadInput: one has more than READ tokens.
    """
    longest = max((len(prompt) for prompt in prompts), default=0) - prefix + len(answer)
    if longest > READ:
        raise BadInput(f"a passage and its query take {longest} tokens, over {READ}: shorten the query")
    group: list[list[int]] = []
    size = 0
    for prompt in prompts:
        own = len(prompt) - prefix + len(answer)
        if group and (size + own > TOGETHER or len(group) == PROMPTS):
            yield group
            group, size = [], 0
        group.append(prompt + answer)
        size += own
    if group:
        yield group
