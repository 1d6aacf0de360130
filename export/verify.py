"""Is an exported file still the model it came from? Compared with transformers in float32.

Four things are checked: the same token ids for texts that tokenizers like to disagree about, the same spec,
the same keys and chat template, and logits, at every position of prompts and answers, that are as close as
the file's format allows.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qe_edge.backends.amx import kept_off_amx
from qe_edge.backends.llama_model import FileName
from qe_edge.backends.mlx import NO_CODE
from qe_edge.console import progress
from qe_edge.errors import BadArgument, BadInput, NotFound, QeEdgeError, require
from qe_edge.export.metadata import check_metadata, read_keys
from qe_edge.export.probes import QUERIES, Reference, load_reference
from qe_edge.export.quantize import KINDS, MIXED, bits_of, captured_log
from qe_edge.lines import read_lines
from qe_edge.student.prompt import Tokenize, hugging_face
from qe_edge.student.spec import GGUF_KEY, KIND_KEY, ModelSpec, parse_spec, read_spec
from qe_edge.work.files import MANIFEST, near, sha256
from qe_edge.work.runs import read_record

CHECKSUMS = "SHA256SUMS"


class Limits(NamedTuple):
    """The least mean cosine and the greatest mean KL divergence, in nats, of a sound export."""

    cosine: float
    divergence: float


# By bits per weight. Twice the distance that was measured on a trained SmolLM2-135M
# (docs/results-earlier.md), or more, since its narrow matrices are stored in larger types than their kinds'
# names say. The worst, without importance matrix: 8 bits .9991 and .004, 6 .997 and .011, 5 .944 (Q5_1) and
# .32, 4 .936 (Q4_0) and .35,
# 3 .82 (IQ3_S) and 1.3; with one, 2 .89 (IQ2_XXS) and .62, 1 .80 (IQ1_S) and 1.0.
LIMITS = {
    8: Limits(0.995, 0.02),
    6: Limits(0.99, 0.05),
    5: Limits(0.87, 0.7),
    4: Limits(0.85, 0.8),
    3: Limits(0.6, 2.6),
    2: Limits(0.5, 3.0),
    1: Limits(0.3, 5.0),
}
# A wrong rotary base still gives a cosine of .98: only 16 bits can show a fault of the conversion itself.
LIMITS_16 = {"F32": Limits(0.9999, 1e-4), "F16": Limits(0.9999, 1e-4), "BF16": Limits(0.999, 2e-3)}
# The merged weights were rounded once more than base + adapter.
ADAPTER_LIMITS = Limits(0.998, 5e-3)
# MLX: measured .9994 and .002 at 8 bits, .994 and .022 at 6, .978 and .08 at 5, .905 and .48 at 4, .67 and
# 2.0 at 3. At 2 (.20 and 14) nothing is left of so small a student, and such an export is refused.
MLX_LIMITS = {
    16: Limits(0.9999, 1e-3),
    8: Limits(0.995, 0.01),
    6: Limits(0.985, 0.06),
    5: Limits(0.95, 0.2),
    4: Limits(0.8, 1.0),
    3: Limits(0.5, 4.0),
    2: Limits(0.5, 3.0),
}
# `general.file_type` -> kind
_FILE_TYPES = {0: "F32", 1: "F16", 32: "BF16"} | {number: kind for kind, number in KINDS.items()}


def source_of(exported: Path) -> Path:
    """The merged model that the run.json beside an export names.

    Raises:
        NotFound: there is no such export, it has no run.json, or its source is gone.
    """
    if not exported.exists():
        raise NotFound(f"{exported}: no such GGUF file or MLX folder")
    record = read_record(exported) if exported.is_dir() else {}
    if record.get("command") == "prune":
        return Path(record["inputs"]["model"]["path"])
    if (exported / MANIFEST).is_file():
        names = ", ".join(str(exported / name) for name in record.get("files", {}))
        if not names:
            raise BadArgument(
                f"{exported} is no export; verify what `qe-edge export` or `qe-edge prune` made"
            )
        raise BadArgument(f"{exported} is a whole export; verify one of its files: {names}")
    made_from = read_record(exported.parent).get("inputs", {}).get("model", {}).get("path")
    if not made_from:
        raise NotFound(
            f"{exported} is of no export: no {MANIFEST} beside it names the model it was made from; "
            "name that with --source"
        )
    source = near(exported.parent / made_from)
    if not source.is_dir():
        raise NotFound(f"{source}, which {exported} was made from, isn't there; name it with --source")
    return source


def verify_export(exported: Path, source: Path) -> dict[str, Any]:
    """Check a GGUF or MLX folder that `qe-edge export` wrote: its checksums, then as `verify_gguf` does.

    Raises:
        NotFound: there is no such export, or source.
        QeEdgeError: a file changed since, or answers differently from the source.
    """
    for path in (exported, source):
        if not path.exists():
            raise NotFound(f"{path}: no such file or folder")
    sums = check_sums(exported)
    found = verify_mlx(exported, source) if exported.is_dir() else verify_gguf(exported, source)
    return {"checksums": sums, **found}


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, as an export's folder lists them.

    Raises:
        BadInput: the list is malformed.
    """
    sums = folder / CHECKSUMS
    try:
        return {name: digest for digest, name in (line.split("  ", 1) for _, line in read_lines(sums))}
    except (ValueError, BadInput):
        raise BadInput("isn't a list of checksums as sha256sum writes it", path=sums) from None


