"""A command's flags, made of the configuration that they fill: one name, bound, default and help for both."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import typer


def flags_of(kind: type[msgspec.Struct]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for every field of `kind`; it is called with those given, as `settings`.

    A field's `Meta` has its help as `description`, and the flag's name as `extra["flag"]` where that differs.
    """
    hints = get_type_hints(kind, include_extras=True)
    defaults = {field.name: field.default for field in msgspec.structs.fields(kind)}
    flags = [_flag(name, hints[name], default) for name, default in defaults.items()]

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: value for name in defaults if (value := values.pop(name)) not in (None, [])}
            command(settings=given, **values)

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "settings"]
        # Typer reads the flags from here.
        run.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
        return run

    return wrap


def _flag(name: str, hint: Any, default: Any) -> inspect.Parameter:
    metas = [meta for meta in getattr(hint, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
    help_text = next(meta.description for meta in metas if meta.description)
    own_name = next((meta.extra["flag"] for meta in metas if meta.extra), f"--{name.replace('_', '-')}")
    kind = get_args(hint)[0]
    if kind is bool:  # so that a recipe's true can be turned off
        own_name = f"{own_name}/--no-{own_name.removeprefix('--')}"
    if get_origin(kind) is tuple:  # a flag that can be given several times
        item = get_args(kind)[0]
        item = get_args(item)[0] if get_origin(item) is Annotated else item
        # Typer has no lists of choices; what is given is checked with the configuration.
        kind = list[str if get_origin(item) is Literal else item]  # type: ignore[misc]
        default = ", ".join(map(str, default))
    shown = False if default == "" or default is False else str(default)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, typer.Option(own_name, help=help_text, show_default=shown)],
    )
