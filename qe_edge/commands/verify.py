"""`qe-edge verify`: an export beside its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qe_edge.commands.common import (
    WORKDIR,
    JsonOption,
    WorkdirOption,
    chosen_model,
    emit,
    has_test_queries,
    measured_on,
)
from qe_edge.console import several, warn
from qe_edge.work.folder import Workdir


def verify(
    exported: Annotated[
        Path | None,
        typer.Argument(
            help="A GGUF or an MLX folder of `export`, or what `prune` made "
            "(default: the newest export's smallest GGUF)."
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(help="The model it was made from (default: the one its run.json names)."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Compare nDCG@10 on it too: NAME or NAME@SPLIT.")
    ] = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Check an export against its source.

    That is checksums, token ids, spec, logits, and nDCG@10 if asked.
    """
    from qe_edge.backends.open import without_metal
    from qe_edge.export.compare import check_language, compare_retrieval
    from qe_edge.export.export import FAR, far
    from qe_edge.export.prune import verify_pruned
    from qe_edge.export.verify import source_of, verify_export
    from qe_edge.retrieval.datasets import load_dataset
    from qe_edge.student.models import resolve
    from qe_edge.work.files import size_of
    from qe_edge.work.runs import read_record

    data = load_dataset(dataset) if dataset else None  # a name that is wrong is found before the work
    exported = exported or Path(
        chosen_model(None, workdir, named="a GGUF or an MLX folder: qe-edge verify EXPORTED")
    )
    source = source or source_of(exported)
    if data:
        check_language(source, data)
    if read_record(exported).get("command") == "prune":
        found = verify_pruned(exported, source)
        text = (
            f"{exported} answers as its source does\n"
            f"  logits of {found['probes']} prompts differ by at most {found['max_logit_difference']:.0e} "
            "where a token stayed"
        )
    else:
        found = verify_export(exported, source)
        text = _closeness(exported, found, FAR)
        if told := far(exported.name, found):
            warn(told)
            text = text.replace("usually does", "usually does, which is much", 1)
    if dataset:
        retrieval = compare_retrieval(exported, source, dataset, workdir=Workdir(workdir))
        found["retrieval"] = retrieval
        change = retrieval["difference"]
        text += (
            f"\nnDCG@10 on {several(retrieval['queries'], 'query', 'queries')} of {retrieval['dataset']}: "
            f"{retrieval['before']:.3f} before, {retrieval['after']:.3f} after\n"
            f"  difference {change['mean']:+z.3f} ({change['low']:+z.3f} to {change['high']:+z.3f})"
        )
        if change["high"] < 0:
            warn(f"{exported} finds less than its source, and not by chance: try a larger kind, such as --q8")
    made_in = exported if exported.is_dir() and read_record(exported) else exported.parent
    if dataset and dataset.endswith("@train") and has_test_queries(dataset.removesuffix("@train")):
        dataset = dataset.removesuffix("@train")  # what it learnt from says little
    # In place of an MLX folder that takes minutes here, the GGUF beside it.
    slow = resolve(str(exported)).engine == "mlx" and without_metal()
    fast = sorted(exported.parent.glob("[!.]*.gguf")) if slow else []
    measured = ("--model", min(fast, key=size_of) if fast else exported)
    following = ("qe-edge", "bench", "--dataset", dataset or measured_on(made_in), *measured)
    emit(json, "verify", text, inputs={"export": exported}, metrics=found, following=following)


def _closeness(exported: Path, found: dict[str, Any], far: float) -> str:
    """What was found, and by which limits it is judged: its kind's, and `far`, above which we warn."""
    limits = found["limits"]
    return (
        f"{exported} loses no more than its kind usually does\n"
        f"  checksums      right\n"
        f"  token ids      identical for {found['probes']} texts\n"
        f"  logit cosine   {found['logit_cosine']:.4f}\n"
        f"  KL divergence  {found['kl_divergence']:.4f} nats a token; "
        f"within answers {found['answer_divergence']:.4f}\n"
        f"  next token     the likeliest is the same at {100 * found['top1_agreement']:.0f} % of all places\n"
        f"  greedy answer  the same for {100 * found['greedy_agreement']:.0f} % of its length, then another\n"
        f"  its limits     logit cosine at least {limits['cosine']:g}, "
        f"KL divergence at most {limits['divergence']:g};\n"
        f"                 within answers more than {far:g} is warned of\n"
        f"compared at {found['positions']} places of the prompts and answers of "
        f"{several(found['queries'], 'query', 'queries')}"
    )
