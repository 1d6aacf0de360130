"""`qe-edge export`: a merged student -> GGUF files for llama.cpp and MLX folders, each one checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec

from qe_edge.console import several
from qe_edge.errors import BadArgument, BadInput, NotInstalled, require
from qe_edge.export.adapter import adapter_of, base_folder, convert_adapter
from qe_edge.export.card import write_card, write_modelfile
from qe_edge.export.config import ExportConfig
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.imatrix import Importance, calibration_rows, measure_importance
from qe_edge.export.lineage import provenance, training_data, training_selection
from qe_edge.export.mixed import check_budget, choose_types
from qe_edge.export.mlx import RECIPES, check_kernels, check_mlx, convert_mlx, low_bits
from qe_edge.export.probes import QUERIES, Reference, load_reference
from qe_edge.export.quantize import KINDS, MIXED, NEED_IMPORTANCE, bits_of, quantize_gguf
from qe_edge.export.source import Source
from qe_edge.export.verify import CHECKSUMS, verify_gguf, verify_mlx
from qe_edge.student.spec import ModelSpec, read_spec
from qe_edge.train.base_model import load_tokenizer
from qe_edge.train.config import SftConfig
from qe_edge.work.files import MANIFEST, atomic_path, near, sha256, size_of, write_json
from qe_edge.work.runs import check_output, learnt_by, run_record

FORMATS = ("gguf", "mlx")
ADAPTER = "adapter"  # the folder of the adapter's GGUF
UNQUANTIZED = ("BF16", "F16")
# Nats of KL divergence of answers. Q4_K_M's is .031 for Qwen2.5-0.5B and .037 for SmolLM2-135M; at .3 and
# more nearly a third of SmolLM2's likeliest next tokens were others than the source's.
FAR = 0.2

Progress = Callable[[str], None]


def export_model(
    model: Path,
    out: Path,
    config: ExportConfig | None = None,
    *,
    progress: Progress = lambda message: None,
) -> dict[str, Any]:
    """Export a merged model folder to the folder `out`, whole or not at all.

    Writes `student-<kind>.gguf` for every kind, one `student-mlx-<bits>bit` folder for every number of
    bits among the kinds (`student-mlx-bf16` for BF16 and F16), a model card (README.md), a Modelfile
    for Ollama, SHA256SUMS and run.json; `student-mixed.gguf` and `adapter/student-lora.gguf` where they are
    wanted. An older `out` is replaced, and stays if anything fails.

    Returns:
        `files` (name -> bytes), `checks` (name -> what `verify_gguf` or `verify_mlx` found), `calibration`
        and, of a mixed file, `types` (GGUF tensor -> type); None without. The checks include the BF16 GGUF
        that is quantized from, the only one exact enough to show a fault of the conversion itself.

    Raises:
        BadArgument: an unknown kind or format, one that needs calibration and has none, or an `out` that
            holds something else.
        NotInstalled: a format's extra is missing.
        NotFound, BadInput: the model is missing, has no qe-edge spec, or can't be converted.
        QeEdgeError: an export doesn't answer as its source does.
    """
    config = config or ExportConfig()
    check_choices(config)
    kinds, formats = list(dict.fromkeys(config.kinds)), list(dict.fromkeys(config.formats))
    _check_installed(formats, config.verify)
    source = Source(model)  # first: what is no model at all has no spec either
    spec = read_spec(model)
    if spec is None:
        raise BadInput("has no qe_edge.json, which holds its prompt; `qe-edge merge` writes it", path=model)
    check_output(out, "export")
    if config.mixed:
        check_budget(source, _budget(config, source))
    if "mlx" in formats:
        for width in mlx_widths(config):
            check_mlx(source.config, width, config.mlx_group)
    lora = adapter_of(model) if config.adapter else None
    base = base_folder(lora) if lora else None
    calibration = _calibrate(source, spec, config, progress)
    reference = None
    if config.verify:
        progress("asking the source model, in float32")
        reference = load_reference(model)
    origin = provenance(model, spec)
    checks: dict[str, Any] = {}
    types: dict[str, str] | None = None
    with atomic_path(out) as folder:
        folder.mkdir()
        work = _Export(config, source, folder, spec, origin, calibration, reference, progress)
        if "gguf" in formats:
            made, types = work.ggufs(kinds)
            checks |= made
            if lora and base:
                checks |= work.adapter(lora, base)
        if "mlx" in formats:
            checks |= work.mlx()
        files = {path.name: size_of(path) for path in sorted(folder.iterdir())}
        write_card(folder, spec, files, checks, calibration.importance if calibration else None)
        if ggufs := [name for name in files if name.endswith(".gguf")]:
            write_modelfile(folder, spec, min(ggufs, key=files.__getitem__))
        _write_checksums(folder)
        measured = calibration.importance.describe() if calibration else None
        warnings = [told for name in files if name in checks and (told := far(name, checks[name]))]
        for warning in warnings:
            progress(f"warning: {warning}")
        found: dict[str, Any] = {"files": files, "checks": checks, "calibration": measured, "types": types}
        found |= {"warnings": warnings, "languages": spec.prompt.languages}
        record = run_record(
            "export", msgspec.to_builtins(config, enc_hook=str), {"model": model}, **found, **learnt_by(model)
        )
        # So that both can be moved together.
        record["inputs"]["model"]["path"] = os.path.relpath(model, out)
        write_json(folder / MANIFEST, record)
    return found


class _Calibration(NamedTuple):
    """Expansions as token ids, each with the place where its answer starts, and what they weigh."""

    rows: list[tuple[list[int], int]]
    importance: Importance


def _calibrate(
    source: Source, spec: ModelSpec, config: ExportConfig, progress: Progress
) -> _Calibration | None:
    """On the named expansions, or those that the student was trained on; some kinds can't do without."""
    if "gguf" not in config.formats or not (config.mixed or any(bits_of(kind) < 8 for kind in config.kinds)):
        return None
    selection = SftConfig() if config.calibrate else training_selection(source.model)
    files = [Path(file) for file in config.calibrate]
    if not files and not config.no_calibrate:
        files = training_data(source.model)
    if files:
        progress(f"importance matrix from {', '.join(str(near(file)) for file in files)}")
        rows = calibration_rows(files, selection, spec, load_tokenizer(str(source.model)))
        return _Calibration(rows, measure_importance(source, rows, files))
    needing = [kind for kind in config.kinds if kind in NEED_IMPORTANCE] + ["a mixed file"] * config.mixed
    if needing:
        raise BadArgument(
            f"{', '.join(needing)} needs an importance matrix; name expansions for it with --calibrate"
        )
    if not config.no_calibrate:
        progress("no importance matrix: name expansions to measure it on with --calibrate")
    return None


