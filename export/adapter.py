"""A student's LoRA adapter alone -> a GGUF that llama.cpp applies to the base model's.

The layout is that of llama.cpp's convert_lora_to_gguf.py: both factors of a matrix under its GGUF name with
`.lora_a` and `.lora_b` added, in float32, and alpha in the metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from qe_edge.errors import BadArgument, BadInput, NotFound, require
from qe_edge.export.gguf import add_description, permute_rotary
from qe_edge.export.source import Source
from qe_edge.student.spec import ModelSpec
from qe_edge.work.files import atomic_path, read_json
from qe_edge.work.runs import read_record

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LoraSettings(msgspec.Struct):
    """The keys of adapter_config.json that decide what an adapter computes."""

    peft_type: str
    r: int
    lora_alpha: float
    bias: str = "none"
    use_dora: bool = False
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}


def adapter_of(model: Path) -> Path:
    """The adapter that a merged model was made from.

    Raises:
        BadArgument: there is none, or it is gone.
    """
    made_from = read_record(model).get("inputs", {}).get("adapter", {}).get("path")
    if not made_from or not (Path(made_from) / CONFIG).is_file():
        raise BadArgument(f"{model} wasn't merged from a LoRA adapter that is still there: no --adapter")
    return Path(made_from)


def base_folder(adapter: Path) -> Path:
    """The folder of the model that an adapter adapts, in the hub's cache if it was named by an id.

    Raises:
        NotFound: it is gone.
    """
    from transformers.utils import cached_file

    base = read_record(adapter).get("base", "")
    if base and Path(base).is_dir():
        return Path(base)
    try:
        found = cached_file(base, "config.json", local_files_only=True)
    except OSError:
        found = None
    if found is None:
        raise NotFound(f"{base}, the base model of {adapter}, isn't there any more; leave out --adapter")
    return Path(found).parent


def convert_adapter(
    adapter: Path,
    source: Source,
    out: Path,
    *,
    spec: ModelSpec | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Convert a PEFT folder to a GGUF adapter; `source` is the merged model, for its shape.

    Raises:
        BadInput: it isn't plain LoRA on matrices that the model has, or holds NaN.
    """
    gguf, torch = require("gguf", "llama"), require("torch", "train")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _settings(adapter / CONFIG)
    try:
        weights = load_file(adapter / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"not a whole safetensors file: {error}", path=adapter / WEIGHTS) from None
    layers = source.config.num_hidden_layers
    arch = gguf.MODEL_ARCH[source.architecture]
    names = gguf.get_tensor_name_map(arch, layers)
    with atomic_path(out) as partial:
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[arch])
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings.lora_alpha)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        add_description(writer, gguf.GGUFType.ADAPTER, spec, provenance)
        for key, tensor in weights.items():
            name, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
            if part not in ("A", "B") or f"{name}.weight" not in source.shapes:
                raise BadInput(f"{key} adapts nothing that the model has", path=adapter / WEIGHTS)
            if not tensor.isfinite().all():
                raise BadInput(f"{key} holds NaN or infinite weights; the training diverged", path=adapter)
            tensor = tensor.to(torch.float32)
            if part == "B":  # it gives the matrix its rows
                tensor = permute_rotary(f"{name}.weight", tensor, source)
            writer.add_tensor(f"{names.get_name(name)}.weight.lora_{part.lower()}", tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def _settings(path: Path) -> LoraSettings:
    try:
        settings = msgspec.convert(read_json(path), LoraSettings)
    except msgspec.ValidationError as error:
        raise BadInput(str(error), path=path) from None
    plain = LoraSettings("LORA", settings.r, settings.lora_alpha)
    if msgspec.structs.replace(settings, modules_to_save=settings.modules_to_save or None) != plain:
        raise BadInput("isn't plain LoRA, the only kind that can be converted", path=path)
    return settings
