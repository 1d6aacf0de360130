"""A merged Hugging Face folder -> a GGUF file for llama.cpp.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Key and tensor names come from the
`gguf` package; what the values mean follows llama.cpp's own converter. Tensors are read, cast and
written one at a time, in an order that does not depend on how the source is sharded.
"""

from __future__ import annotations

import errno
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from qe_edge.console import progress
from qe_edge.errors import BadArgument, require
from qe_edge.export.source import Source
from qe_edge.export.vocab import add_vocabulary
from qe_edge.student.spec import GGUF_KEY, PROVENANCE_KEY, ModelSpec, is_hub_id
from qe_edge.work.files import atomic_path

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

Dtype = Literal["f16", "bf16", "f32"]


def convert_gguf(
    model: Path,
    out: Path,
    *,
    dtype: Dtype = "bf16",
    spec: ModelSpec | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Convert a model folder to one GGUF file; matrices are stored in `dtype`, vectors in float32.

    Needs config.json, safetensors (one file, or shards with their index), tokenizer.json and a chat
    template. Tied embeddings are stored once. `spec` is stored under the key `qe_edge.spec`, and `provenance`
    as JSON under `qe_edge.provenance`.

    Raises:
        BadArgument: an unknown `dtype`.
        BadInput: the architecture, its settings, a tensor or the tokenizer can't be converted.
    """
    gguf = require("gguf", "llama")
    torch = require("torch", "train")
    types = {
        "f32": (torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        "f16": (torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    }
    if dtype not in types:
        raise BadArgument(f"no dtype {dtype!r}; choose one of: {', '.join(types)}")
    source = Source(model)
    architecture, config, shapes = source.architecture, source.config, source.shapes
    stored = {name: types["f32" if len(shape) == 1 else dtype] for name, shape in shapes.items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)

    with ExitStack() as stack:
        partial = stack.enter_context(atomic_path(out))
        advance = stack.enter_context(progress(f"converting to {out.name}", len(stored)))
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture]])
        stack.callback(writer.close)
        writer.add_file_type(types[dtype][2])
        add_header(writer, source, spec, provenance)
        for name, (element, code, _) in stored.items():
            size = math.prod(shapes[name]) * element.itemsize
            short = names.get_name(name, try_suffixes=(".weight", ".bias"))
            # The NumPy type matters only where no type code is given.
            writer.add_tensor_info(short, shapes[name], np.dtype(np.void), size, raw_dtype=code)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (element, _, _) in stored.items():
            _write(writer, permute_rotary(name, source.tensor(name, element), source), out)
            advance()
    return out


def add_header(
    writer: GGUFWriter, source: Source, spec: ModelSpec | None, provenance: dict[str, Any] | None
) -> None:
    """All keys that don't depend on how the tensors are stored."""
    gguf = require("gguf", "llama")
    writer.add_size_label(gguf.size_label(source.parameters, source.parameters, 0, 0))
    add_description(writer, gguf.GGUFType.MODEL, spec, provenance)
    _add_metadata(writer, source)
    add_vocabulary(writer, source.model, source.config.vocab_size)


def add_description(
    writer: GGUFWriter, kind: str, spec: ModelSpec | None, provenance: dict[str, Any] | None
) -> None:
    """What the file is, for people and hubs, and what our own runtime reads; `kind` is model or adapter."""
    writer.add_type(kind)
    if spec:
        base = Path(spec.base_model).name
        writer.add_name(f"{base} {spec.stage}, query expansion")
        writer.add_finetune(spec.stage)
        writer.add_languages(list(spec.prompt.languages))
        writer.add_tags(["query-expansion", "information-retrieval"])
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
        if is_hub_id(spec.base_model):
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{spec.base_model}")
        if spec.license:
            writer.add_license(spec.license)
        writer.add_string(GGUF_KEY, spec.to_json())
    if provenance:
        writer.add_string(PROVENANCE_KEY, msgspec.json.encode(provenance).decode())


def _add_metadata(writer: GGUFWriter, source: Source) -> None:
    gguf, config = require("gguf", "llama"), source.config
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.kv_heads)
    if config.head_dim:  # without it llama.cpp takes hidden_size / heads, too
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
    writer.add_rope_freq_base(source.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if source.architecture == "LLAMA":  # as llama.cpp's own converter; both follow from the rest
        writer.add_rope_dimension_count(config.head_size)
        writer.add_vocab_size(config.vocab_size)


def permute_rotary(name: str, tensor: Tensor, source: Source) -> Tensor:
    """Reorder the rows of Llama's query and key projections; every other tensor stays as it is.

    transformers rotates a head's first half against its second, llama.cpp's Llama (unlike its Qwen3)
    even rows against odd ones; see `LlamaModel.permute` in llama.cpp's converter.
    """
    heads = _rotary_heads(name, source)
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape).contiguous()


def unpermute_rotary(name: str, tensor: Tensor, source: Source) -> Tensor:
    """A tensor of a GGUF in its source's order of rows."""
    heads = _rotary_heads(name, source)
    if heads is None:
        return tensor
    return tensor.reshape(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape).contiguous()


def _rotary_heads(name: str, source: Source) -> int | None:
    """How many heads a matrix has whose rows llama.cpp orders otherwise; None for all other tensors."""
    if source.architecture != "LLAMA":
        return None
    return {"q_proj": source.config.num_attention_heads, "k_proj": source.config.kv_heads}.get(
        name.split(".")[-2]
    )


def _write(writer: GGUFWriter, tensor: Tensor, out: Path) -> None:
    import torch

    # NumPy has no bfloat16; the writer needs only the bytes.
    array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    try:
        writer.write_tensor_data(array)
    except OSError as error:
        # NumPy reports a full disk without saying so.
        raise OSError(
            error.errno or errno.ENOSPC, os.strerror(error.errno or errno.ENOSPC), str(out)
        ) from error
