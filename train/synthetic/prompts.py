"""What is asked of a passage: a query that it answers, or how well it answers one."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path

import msgspec

from qe_edge.errors import BadInput
from qe_edge.records import Document, Lang
from qe_edge.student.prompt import clean_text
from qe_edge.text import detect_language

MOST_CHARACTERS = 4000  # of a passage: what comes after it decides nothing, and would not fit everywhere


class PassageText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The words in one language. `user` holds {passage}, and if it likes {title}, {query} and {style}."""

    system: str
    user: str
    styles: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        if self.user.count("{passage}") != 1 or not self.styles:
            raise ValueError("the user text must hold {passage} exactly once, and there must be a style")


class PassagePrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """By language, English being taken for what is neither English nor Chinese."""

    id: str
    texts: dict[Lang, PassageText]

    def __post_init__(self) -> None:
        if "en" not in self.texts:
            raise ValueError("a text in English is needed")

    def messages(self, document: Document, *, query: str = "", style: int = 0) -> tuple[str, str]:
        """The system's and the user's message; styles come in turn."""
        text = self.texts.get(detect_language(query or document.text), self.texts["en"])
        values = {
            "passage": clean_text(document.text)[:MOST_CHARACTERS],
            "title": clean_text(document.title or ""),
            "query": query,
            "style": text.styles[style % len(text.styles)],
        }
        # All at once, so that a passage that holds `{query}` stays as it is.
        return text.system, re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), text.user)


def load_passage_prompt(name: str) -> PassagePrompt:
    """A TOML file, or one that ships, by its id.

    Raises:
        BadInput: there is none, or it doesn't fit.
    """
    shipped = resources.files("qe_edge.train.synthetic") / "prompts" / f"{name}.toml"
    try:
        text = shipped.read_text("utf-8") if shipped.is_file() else Path(name).read_text("utf-8-sig")
        return msgspec.convert(tomllib.loads(text), PassagePrompt)
    except OSError:
        raise BadInput("no such file, and no prompt of that name ships", path=name) from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise BadInput(f"not a valid prompt: {error}", path=name) from None
