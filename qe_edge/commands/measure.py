"""`export`, `bench` and `report`: from a merged student to files and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.common import (
    WORKDIR,
    AnalyzerOption,
    JsonOption,
    OutOption,
    PassagesOption,
    RetrieverOption,
    ThreadsOption,
    WorkdirOption,
    emit,
    finite,
    took,
)
from qe_edge.console import note
from qe_edge.errors import BadArgument, NotFound, PartlyDone
from qe_edge.records import configured
from qe_edge.work.folder import Workdir


def export(
    model: Annotated[Path | None, typer.Argument(help="A merged model folder (default: the newest).")] = None,
    q4: Annotated[bool, typer.Option("--q4", help="Q4_K_M GGUF and 4-bit MLX (the default).")] = False,
    q8: Annotated[bool, typer.Option("--q8", help="Q8_0 GGUF and 8-bit MLX.")] = False,
    f16: Annotated[bool, typer.Option("--f16", help="F16 GGUF and bf16 MLX.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="BF16 GGUF and bf16 MLX.")] = False,
    quant: Annotated[
        list[str] | None, typer.Option(help="Another of llama.cpp's kinds, such as Q6_K.")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="gguf or mlx (default: both).")
    ] = None,
    budget_mb: Annotated[
        float | None,
        typer.Option(
            min=0.1, callback=finite, help="Add a mixed GGUF of at most so many MB, by measurement."
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            min=1, callback=finite, help="The same, by the file's bits per weight instead of its MB."
        ),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Add the LoRA adapter alone, for a GGUF of the base model.")
    ] = False,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="Expansions for the importance matrix (default: those it was trained on)."),
    ] = None,
    no_calibrate: Annotated[
        bool, typer.Option("--no-calibrate", help="Quantize without an importance matrix.")
    ] = False,
    mlx_bits: Annotated[int | None, typer.Option(help="2, 3, 4, 5, 6 or 8 (default: the kind's).")] = None,
    mlx_group: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = 64,
    mlx_recipe: Annotated[
        str | None, typer.Option(help="mlx-lm's mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6.")
    ] = None,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Turn a merged model into quantized GGUF and MLX, checked against the original."""
    from qe_edge.export.export import MlxOptions, check_choices, export_model
    from qe_edge.export.source import Source

    if no_calibrate and calibrate:
        raise BadArgument("give either --calibrate or --no-calibrate")
    if budget_mb and target_bpw:
        raise BadArgument("give either --budget-mb or --target-bpw")
    named = {"Q4_K_M": q4, "Q8_0": q8, "F16": f16, "BF16": bf16}
    kinds = [kind for kind, wanted in named.items() if wanted] + list(quant or []) or ["Q4_K_M"]
    formats = formats or ["gguf", "mlx"]
    work = Workdir(workdir)
    mlx = MlxOptions(mlx_bits, mlx_group, mlx_recipe)
    check_choices(
        kinds, formats, budget_mb=budget_mb or target_bpw, adapter=adapter, calibrate=calibrate, mlx=mlx
    )
    if model is None:
        model = _newest_model(work)
    if target_bpw:
        budget_mb = Source(model).parameters * target_bpw / 8e6
    out = out or work.new("export")
    report = export_model(
        model,
        out,
        kinds=kinds,
        formats=formats,
        budget_mb=budget_mb,
        adapter=adapter,
        calibrate=[] if no_calibrate else calibrate,
        mlx=mlx,
        progress=note,
    )
    lines = [f"{out / name}  {size / 1e6:.1f} MB" for name, size in report["files"].items()]
    emit(json, "export", "\n".join(lines), inputs={"model": model}, artifacts={"folder": out}, metrics=report)