def check_sums(path: Path) -> int:
    """Compare an export, a file or a folder, with the SHA256SUMS beside it; returns how many files were.

    Raises:
        BadInput: a file is missing or differs, or isn't listed.
    """
    sums = path.parent / CHECKSUMS
    if not sums.is_file():
        raise BadInput(f"has no {CHECKSUMS} beside it, so nothing tells whether it is whole", path=path)
    listed = read_sums(path.parent)
    own = {name: digest for name, digest in listed.items() if Path(name).parts[:1] == (path.name,)}
    if not own:
        raise BadInput(f"does not list {path.name}; it is from another export", path=sums)
    for name, digest in own.items():
        file = path.parent / name
        if not file.is_file():
            raise BadInput(f"is missing, though {sums} lists it", path=file)
        if sha256(file) != digest:
            raise BadInput(f"differs from its entry in {sums}: it is damaged or was changed", path=file)
    # An engine may read what nobody listed: mlx-lm takes every model*.safetensors of a folder.
    for file in path.rglob("*") if path.is_dir() else ():
        if file.is_file() and file.relative_to(path.parent).as_posix() not in own:
            raise BadInput(f"isn't listed in {sums}: it was added later", path=file)
    return len(own)


def verify_gguf(file: Path, source: Path | Reference, *, adapter: Path | None = None) -> dict[str, Any]:
    """Check a GGUF against the model folder it was made from, or against its `load_reference`.

    With `adapter`, a GGUF of the base model is checked with that adapter's GGUF applied to it.

    Returns:
        `token_ids` ("identical"), `probes` (how many texts were tokenized), `queries` (how many of them
        were answered), `positions` (tokens of prompts and answers), and over these `logit_cosine` (the mean),
        `lowest_cosine`, `kl_divergence` (the mean, of the export's next-token distribution from the
        source's, in nats), `answer_divergence` (the same where an answer's tokens and what follows
        them are predicted: within the prompt nothing uses what a student predicts),
        `top1_agreement` (the share whose likeliest next token is the same);
        `greedy_agreement`, how much of the source's greedy answer the export writes before it differs; last,
        `limits`, the least `cosine` and the greatest `divergence` that were allowed.

    Raises:
        QeEdgeError: the file can't be loaded, its spec or any token id differs, or logits are too far.
    """
    llama_cpp = require("llama_cpp", "llama")
    reference = source if isinstance(source, Reference) else load_reference(source)
    longest = max(len(reference.sequence(query)) for query in range(len(QUERIES)))
    if adapter is None:  # before llama-cpp-python compiles the chat template, which may be anybody's
        keys = read_keys(file)
        _check_spec(
            parse_spec(str(keys[GGUF_KEY]), source=file) if GGUF_KEY in keys else None, reference, file
        )
        check_metadata(keys, file, reference.model, reference.spec)
    with captured_log() as log, kept_off_amx(llama_cpp):
        try:
            llama = llama_cpp.Llama(
                FileName(file),
                n_ctx=longest + 1,
                n_batch=longest,
                logits_all=True,
                lora_path=FileName(adapter) if adapter else None,
                verbose=False,
            )
        except (ValueError, RuntimeError):
            raise QeEdgeError(f"llama.cpp can't load {file}: {'; '.join(log[-3:])}") from None
    with closing(llama):
        _check_ids(
            lambda text, special: llama.tokenize(text.encode(), add_bos=False, special=special),
            reference,
            file,
        )
        closeness = Closeness(reference)
        with progress(f"checking {file.name}", len(QUERIES)) as advance:
            for query in range(len(QUERIES)):
                ids = reference.sequence(query)
                llama.reset()
                llama.eval(ids)
                closeness.add(llama.scores[: len(ids)])
                advance()
        kind = _kind_of(llama.metadata, file)
    return closeness.check(ADAPTER_LIMITS if adapter else limits_of(kind), file)


def verify_mlx(folder: Path, source: Path | Reference) -> dict[str, Any]:
    """Check an MLX folder as `verify_gguf` checks a GGUF; same result, same errors."""
    mx, mlx_lm = require("mlx.core", "mlx"), require("mlx_lm", "mlx")
    reference = source if isinstance(source, Reference) else load_reference(source)
    try:
        model, tokenizer, config = mlx_lm.load(str(folder), return_config=True, **NO_CODE)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise QeEdgeError(f"mlx-lm can't load {folder}: {error}") from None
    _check_spec(read_spec(folder), reference, folder)
    if tokenizer._tokenizer.chat_template != reference.template:
        raise QeEdgeError(f"{folder}: its chat template is not its source's: don't use it")
    _check_ids(hugging_face(tokenizer._tokenizer), reference, folder)
    # The question is the weights, so the arithmetic is the reference's.
    model.set_dtype(mx.float32)
    # Without Metal, MLX multiplies matrices at about 1.5 GFLOP/s: a minute for a prompt to Qwen3-0.6B.
    queries = len(QUERIES) if mx.metal.is_available() else 1
    closeness = Closeness(reference)
    with progress(f"checking {folder.name}", queries) as advance:
        for query in range(queries):
            closeness.add(np.array(model(mx.array([reference.sequence(query)]))[0]))
            advance()
    bits = config["quantization"]["bits"] if "quantization" in config else 16
    if bits not in MLX_LIMITS:
        raise QeEdgeError(f"{folder} has {bits} bits per weight, which no export writes: don't use it")
    return closeness.check(MLX_LIMITS[bits], folder)


