"""The one prompt renderer, used by training, export and every backend.

A prompt is rendered to one string, but it is tokenized piece by piece: only the markup that we wrote
is parsed for special tokens; the user's text never is. No BOS is added and no engine's own chat
template is called, so training, transformers, llama.cpp and MLX see the same token ids.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import msgspec

from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.records import Lang
from qe_edge.text import detect_language

DEFAULT_PROMPT = "student-v2"
DEFAULT_TEACHER_PROMPT = "teacher-v1"
# Qwen3's template puts this block before every answer given without thinking. As part of the prompt,
# it costs the student no decode step.
EMPTY_THINK = "<think>\n\n</think>\n\n"
END = "<|im_end|>"

Tokenize = Callable[[str, bool], list[int]]
"""(text, parse special tokens) -> token ids, without BOS."""


class Piece(NamedTuple):
    text: str
    special: bool  # parse it for special tokens


class PromptText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The words of a prompt in one language; `user` holds `{query}` once."""

    system: str
    user: str

    def __post_init__(self) -> None:
        if self.user.count("{query}") != 1:
            raise ValueError("the user text must hold {query} exactly once")


class PromptSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides a student's prompt. It travels inside the exported model.

    `texts` has one entry per language the student serves, its first being the fallback.
    `answer_prefix` is what the answer starts with, given rather than generated.
    The chat format is ChatML, which Qwen3 and SmolLM2 share.
    """

    id: str
    texts: dict[Lang, PromptText]
    max_tokens: int = 128
    answer_prefix: str = ""
    end: str = END

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("a prompt needs a text in at least one language")
        if not 1 <= self.max_tokens <= 10**6:
            raise ValueError("max_tokens must be from 1 to 1000000")

    @property
    def languages(self) -> tuple[Lang, ...]:
        return tuple(self.texts)

    def language_of(self, query: str) -> Lang:
        """The language whose text is used: the query's own if served, else the first one."""
        language = detect_language(query)
        return language if language in self.texts else self.languages[0]

    def pieces(self, query: str) -> Iterator[Piece]:
        """The prompt of a clean query as pieces that are tokenized one by one; joined, they are the text."""
        return self.chat(*self.messages(query))

    def messages(self, query: str) -> tuple[str, str]:
        """The system's and the user's message of a clean query."""
        text = self.texts[self.language_of(query)]
        before, after = text.user.split("{query}")
        return text.system, f"{before}{query}{after}"

    def chat(self, system: str, user: str) -> Iterator[Piece]:
        """Any two messages in this prompt's chat format, as pieces: a local model can be a teacher too."""
        yield from self.opening(system, user)
        yield from self.closing()

    def opening(self, system: str, user: str) -> Iterator[Piece]:
        """The first message and what the second begins with."""
        yield Piece("<|im_start|>", True)
        yield from plain(f"system\n{system}")
        yield Piece("<|im_end|>", True)
        yield from plain("\n")
        yield Piece("<|im_start|>", True)
        yield from plain(f"user\n{user}")

    def closing(self, user: str = "") -> Iterator[Piece]:
        """What the second message ends with, and the answer's beginning."""
        yield from plain(user)
        yield Piece("<|im_end|>", True)
        yield from plain("\n")
        yield Piece("<|im_start|>", True)
        yield from plain("assistant\n")
        if self.answer_prefix:
            yield Piece(self.answer_prefix, True)

    def render(self, query: str) -> str:
        """The prompt as one string, for people to read."""
        return "".join(piece.text for piece in self.pieces(clean_query(query)))

    def encode(self, query: str, tokenize: Tokenize) -> list[int]:
        """The prompt's token ids, without BOS."""
        return self.encode_clean(clean_query(query), tokenize)

    def encode_clean(self, query: str, tokenize: Tokenize) -> list[int]:
        """As `encode`, of what `clean_query` returned."""
        return encode(self.pieces(query), tokenize)

    def encode_answer(self, text: str, tokenize: Tokenize) -> list[int]:
        """What the student is trained to write: the expansion's ids and one end token."""
        return encode(plain(text.strip()), tokenize) + tokenize(self.end, True)


def encode(pieces: Iterable[Piece], tokenize: Tokenize) -> list[int]:
    """The token ids of pieces, each tokenized by itself."""
    return [token for piece in pieces for token in tokenize(piece.text, piece.special)]


def hugging_face(tokenizer: Any) -> Tokenize:
    """A Hugging Face tokenizer as `PromptSpec.encode` wants it; for several threads, use one of these."""
    lock = Lock()  # it keeps `split_special_tokens` in itself while it encodes

    def tokenize(text: str, special: bool) -> list[int]:
        with lock:
            return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)

    return tokenize


def plain(text: str) -> Iterator[Piece]:
    """Cut text after each `<`, so that no tokenizer can see a whole special token in it.

    llama.cpp and transformers both parse some added tokens (`</think>`) even when told to parse none;
    all those of the supported vocabularies start with `<` and are longer than it.
    """
    for part in re.split(r"(?<=<)", text):
        if part:
            yield Piece(part, False)


