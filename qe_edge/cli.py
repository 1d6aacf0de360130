"""The command line: each command parses its options, imports its verb when called, and prints the result."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qe_edge.errors import BadInput, QeEdgeError

app = typer.Typer(
    help="Distil a big model's query expansions into a small model that runs on your own device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(help="Train a student: SFT, then DPO.", no_args_is_help=True)
data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True)
app.add_typer(train_app, name="train")
app.add_typer(data_app, name="data")

WorkdirOption = Annotated[
    Path,
    typer.Option("--workdir", envvar="QE_EDGE_WORKDIR", help="Where outputs go and inputs are looked for."),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Output folder (default: a new one in the work folder).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A .gguf file, a model folder, a hub id or builtin:NAME (default: newest export).",
    ),
]
WORKDIR = Path("qe-edge-work")


def _workdir(root: Path) -> Any:
    from qe_edge.workdir import Workdir

    return Workdir(root)


def _took(what: str, path: Path | str) -> None:
    from qe_edge.console import note

    note(f"{what}: {path} (the newest; name another to use that)")


def _emit(
    as_json: bool,
    command: str,
    text: str,
    *,
    inputs: dict[str, Any] | None = None,
    artifacts: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    warnings: list[str] | None = None,
    status: str = "ok",
) -> None:
    """The result on stdout: the text, or with --json the envelope of it."""
    if as_json:
        import msgspec

        envelope = {
            "schema_version": 1,
            "command": command,
            "status": status,
            "inputs": inputs or {},
            "artifacts": artifacts or {},
            "metrics": metrics or {},
            "warnings": warnings or [],
        }
        text = msgspec.json.encode(envelope, enc_hook=str).decode()
    print(text)


@app.command()
def doctor(workdir: WorkdirOption = WORKDIR, json: JsonOption = False) -> None:
    """Show what is installed, what is missing and how to get it."""
    from qe_edge.doctor import describe
    from qe_edge.doctor import doctor as look

    found = look(workdir)
    _emit(json, "doctor", describe(found), metrics=found)


@data_app.command("list")
def data_list(json: JsonOption = False) -> None:
    """List the named data sets."""
    from qe_edge.datasets import BUILTIN, SHORT_NAMES

    lines = [f"{name:<16} ships with qe-edge" for name in BUILTIN]
    lines += [f"{name:<16} ir_datasets {target}" for name, target in SHORT_NAMES.items()]
    lines += ["", "Also: any folder in BEIR layout, any ir_datasets id; NAME@SPLIT picks a split."]
    _emit(json, "data list", "\n".join(lines), metrics={"builtin": BUILTIN, "short_names": SHORT_NAMES})


@data_app.command("info")
def data_info(
    name: Annotated[str, typer.Argument(help="A data set, as NAME or NAME@SPLIT.")], json: JsonOption = False
) -> None:
    """Count a data set, and check that its judgments fit its documents."""
    import msgspec

    from qe_edge.datasets import describe, load_dataset

    dataset = load_dataset(name)
    info = msgspec.to_builtins(describe(dataset)) | {"fingerprint": dataset.fingerprint()}
    _emit(json, "data info", "\n".join(f"{key:<12} {value}" for key, value in info.items()), metrics=info)


@app.command()
def pairs(
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Judged queries, as NAME or NAME@SPLIT.")],
    expansions: Annotated[
        list[Path], typer.Option("--expansions", "-e", help="Candidate expansions (JSON Lines).")
    ],
    join: Annotated[
        str, typer.Option(help="How query and expansion are joined: mass:R, repeat:N or adaptive:B.")
    ] = "mass:0.7",
    min_gap: Annotated[
        float, typer.Option(help="nDCG@10 difference from which two candidates make a pair.")
    ] = 0.05,
    max_per_query: Annotated[int, typer.Option(help="Pairs kept of each query, widest gap first.")] = 4,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Score candidate expansions by retrieval and build preference pairs."""
    from qe_edge.manifest import read_json
    from qe_edge.train.pairs import REPORT, PairsConfig
    from qe_edge.train.pairs import pairs as verb

    config = PairsConfig(join=join, min_gap=min_gap, max_per_query=max_per_query)
    folder = verb(dataset, expansions, config, out=out, workdir=_workdir(workdir))
    report = read_json(folder / REPORT)
    text = f"{report['pairs']} pairs of {report['queries_with_pairs']} queries in {folder}"
    _emit(json, "pairs", text, inputs={"dataset": dataset}, artifacts={"folder": folder}, metrics=report)


