"""`pairs`, `train sft`, `train dpo` and `merge`: from expansions to a merged student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from qe_edge.commands.common import (
    WORKDIR,
    AcceptOption,
    AnalyzerOption,
    JsonOption,
    OutOption,
    RetrieverOption,
    WorkdirOption,
    emit,
    took,
)
from qe_edge.commands.settings import flags_of
from qe_edge.console import is_main_process
from qe_edge.errors import BadArgument, BadInput
from qe_edge.records import configured
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.work.folder import Workdir

ShowOption = Annotated[
    bool, typer.Option("--show-example", help="Print the first row as it would be trained on, and stop.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option(help="Take this recipe's settings (a file, or one that ships); flags override them."),
]
DataOption = Annotated[Path | None, typer.Option(help="What {data} stands for in the recipe's paths.")]
PrintOption = Annotated[
    bool, typer.Option("--print-config", help="Print the settings as they would be used, and stop.")
]
train_app = typer.Typer(help="Train a student: SFT, then DPO.", no_args_is_help=True)


def pairs(
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Judged queries, as NAME or NAME@SPLIT.")],
    expansions: Annotated[
        list[Path] | None,
        typer.Option("--expansions", "-e", help="Candidates (JSON Lines; default: what `teach` collected)."),
    ] = None,
    join: Annotated[
        str, typer.Option(help="How query and expansion are joined: mass:R, repeat:N or adaptive:B.")
    ] = "mass:0.7",
    reward: Annotated[
        str, typer.Option(help="A measure of ir_measures, or a mix: 0.7*nDCG@10 + 0.3*R@100.")
    ] = "nDCG@10",
    length_penalty: Annotated[float, typer.Option(help="Taken off the reward per hundred words.")] = 0.0,
    strategy: Annotated[
        str, typer.Option(help="all-above-gap, best-worst or best-vs-sampled.")
    ] = "all-above-gap",
    min_gap: Annotated[
        float, typer.Option(help="Difference of rewards from which two candidates make a pair.")
    ] = 0.05,
    max_per_query: Annotated[int, typer.Option(help="Pairs kept of each query.")] = 4,
    seed: Annotated[int, typer.Option(help="Of what best-vs-sampled draws.")] = 0,
    accept: AcceptOption = None,
    analyzer: AnalyzerOption = "",
    retriever: RetrieverOption = "",
    executor: Annotated[str, typer.Option(help="local, or ray for a Ray cluster.")] = "local",
    workers: Annotated[int, typer.Option(min=0, max=512, help="Processes; 0 is one per core.")] = 0,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Score candidate expansions by retrieval and build preference pairs."""
    import msgspec

    from qe_edge.retrieval.datasets import load_dataset
    from qe_edge.train.pair_report import describe
    from qe_edge.train.pairs import REPORT, PairsConfig
    from qe_edge.train.pairs import pairs as verb
    from qe_edge.train.scoring import Executor
    from qe_edge.work.files import read_json

    config = configured(
        PairsConfig,
        join=join,
        reward=reward,
        length_penalty=length_penalty,
        strategy=strategy,
        min_gap=min_gap,
        max_per_query=max_per_query,
        seed=seed,
        accept=tuple(accept or ()),
        analyzer=analyzer,
        retriever=retriever,
    )
    try:
        where: Executor = msgspec.convert(executor, Executor)
    except msgspec.ValidationError:
        raise BadArgument(f"no executor {executor!r}; there are: {', '.join(get_args(Executor))}") from None
    work = Workdir(workdir)
    if not expansions:
        expansions = [work.taught(str(load_dataset(dataset)))]
        took("expansions", expansions[0])
    folder = verb(dataset, expansions, config, out=out, workdir=work, executor=where, workers=workers)
    report = read_json(folder / REPORT)
    text = (
        f"{report['pairs']} pairs of {report['queries_with_pairs']} queries in {folder}\n{describe(report)}"
    )
    emit(json, "pairs", text, inputs={"dataset": dataset}, artifacts={"folder": folder}, metrics=report)


