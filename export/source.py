"""A merged Hugging Face folder as the converters read it: checked first, then one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from qe_edge.errors import BadInput, NotFound, require
from qe_edge.work.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

# Hugging Face's class name -> the name in `gguf.MODEL_ARCH`, and in llama.cpp in lower case.
ARCHITECTURES = {"Qwen3ForCausalLM": "QWEN3", "Qwen2ForCausalLM": "QWEN2", "LlamaForCausalLM": "LLAMA"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Size = Annotated[int, msgspec.Meta(ge=1)]


class HfConfig(msgspec.Struct):
    """The keys of config.json that decide the weights' layout and the computation."""

    hidden_size: Size
    intermediate_size: Size
    max_position_embeddings: Size
    num_attention_heads: Size
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    rms_norm_eps: float
    vocab_size: Size
    head_dim: Size | None = None
    hidden_act: str = "silu"
    num_key_value_heads: Size | None = None
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


class Source:
    """A model folder with config.json and safetensors (one file, or shards with their index).

    Args:
        model: the folder. Nothing but JSON and safetensors is read; no code of it is run.

    Raises:
        NotFound, BadInput: it is missing or no model folder, or the architecture, its settings or a tensor
            can't be converted.
    """

    def __init__(self, model: Path):
        self.model = model
        self.architecture, self.config = read_config(model)
        self.theta = rope_theta(self.config, model / "config.json")
        self.shapes = expected_shapes(self.architecture, self.config)
        self._files = self._check_tensors()

    @property
    def parameters(self) -> int:
        """How many weights there are; tied embeddings count once."""
        return sum(map(math.prod, self.shapes.values()))

    def tensor(self, name: str, element: Any, *, rows: slice = slice(None)) -> Tensor:
        """A tensor, or some of its rows, in another dtype of torch.

        Raises:
            BadInput: it holds NaN or infinite values, or values too large for `element`.
        """
        # Opened anew each time, or all that was ever read of the file would stay mapped.
        with self._open(self._files[name]) as file:
            tensor = file.get_slice(name)[rows]
        cast = tensor.to(element)
        if not _finite(cast):
            if _finite(tensor):
                raise BadInput(f"{name} has values too large for {element}; convert to bf16", path=self.model)
            raise BadInput(f"{name} holds NaN or infinite weights; the training diverged", path=self.model)
        return cast.contiguous()

    def _open(self, path: Path) -> Any:
        safetensors = require("safetensors", "train")
        try:
            return safetensors.safe_open(path, "pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise BadInput(f"not a whole safetensors file: {error}", path=path) from None

    def _check_tensors(self) -> dict[str, Path]:
        """Tensor name -> its file; a tensor that is missing, has no place or another shape is refused."""
        files: dict[str, Path] = {}
        infos: dict[str, tuple[list[int], str]] = {}
        for path in _weight_files(self.model):
            with self._open(path) as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    part = file.get_slice(name)
                    files[name], infos[name] = path, (part.get_shape(), part.get_dtype())
        if missing := [name for name in self.shapes if name not in files]:
            raise BadInput(f"lacks {_some(missing)}", path=self.model)
        # Some savers store the head of a tied model too; it is the embedding again, and is not read.
        known = self.shapes.keys() | ({HEAD} if self.config.tie_word_embeddings else set())
        if extra := sorted(files.keys() - known):
            raise BadInput(f"holds tensors that have no place in the export: {_some(extra)}", path=self.model)
        for name, shape in self.shapes.items():
            found, dtype = infos[name]
            if tuple(found) != shape:
                raise BadInput(f"{name} has shape {found}, config.json says {list(shape)}", path=self.model)
            if dtype not in ("BF16", "F16", "F32"):
                raise BadInput(
                    f"{name} is stored as {dtype}; convert from the unquantized model", path=self.model
                )
        return files


def _finite(tensor: Tensor) -> bool:
    """Whether no weight is NaN or infinite; `isfinite` on a whole tensor would take twice its memory."""
    return all(bound.isfinite().item() for bound in tensor.aminmax())


def read_config(model: Path) -> tuple[str, HfConfig]:
    """The architecture's name in `gguf`, and the model's hyper-parameters, checked to be convertible.

    Raises:
        NotFound: there is no such folder.
        BadInput: it is no model folder, or of a model that can't be converted.
    """
    path = model / "config.json"
    if not model.exists():
        raise NotFound(f"{model}: no such model folder")
    if not path.is_file():
        if (model / "adapter_config.json").exists():
            raise BadInput(
                "is an adapter; merge it into its base with `qe-edge merge`, and export that", path=model
            )
        why = "holds no config.json, so it is no model folder" if model.is_dir() else "is a file"
        raise BadInput(
            f"{why}; the folder of a merged model is wanted, as `qe-edge merge` writes it", path=model
        )
    content = read_json(path)
    if "model_file" in content:  # mlx-lm would run it
        raise BadInput("names a file of code, model_file, which is not run", path=path)
    if content.get("quantization_config") or content.get("quantization"):
        raise BadInput("is quantized; export the model that it was made from", path=model)
    found = ", ".join(content.get("architectures") or ["none"])
    if found not in ARCHITECTURES:
        raise BadInput(
            f"the architecture {found} can't be converted; those that can: {', '.join(ARCHITECTURES)}",
            path=path,
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
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if architecture == "QWEN3":
        head = (config.head_size,)
        layer |= {"self_attn.q_norm.weight": head, "self_attn.k_norm.weight": head}
    elif architecture == "QWEN2":
        layer |= {
            "self_attn.q_proj.bias": (queries,),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.bias": (keys,),
        }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for number in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
