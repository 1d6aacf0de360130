"""The JSON Lines files that pass between stages: one schema per kind, checked on reading.

Unknown, missing and mistyped keys are errors that name the file and the line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from qe_edge.arguments import MOST_THREADS
from qe_edge.errors import BadArgument, BadInput
from qe_edge.lines import raw_lines

Lang = Literal["en", "zh", "other"]
"""English, Chinese, or what is mostly written in neither Latin nor Han letters."""
Mode = Literal["zero-shot", "few-shot", "student"]


Problem = Literal[
    "empty", "refused", "wrong language", "cut", "copy of the query", "think block", "unreadable"
]
"""What is wrong with a teacher's answer; an unreadable one came, but holds no text where one belongs."""


class Expansion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One candidate expansion of one query. The optional keys are known only where we generated it.

    `key` stands for everything that decided the candidate, so that it is never asked for twice. A row with
    a `problem` is not for training; its text is there only if it was to be kept.
    """

    dataset: str
    query_id: str
    query: str
    lang: Lang
    model: str
    mode: Mode
    text: str
    prompt_id: str | None = None
    seed: int | None = None
    temperature: float | None = None
    finish_reason: Literal["stop", "length", "fallback"] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    sample: int | None = None
    key: str | None = None
    problem: Problem | None = None


class Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two candidates of one query, ordered by retrieval's reward; nDCG@10 values lie in 0..1."""

    dataset: str
    query_id: str
    query: str
    lang: Lang
    chosen: str
    rejected: str
    chosen_ndcg: float
    rejected_ndcg: float
    chosen_reward: float
    rejected_reward: float
    chosen_model: str
    chosen_mode: Mode
    rejected_model: str
    rejected_mode: Mode


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A scored candidate, whether or not a pair came of it; the plain query is one of them."""

    dataset: str
    query_id: str
    model: str
    mode: Mode | Literal["plain"]
    ndcg: float
    plain_ndcg: float
    reward: float
    text: str


class Document(msgspec.Struct, frozen=True):
    """A line of a BEIR corpus.jsonl; other keys (such as `metadata`) are allowed and ignored."""

    id: str = msgspec.field(name="_id")
    text: str
    title: str | None = None


class Query(msgspec.Struct, frozen=True):
    """A line of a BEIR queries.jsonl; other keys are allowed and ignored."""

    id: str = msgspec.field(name="_id")
    text: str


# Bounds of settings, which hold wherever a configuration is read: from flags or from a recipe.
Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e9)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10**6)]
Threads = Annotated[int, msgspec.Meta(ge=1, le=MOST_THREADS)]
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]  # which every random generator takes
Amount = Annotated[float, msgspec.Meta(ge=0, lt=1e15)]  # of money, or a price


def said(
    text: str,
    *,
    flag: str | None = None,
    short: str | None = None,
    env: str | None = None,
    rare: bool = False,
    **bounds: Any,
) -> msgspec.Meta:
    """A setting's help; its flag's name where it isn't the field's (empty: it has none), a short one, the
    environment variable that sets it too, and whether it is `rare`, shown by --help-all alone."""
    extra: dict[str, Any] = {"flag": flag, "short": short, "env": env, "rare": rare or None}
    given = {name: value for name, value in extra.items() if value is not None}
    return msgspec.Meta(description=text, extra=given or None, **bounds)


# What several settings say of one thing.
ANALYZER = "english, cjk or jieba (default: the collection's language decides)."
RETRIEVER = "An OpenSearch or Elasticsearch index instead of our own: http://HOST:PORT/INDEX?fields=…"

R = TypeVar("R", bound=msgspec.Struct)
_WRITTEN_BY = {"expansion": "qe-edge teach", "pair": "qe-edge pairs"}
_TAKEN_BY: dict[type[msgspec.Struct], str] = {
    Expansion: "`qe-edge train sft --expansions`",
    Pair: "`qe-edge train dpo --pairs`",
}


def read_jsonl(path: Path | str, kind: type[R]) -> Iterator[R]:
    """Yield the rows of a JSON Lines file; blank lines are skipped.

    Raises:
        NotFound: there is no such file.
        BadInput: a line is not JSON, not UTF-8, or does not fit `kind`.
    """
    for _, row in numbered_jsonl(path, kind):
        yield row


def numbered_jsonl(path: Path | str, kind: type[R]) -> Iterator[tuple[int, R]]:
    """As `read_jsonl`, each row with the number of its line."""
    decoder, name = msgspec.json.Decoder(kind), kind.__name__.lower()
    ours = f" (as `{_WRITTEN_BY[name]}` writes them)" if name in _WRITTEN_BY else ""
    if Path(path).is_dir():
        fit = ", ".join(file.name for file in sorted(Path(path).glob("*.jsonl")) if _begins_with(kind, file))
        found = f"name one in it: {fit}" if fit else f"none in it holds {name}s{ours}"
        raise BadInput(f"is a folder, expected a file; {found}", path=path)
    for number, line in raw_lines(path):
        if not line.strip():
            continue
        try:
            yield number, decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            what = re.sub(r"^Expected `object`, got `\w+`$", "no JSON object", str(error))
            others = (f"it is for {taker}" for other, taker in _TAKEN_BY.items() if _fits(other, line))
            what = next(others, lowered(what))
            raise BadInput(f"not a valid {name}{ours}: {what}", path=path, line=number) from None


def _fits(kind: type[msgspec.Struct], line: bytes) -> bool:
    """Whether a line is a row of this kind."""
    try:
        return msgspec.json.decode(line, type=kind) is not None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _begins_with(kind: type[msgspec.Struct], file: Path) -> bool:
    """Whether a file's first row is of this kind."""
    try:
        return next(numbered_jsonl(file, kind), None) is not None
    except BadInput:
        return False


