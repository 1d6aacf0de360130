"""`teach`: candidate expansions from a teacher, or from a file made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.common import WORKDIR, JsonOption, OutOption, WorkdirOption, emit
from qe_edge.console import note
from qe_edge.errors import BadArgument, PartlyDone
from qe_edge.records import configured


def teach(
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Whose queries to expand: NAME or NAME@SPLIT.")
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="Or a file of queries without judgments: JSON Lines with _id and text."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="The endpoint's model, or a local one as everywhere else.")
    ] = "",
    endpoint: Annotated[
        str,
        typer.Option(
            envvar="OPENAI_BASE_URL", help="An OpenAI-compatible URL, such as http://localhost:8080/v1."
        ),
    ] = "",
    api_key_env: Annotated[
        str, typer.Option(help="The environment variable that holds the key.")
    ] = "OPENAI_API_KEY",
    mode: Annotated[
        str | None, typer.Option(help="zero-shot, few-shot, or both as zero-shot,few-shot (default).")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Candidates of each query in each mode.")] = 1,
    temperature: float = 1.0,
    seed: Annotated[int, typer.Option(help="Of the first sample; the others count on from it.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Token budget of one answer.")] = 256,
    prompt: Annotated[str, typer.Option(help="A shipped prompt's id, or a TOML file.")] = "teacher-v1",
    exemplars: Annotated[
        str,
        typer.Option(help="Training split to draw few-shot exemplars from (default: the data set's own)."),
    ] = "",
    exemplar_rule: Annotated[str, typer.Option(help="random, or bm25 for the nearest queries.")] = "random",
    shots: Annotated[int, typer.Option(help="Exemplars in a few-shot prompt.")] = 4,
    extra: Annotated[
        str, typer.Option(help='More fields of the request as JSON, e.g. {"top_p": 0.9}; null takes one out.')
    ] = "{}",
    concurrency: Annotated[int, typer.Option(help="The most requests at once; rate limits lower it.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 120.0,
    patience: Annotated[float, typer.Option(help="Seconds in which a failed request is sent again.")] = 900.0,
    max_tokens_total: Annotated[int, typer.Option(help="Stop before so many tokens are used.")] = 0,
    max_cost: Annotated[float, typer.Option(help="Stop before so much is spent; needs the prices.")] = 0.0,
    price_in: Annotated[float, typer.Option(help="Price of a million prompt tokens.")] = 0.0,
    price_out: Annotated[float, typer.Option(help="Price of a million answer tokens.")] = 0.0,
    keep_bad: Annotated[
        bool, typer.Option("--keep-bad", help="Keep the text of unusable answers, marked, to look at.")
    ] = False,
    import_file: Annotated[
        Path | None, typer.Option("--import", help="Take the expansions in this file instead of asking.")
    ] = None,
    format: Annotated[
        str, typer.Option(help="Of the imported file: querygym, query2doc or jsonl.")
    ] = "jsonl",
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Ask a teacher for candidate expansions. Run again, it asks for what is still missing."""
    from qe_edge.train.teach.plan import TeachConfig
    from qe_edge.train.teach.teach import EXPANSIONS, AskConfig
    from qe_edge.train.teach.teach import teach as verb
    from qe_edge.work.folder import Workdir

    data = _queries(dataset, queries)
    out = out or Workdir(workdir).teach_folder(str(data) if data else import_file.stem if import_file else "")
    if import_file is not None:
        from qe_edge.train.teach.importing import ImportConfig, import_expansions

        imported = configured(ImportConfig, format=format, model=model, mode=mode, keep_bad=keep_bad)
        counts = import_expansions(import_file, imported, data, out=out)
        text = ", ".join(f"{count} {what}" for what, count in counts.items())
        artifacts = {"expansions": out / EXPANSIONS}
        emit(json, "teach", f"{text}: {out / EXPANSIONS}", artifacts=artifacts, metrics=dict(counts))
        return
    if data is None or not model:
        raise BadArgument("name the queries with --dataset or --queries, and the teacher with --model")
    config = configured(
        TeachConfig,
        model=model,
        modes=tuple(part.strip() for part in (mode or "zero-shot,few-shot").split(",")),
        n=n,
        temperature=temperature,
        seed=seed,
        max_tokens=max_tokens,
        prompt=prompt,
        exemplars=exemplars,
        exemplar_rule=exemplar_rule,
        shots=shots,
        extra=_object(extra),
    )
    ask = configured(
        AskConfig,
        endpoint=endpoint,
        api_key_env=api_key_env,
        concurrency=concurrency,
        timeout=timeout,
        patience=patience,
        max_tokens_total=max_tokens_total,
        max_cost=max_cost,
        price_in=price_in,
        price_out=price_out,
        keep_bad=keep_bad,
    )
    outcome = verb(data, config, ask, out=out)
    bad = ", ".join(f"{count} {what}" for what, count in outcome.problems.items())
    text = (
        f"{outcome.done} of {outcome.candidates} candidates are in {out / EXPANSIONS}\n"
        f"this session: {outcome.asked} answers, {outcome.prompt_tokens + outcome.completion_tokens:,} tokens"
        + (f", cost {outcome.cost:.4f}" if outcome.cost else "")
        + (f"; unusable: {bad}" if bad else "")
    )
    import msgspec

    missing = []
    if outcome.done < outcome.candidates:
        why = f"stopped: {outcome.stopped}" if outcome.stopped else f"{outcome.failed} got no answer"
        missing.append(f"{why}. Run the same command again for the others")
    emit(
        json,
        "teach",
        text,
        inputs={"dataset": str(data), "model": model, "endpoint": endpoint},
        artifacts={"expansions": out / EXPANSIONS},
        metrics=msgspec.to_builtins(outcome),
        status="partial" if missing else "ok",
        warnings=missing,
    )
    if missing:
        note(f"error: {missing[0]}")
        raise typer.Exit(PartlyDone.exit_code)


def _queries(dataset: str | None, queries: Path | None):  # type: ignore[no-untyped-def]
    from qe_edge.retrieval.datasets import load_dataset, load_queries

    if dataset and queries:
        raise BadArgument("give either --dataset or --queries")
    if dataset:
        return load_dataset(dataset)
    return load_queries(queries) if queries else None


def _object(text: str) -> dict[str, object]:
    import msgspec

    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise BadArgument(f"--extra must be a JSON object: {error}") from None