def check_choices(config: ExportConfig) -> None:
    """Refuse what is unknown, listing what is known, and what would be left out without a word."""
    _check("kind", config.kinds, (*KINDS, *UNQUANTIZED))
    _check("format", config.formats, FORMATS)
    of_gguf = {"--budget-mb or --target-bpw": config.mixed, "--adapter": config.adapter}
    of_gguf["--calibrate"] = bool(config.calibrate)
    changed = (config.mlx_bits, config.mlx_group, config.mlx_recipe) != (None, 64, None)
    for given, needed in ((of_gguf, "gguf"), ({"--mlx-…": changed}, "mlx")):
        for name, is_given in given.items():
            if is_given and needed not in config.formats:
                raise BadArgument(f"{name} needs the format {needed}, which --format leaves out")
    if config.calibrate and not config.mixed and all(bits_of(kind) >= 8 for kind in config.kinds):
        raise BadArgument(
            f"--calibrate changes nothing for {', '.join(config.kinds)}: only kinds below 8 bits use it"
        )
    check_kernels(4 if config.mlx_bits is None else config.mlx_bits, config.mlx_group)
    if config.mlx_recipe is not None:
        _check("MLX recipe", [config.mlx_recipe], RECIPES)


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


class _Export(NamedTuple):
    """One export on its way: what it is made from, and the folder that its files go to."""

    config: ExportConfig
    source: Source
    folder: Path
    spec: ModelSpec
    origin: dict[str, Any]
    calibration: _Calibration | None
    reference: Reference | None
    progress: Progress

    def ggufs(self, kinds: list[str]) -> tuple[dict[str, Any], dict[str, str] | None]:
        """Write a GGUF of each kind, and a mixed one; returns what was found of each, and the mixed types."""
        checks: dict[str, Any] = {}

        def made(file: Path, note: str = "") -> None:
            if self.reference:
                checks[file.name] = verify_gguf(file, self.reference)
            self.progress(_summary(file, checks) + note)

        described: dict[str, Any] = {"spec": self.spec, "provenance": self.origin}
        importance = self.calibration.importance if self.calibration else None
        model, base = self.source.model, self.folder / "student-BF16.gguf"
        if self.config.mixed or any(kind != "F16" for kind in kinds):
            convert_gguf(model, base, **described)
            made(base, "" if "BF16" in kinds else " (to be quantized, not kept)")
        for kind in kinds:
            file = self.folder / f"student-{kind}.gguf"
            if kind == "F16":
                made(convert_gguf(model, file, dtype="f16", **described))
            elif kind != "BF16":
                made(quantize_gguf(base, file, kind, importance=importance))
        types = self._mixed(base, made) if self.config.mixed else None
        if "BF16" not in kinds:
            base.unlink(missing_ok=True)
        return checks, types

    def _mixed(self, base: Path, made: Callable[[Path], None]) -> dict[str, str]:
        assert self.calibration  # checked before anything was written
        self.progress("measuring what each type does to the answers")
        rows, importance = self.calibration
        with TemporaryDirectory(dir=self.folder) as scratch:
            budget = _budget(self.config, self.source)
            types = choose_types(self.source, base, rows, importance, budget, Path(scratch))
        file = self.folder / "student-mixed.gguf"
        made(quantize_gguf(base, file, MIXED, importance=importance, types=types))
        return types

    def adapter(self, adapter: Path, base: Path) -> dict[str, Any]:
        """Write the adapter's GGUF; it is checked on the base model's, which isn't kept."""
        checks: dict[str, Any] = {}
        described: dict[str, Any] = {"spec": self.spec, "provenance": self.origin}
        # In a folder of its own, where nobody takes it for a model.
        file = convert_adapter(adapter, self.source, self.folder / ADAPTER / "student-lora.gguf", **described)
        if self.reference:
            whole = convert_gguf(base, self.folder / "base.gguf", spec=self.spec)
            checks[ADAPTER] = verify_gguf(whole, self.reference, adapter=file)
            whole.unlink()
        self.progress(_summary(file.parent, checks))
        return checks

    def mlx(self) -> dict[str, Any]:
        """Write an MLX folder of each number of bits; returns what was found of each."""
        checks: dict[str, Any] = {}
        for bits in mlx_widths(self.config):
            name = self.config.mlx_recipe or (f"{bits}bit" if bits else "bf16")
            target = convert_mlx(
                self.source.model,
                self.folder / f"student-mlx-{name}",
                bits=bits,
                group_size=self.config.mlx_group,
                recipe=self.config.mlx_recipe,
                spec=self.spec,
                provenance=self.origin,
            )
            if self.reference:
                checks[target.name] = verify_mlx(target, self.reference)
            self.progress(_summary(target, checks))
        return checks


