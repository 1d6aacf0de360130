"""A merged Hugging Face folder -> a GGUF file for llama.cpp.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Key and tensor names come from the
`gguf` package; what the values mean follows llama.cpp's own converter. Tensors are read, cast and
written one at a time, in an order that does not depend on how the source is sharded.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from qe_edge.errors import BadArgument, BadInput, require
from qe_edge.export.vocab import add_vocabulary, read_json
from qe_edge.manifest import atomic_path
from qe_edge.spec import GGUF_KEY, ModelSpec

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

Dtype = Literal["f16", "bf16", "f32"]

# Hugging Face's class name -> the name in `gguf.MODEL_ARCH`, and in llama.cpp in lower case.
ARCHITECTURES = {"Qwen3ForCausalLM": "QWEN3", "LlamaForCausalLM": "LLAMA"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class HfConfig(msgspec.Struct):
    """The keys of config.json that decide the weights' layout and the computation."""

    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int
    num_attention_heads: int
    num_hidden_layers: int
    rms_norm_eps: float
    vocab_size: int
    head_dim: int | None = None
    hidden_act: str = "silu"
    num_key_value_heads: int | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    tie_word_embeddings: bool = False
    use_sliding_window: bool = False

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


def convert_gguf(model: Path, out: Path, *, dtype: Dtype = "bf16", spec: ModelSpec | None = None) -> Path:
    """Convert a model folder to one GGUF file; matrices are stored in `dtype`, vectors in float32.

    Needs config.json, safetensors (one file, or shards with their index), tokenizer.json and a chat
    template. Tied embeddings are stored once. `spec` is stored under the key `qe_edge.spec`.

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
    architecture, config = read_config(model)
    theta = rope_theta(config, model / "config.json")
    shapes = expected_shapes(architecture, config)
    stored = {name: types["f32" if len(shape) == 1 else dtype] for name, shape in shapes.items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)

    with ExitStack() as stack:
        tensors = _open_tensors(model, stack)
        _check_tensors(model, tensors, shapes, tied=config.tie_word_embeddings)
        partial = stack.enter_context(atomic_path(out))
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture]])
        stack.callback(writer.close)
        writer.add_file_type(types[dtype][2])
        _add_metadata(writer, config, theta, spec)
        add_vocabulary(writer, model, config.vocab_size)
        for name, (element, code, _) in stored.items():
            size = math.prod(shapes[name]) * element.itemsize
            short = names.get_name(name, try_suffixes=(".weight",))
            # The NumPy type matters only where no type code is given.
            writer.add_tensor_info(short, shapes[name], np.dtype(np.void), size, raw_dtype=code)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (element, _, _) in stored.items():
            tensor = tensors[name].get_tensor(name)
            if architecture == "LLAMA":
                tensor = _permute_rotary(name, tensor, config)
            _write(writer, _cast(tensor, element, name, model), out)
    return out


def read_config(model: Path) -> tuple[str, HfConfig]:
    """The architecture's name in `gguf`, and the model's hyper-parameters, checked to be convertible."""
    path = model / "config.json"
    content = read_json(path)
    found = ", ".join(content.get("architectures") or ["none"])
    if found not in ARCHITECTURES:
        raise BadInput(
            f"the architecture {found} can't be converted; {' and '.join(ARCHITECTURES)} can", path=path
        )
    try:
        config = msgspec.convert(content, HfConfig)
    except msgspec.ValidationError as error:
        raise BadInput(str(error), path=path) from None
    if config.hidden_act != "silu":
        raise BadInput(f"hidden_act {config.hidden_act!r} can't be converted, only 'silu'", path=path)
    if config.use_sliding_window:
        raise BadInput("use_sliding_window can't be converted; only full attention can", path=path)
    return ARCHITECTURES[found], config


def rope_theta(config: HfConfig, path: Path) -> float:
    """The rotary base frequency; transformers 5 writes it to `rope_parameters`, older ones to `rope_theta`.

    A missing one is refused: llama.cpp would assume 10000, and the model would write nonsense.
    """
    rope = config.rope_parameters or config.rope_scaling or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise BadInput(f"rope scaling ({kind}) can't be converted, only plain rotary positions", path=path)
    theta = rope.get("rope_theta", config.rope_theta)
    if not isinstance(theta, int | float):
        raise BadInput("has no rope_theta (neither in rope_parameters nor on its own)", path=path)
    return float(theta)


def expected_shapes(architecture: str, config: HfConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape (rows, columns) of every tensor the model must have, in the order they are written."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    if architecture == "QWEN3":
        layer |= {"self_attn.q_norm": (config.head_size,), "self_attn.k_norm": (config.head_size,)}
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden)}
    for number in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (config.vocab_size, hidden)
    return shapes


def _open_tensors(model: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name -> the open safetensors file that holds it; nothing is read yet."""
    safetensors = require("safetensors", "train")
    tensors: dict[str, Any] = {}
    for path in _weight_files(model):
        try:
            file = stack.enter_context(safetensors.safe_open(path, "pt"))
        except (OSError, safetensors.SafetensorError) as error:
            raise BadInput(f"not a whole safetensors file: {error}", path=path) from None
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def _weight_files(model: Path) -> Iterator[Path]:
    index = model / "model.safetensors.index.json"
    if not index.is_file():
        yield model / "model.safetensors"
        return
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise BadInput("has no weight_map", path=index)
    for name in sorted(set(weight_map.values())):
        if name != Path(name).name:
            raise BadInput(f"names a shard outside the model folder: {name}", path=index)
        yield model / name