@train_app.command("sft")
@flags_of(SftConfig)
def train_sft(
    expansions: Annotated[
        list[Path] | None,
        typer.Option("--expansions", "-e", help="Teacher expansions (JSON Lines; default: the newest)."),
    ] = None,
    recipe: RecipeOption = None,
    data: DataOption = None,
    print_config: PrintOption = False,
    show_example: ShowOption = False,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Fine-tune a student on teacher expansions. Run again after Ctrl-C, it goes on."""
    from qe_edge.train.sft import example, sft

    section = recipe_section(recipe, "sft", data)
    named = section.pop("expansions", [])
    config = configured(SftConfig, **(section | settings))
    if print_config:
        print_toml("sft", config)
        return
    work = Workdir(workdir)
    expansions = expansions or [Path(name) for name in named]
    if not expansions:
        expansions = [work.newest_taught()]
        took("expansions", expansions[0])
    if show_example:
        print(example(expansions, config, workdir=work), end="")
        return
    end_training(json, "train sft", sft(expansions, config, out=out, workdir=work))


@train_app.command("dpo")
@flags_of(DpoConfig)
def train_dpo(
    pairs: Annotated[Path | None, typer.Option(help="A pairs.jsonl (default: the newest).")] = None,
    adapter: Annotated[Path | None, typer.Option(help="An SFT folder (default: the newest).")] = None,
    recipe: RecipeOption = None,
    data: DataOption = None,
    print_config: PrintOption = False,
    show_example: ShowOption = False,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Align the SFT student with retrieval's own preferences. Run again after Ctrl-C, it goes on."""
    from qe_edge.train.dpo import dpo, example
    from qe_edge.train.pairs import PAIRS

    config = configured(DpoConfig, **(recipe_section(recipe, "dpo", data) | settings))
    if print_config:
        print_toml("dpo", config)
        return
    work = Workdir(workdir)
    if pairs is None:
        pairs = work.newest("pairs") / PAIRS
        took("pairs", pairs)
    if adapter is None:
        adapter = work.newest("sft")
        took("adapter", adapter)
    if show_example:
        print(example(pairs, adapter, config), end="")
        return
    end_training(json, "train dpo", dpo(pairs, adapter, config, out=out, workdir=work))


def recipe_section(recipe: str | None, name: str, data: Path | None) -> dict[str, Any]:
    """A section of a recipe as it is written; empty without a recipe.

    Raises:
        BadInput: the recipe has no such section.
    """
    from qe_edge.pipeline import read_recipe

    if not recipe:
        return {}
    content = read_recipe(recipe, data=data)
    if name not in content:
        raise BadInput(f"has no [{name}] section", path=recipe)
    return content[name]


def print_toml(section: str, config: Any) -> None:
    """The settings as a recipe's section."""
    import msgspec

    print(msgspec.toml.encode({section: config}).decode().rstrip())


def end_training(json: bool, command: str, folder: Path) -> None:
    from qe_edge.train.hardware import leave_group
    from qe_edge.work.runs import read_record

    leave_group()
    if not is_main_process():
        return
    record = read_record(folder)
    metrics = record["metrics"] | {"rows": record["rows"], "dropped": record["dropped"]}
    text = f"student in {folder} ({record['rows']} rows, mean loss {record['metrics']['train_loss']:.3f})"
    emit(json, command, text, inputs=record["inputs"], artifacts={"adapter": folder}, metrics=metrics)


def merge(
    adapter: Annotated[Path | None, typer.Argument(help="A trained adapter (default: the newest).")] = None,
    join: Annotated[
        str | None, typer.Option(help="The join that travels with the student, such as mass:1.")
    ] = None,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Merge an adapter into its base model: a plain Hugging Face folder."""
    from qe_edge.student.join import Join
    from qe_edge.train.merge import merge as verb
    from qe_edge.work.runs import read_record

    work = Workdir(workdir)
    if adapter is None:
        adapter = work.newest("dpo", "sft")
        took("adapter", adapter)
    folder = verb(adapter, join=Join.parse(join) if join else None, out=out, workdir=work)
    checks = read_record(folder)["checks"]
    text = f"model in {folder} (logit cosine to base + adapter {checks['logit_cosine']})"
    emit(json, "merge", text, inputs={"adapter": adapter}, artifacts={"model": folder}, metrics=checks)