def _budget(config: ExportConfig, source: Source) -> int:
    """Bytes of the mixed file."""
    if config.budget_mb is not None:
        return int(config.budget_mb * 1e6)
    assert config.target_bpw is not None
    return int(source.parameters * config.target_bpw / 8)


def mlx_widths(config: ExportConfig) -> list[int | None]:
    """The bits of each MLX folder to write, None for bfloat16; MLX has none below 2."""
    if config.mlx_recipe is not None:
        return [low_bits(config.mlx_recipe)]
    if config.mlx_bits is not None:
        return [config.mlx_bits]
    return list(
        dict.fromkeys(None if kind in UNQUANTIZED else _beside(bits_of(kind)) for kind in config.kinds)
    )


def _beside(bits: int) -> int:
    """The bits of MLX beside a GGUF kind of so many.

    MLX's groups have no importance matrix and no larger type for the tensors that matter most: at 4 bits a
    0.5B student's answers diverged by .12 nats and a 135M one's by .59, at 5 by .034 and .10, in less space
    than Q4_K_M takes (.031 and .037).
    """
    return 5 if bits == 4 else max(2, bits)


def far(name: str, check: dict[str, Any]) -> str:
    """What to say of an export that is sound, but whose answers are often others; of another one, nothing."""
    if check["answer_divergence"] <= FAR:
        return ""
    return (
        f"{name} often answers otherwise than its source (KL divergence of answers "
        f"{check['answer_divergence']:.2f} nats, over {FAR}): take more bits, or measure what it "
        "costs with `qe-edge bench`"
    )


def _summary(path: Path, checks: dict[str, Any]) -> str:
    size = f"{path.name}: {size_of(path) / 1e6:.1f} MB"
    if check := checks.get(path.name):
        of_answers = f"within answers {check['answer_divergence']:.4f}"
        # MLX on a slow machine. Beside the line of a file that was asked everything, this one misleads.
        asked = several(check["queries"], "query", "queries")
        sample = f", compared on {asked} of {len(QUERIES)}" if check["queries"] < len(QUERIES) else ""
        return (
            f"{size}, token ids identical{sample}\n  logit cosine {check['logit_cosine']:.4f}, "
            f"KL divergence {check['kl_divergence']:.4f} nats a token ({of_answers})"
        )
    return f"{size}, not verified"


def _write_checksums(folder: Path) -> None:
    """One line a file, as `sha256sum -c` reads them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
