"""The student before training: any model that transformers loads, as a plain folder with its spec."""

from __future__ import annotations

import errno
import hashlib
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from qe_edge.backends.pretrained import load_pretrained
from qe_edge.console import note, progress
from qe_edge.errors import BadArgument, BadInput, NotFound, require
from qe_edge.student.models import ModelRef, default_spec, resolve
from qe_edge.student.spec import ModelSpec, read_spec, write_spec
from qe_edge.student.template import chat_template
from qe_edge.train.card import write_student_card
from qe_edge.work.files import atomic_path, sha256
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare_student(student: str, workdir: Workdir) -> tuple[str, ModelSpec]:
    """What transformers loads the base model from (a folder or a hub id), and the base's spec.

    A GGUF (a `builtin:` model is one) is unpacked once to `<workdir>/base/<name>-<hash>`: training needs
    plain weights, and merging needs the same ones again.

    Raises:
        BadArgument: the model is an MLX folder, is quantized, or doesn't speak ChatML.
    """
    require("transformers", "train")
    ref = resolve(student)
    if ref.engine == "mlx":
        raise BadArgument(f"{student} is a quantized MLX folder; train the model it was made from")
    if ref.is_gguf:
        name = ref.name.removeprefix("builtin:").removesuffix(".gguf")
        folder = workdir.root / "base" / f"{name}-{sha256(ref.source)[:8]}"
        spec = read_spec(folder) if folder.is_dir() else None
        if spec is None:
            spec = _unpack_gguf(ref, Path(ref.source), folder)
        return str(folder.resolve()), spec
    tokenizer, config = load_tokenizer(ref.source), load_config(ref.source)
    if getattr(config, "quantization_config", None):
        raise BadArgument(f"{student} is quantized; train its unquantized original and quantize at export")
    spec = read_spec(ref.path) if ref.path else None
    if spec is None:
        licensed = _license_of_card(ref)
        spec = msgspec.structs.replace(default_spec(ref, tokenizer.chat_template), license=licensed)
    return str(ref.path.resolve()) if ref.path else ref.name, spec


def untrained(student: str, workdir: Workdir) -> Path:
    """The base as a folder like a merged student's, with its spec: what it is without any training.

    Raises:
        BadArgument: see `prepare_student`.
    """
    source, spec = prepare_student(student, workdir)
    there = Path(source)
    content = [sha256(there) if there.is_dir() else source, spec.to_json()]
    mark = hashlib.sha256(" ".join(content).encode()).hexdigest()[:8]
    folder = workdir.root / "base" / f"{there.name}-untrained-{mark}"
    if not folder.is_dir():
        with atomic_path(folder) as partial:
            save_student(load_model(source, dtype="auto"), load_tokenizer(source), spec, partial)
    return folder