def _check_tensors(
    model: Path, tensors: dict[str, Any], shapes: dict[str, tuple[int, ...]], *, tied: bool
) -> None:
    """Refuse a model whose tensors aren't exactly the expected ones: each has a place, or it is a mistake."""
    if missing := [name for name in shapes if name not in tensors]:
        raise BadInput(f"lacks {_some(missing)}", path=model)
    # Some savers store the head of a tied model too; it is the embedding again, and is not read.
    known = shapes.keys() | ({_HEAD} if tied else set())
    if extra := sorted(tensors.keys() - known):
        raise BadInput(f"holds tensors that have no place in a GGUF: {_some(extra)}", path=model)
    for name, shape in shapes.items():
        info = tensors[name].get_slice(name)
        if tuple(info.get_shape()) != shape:
            raise BadInput(f"{name} has shape {info.get_shape()}, config.json says {list(shape)}", path=model)
        if info.get_dtype() not in ("BF16", "F16", "F32"):
            raise BadInput(
                f"{name} is stored as {info.get_dtype()}; convert from the unquantized model", path=model
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _add_metadata(writer: GGUFWriter, config: HfConfig, theta: float, spec: ModelSpec | None) -> None:
    gguf = require("gguf", "llama")
    writer.add_type("model")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if spec:
        writer.add_name(f"{Path(spec.base_model).name} {spec.stage}, query expansion")
        writer.add_string(GGUF_KEY, spec.to_json())
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.kv_heads)
    # Without these, llama.cpp takes hidden_size / heads, which is wrong for most Qwen3 sizes.
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _permute_rotary(name: str, tensor: Tensor, config: HfConfig) -> Tensor:
    """Reorder the rows of Llama's query and key projections.

    transformers rotates a head's first half against its second, llama.cpp's Llama (unlike its Qwen3)
    even rows against odd ones; see `LlamaModel.permute` in llama.cpp's converter.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def _cast(tensor: Tensor, element: Any, name: str, model: Path) -> Tensor:
    cast = tensor.to(element)
    if not cast.isfinite().all():
        if tensor.isfinite().all():
            raise BadInput(f"{name} has values too large for {element}; convert to bf16", path=model)
        raise BadInput(f"{name} holds NaN or infinite weights; the training diverged", path=model)
    return cast.contiguous()


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
