"""A command's flags, made of the settings that they fill: one name, bound, default and help for both.

A field's `Meta` has its help as `description`. A flag is named as the field is in a recipe. In `extra` stand
another name as `flag` (empty: the field has none), a `short` one, as `env` an environment variable that sets
it too, and `rare` where --help-all alone shows it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import typer
from msgspec import Meta

from qe_edge.commands.common import emit, finite
from qe_edge.errors import BadArgument, BadInput
from qe_edge.records import configured
from qe_edge.redact import redact

S = TypeVar("S", bound=msgspec.Struct)
RecipeOption = Annotated[
    str | None,
    typer.Option(help="Take this recipe's settings (a file, or one that ships); flags override them."),
]
DataOption = Annotated[Path | None, typer.Option(help="What {data} stands for in the recipe's paths.")]


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        print(context.get_help())
        raise typer.Exit


AllOption = Annotated[
    bool,
    typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show rarely used options too."),
]
PrintOption = Annotated[
    bool, typer.Option("--print-config", help="Print the settings that don't depend on a model, and stop.")
]


class Settings(Generic[S]):
    """What a command was given: by its flags, or else by a section of a recipe. `values` have their names."""

    def __init__(self, kind: type[S], section: str, values: dict[str, Any], *, recipe: str | None = None):
        self._kind, self._section, self._recipe = kind, section, recipe
        self.values = values
        self.shown, self.json = False, False

    def config(self) -> S:
        """The checked settings. With --print-config, it ends here.

        Raises:
            BadArgument: a value is out of its bounds, or missing.
        """
        place = f"in [{self._section}] of {self._recipe}, or as a flag" if self._recipe else ""
        config = configured(self._kind, self.values, place)
        if self.shown:
            content = {self._section: redact(msgspec.to_builtins(config))}
            verb = f"train {self._section}" if self._section in ("sft", "dpo") else self._section
            text = msgspec.toml.encode(_without_none(content)).decode().rstrip()
            if unset := [name for name, value in content[self._section].items() if value is None]:
                text += f"\n# not set: {', '.join(unset)}"
            emit(self.json, verb, text, metrics={"config": content})
            raise typer.Exit
        return config


def flags_of(kind: type[S], section: str, *, recipe: bool = False) -> Callable[..., Callable[..., None]]:
    """Give a command a flag for every field of `kind`, and --print-config; it is called with `settings`.

    Without a `section` they are no recipe's, and there is no --print-config. With `recipe` come --recipe and
    --data too, whose section of that name may hold further keys.
    """
    hints = get_type_hints(kind, include_extras=True)
    hints = {field.encode_name: hints[field.name] for field in msgspec.structs.fields(kind)}
    defaults = {field.encode_name: field.default for field in msgspec.structs.fields(kind)}
    found = {name: _flag(name, hints[name], defaults[name], negated=bool(section)) for name in defaults}
    flags = {name: flag for name, flag in found.items() if flag}
    common: dict[str, Any] = {"recipe": RecipeOption, "data": DataOption} if recipe else {}
    others = [_keyword(name, annotation, None) for name, annotation in common.items()]
    if section:
        others.append(_keyword("print_config", PrintOption, False))
    if any("rare" in (meta.extra or {}) for hint in hints.values() for meta in _unwrapped(hint)[1]):
        others.append(_keyword("help_all", AllOption, False))

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: value for name in flags if (value := values.pop(name)) not in (None, [])}
            given = {name: parsed(name, hints[name], value) for name, value in given.items()}
            shown = values.pop("print_config", False)
            values.pop("help_all", None)
            file, data = (values.pop("recipe"), values.pop("data")) if recipe else (None, None)
            written = _read(file, section, data)
            settings = Settings(kind, section, written | given, recipe=file)
            settings.shown, settings.json = shown, values.get("json", False)
            command(settings=settings, **values)

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "settings"]
        # Typer reads the flags from here.
        run.__signature__ = signature.replace(parameters=[*own, *flags.values(), *others])  # type: ignore[attr-defined]
        return run

    return wrap


def _read(recipe: str | None, section: str, data: Path | None) -> dict[str, Any]:
    """A section of a recipe as it is written; empty without a recipe.

    Raises:
        BadInput: the recipe has no such section.
    """
    from qe_edge.recipe import read_recipe

    if not recipe:
        return {}
    content = read_recipe(recipe, data=data)
    if section not in content:
        raise BadInput(f"has no [{section}] section", path=recipe)
    return content[section]


def _flag(name: str, hint: Any, default: Any, *, negated: bool) -> inspect.Parameter | None:
    kind, metas = _unwrapped(hint)
    extra = _extra(metas)
    own_name = _own_name(name, extra)
    if not own_name:
        return None
    settings: dict[str, Any] = {"help": next(meta.description for meta in metas if meta.description)}
    # So that a recipe's true can be turned off.
    if negated and kind is bool and not own_name.startswith("--no-"):
        own_name = f"{own_name}/--no-{own_name.removeprefix('--')}"
    if get_origin(kind) is tuple:  # a flag that can be given several times
        item, _ = _unwrapped(get_args(kind)[0])
        # Typer has no lists of choices; what is given is checked with the configuration.
        kind = list[str if get_origin(item) is Literal else item]  # type: ignore[misc]
        default = ", ".join(map(str, default)) if default is not msgspec.NODEFAULT else ""
    elif get_origin(kind) is dict:
        kind, default = str, ""
    elif kind in (int, float):
        settings |= {"min": _bound(metas, "ge"), "max": _bound(metas, "le")}
        if kind is float:
            settings["callback"] = finite
    shown = default not in ("", None, False, msgspec.NODEFAULT)
    if shown:
        settings["help"] += f" [{default}]"
    names = [own_name, extra["short"]] if "short" in extra else [own_name]
    option = typer.Option(
        *names, envvar=extra.get("env"), show_default=False, hidden="rare" in extra, **settings
    )
    return _keyword(name, Annotated[kind | None, option], None)


def _extra(metas: list[Meta]) -> dict[str, Any]:
    return {key: value for meta in metas for key, value in (meta.extra or {}).items()}


def _own_name(name: str, extra: dict[str, Any]) -> str:
    return str(extra.get("flag", f"--{name.replace('_', '-')}"))


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _unwrapped(hint: Any) -> tuple[Any, list[Meta]]:
    """A field's type without `| None` and `Annotated`, and all that is said of it, the outermost first."""
    metas: list[Meta] = []
    while True:
        if get_origin(hint) is Annotated:
            hint, *found = get_args(hint)
            metas += [meta for meta in found if isinstance(meta, Meta)]
        elif get_origin(hint) in (Union, UnionType):
            (hint,) = (part for part in get_args(hint) if part is not type(None))
        else:
            return hint, metas


def _bound(metas: list[Meta], which: str) -> Any:
    return next((value for meta in metas if (value := getattr(meta, which)) is not None), None)


def parsed(name: str, hint: Any, value: Any) -> Any:
    """A flag's value as the field wants it: a list's parts may be separated by commas, a dict is JSON."""
    kind, metas = _unwrapped(hint)
    flag = _own_name(name, _extra(metas))
    if get_origin(kind) is tuple and get_origin(choices := _unwrapped(get_args(kind)[0])[0]) is Literal:
        known = {choice.lower(): choice for choice in get_args(choices)}
        parts = [part.strip() for one in value for part in one.split(",")]
        parts = [known.get(part.lower(), part) for part in parts]
        if unknown := [part for part in parts if part not in get_args(choices)]:
            raise BadArgument(
                f"{flag}: unknown {', '.join(unknown)}; choose from: {', '.join(get_args(choices))}"
            )
        return parts
    if get_origin(kind) is dict:
        try:
            return msgspec.json.decode(value, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise BadArgument(f"{flag} must be a JSON object: {error}") from None
    return value


def _without_none(value: Any) -> Any:
    """TOML knows no null: what has no value is left out."""
    if isinstance(value, dict):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return value
