"""`qe-edge bench` and `bench speed`: what a student gains and costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qe_edge.bench.config import BenchConfig
from qe_edge.commands.common import (
    WORKDIR,
    ColumnsOption,
    JsonOption,
    OutOption,
    ThreadsOption,
    WorkdirOption,
    chosen_model,
    emit,
    measured_on,
    named_columns,
    took_trained,
)
from qe_edge.commands.flags import Settings, flags_of
from qe_edge.console import note
from qe_edge.errors import BadArgument, NotFound, PartlyDone
from qe_edge.work.folder import Workdir

bench_app = typer.Typer(help="Measure nDCG@10 beside tokens per second, or speed alone.")


@bench_app.callback(invoke_without_command=True)
@flags_of(BenchConfig, "bench", recipe=True)
def bench(
    context: typer.Context,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    columns: ColumnsOption = "",
    *,
    settings: Settings[BenchConfig],
) -> None:
    """Measure nDCG@10 beside tokens per second: BM25, models and teacher."""
    if context.invoked_subcommand:
        given = [name for name in context.params if _is_given(context, name)]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise BadArgument(f"{flags} comes before `{context.invoked_subcommand}`; put it after")
        return
    from qe_edge.bench.bench import bench as verb
    from qe_edge.bench.inputs import default_models, default_teachers
    from qe_edge.bench.report.columns import check_columns

    work, values = Workdir(workdir), settings.values
    if not values.get("dataset"):
        raise BadArgument("name at least one data set with --dataset")
    values["teacher"] = values.get("teacher") or default_teachers(values["dataset"])
    if values.get("model") == ["none"]:
        values["model"] = []
    elif not values.get("model"):
        try:
            values["model"] = default_models(work)
            took_trained("models", Path(values["model"][0]).parent, ", ".join(values["model"]))
        except NotFound:
            values["model"] = []
    config, shown = settings.config(), named_columns(columns)
    check_columns(shown, config.measures)
    shown += [measure for measure in config.measures if shown and measure not in shown]
    emit_bench(json, "bench", verb(config, out=out, workdir=work), columns=shown)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@bench_app.command("speed")
def bench_speed(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="A GGUF file or builtin:NAME; repeat for several (default: newest export)."
        ),
    ] = None,
    synthetic: Annotated[
        list[str] | None,
        typer.Option(help="A real shape with random weights, such as qwen3-0.6b; nothing is downloaded."),
    ] = None,
    quant: Annotated[
        list[str] | None, typer.Option(help="Kinds of the synthetic ones (default: Q4_K_M).")
    ] = None,
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Measured turns; one more warms up.")] = 3,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Measure prefill and decode beside the plainest loop over llama.cpp.

    Beside them stands the memory's bandwidth.
    """
    import msgspec

    from qe_edge.bench.bench import other_work
    from qe_edge.bench.engine_speed import engine_speed, synthetic_gguf, text
    from qe_edge.student.models import resolve

    shapes = synthetic or []
    if quant and not shapes:
        raise BadArgument("--quant is for random weights; name their shape with --synthetic")
    names = model or ([] if shapes else [chosen_model(None, workdir)])
    kinds = (quant or ["Q4_K_M"]) if shapes else []
    folder = Workdir(workdir).root / "synthetic"
    made = [str(synthetic_gguf(shape, kind, folder)) for shape in shapes for kind in kinds]
    models = [resolve(name) for name in [*names, *made]]  # a wrong name is found before the work
    other_work()
    found = []
    for ref in models:
        note(f"bench: {ref.name}")
        found.append(engine_speed(ref, threads=threads, rounds=rounds))
    after = ("bench", "--dataset", measured_on(Path(names[0]).parent), "--model", names[0]) if names else None
    emit(
        json,
        "bench speed",
        text(found, rounds),
        inputs={"model": names, "synthetic": shapes, "quant": kinds, "threads": found[0].threads},
        metrics={"models": msgspec.to_builtins(found)},
        following=("qe-edge", *(after or ("train", "sft", "--student", "MODEL"))),
    )


def emit_bench(
    json: bool, command: str, folder: Path, *, columns: Sequence[str] = (), report: Path | None = None
) -> None:
    """Print a bench's table; then, if a model failed, exit with the code for work done in part."""
    from qe_edge.bench.report.table import console_table
    from qe_edge.bench.result import RESULT, read_result

    result = read_result(folder)
    rows = {
        str(data.info.name): {f"{s.name} {s.join}".strip(): s.ndcg.mean for s in data.systems}
        for data in result.datasets
    }
    emit(
        json,
        command,
        f"{console_table(result, columns)}\nresult: {folder / RESULT}"
        + (f"\nreport: {report}" if report else ""),
        inputs={name: result.settings.get(name) for name in ("dataset", "model", "teacher", "run")},
        artifacts={"folder": folder} | ({"report": report} if report else {}),
        metrics={"ndcg@10": rows},
        warnings=result.warnings,
        errors=result.failures,
        status="partial" if result.failures else "ok",
        following=() if report else ("qe-edge", "report", folder / RESULT),
    )
    if result.failures:
        note(f"error: {'; '.join(result.failures)}")
        raise typer.Exit(PartlyDone.exit_code)