def _unpack_gguf(ref: ModelRef, file: Path, folder: Path) -> ModelSpec:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    require("gguf", "train")
    note(f"unpacking {ref.name} to {folder} (once)")
    try:
        tokenizer = load_pretrained(AutoTokenizer, file.parent, gguf_file=file.name)
        # A bar that transformers offers no way to turn off.
        with progress("unpacking", None), redirect_stderr(StringIO()):
            model = load_pretrained(
                AutoModelForCausalLM,
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise BadInput(f"transformers can't read this GGUF: {error}", path=file) from None
    _restore_digits(tokenizer, file)
    licensed = _gguf_text(file, "general.license")
    spec = msgspec.structs.replace(default_spec(ref, tokenizer.chat_template), license=licensed)
    with atomic_path(folder) as partial:
        save_model(model, partial)
        tokenizer.save_pretrained(partial)
        write_spec(partial, spec)
    return spec


def _restore_digits(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """transformers forgets SmolLM's first cut, into single digits, when it reads the vocabulary of a GGUF."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if _gguf_text(file, "tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )


def _gguf_text(file: Path, key: str) -> str:
    """A text from a GGUF's metadata; empty where it is not there."""
    from gguf import GGUFReader

    field = GGUFReader(str(file)).get_field(key)
    return str(field.contents()) if field else ""


def _license_of_card(ref: ModelRef) -> str:
    """The licence that a folder's or a hub model's card names; empty where there is none, or no network."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard.load(ref.path / "README.md" if ref.path else ref.name)
    except (OSError, ValueError):  # the hub's errors are OSErrors
        return ""
    return str(card.data.license or "")


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub id."""
    from transformers import AutoTokenizer

    try:
        return load_pretrained(AutoTokenizer, source)
    except (OSError, ValueError, KeyError) as error:
        raise NotFound(f"can't load a tokenizer from {source}: {str(error).splitlines()[0]}") from None


def load_config(source: str) -> Any:
    """The configuration of a folder or a hub id: the model's shape, without its weights."""
    from transformers import AutoConfig

    try:
        return load_pretrained(AutoConfig, source)
    except (OSError, ValueError, KeyError) as error:
        raise NotFound(f"can't load a model from {source}: {str(error).splitlines()[0]}") from None


def check_vocabulary(source: str, model_config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer fits the model.

    Raises:
        BadInput: it has ids that the model's embedding table lacks.
    """
    rows = model_config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise BadInput(f"its tokenizer has {len(tokenizer)} tokens, its model only {rows}", path=source)


def load_model(source: str, *, dtype: Any, attention: str | None = None) -> PreTrainedModel:
    """The weights of a folder or a hub id in `dtype`; `attention` is one of transformers' implementations."""
    from transformers import AutoModelForCausalLM

    try:
        return load_pretrained(AutoModelForCausalLM, source, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, KeyError) as error:
        raise NotFound(f"can't load a model from {source}: {str(error).splitlines()[0]}") from None


class Trained(NamedTuple):
    """What `qe-edge train` left in a folder: an adapter of `base`, or all its weights (`full`)."""

    folder: Path
    base: str
    spec: ModelSpec
    full: bool


def open_trained(folder: Path) -> Trained:
    """A folder that SFT or DPO wrote.

    Raises:
        BadInput: it is something else.
    """
    record, spec = read_record(folder), read_spec(folder)
    if spec is None or record.get("command") not in ("train sft", "train dpo"):
        if not Path(folder).exists():
            made = ", ".join(sorted(str(other) for other in folder.parent.glob("[0-9]*[0-9]")))
            raise NotFound(f"{folder}: no such folder of `qe-edge train`{made and f'; there are: {made}'}")
        if spec and record.get("command") in ("merge", "prune"):
            raise BadInput("is a merged model, no longer an adapter: `qe-edge export` takes it", path=folder)
        if (folder / "trainer_state.json").is_file():
            raise BadInput("is a checkpoint: give the training's command again, which ends it", path=folder)
        raise BadInput("is no folder of `qe-edge train`; give one that it wrote", path=folder)
    return Trained(folder, record["base"], spec, full=not (folder / "adapter_config.json").is_file())


def load_trained(trained: Trained, *, dtype: Any, trainable: bool = False) -> PreTrainedModel:
    """The trained model, or its adapter on its base, in `dtype`."""
    if trained.full:
        return load_model(str(trained.folder), dtype=dtype)
    base, peft = load_model(trained.base, dtype=dtype), require("peft", "train")
    return peft.PeftModel.from_pretrained(base, str(trained.folder), is_trainable=trainable)


def save_student(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, folder: Path
) -> None:
    """Save a student that knows its prompt: in its spec, for us, and as the chat template, for all others."""
    save_model(model, folder)
    tokenizer.chat_template = chat_template(spec.prompt, tokenizer.get_added_vocab())
    tokenizer.save_pretrained(folder)
    write_spec(folder, spec)
    write_student_card(folder, spec)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Save weights and configuration; a full disk is an OSError, as everywhere else."""
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None