def lowered(message: str) -> str:
    """A library's sentence within one of ours: "JSON is malformed" keeps its letters."""
    return message if message[:2].isupper() else message[:1].lower() + message[1:]


def configured(kind: type[R], values: dict[str, Any], place: str = "") -> R:
    """A configuration from values that are not checked yet; `place` tells where they stand, if not in flags.

    Raises:
        BadArgument: a value is out of its bounds.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        where, what = misfit(error, lambda _: kind)
        if place:
            raise BadArgument(f"{f'`{where}`: ' if where else ''}{what} ({place})") from None
        flag = where.partition("[")[0].replace("_", "-")
        raise BadArgument(f"--{flag}: {what}" if flag else what.replace("_", "-")) from None


# What msgspec calls the types of JSON and TOML.
_TYPES = {
    "array": "a list",
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}
_TYPES |= {"object": "a table", "null": "nothing"}


def misfit(error: msgspec.ValidationError, struct_at: Callable[[str], type | None]) -> tuple[str, str]:
    """Where a configuration doesn't fit, such as `sft.rank`, and why, in words that are not msgspec's.

    `struct_at` gives the struct at a place, whose fields are told where one is unknown.
    """
    what, _, where = lowered(str(error)).partition(" - at `")
    where = where.rstrip("`").removeprefix("$").removeprefix(".")
    if unknown := re.fullmatch(r"object contains unknown field `(.+)`", what):
        return where, no_setting(unknown[1], struct_at(where))
    if missing := re.fullmatch(r"object missing required field `(.+)`", what):
        return where, f"lacks `{missing[1]}`"
    if what.startswith("invalid enum value"):
        section, _, name = where.rpartition(".")
        known = ", ".join(_choices(struct_at(section), name))
        return where, f"{what.replace('enum value', 'choice')}; choose from: {known}"
    return where, re.sub(r"`(\w+)`", lambda found: _TYPES.get(found[1], found[0]), what)


def no_setting(name: str, kind: type | None, what: str = "setting") -> str:
    """That a struct has no such setting, and which one may be meant."""
    names = kind.__struct_encode_fields__ if kind else ()  # type: ignore[attr-defined]
    near = difflib.get_close_matches(name, names, 1)
    known = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(names)}"
    return f"there is no {what} `{name}`; {known}"


def _choices(kind: type | None, name: str) -> list[str]:
    """What a field of literals takes, or each of its items."""
    hints = get_type_hints(kind) if kind else {}
    fields = msgspec.structs.fields(kind) if kind else ()
    hint = next((hints[field.name] for field in fields if field.encode_name == name.partition("[")[0]), None)
    parts = [hint]
    while parts:
        part = parts.pop()
        if get_origin(part) is Literal:
            return list(get_args(part))
        parts += get_args(part)
    return []


def encode_jsonl(rows: Iterable[msgspec.Struct]) -> bytes:
    """The rows as UTF-8 JSON Lines."""
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