@train_app.command("sft")
def train_sft(
    expansions: Annotated[
        list[Path], typer.Option("--expansions", "-e", help="Teacher expansions (JSON Lines).")
    ],
    student: Annotated[
        str, typer.Option(help="Hub id, folder, GGUF file or builtin:NAME.")
    ] = "builtin:smollm2-135m",
    models: Annotated[
        list[str] | None, typer.Option("--teacher-model", help="Take only this model's rows.")
    ] = None,
    modes: Annotated[
        list[str] | None, typer.Option("--mode", help="Take only zero-shot or few-shot rows.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Rows drawn at random; 0 takes all.")] = 0,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 32,
    alpha: Annotated[int, typer.Option(help="LoRA alpha.")] = 64,
    learning_rate: float = 3e-4,
    epochs: float = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows in memory at a time.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 2,
    max_length: Annotated[int, typer.Option(help="Tokens; longer rows are dropped and counted.")] = 512,
    seed: int = 0,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 20,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Fine-tune a LoRA adapter on teacher expansions. Run again after Ctrl-C, it goes on."""
    from qe_edge.train.sft import SftConfig, sft

    config = SftConfig(
        student=student,
        models=tuple(models or ()),
        modes=tuple(modes or ()),
        max_rows=max_rows,
        rank=rank,
        alpha=alpha,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        max_length=max_length,
        seed=seed,
        save_steps=save_steps,
    )
    _emit_training(json, "train sft", sft(expansions, config, out=out, workdir=_workdir(workdir)))


@train_app.command("dpo")
def train_dpo(
    pairs: Annotated[Path | None, typer.Option(help="A pairs.jsonl (default: the newest).")] = None,
    adapter: Annotated[Path | None, typer.Option(help="An SFT folder (default: the newest).")] = None,
    beta: Annotated[float, typer.Option(help="Pull towards the SFT model.")] = 0.1,
    loss: Annotated[
        list[str] | None, typer.Option(help="sigmoid, sigmoid_norm, sft …; several are summed.")
    ] = None,
    learning_rate: float = 5e-5,
    epochs: float = 1.0,
    batch_size: Annotated[int, typer.Option(help="Pairs in memory at a time.")] = 2,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 4,
    max_length: Annotated[int, typer.Option(help="Tokens; longer pairs are dropped and counted.")] = 512,
    seed: int = 0,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 20,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Align the SFT student with retrieval's own preferences. Run again after Ctrl-C, it goes on."""
    from qe_edge.train.dpo import DpoConfig, dpo
    from qe_edge.train.pairs import PAIRS

    work = _workdir(workdir)
    if pairs is None:
        pairs = work.newest("pairs") / PAIRS
        _took("pairs", pairs)
    if adapter is None:
        adapter = work.newest("sft")
        _took("adapter", adapter)
    config = DpoConfig(
        beta=beta,
        loss=tuple(loss or ("sigmoid",)),
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        max_length=max_length,
        seed=seed,
        save_steps=save_steps,
    )
    _emit_training(json, "train dpo", dpo(pairs, adapter, config, out=out, workdir=work))


def _emit_training(json: bool, command: str, folder: Path) -> None:
    from qe_edge.manifest import read_record

    record = read_record(folder)
    metrics = record["metrics"] | {"rows": record["rows"], "dropped": record["dropped"]}
    text = f"adapter in {folder} ({record['rows']} rows, mean loss {record['metrics']['train_loss']:.3f})"
    _emit(json, command, text, inputs=record["inputs"], artifacts={"adapter": folder}, metrics=metrics)


@app.command()
def merge(
    adapter: Annotated[
        Path | None, typer.Argument(help="A trained adapter (default: the newest DPO, else SFT).")
    ] = None,
    join: Annotated[
        str | None, typer.Option(help="The join that travels with the student, such as mass:1.")
    ] = None,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Merge an adapter into its base model: a plain Hugging Face folder."""
    from qe_edge.join import Join
    from qe_edge.manifest import read_record
    from qe_edge.train.merge import merge as verb

    work = _workdir(workdir)
    if adapter is None:
        adapter = work.newest("dpo", "sft")
        _took("adapter", adapter)
    folder = verb(adapter, join=Join.parse(join) if join else None, out=out, workdir=work)
    checks = read_record(folder)["checks"]
    text = f"model in {folder} (logit cosine to base + adapter {checks['logit_cosine']})"
    _emit(json, "merge", text, inputs={"adapter": adapter}, artifacts={"model": folder}, metrics=checks)


@app.command()
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
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Turn a merged model into quantized GGUF and MLX, checked against the original."""
    from qe_edge.console import note
    from qe_edge.export import export_model

    work = _workdir(workdir)
    if model is None:
        model = work.newest("merge")
        _took("model", model)
    named = {"Q4_K_M": q4, "Q8_0": q8, "F16": f16, "BF16": bf16}
    kinds = [kind for kind, wanted in named.items() if wanted] + list(quant or [])
    out = out or work.new("export")
    report = export_model(
        model, out, kinds=kinds or ["Q4_K_M"], formats=formats or ["gguf", "mlx"], progress=note
    )
    lines = [f"{out / name}  {size / 1e6:.1f} MB" for name, size in report["files"].items()]
    _emit(
        json, "export", "\n".join(lines), inputs={"model": model}, artifacts={"folder": out}, metrics=report
    )


@app.command()
def bench(
    dataset: Annotated[
        list[str], typer.Option("--dataset", "-d", help="NAME or NAME@SPLIT; repeat for several.")
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="MODEL or LABEL=MODEL; repeat for several (default: the newest export)."
        ),
    ] = None,
    join: Annotated[
        list[str] | None, typer.Option(help="Instead of the models' own join; several make several rows.")
    ] = None,
    teacher: Annotated[
        list[Path] | None, typer.Option(help="Teacher expansions of these queries (JSON Lines).")
    ] = None,
    teacher_model: Annotated[list[str] | None, typer.Option(help="Take only this teacher's rows.")] = None,
    teacher_join: str = "repeat:5",
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: the engine's choice).")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Instead of the models' own token budget.")] = None,
    hardware_label: Annotated[str, typer.Option(help="What to call this machine in reports.")] = "",
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Measure nDCG@10 beside tokens per second: BM25, models and teacher."""
    from qe_edge.bench.harness import BenchConfig, default_models, default_teachers
    from qe_edge.bench.harness import bench as verb

    work = _workdir(workdir)
    if not model:
        model = default_models(work)
        _took("models", ", ".join(model))
    config = BenchConfig(
        datasets=tuple(dataset),
        models=tuple(model),
        joins=tuple(join or ()),
        teachers=tuple(str(path) for path in teacher or default_teachers(dataset)),
        teacher_models=tuple(teacher_model or ()),
        teacher_join=teacher_join,
        threads=threads,
        max_tokens=max_tokens,
        label=hardware_label,
    )
    _emit_bench(json, "bench", verb(config, out=out, workdir=work))


def _emit_bench(json: bool, command: str, folder: Path) -> None:
    from qe_edge.bench.result import RESULT, read_result
    from qe_edge.bench.table import console_table

    result = read_result(folder)
    rows = {
        str(data.info.name): {f"{s.name} {s.join}".strip(): s.ndcg.mean for s in data.systems}
        for data in result.datasets
    }
    text = f"{console_table(result)}\nresult: {folder / RESULT}\nnext:   qe-edge report {folder / RESULT}"
    _emit(
        json, command, text, artifacts={"folder": folder}, metrics={"ndcg@10": rows}, warnings=result.warnings
    )


@app.command()
def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Result files or folders (default: the newest bench).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file (default: beside the first result).")
    ] = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Draw one self-contained HTML report from bench results of one or several machines."""
    from qe_edge.bench.report import report as verb

    if not results:
        results = [_workdir(workdir).newest("bench")]
        _took("result", results[0])
    folder = results[0] if results[0].is_dir() else results[0].parent
    file = verb(results, out or folder / "report.html")
    _emit(
        json, "report", str(file), inputs={"results": [str(r) for r in results]}, artifacts={"report": file}
    )


def _expander(model: str | None, workdir: Path, max_tokens: int | None = None) -> Any:
    from qe_edge.bench.harness import default_models
    from qe_edge.expander import Expander

    if model is None:
        models = default_models(_workdir(workdir))
        # The smallest file is the one meant for the device.
        model = min(models, key=lambda path: Path(path).stat().st_size)
        _took("model", model)
    return Expander.load(model, max_tokens=max_tokens)


@app.command()
def expand(
    queries: Annotated[list[str], typer.Argument(help="Queries; `-` reads one per line from stdin.")],
    model: ModelOption = None,
    max_tokens: Annotated[int | None, typer.Option(help="Token budget (default: the model's own).")] = None,
    terms: Annotated[
        bool, typer.Option("--terms", help="Print weighted index terms instead of text.")
    ] = False,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Expand queries with a student."""
    if queries == ["-"]:
        queries = [line.strip() for line in sys.stdin if line.strip()]
        if not queries:
            raise BadInput("stdin holds no query")
    with _expander(model, workdir, max_tokens) as expander:
        rows = [
            {
                "query": query,
                "text": expanded.text,
                "terms": expanded.terms(),
                "tokens": expanded.tokens,
                "finish_reason": expanded.finish_reason,
                "prefill_s": round(expanded.prefill_s, 4),
                "decode_s": round(expanded.decode_s, 4),
            }
            for query, expanded in zip(queries, map(expander.expand, queries), strict=True)
        ]
    shown = (
        "  ".join(f"{term}^{weight:.3g}" for term, weight in row["terms"].items()) if terms else row["text"]
        for row in rows
    )
    _emit(json, "expand", "\n".join(shown), inputs={"model": model}, metrics={"expansions": rows})


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    dataset: Annotated[
        str, typer.Option("--dataset", "-d", help="Where to look: NAME or folder.")
    ] = "demo-en",
    model: ModelOption = None,
    plain: Annotated[bool, typer.Option("--plain", help="Without expansion.")] = False,
    k: Annotated[int, typer.Option("-k", min=1, help="Results to show.")] = 5,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Search a data set with the expanded query, and show what the expansion changed."""
    import msgspec

    from qe_edge.search import search as verb

    expander = None if plain else _expander(model, workdir)
    hits, expanded = verb(query, dataset, expander=expander, cache=workdir / "index", k=k)
    if expander:
        expander.close()
    lines = [f"expansion: {expanded.text}\n"] if expanded else []
    for hit in hits:
        before = "" if plain else f"  (plain: {hit.plain_rank or f'not in the first {k}'})"
        lines.append(f"{hit.rank:>2}. {hit.doc_id}{before}\n    {hit.text[:200]}")
    text = "\n".join(lines) if hits else "nothing found"
    _emit(json, "search", text, inputs={"query": query}, metrics={"hits": msgspec.to_builtins(hits)})


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file (TOML), or the name of one that ships with qe-edge.")
    ],
    data: Annotated[Path | None, typer.Option(help="What {data} stands for in the recipe's paths.")] = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Run a recipe: pairs, SFT, DPO, merge, export, bench and report. Run again, it goes on."""
    from qe_edge.bench.report import report as draw
    from qe_edge.recipe import load_recipe, run_recipe

    out = run_recipe(load_recipe(recipe, data=data), workdir=_workdir(workdir))
    html = draw([out["bench"]], out["bench"] / "report.html")
    _emit_bench(json, "run", out["bench"])
    if not json:
        student = min(out["export dpo"].glob("*.gguf"), key=lambda file: file.stat().st_size)
        print(
            f"report: {html}\nmodel:  {student}\n"
            f'try:    qe-edge expand "why do my ears pop on a plane" --model {student}\n'
            f'        qe-edge search "why do my ears pop on a plane" --dataset demo-en --model {student}'
        )


@app.command()
def demo(workdir: WorkdirOption = WORKDIR, json: JsonOption = False) -> None:
    """Run the whole pipeline on the built-in student and collection: the recipe `demo`."""
    run("demo", None, workdir, json)


def main() -> None:
    """Run the CLI; an expected error becomes one line and its exit code."""
    # Read when these libraries are imported, which happens later: keep their chatter off the terminal.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    as_json = "--json" in sys.argv
    try:
        app()
    except QeEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        if as_json:
            _emit(True, " ".join(sys.argv[1:2]), "", status="error", warnings=[str(error)])
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # such as `qe-edge data list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
