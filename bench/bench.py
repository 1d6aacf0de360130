"""`bench`: BM25, models and teachers on one or several data sets, quality and cost side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from qe_edge.bench.baselines import parse_baseline
from qe_edge.bench.config import ITSELF, BenchConfig
from qe_edge.bench.inputs import Model, learnt_by_model, parse_model, parse_run
from qe_edge.bench.result import BUSY, RESULT, BenchResult
from qe_edge.bench.systems import OURS, Systems, is_of
from qe_edge.console import note, warn
from qe_edge.errors import BadArgument, QeEdgeError
from qe_edge.records import Expansion, read_jsonl
from qe_edge.retrieval.datasets import Dataset, load_dataset
from qe_edge.retrieval.measures import RESAMPLES, check_measure
from qe_edge.retrieval.trec import read_run
from qe_edge.student.hub import local_file
from qe_edge.student.join import Join
from qe_edge.student.models import resolve
from qe_edge.work.files import write_json
from qe_edge.work.folder import Workdir
from qe_edge.work.machine import busy, cpu_name, machine, versions
from qe_edge.work.runs import RunFolder, now


def bench(config: BenchConfig, *, out: Path | None = None, workdir: Workdir) -> Path:
    """Run a benchmark; returns its folder.

    It holds `result.json`, TREC runs under `runs/` and every generation under `generated/`. A model that
    fails is named in the result's `failures`, and the others' rows are there all the same.

    Raises:
        QeEdgeError: every model failed.
    """
    if not config.datasets:
        raise BadArgument("name at least one data set with --dataset")
    whole, dev = check_config(config)
    loaded = [data.draw(config.max_queries or len(data.queries)) for data in whole]
    if not config.models and (config.feedback or config.refine):
        raise BadArgument("--feedback and --refine need a model: name one with --model")
    if config.teacher_models and not config.teachers:
        raise BadArgument("--teacher-model chooses among the texts of a --teacher: name one")
    if not config.models:
        ours = ", as builtin:smollm2-135m does" if any(data.lang == "en" for data in loaded) else ""
        note(f"bench: without a model; --model takes one that knows the language{ours}")
    named = dict(parse_model(text) for text in config.models)
    inputs: dict[str, Path | str] = {label: resolve(name).path or name for label, name in named.items()}
    inputs |= {f"teachers[{i}]": path for i, path in enumerate(config.teachers)}
    runs = dict(parse_run(text) for text in config.runs)
    rankings = {label: read_run(path) for label, path in runs.items()}  # a bad file is found before the work
    inputs |= {f"runs[{label}]": path for label, path in runs.items()}
    run = RunFolder("bench", msgspec.to_builtins(config), inputs, out or workdir.new("bench"))
    if any(run.partial.glob(run.work)):
        note("bench: going on with what an interrupted run wrote")
    readers = tuple(name if name == ITSELF else str(local_file(name)) for name in config.readers)
    config = replace(config, readers=readers)
    hashes = {label: run.record["inputs"][label]["sha256"] for label in named}
    models = [
        Model(label, name, hashes[label], config.joins, learnt_by_model(name))
        for label, name in named.items()
    ]
    failures: list[str] = []
    results = []
    load, warnings = other_work()
    lost = []
    for path in config.teachers:  # a bad file is found before hours of generation
        if not any(is_of(row, data) for row in read_jsonl(path, Expansion) for data in loaded):
            lost.append(f"{path} holds no expansion of these queries")
            warn(lost[-1])
    warnings += lost
    tuning = []
    if dev:
        tuner = Systems(dev, config, run.partial, workdir)
        tuning = tuner.tune(models)
        failures += tuner.failures
        chosen = {found.model: (found.chosen,) for found in tuning}
        # One that failed there can't be compared: it would have another join.
        models = [model._replace(joins=chosen[model.label]) for model in models if model.label in chosen]
    for data, known in zip(loaded, whole, strict=True):
        note(f"bench: {data}")
        one = Systems(data, config, run.partial, workdir)
        if len(data.queries) < len(known.queries):
            told = f"{len(data.queries)} of the {len(known.queries)} queries of {data}, drawn at random"
            note(f"bench: {told}")
            one.warnings.append(told)
        found = one.measure(models, rankings)
        results.append(replace(found, warnings=[*lost, *found.warnings]))
        warnings += one.warnings
        failures += one.failures
    result = BenchResult(
        created=now(),
        label=config.hardware_label or cpu_name(),
        machine=machine() | {"busy": load},
        versions=versions(),
        datasets=results,
        settings=run.record["settings"],
        resamples=RESAMPLES,
        warnings=warnings,
        failures=failures,
        tuning=tuning,
    )
    if failures and not any(system.kind == "model" for data in results for system in data.systems):
        raise QeEdgeError(f"every model failed: {'; '.join(failures)}")
    write_json(run.partial / RESULT, msgspec.to_builtins(result))
    return run.finish()


def other_work() -> tuple[float, list[str]]:
    """The share of the processors that is at work before ours begins, and what was warned of it."""
    load = round(busy(), 2)
    if load <= BUSY:
        return load, []
    told = f"other work took {100 * load:.0f} % of the processors at the start: times say little"
    warn(told)
    return load, [told]


def check_config(config: BenchConfig) -> tuple[list[Dataset], Dataset | None]:
    """Look for what is wrong with a benchmark before its work; returns its data sets, and that to tune on.

    Raises:
        QeEdgeError: something is.
    """
    for join in (*config.joins, *config.tune_joins, config.teacher_join):
        Join.parse(join)
    for measure in config.measures:
        check_measure(measure)
    loaded = [load_dataset(name) for name in config.datasets]
    dev = _load_dev(config, loaded)
    named, runs = dict(map(parse_model, config.models)), dict(map(parse_run, config.runs))
    if len(named) < len(config.models):
        raise BadArgument("two models have the same name; tell them apart with --model LABEL=MODEL")
    names = [parse_baseline(text).name for text in config.baselines]
    if len(set(names)) < len(names):
        raise BadArgument("two baselines have the same name: rename one of the files")
    if taken := (runs.keys() | named.keys()) & OURS:
        raise BadArgument(
            f"{', '.join(taken)}: a row of ours has this name; name yours otherwise, as LABEL=FILE"
        )
    if len(runs) < len(config.runs) or runs.keys() & named.keys():
        raise BadArgument("two rows have the same name; tell them apart with --run LABEL=FILE")
    return loaded, dev


def _load_dev(config: BenchConfig, measured: Sequence[Dataset]) -> Dataset | None:
    """The data set to tune on, which must not be one that is measured."""
    if not config.tune_on:
        return None
    if config.joins:
        raise BadArgument("give either --join or --tune-on")
    dev = load_dataset(config.tune_on)
    for data in measured:
        shared = set(dev.queries.values()) & set(data.queries.values())
        if shared:
            raise BadArgument(
                f"{dev} and {data} share {len(shared)} queries, such as {min(shared)!r}; "
                "tune on others than those that are measured"
            )
    return dev
