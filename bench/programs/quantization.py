"""What each quantization of a student costs: size, closeness to the source, nDCG@10 and speed.

    python -m qe_edge.bench.programs.quantization MODEL --dataset NAME --budget-mb 100

Every kind is exported with and without importance matrix and checked, then all of them expand the queries of
the data set. Differences are paired over the queries, speeds are shares of BF16's in the same run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from qe_edge.bench.bench import bench
from qe_edge.bench.config import BenchConfig
from qe_edge.bench.report.figures import bounds, score, signed
from qe_edge.bench.result import System, read_result
from qe_edge.console import note
from qe_edge.errors import QeEdgeError
from qe_edge.export.config import ExportConfig
from qe_edge.export.export import export_model
from qe_edge.export.lineage import training_data
from qe_edge.export.quantize import MIXED, NEED_IMPORTANCE
from qe_edge.retrieval.measures import mean_interval
from qe_edge.work.files import sha256
from qe_edge.work.folder import DEFAULT_WORKDIR, Workdir
from qe_edge.work.runs import read_record

KINDS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_1", "Q4_0", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XXS")
BASE = "BF16"


class Exported(NamedTuple):
    """One file: its kind, whether an importance matrix was used, and where it is."""

    kind: str
    weighted: bool
    file: Path

    @property
    def label(self) -> str:
        return f"{self.kind} with" if self.weighted else self.kind


def main(
    model: Annotated[Path, typer.Argument(help="A merged model folder.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Queries to expand: NAME or NAME@SPLIT.")],
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="Expansions for the importance matrix (default: what it was trained on)."),
    ] = None,
    kinds: Annotated[list[str] | None, typer.Option("--quant", help="Kinds (default: eleven).")] = None,
    budget_mb: Annotated[list[float] | None, typer.Option(help="Add a mixed file of this size.")] = None,
    join: Annotated[str | None, typer.Option(help="The join (default: the student's own).")] = None,
    workdir: Annotated[Path, typer.Option(envvar="QE_EDGE_WORKDIR")] = Path(DEFAULT_WORKDIR),
) -> None:
    """Print a table with a row for each kind, with and without importance matrix."""
    work = Workdir(workdir)
    root = work.root / "quantization"
    chosen, weighing = list(kinds or KINDS), calibrate or training_data(model)
    if not weighing:
        raise QeEdgeError("its training data are not at hand; name expansions with --calibrate")
    plain = [BASE, *(kind for kind in chosen if kind not in NEED_IMPORTANCE)]
    files = _export(model, root / "without", plain, []) + _export(model, root / "with", chosen, weighing)
    for budget in budget_mb or []:
        files += _export(model, root / f"mixed-{budget:g}", ["Q4_K_M"], weighing, budget)
    models = tuple(f"{exported.label}={exported.file}" for exported in files)
    config = BenchConfig(datasets=(dataset,), models=models, joins=(join,) if join else ())
    result = read_result(bench(config, workdir=work))
    if result.failures:
        raise QeEdgeError("; ".join(result.failures))
    systems = {system.name: system for system in result.datasets[0].systems}
    print("| kind | imatrix | MB | KL | top-1 | greedy | nDCG@10 | vs BF16 | tokens/s, of BF16's |")
    print("| :-- | :-- | --: | --: | --: | --: | --: | --: | --: |")
    for exported in sorted(files, key=lambda e: -e.file.stat().st_size):
        print(_row(exported, systems[exported.label], systems[BASE]))


def _export(
    model: Path, out: Path, kinds: list[str], calibrate: list[Path], budget_mb: float | None = None
) -> list[Exported]:
    """The kinds' files, or with a budget the mixed one; an earlier run's are used if they are the same."""
    record = read_record(out)
    made = (
        record.get("inputs", {}).get("model", {}).get("sha256"),
        record.get("settings", {}).get("kinds"),
        record.get("settings", {}).get("budget_mb"),
        [file["sha256"] for file in (record.get("calibration") or {"files": []})["files"]],
    )
    if made != (sha256(model), kinds, budget_mb, [sha256(path) for path in calibrate]):
        # What it was trained on is drawn from as its training did.
        default = bool(calibrate) and list(calibrate) == training_data(model)
        config = ExportConfig(
            kinds=tuple(kinds),
            formats=("gguf",),
            budget_mb=budget_mb,
            calibrate=() if default else tuple(map(str, calibrate)),
            no_calibrate=not calibrate,
        )
        export_model(model, out, config, progress=note)
    if budget_mb:
        return [Exported(f"{MIXED} {budget_mb:g} MB", True, out / f"student-{MIXED}.gguf")]
    return [Exported(kind, bool(calibrate), out / f"student-{kind}.gguf") for kind in kinds]


def _row(exported: Exported, system: System, base: System) -> str:
    check = read_record(exported.file.parent)["checks"][exported.file.name]
    difference = mean_interval([system.per_query[i] - base.per_query[i] for i in base.per_query])
    written, by_base = (one.speed.decode_tokens_per_s for one in (system, base) if one.speed)
    assert written and by_base  # all of these write
    cells = [
        exported.kind,
        "yes" if exported.weighted else "no",
        f"{exported.file.stat().st_size / 1e6:.1f}",
        f"{check['kl_divergence']:.4f}",
        f"{check['top1_agreement']:.1%}",
        f"{check['greedy_agreement']:.0%}",
        score(system.ndcg.mean),
        "–" if system is base else f"{signed(difference.mean)} {bounds(difference, signed)}",
        f"{written / by_base:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    typer.run(main)
