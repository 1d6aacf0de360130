"""`qe-edge export`: from a merged student to files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.common import (
    WORKDIR,
    JsonOption,
    OutOption,
    WorkdirOption,
    emit,
    measured_on,
    took_trained,
)
from qe_edge.commands.flags import Settings, flags_of
from qe_edge.console import note
from qe_edge.export.config import ExportConfig
from qe_edge.work.folder import Workdir


@flags_of(ExportConfig, "export", recipe=True)
def export(
    model: Annotated[Path | None, typer.Argument(help="A merged model folder (default: the newest).")] = None,
    q4: Annotated[bool, typer.Option("--q4", help="Q4_K_M GGUF and 5-bit MLX (the default).")] = False,
    q8: Annotated[bool, typer.Option("--q8", help="Q8_0 GGUF and 8-bit MLX.")] = False,
    f16: Annotated[bool, typer.Option("--f16", help="F16 GGUF and bf16 MLX.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="BF16 GGUF and bf16 MLX.")] = False,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: Settings[ExportConfig],
) -> None:
    """Turn a merged model into quantized GGUF and MLX, and check them.

    Each file is compared with the original.
    """
    from qe_edge.export.export import check_choices, export_model

    named = {"Q4_K_M": q4, "Q8_0": q8, "F16": f16, "BF16": bf16}
    if kinds := [kind for kind, wanted in named.items() if wanted]:
        settings.values["quant"] = [*kinds, *settings.values.get("quant", [])]
    config = settings.config()
    work = Workdir(workdir)
    check_choices(config)
    if model is None:
        model = _newest_model(work)
    if config.prune_vocab:
        from qe_edge.export.prune import prune

        model = prune(model, config, workdir=work)
    out = out or work.new("export")
    report = export_model(model, out, config, progress=note)
    first = next(iter(report["files"]))
    lines = [f"{out / name}  {size / 1e6:.1f} MB" for name, size in report["files"].items()]
    emit(
        json,
        "export",
        "\n".join(lines),
        inputs={"model": model},
        artifacts={"folder": out},
        metrics={name: found for name, found in report.items() if name != "warnings"},
        warnings=report["warnings"],
        following=("qe-edge", "bench", "--dataset", measured_on(out), "--model", out / first),
    )


def _newest_model(work: Workdir) -> Path:
    """The newest merged model; an adapter that is newer still is merged first."""
    newest = work.newest("dpo", "sft", "merge", named="a merged model: qe-edge export MODEL")
    if newest.parent.name == "merge":
        took_trained("model", newest)
        return newest
    from qe_edge.train.merge import merge

    took_trained("adapter, which is merged first", newest)
    return merge(newest, workdir=work)
