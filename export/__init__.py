"""`qe-edge export`: a merged student -> GGUF files for llama.cpp and MLX folders, each one checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qe_edge.errors import BadArgument, BadInput, NotFound, NotInstalled, require
from qe_edge.export.card import write_card, write_modelfile
from qe_edge.export.gguf import convert_gguf, read_config
from qe_edge.export.mlx import convert_mlx
from qe_edge.export.quantize import KINDS, bits_of, quantize_gguf
from qe_edge.export.verify import CHECKSUMS, Reference, load_reference, verify_gguf, verify_mlx
from qe_edge.manifest import (
    MANIFEST,
    atomic_path,
    check_output,
    run_record,
    sha256,
    write_json,
)
from qe_edge.spec import ModelSpec, read_spec

FORMATS = ("gguf", "mlx")
UNQUANTIZED = ("BF16", "F16")

Progress = Callable[[str], None]


def export_model(
    model: Path,
    out: Path,
    *,
    kinds: Sequence[str] = ("Q4_K_M",),
    formats: Sequence[str] = FORMATS,
    verify: bool = True,
    threads: int | None = None,
    progress: Progress = lambda message: None,
) -> dict[str, Any]:
    """Export a merged model folder to the folder `out`, whole or not at all.

    Writes `student-<kind>.gguf` for every kind, one `student-mlx-<bits>bit` folder for every number of
    bits among the kinds (`student-mlx-bf16` for BF16 and F16), a model card (README.md), a Modelfile
    for Ollama, SHA256SUMS and run.json. An older `out`
    is replaced, and stays if anything fails.

    Returns:
        `files` (name -> bytes) and `checks` (name -> what `verify_gguf` or `verify_mlx` found). The
        checks include the BF16 GGUF that is quantized from, the only one exact enough to show a
        fault of the conversion itself.

    Raises:
        BadArgument: an unknown kind or format, or an `out` that holds something else.
        NotInstalled: a format's extra is missing.
        NotFound, BadInput: the model is missing, has no qe-edge spec, or can't be converted.
        QeEdgeError: an export doesn't answer as its source does.
    """
    kinds, formats = list(dict.fromkeys(kinds)), list(dict.fromkeys(formats))
    check_choices(kinds, formats)
    if not model.is_dir():
        raise NotFound(f"{model}: no such model folder")
    spec = read_spec(model)
    if spec is None:
        raise BadInput("has no qe_edge.json, which holds its prompt; `qe-edge merge` writes it", path=model)
    read_config(model)
    _check_installed(formats, verify)
    check_output(out, "export")
    reference = None
    if verify:
        progress("asking the source model, in float32")
        reference = load_reference(model)
    checks: dict[str, Any] = {}
    with atomic_path(out) as folder:
        folder.mkdir()
        if "gguf" in formats:
            checks |= _export_ggufs(model, folder, kinds, spec, reference, threads, progress)
        if "mlx" in formats:
            checks |= _export_mlx(model, folder, kinds, spec, reference, progress)
        files = {path.name: _size(path) for path in sorted(folder.iterdir())}
        write_card(folder, spec, files, checks)
        if ggufs := [name for name in files if name.endswith(".gguf")]:
            write_modelfile(folder, spec, ggufs[0])
        _write_checksums(folder)
        settings = {"kinds": kinds, "formats": formats, "verify": verify}
        record = run_record("export", settings, {"model": model}, files=files, checks=checks)
        write_json(folder / MANIFEST, record)
    return {"files": files, "checks": checks}


def check_choices(kinds: Sequence[str], formats: Sequence[str]) -> None:
    """Refuse unknown kinds and formats, listing the known ones."""
    _check("kind", kinds, (*KINDS, *UNQUANTIZED))
    _check("format", formats, FORMATS)


def _check(what: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        problem = f"unknown {what} {', '.join(unknown)}" if unknown else f"no {what} given"
        raise BadArgument(f"{problem}; choose from: {', '.join(known)}")


def _check_installed(formats: list[str], verify: bool) -> None:
    """Fail before the work, not after the half of it."""
    if "gguf" in formats:
        require("gguf", "llama")
        require("llama_cpp", "llama")
        require("torch", "train")
    if verify:
        require("torch", "train")
        require("transformers", "train")
    if "mlx" in formats:
        try:
            require("mlx_lm", "mlx")
        except NotInstalled as error:
            alone = "; or leave MLX out with --format gguf" if "gguf" in formats else ""
            raise NotInstalled(f"{error}{alone}") from None


def _export_ggufs(
    model: Path,
    folder: Path,
    kinds: list[str],
    spec: ModelSpec,
    reference: Reference | None,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    checks = {}

    def made(file: Path, note: str = "") -> None:
        if reference:
            checks[file.name] = verify_gguf(file, reference)
        progress(_summary(file, checks) + note)

    base = folder / "student-BF16.gguf"
    if any(kind != "F16" for kind in kinds):
        convert_gguf(model, base, spec=spec)
        made(base, "" if "BF16" in kinds else " (to be quantized, not kept)")
    for kind in kinds:
        file = folder / f"student-{kind}.gguf"
        if kind == "F16":
            made(convert_gguf(model, file, dtype="f16", spec=spec))
        elif kind != "BF16":
            made(quantize_gguf(base, file, kind, threads=threads))
    if "BF16" not in kinds:
        base.unlink(missing_ok=True)
    return checks


def _export_mlx(
    model: Path,
    folder: Path,
    kinds: list[str],
    spec: ModelSpec,
    reference: Reference | None,
    progress: Progress,
) -> dict[str, Any]:
    checks = {}
    for bits in dict.fromkeys(None if kind in UNQUANTIZED else bits_of(kind) for kind in kinds):
        target = folder / f"student-mlx-{f'{bits}bit' if bits else 'bf16'}"
        convert_mlx(model, target, bits=bits, spec=spec)
        if reference:
            checks[target.name] = verify_mlx(target, reference)
        progress(_summary(target, checks))
    return checks


def _summary(path: Path, checks: dict[str, Any]) -> str:
    size = f"{path.name}: {_size(path) / 1e6:.1f} MB"
    if check := checks.get(path.name):
        return f"{size}, token ids identical, logit cosine {check['logit_cosine']:.4f}"
    return f"{size}, not verified"


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files)


def _write_checksums(folder: Path) -> None:
    """One line a file, as `sha256sum -c` reads them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