def _check_spec(found: ModelSpec | None, reference: Reference, where: Path) -> None:
    if found != reference.spec:
        raise QeEdgeError(f"{where} carries another qe-edge spec than its source; export it again")


def _check_ids(tokenize: Tokenize, reference: Reference, where: Path) -> None:
    for probe, expected in zip(reference.probes, reference.prompts, strict=True):
        found = reference.spec.prompt.encode(probe, tokenize)
        if found != expected:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected)
            )
            raise QeEdgeError(
                f"{where} tokenizes {probe!r} differently from its source, from token {at} of the prompt on "
                f"({found[at : at + 5]} instead of {expected[at : at + 5]}): don't use it"
            )


def _kind_of(metadata: dict[str, str], file: Path) -> str:
    kind = metadata.get(KIND_KEY) or _FILE_TYPES.get(int(metadata.get("general.file_type", -1)), "")
    if kind != MIXED and kind not in _FILE_TYPES.values():
        raise QeEdgeError(f"{file} is of the kind {kind!r}, which no export writes: don't use it")
    return kind


def limits_of(kind: str) -> Limits:
    """The limits of a GGUF of a kind; a mixed one may go down to its smallest type."""
    return LIMITS_16.get(kind) or LIMITS[3 if kind == MIXED else bits_of(kind)]


class Closeness:
    """How close an export's logits are to its source's, query by query."""

    def __init__(self, reference: Reference):
        self.reference = reference
        self.queries = 0
        self.cosines: list[np.ndarray] = []
        self.divergences: list[np.ndarray] = []
        self.of_answers: list[np.ndarray] = []
        self.same_top: list[np.ndarray] = []
        self.greedy: list[float] = []

    def add(self, found: np.ndarray) -> None:
        """The export's logits [prompt + answer, vocabulary] for the next one of QUERIES."""
        from scipy.special import log_softmax

        expected = self.reference.logits[self.queries]
        found = np.array(found, np.float32)
        log_p, log_q = log_softmax(expected, axis=1), log_softmax(found, axis=1)
        divergences = (np.exp(log_p) * (log_p - log_q)).sum(1)
        self.divergences.append(divergences)
        same = found.argmax(1) == expected.argmax(1)
        self.same_top.append(same)
        answer = len(self.reference.answers[self.queries])
        self.of_answers.append(divergences[-answer - 1 :])
        # Given the source's answer so far, is the next token the same? Up to the first that isn't, this is
        # what the export would write by itself.
        asked = same[-answer - 1 : -1]
        self.greedy.append(float(np.argmin(asked)) / answer if not asked.all() else 1.0)
        # Adding a constant to all logits changes no probability, and a large common part hides differences.
        found -= found.mean(1, keepdims=True)
        expected = expected - expected.mean(1, keepdims=True)
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        self.cosines.append((found * expected).sum(1) / norms)
        self.queries += 1

    def check(self, limits: Limits, where: Path) -> dict[str, Any]:
        """The figures, as `verify_gguf` returns them.

        Raises:
            QeEdgeError: they are outside the limits.
        """
        cosine = float(np.concatenate(self.cosines).mean())
        divergence = float(np.concatenate(self.divergences).mean())
        # NaN fails both.
        if not (cosine >= limits.cosine and divergence <= limits.divergence):
            more_bits = ". A kind of more bits, such as --q8, keeps more"
            raise QeEdgeError(
                f"{where.name} answers differently from its source: mean logit cosine {cosine:.4f}, at least "
                f"{limits.cosine} expected; KL divergence {divergence:.4f}, at most {limits.divergence}"
                + (more_bits if limits.cosine < LIMITS[8].cosine else "")
            )
        return {
            "token_ids": "identical",
            "probes": len(self.reference.probes),
            "queries": self.queries,
            "positions": sum(map(len, self.cosines)),
            "logit_cosine": round(cosine, 6),
            "lowest_cosine": round(float(np.concatenate(self.cosines).min()), 6),
            "kl_divergence": round(divergence, 6),
            "answer_divergence": round(float(np.concatenate(self.of_answers).mean()), 6),
            "top1_agreement": round(float(np.concatenate(self.same_top).mean()), 4),
            "greedy_agreement": round(float(np.mean(self.greedy)), 4),
            "limits": limits._asdict(),
        }