def clean_text(text: str) -> str:
    """A text on one line, without surrounding blanks or control characters, in Unicode form NFC.

    Qwen's tokenizer normalizes to NFC, llama.cpp's copy of it doesn't; with NFC given, both agree.
    """
    cleaned = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return unicodedata.normalize("NFC", cleaned)


def clean_query(query: str) -> str:
    """The query as a clean text.

    Raises:
        BadInput: nothing is left of it.
    """
    cleaned = clean_text(query)
    if not cleaned:
        raise BadInput("the query is empty; give at least one word")
    return cleaned


class TeacherText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A teacher's instructions in one language.

    `exemplar` is repeated for every example and takes its place in `few_shot` as `{exemplars}`.
    """

    system: str
    zero_shot: str
    few_shot: str
    exemplar: str

    def __post_init__(self) -> None:
        for name, wanted in (
            ("zero_shot", ("{query}",)),
            ("few_shot", ("{query}", "{exemplars}")),
            ("exemplar", ("{query}", "{passage}")),
        ):
            if any(getattr(self, name).count(field) != 1 for field in wanted):
                raise ValueError(f"{name} must hold {' and '.join(wanted)} exactly once")


class Exemplar(NamedTuple):
    """A query and a passage that answers it, shown to the teacher."""

    query: str
    passage: str


class TeacherPrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a teacher is asked, by language; the messages go through the endpoint's own chat template."""

    id: str
    texts: dict[Lang, TeacherText]

    def messages(self, query: str, exemplars: Sequence[Exemplar] = ()) -> tuple[str, str]:
        """The system and the user message: few-shot with exemplars, zero-shot without.

        Raises:
            BadInput: the query is blank, or Chinese or English and the prompt has no text for that.
        """
        lang = detect_language(query)
        if lang not in self.texts and lang != "other":
            raise BadInput(f"the prompt {self.id} has no text in the language {lang!r} of {query!r}")
        text = self.texts.get(lang) or next(iter(self.texts.values()))
        shown = "".join(_fill(text.exemplar, query=e.query, passage=e.passage) for e in exemplars)
        template = text.few_shot if exemplars else text.zero_shot
        return text.system, _fill(template, query=clean_query(query), exemplars=shown)


def _fill(template: str, **values: str) -> str:
    """Put values in their places at once, so that a value holding `{query}` stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def load_prompt(name: str = DEFAULT_PROMPT) -> PromptSpec:
    """A student's prompt that ships with the package, by its id."""
    return msgspec.convert(tomllib.loads(_shipped(name, "student")), PromptSpec)


def load_teacher_prompt(name: str | Path = DEFAULT_TEACHER_PROMPT) -> TeacherPrompt:
    """A teacher's prompt: a TOML file, or by its id one that ships with the package.

    Raises:
        NotFound, BadInput: there is none, or it doesn't fit.
    """
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else _shipped(str(name), "teacher")
        return msgspec.convert(tomllib.loads(text), TeacherPrompt)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise BadInput(f"not a valid teacher prompt: {error}", path=path) from None


def _shipped(name: str, kind: str) -> str:
    folder = resources.files("qe_edge.student") / "prompts"
    names = sorted(f.name.removesuffix(".toml") for f in folder.iterdir())
    known = [n for n in names if n.startswith(kind)]
    if name not in known:
        raise NotFound(f"no {kind} prompt named {name!r}; there are: {', '.join(known)}")
    return (folder / f"{name}.toml").read_text(encoding="utf-8")


def prompt_for(chat_template: str | None, *, languages: tuple[Lang, ...] = ("en", "zh")) -> PromptSpec:
    """The default prompt, fitted to a model by its chat template.

    Raises:
        BadArgument: the model doesn't speak ChatML, or can't but think.
    """
    if not chat_template or "<|im_start|>" not in chat_template:
        raise BadArgument(
            "this model's chat format isn't ChatML (<|im_start|>…<|im_end|>); "
            "Qwen3, Qwen2.5 and SmolLM2 models are supported"
        )
    # An empty block stands in what is given, as in our own templates.
    empty = re.search(r"assistant(\\n|\n)<think>(\\n|\n){2}</think>", chat_template)
    if not empty and re.search(r"assistant(\\n|\n)<think>", chat_template):  # with no way to turn it off
        raise BadArgument(
            "this model thinks before every answer, which its chat template can't turn off; take one that "
            "needn't, such as Qwen/Qwen3-4B or Qwen/Qwen3-4B-Instruct-2507"
        )
    base = load_prompt()
    return msgspec.structs.replace(
        base,
        texts={lang: base.texts[lang] for lang in languages},
        answer_prefix=EMPTY_THINK if empty or "enable_thinking" in chat_template else "",
    )