def verify(
    exported: Annotated[Path, typer.Argument(help="A GGUF file or an MLX folder of `qe-edge export`.")],
    source: Annotated[
        Path | None,
        typer.Option(help="The merged model it was made from (default: the one its run.json names)."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Compare nDCG@10 on it too: NAME or NAME@SPLIT.")
    ] = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Check an export against its source: checksums, token ids, spec, logits, and nDCG@10 if asked."""
    from qe_edge.export.compare import compare_retrieval
    from qe_edge.export.verify import source_of, verify_export
    from qe_edge.retrieval.datasets import load_dataset

    if dataset:
        load_dataset(dataset)  # a name that is wrong is found before the work
    source = source or source_of(exported)
    found = verify_export(exported, source)
    text = (
        f"{exported} answers as its source does: {found['checksums']} checksums right, token ids of "
        f"{found['probes']} texts identical, logit cosine {found['logit_cosine']:.4f}, "
        f"KL divergence {found['kl_divergence']:.4f} ({found['answer_divergence']:.4f} of answers), "
        f"top-1 agreement {found['top1_agreement']:.0%}, "
        f"greedy agreement {found['greedy_agreement']:.0%}"
    )
    if dataset:
        retrieval = compare_retrieval(exported, source, dataset, workdir=Workdir(workdir))
        found["retrieval"] = retrieval
        change = retrieval["difference"]
        text += (
            f"\nnDCG@10 on {retrieval['queries']} queries of {retrieval['dataset']}: "
            f"{retrieval['before']:.3f} before, {retrieval['after']:.3f} after, difference "
            f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"
        )
    emit(json, "verify", text, inputs={"export": exported}, metrics=found)


def _newest_model(work: Workdir) -> Path:
    """The newest merged model; an adapter that is newer still is merged first."""
    newest = work.newest("dpo", "sft", "merge")
    if newest.parent.name == "merge":
        took("model", newest)
        return newest
    from qe_edge.train.merge import merge

    took("adapter, which is merged first", newest)
    return merge(newest, workdir=work)


bench_app = typer.Typer(help="Measure nDCG@10 beside tokens per second, or speed alone.")


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", "-d", help="NAME or NAME@SPLIT; repeat for several.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="MODEL or LABEL=MODEL; repeat for several (default: the newest export)."
        ),
    ] = None,
    join: Annotated[
        list[str] | None, typer.Option(help="Instead of the models' own join; several make several rows.")
    ] = None,
    tune_on: Annotated[
        str, typer.Option(help="Choose each model's join on this data set's queries instead.")
    ] = "",
    measure: Annotated[
        list[str] | None, typer.Option(help="Another measure of ir_measures, such as R@100; repeat for more.")
    ] = None,
    teacher: Annotated[
        list[Path] | None, typer.Option(help="Teacher expansions of these queries (JSON Lines).")
    ] = None,
    teacher_model: Annotated[list[str] | None, typer.Option(help="Take only this teacher's rows.")] = None,
    teacher_join: str = "repeat:5",
    threads: ThreadsOption = None,
    max_tokens: Annotated[int | None, typer.Option(help="Instead of the models' own token budget.")] = None,
    feedback: Annotated[
        bool, typer.Option("--feedback", help="Also have each model read what the plain query finds.")
    ] = False,
    passages: PassagesOption = None,
    analyzer: AnalyzerOption = "",
    retriever: RetrieverOption = "",
    hardware_label: Annotated[str, typer.Option(help="What to call this machine in reports.")] = "",
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Measure nDCG@10 beside tokens per second: BM25, models and teacher."""
    if context.invoked_subcommand:
        given = [name for name in context.params if _is_given(context, name)]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise BadArgument(f"{flags} comes before `{context.invoked_subcommand}`; put it after")
        return
    if not dataset:
        raise BadArgument("name at least one data set with --dataset")
    from qe_edge.bench.bench import bench as verb
    from qe_edge.bench.config import BenchConfig
    from qe_edge.bench.inputs import default_models, default_teachers

    work = Workdir(workdir)
    teachers = tuple(str(path) for path in teacher or default_teachers(dataset))
    if not model:
        try:
            model = default_models(work)
            took("models", ", ".join(model))
        except NotFound as error:
            if not teachers:
                raise
            note(f"no model is run: {error}")
    config = configured(
        BenchConfig,
        datasets=tuple(dataset),
        models=tuple(model or ()),
        joins=tuple(join or ()),
        tune_on=tune_on,
        measures=tuple(measure or ()),
        teachers=teachers,
        teacher_models=tuple(teacher_model or ()),
        teacher_join=teacher_join,
        threads=threads,
        max_tokens=max_tokens,
        feedback=feedback,
        passages=passages,
        analyzer=analyzer,
        retriever=retriever,
        label=hardware_label,
    )
    emit_bench(json, "bench", verb(config, out=out, workdir=work))


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@bench_app.command("speed")
def bench_speed(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A GGUF file or builtin:NAME; repeat for several."),
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
    """Measure prefill and decode beside the plainest loop over llama.cpp, and the memory's bandwidth."""
    import msgspec

    from qe_edge.bench.engine_speed import engine_speed, synthetic_gguf, table
    from qe_edge.student.models import resolve

    folder = Workdir(workdir).root / "synthetic"
    names = list(model or [])
    names += [
        str(synthetic_gguf(shape, kind, folder)) for shape in synthetic or [] for kind in quant or ["Q4_K_M"]
    ]
    if not names:
        raise BadArgument("name a model with --model or a shape with --synthetic")
    models = [resolve(name) for name in names]  # a wrong name is found before the work
    found = []
    for ref in models:
        note(f"bench: {ref.name}")
        found.append(engine_speed(ref, threads=threads, rounds=rounds))
    emit(json, "bench speed", table(found), metrics={"models": msgspec.to_builtins(found)})


def emit_bench(json: bool, command: str, folder: Path, *, report: Path | None = None) -> None:
    """Print a bench's table; then, if a model failed, exit with the code for work done in part."""
    from qe_edge.bench.report.table import console_table
    from qe_edge.bench.result import RESULT, read_result

    result = read_result(folder)
    rows = {
        str(data.info.name): {f"{s.name} {s.join}".strip(): s.ndcg.mean for s in data.systems}
        for data in result.datasets
    }
    following = f"report: {report}" if report else f"next:   qe-edge report {folder / RESULT}"
    emit(
        json,
        command,
        f"{console_table(result)}\nresult: {folder / RESULT}\n{following}",
        artifacts={"folder": folder} | ({"report": report} if report else {}),
        metrics={"ndcg@10": rows},
        warnings=result.failures + result.warnings,
        status="partial" if result.failures else "ok",
    )
    if result.failures:
        note(f"error: {'; '.join(result.failures)}")
        raise typer.Exit(PartlyDone.exit_code)


def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Result files or folders (default: the newest bench).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file (default: beside the first result).")
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Also draw the first result's chart as a picture.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Also write every figure to this CSV file.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print the tables as LaTeX (booktabs).")] = False,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Draw one self-contained HTML report from bench results of one or several machines."""
    from qe_edge.bench.report.report import chart_png
    from qe_edge.bench.report.report import report as verb
    from qe_edge.bench.report.table import csv_rows, latex_table, markdown_table
    from qe_edge.bench.result import read_result
    from qe_edge.work.files import write_bytes

    if markdown and latex:
        raise BadArgument("give either --markdown or --latex")
    if not results:
        results = [Workdir(workdir).newest("bench")]
        took("result", results[0])
    folder = results[0] if results[0].is_dir() else results[0].parent
    artifacts = {"report": verb(results, out or folder / "report.html")}
    if png:
        artifacts["png"] = chart_png(read_result(results[0]), png)
    read = [read_result(path) for path in results]
    if csv:
        write_bytes(csv, csv_rows(read).encode())
        artifacts["csv"] = csv
    text = "\n".join(str(path) for path in artifacts.values())
    if markdown:
        tables = [(data.info.name, markdown_table(data)) for result in read for data in result.datasets]
        text = "\n".join(f"### {name}\n\n{table}" for name, table in tables)
    if latex:
        text = "\n".join(latex_table(data) for result in read for data in result.datasets)
    emit(json, "report", text, inputs={"results": [str(r) for r in results]}, artifacts=artifacts)
