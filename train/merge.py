"""Merge an adapter into its base: a plain Hugging Face folder, checked against base + adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from qe_edge.errors import QeEdgeError, require
from qe_edge.student.join import Join
from qe_edge.student.prompt import hugging_face
from qe_edge.train.base_model import load_config, load_tokenizer, load_trained, open_trained, save_student
from qe_edge.work.files import MANIFEST, atomic_path, write_json
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import check_output, learnt_by, run_record

if TYPE_CHECKING:
    from torch import Tensor

PROBES = ("what causes tides", "how long does bread keep", "2023 tax rate")
# Merging itself is exact but for float32's rounding. What is saved is rounded to the base's precision. bf16
# keeps 8 bits: what it changes in a student of 135M takes the cosine to .999 and sometimes below.
MIN_COSINE, MIN_ROUNDED = 0.99999, 0.99


def merge(adapter: Path, *, join: Join | None = None, out: Path | None = None, workdir: Workdir) -> Path:
    """Merge a LoRA adapter in float32 and save in the base's own precision; returns the model folder.

    Weights that were trained whole are only rounded to that precision.

    `join` sets the join that travels with the student, for instance one chosen on a dev set.

    Raises:
        QeEdgeError: the merged model's logits, in float32 or as it is saved, differ from base + adapter's.
    """
    torch = require("torch", "train")
    trained = open_trained(adapter)
    spec = msgspec.structs.replace(trained.spec, join=join) if join else trained.spec
    out = out or workdir.new("merge")
    check_output(out, "merge")
    tokenizer = load_tokenizer(trained.base)
    precision = load_config(trained.base).dtype or torch.float32
    tokenize = hugging_face(tokenizer)
    probes = [torch.tensor([spec.prompt.encode(query, tokenize)]) for query in PROBES]
    model = load_trained(trained, dtype=torch.float32).eval()
    with torch.inference_mode():
        before = [model(ids).logits[0, -1] for ids in probes]
        merged = model if trained.full else model.merge_and_unload(safe_merge=True)
        exact = [merged(ids).logits[0, -1] for ids in probes]
        # Rounded to what is saved, and compared in float32: arithmetic in bf16 would drown the difference.
        merged = merged.to(precision).float()
        after = [merged(ids).logits[0, -1] for ids in probes]
    cosine = _cosine(before, after)
    for found, least, what in (
        (_cosine(before, exact), MIN_COSINE, "merged"),
        (cosine, MIN_ROUNDED, f"merged and saved as {str(precision).removeprefix('torch.')}"),
    ):
        if not found >= least:
            raise QeEdgeError(
                f"{what}, the model's logits differ from base + adapter (cosine {found:.5f}, below {least}); "
                "nothing was written"
            )
    checks = {
        "logit_cosine": round(cosine, 6),
        "max_logit_difference": round(
            max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)), 4
        ),
    }
    with atomic_path(out) as partial:
        save_student(merged.to(precision), tokenizer, spec, partial)
        settings = {"join": str(spec.join), "precision": str(precision).removeprefix("torch.")}
        write_json(
            partial / MANIFEST,
            run_record(
                "merge",
                settings,
                {"adapter": adapter},
                base=trained.base,
                checks=checks,
                **learnt_by(adapter),
            ),
        )
    return out


def _cosine(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The least of the pairs'."""
    torch = require("torch", "train")
    pairs = zip(some, others, strict=True)
    return min(float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in pairs)
