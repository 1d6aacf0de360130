"""Print docs/python-api.md: the public names of qe_edge with their signatures and docstrings.

python docs/site/api.py > docs/python-api.md
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any, ForwardRef

import qe_edge

ABOUT = """\
# Python API

What `from qe_edge import …` gives. This page is made of the docstrings (`make docs`); a test compares.
"""


def page() -> str:
    """The whole page."""
    entries = (line for name in sorted(qe_edge.__all__) for line in entry(name))
    return "\n".join([ABOUT, *entries]).rstrip() + "\n"


def entry(name: str) -> Iterator[str]:
    thing = getattr(qe_edge, name)
    yield f"## {name}\n"
    if isinstance(thing, ModuleType):
        yield text_of(thing)
        for part, function in inspect.getmembers(thing, inspect.isfunction):
            if function.__module__ == thing.__name__ and not part.startswith("_"):
                yield from described(f"{name}.{part}", function)
    elif inspect.isclass(thing):
        yield from described(name, thing, heading=False)
        for part, member in vars(thing).items():
            if not part.startswith("_") and (what := unwrapped(member)):
                yield from described(f"{name}.{part}", what, prop=isinstance(member, property))
    elif callable(thing):
        yield from described(name, thing, heading=False)
    else:
        yield f"`{thing!r}`\n"


def unwrapped(member: Any) -> Any:
    """A method, or a property's; None for what is neither."""
    if isinstance(member, property):
        return member.fget
    if isinstance(member, classmethod | staticmethod):
        return member.__func__
    return member if inspect.isfunction(member) else None


def described(name: str, thing: Any, *, heading: bool = True, prop: bool = False) -> Iterator[str]:
    if heading:
        yield f"### {name}\n"
    if not prop and not (inspect.isclass(thing) and issubclass(thing, Exception)):
        yield f"```python\n{name}{signature_of(thing)}\n```\n"
    yield text_of(thing)


class Plain(str):
    """An annotation as one would write it."""

    @classmethod
    def of(cls, annotation: Any) -> Plain:
        if isinstance(annotation, str):
            return cls(annotation)
        if isinstance(annotation, ForwardRef):
            return cls(annotation.__forward_arg__)
        text = re.sub(r"(?:typing\.)?Annotated\[(\w+), .*?\)\]", r"\1", inspect.formatannotation(annotation))
        return cls(re.sub(r"(?:typing\.)?Optional\[(.*)\]", r"\1 | None", text))

    def __repr__(self) -> str:
        return str(self)


def signature_of(thing: Any) -> str:
    signature = inspect.signature(thing)
    kept = [
        p.replace(annotation=p.annotation if p.annotation is p.empty else Plain.of(p.annotation))
        for p in signature.parameters.values()
        if p.name not in ("self", "cls")
    ]
    result = signature.return_annotation
    plain = signature.replace(
        parameters=kept, return_annotation=result if result in (None, signature.empty) else Plain.of(result)
    )
    return str(plain)


def text_of(thing: Any) -> str:
    """The docstring; its sections as lists."""
    lines = []
    for line in (inspect.getdoc(thing) or "").split("\n"):
        section = line in ("Args:", "Raises:", "Returns:", "Yields:")
        indented = line.startswith("    ") and not line.startswith("     ")
        lines.append(f"**{line}**\n" if section else f"- {line.strip()}" if indented else line)
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
