"""Flags, recipes and --print-config come from one struct a verb."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from typer.testing import CliRunner

from qe_edge.bench.config import BenchConfig
from qe_edge.cli import app
from qe_edge.commands.flags import flags_of
from qe_edge.export.config import ExportConfig
from qe_edge.records import said
from qe_edge.serve.config import ServeConfig, StudentConfig
from qe_edge.train.config import DpoConfig, PairsConfig, SftConfig
from qe_edge.train.teach.config import TeachConfig

VERBS: dict[str, tuple[list[str], type[msgspec.Struct], dict[str, Any]]] = {
    "teach": (["-m", "big"], TeachConfig, {"model": "big"}),
    "pairs": ([], PairsConfig, {}),
    "train sft": ([], SftConfig, {}),
    "train dpo": ([], DpoConfig, {}),
    "export": ([], ExportConfig, {}),
    "bench": (["-d", "demo-zh", "--teacher", "x"], BenchConfig, {"dataset": ["demo-zh"], "teacher": ["x"]}),
    "serve": ([], ServeConfig, {}),
    "mcp": ([], StudentConfig, {}),
}


def printed(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--print-config"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return tomllib.loads(result.stdout)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_prints_the_settings_that_it_would_use(verb: str) -> None:
    arguments, kind, needed = VERBS[verb]
    (section,) = printed(*verb.split(), *arguments).values()
    assert msgspec.convert(section, kind) == msgspec.convert(needed, kind)


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_has_its_help_and_a_flag_or_none_by_intent(verb: str) -> None:
    _, kind, _ = VERBS[verb]
    shown = "--help-all" if verb.startswith("train") else "--help"
    listed = CliRunner().invoke(app, [*verb.split(), shown], env={"COLUMNS": "300"}).stdout
    hidden = {"verify", "tune_joins"}  # for those who call the verb itself
    for field in kind.__struct_encode_fields__:  # as it is named in a recipe
        flag = "--" + field.replace("_", "-")
        assert (flag in listed) != (field in hidden), flag


def test_flags_go_before_a_recipe_and_a_recipe_before_defaults() -> None:
    section = printed("pairs", "--recipe", "demo", "--min-gap", "0.2")["pairs"]
    assert (section["max_per_query"], section["min_gap"], section["strategy"]) == (1, 0.2, "all-above-gap")
    section = printed("bench", "--recipe", "demo", "-d", "demo-zh")["bench"]
    assert (section["dataset"], section["refine"]) == (["demo-zh"], True)


def test_what_is_not_set_is_named_too() -> None:
    last = CliRunner().invoke(app, ["serve", "--cache", "x", "--print-config"]).stdout.splitlines()[-1]
    assert last == "# not set: passages, reader, budget_tokens, threads"


def test_a_secret_is_not_printed() -> None:
    assert printed("serve", "--token", "geheim")["serve"]["token"] == "***"


class Some(msgspec.Struct, kw_only=True):
    """Of each kind that a field can have."""

    many: Annotated[tuple[str, ...], said("Several.")] = ()
    on: Annotated[bool, said("Switched.")] = True
    no_off: Annotated[bool, said("Switched off.")] = False
    perhaps: Annotated[Annotated[float, msgspec.Meta(ge=0, le=1)] | None, said("A share.")] = None
    fields: Annotated[dict[str, Any], said("As JSON.")] = {}
    hidden: Annotated[int, said("Not for the command line.", flag="")] = 3


@pytest.fixture
def call() -> Callable[..., dict[str, Any]]:
    import typer

    own, found = typer.Typer(), []

    @own.command()
    @flags_of(Some, "some")
    def command(*, settings: Any) -> None:
        """Do something."""
        found.append(msgspec.structs.asdict(settings.config()))

    def run(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(own, list(arguments))
        return found[-1] if result.exit_code == 0 else {"exit": result.exit_code, "said": result.output}

    return run


def test_each_kind_of_field_has_its_flag(call: Callable[..., dict[str, Any]]) -> None:
    default = {"many": (), "on": True, "no_off": False, "perhaps": None, "fields": {}, "hidden": 3}
    assert call() == default
    assert call("--many", "a,b", "--many", "c") == default | {"many": ("a,b", "c")}
    assert call("--no-on", "--no-off") == default | {"on": False, "no_off": True}
    assert call("--perhaps", "0.5") == default | {"perhaps": 0.5}
    assert call("--fields", '{"a": [1, null]}') == default | {"fields": {"a": [1, None]}}
    for wrong in (["--perhaps", "2"], ["--perhaps", "nan"], ["--hidden", "1"], ["--no-no-off"]):
        assert call(*wrong)["exit"] == 2, wrong


def test_what_a_recipe_names_wrongly_is_told_with_the_file_and_what_there_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    for written, message in (
        ('modes = ["few-shot"]', "there is no setting `modes`; did you mean `mode`?"),
        ("zzz = 1", "there is no setting `zzz`; there are: learning_rate, epochs,"),
        ('mode = "few-shot"', "`mode`: expected a list, got a text"),
        ("max-steps = 2", "there is no setting `max-steps`; did you mean `max_steps`?"),
        ('device = "gpu"', "`device`: invalid choice 'gpu'; choose from: auto, cuda, cpu"),
        ('task = ["wrte"]', "`task[0]`: invalid choice 'wrte'; choose from: write, read"),
        ("epochs = -1", "`epochs`: expected a number > 0.0"),
    ):
        file.write_text(f"[sft]\n{written}\n", encoding="utf-8")
        result = CliRunner().invoke(app, ["train", "sft", "--recipe", str(file), "--print-config"])
        assert message in str(result.exception), result.exception
        assert str(result.exception).endswith(f"(in [sft] of {file}, or as a flag)")


def test_a_section_that_no_recipe_has_is_told_whatever_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[sft]\nrank = 4\n[sfr]\nrank = 8\n", encoding="utf-8")
    for command in (["train", "sft", "--recipe", str(file), "--print-config"], ["run", str(file)]):
        result = CliRunner().invoke(app, command)
        assert str(result.exception) == (
            f"{file}: not a valid recipe: there is no section `sfr`; did you mean `sft`?"
        )


def test_what_a_recipe_lacks_is_told_with_the_flag_that_gives_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('title = "mine"\n[sft]\nexpansions = ["a.jsonl"]\n[bench]\n', encoding="utf-8")
    result = CliRunner().invoke(app, ["run", str(file)])
    assert str(result.exception).startswith(
        f"{file}: not complete: [bench] lacks `dataset`; name your data with --dataset"
    )


def test_printed_settings_are_one_object_with_json() -> None:
    result = CliRunner().invoke(app, ["pairs", "--min-gap", "0.2", "--print-config", "--json"])
    found = json.loads(result.stdout)
    assert (found["command"], found["metrics"]["config"]["pairs"]["min_gap"]) == ("pairs", 0.2)
    result = CliRunner().invoke(app, ["run", "demo", "--show", "--json"])
    assert "[sft]" in json.loads(result.stdout)["metrics"]["recipe"]
