"""A merged Hugging Face folder -> an MLX folder for Apple silicon, one tensor at a time.

The layout is mlx-lm's: the names of the source, and for a quantized matrix its packed `weight` with `scales`
and `biases`. mlx-lm's own converter writes the same tensors, but holds the whole model in memory.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qe_edge.errors import BadArgument, require
from qe_edge.export.source import HfConfig, Source, read_config
from qe_edge.student.spec import PROVENANCE_FILE, ModelSpec, write_spec
from qe_edge.work.files import atomic_path, read_json, write_json

# What MLX's affine quantization has kernels for.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# mlx-lm's names for more bits where they matter most.
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
SHARD = 2**29  # bytes; one is held in memory
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "generation_config.json"),
)


def convert_mlx(
    model: Path,
    out: Path,
    *,
    bits: int | None = 4,
    group_size: int = 64,
    recipe: str | None = None,
    spec: ModelSpec | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Convert a model folder to an MLX folder; matrices are quantized to `bits`, or bfloat16 if None.

    `group_size` weights of a row share one scale and one offset, both bfloat16. `recipe`, one of RECIPES,
    takes the place of `bits`: its second number goes to the matrices that matter most. `spec` and
    `provenance` are written beside the weights.

    Raises:
        BadArgument: bits, a recipe or a group size that MLX lacks, or one that doesn't divide the widths.
        BadInput: the model can't be converted.
    """
    mx, torch = require("mlx.core", "mlx"), require("torch", "train")
    if recipe is not None:
        bits = low_bits(recipe)
    check_mlx(read_config(model)[1], bits, group_size)
    source = Source(model)
    width_of = _recipe_bits(model, recipe, group_size) if recipe else lambda _: bits
    plan = {name: width_of(name) if len(shape) == 2 else None for name, shape in source.shapes.items()}
    with atomic_path(out) as partial:
        partial.mkdir()
        shards = _Shards(mx, partial)
        for name, to_bits in plan.items():
            # NumPy, through which tensors pass from torch to MLX, has no bfloat16.
            weight = mx.array(source.tensor(name, torch.bfloat16).view(torch.int16).numpy()).view(mx.bfloat16)
            if to_bits is None:
                shards.add({name: weight})
            else:
                packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=to_bits)
                stem = name.removesuffix("weight")
                shards.add({name: packed, f"{stem}scales": scales, f"{stem}biases": biases})
        shards.finish(source.parameters)
        config = read_json(model / "config.json")
        # mlx-lm's Llama knows only the older place of this key, and assumes 10000 without it.
        config["rope_theta"] = source.theta
        if bits is not None:
            whole = {"group_size": group_size, "bits": bits, "mode": "affine"}
            quantized = {name.removesuffix(".weight"): n for name, n in plan.items() if n is not None}
            single = {name: whole | {"bits": n} for name, n in quantized.items()} if recipe else {}
            quantization = whole | single
            config["quantization"] = config["quantization_config"] = quantization
        write_json(partial / "config.json", config)
        for name in TOKENIZER_FILES:
            if (model / name).is_file():
                shutil.copyfile(model / name, partial / name)
        if spec:
            write_spec(partial, spec)
        if provenance:
            write_json(partial / PROVENANCE_FILE, provenance)
    return out


class _Shards:
    """Writes model-0000i-of-0000n.safetensors, of SHARD bytes or a tensor more each, and their index."""

    def __init__(self, mx: Any, folder: Path):
        self.mx, self.folder = mx, folder
        self.shard: dict[str, Any] = {}
        self.saved: list[list[str]] = []  # the tensors of each shard
        self.bytes = 0

    def add(self, tensors: dict[str, Any]) -> None:
        self.mx.eval(list(tensors.values()))
        self.shard |= tensors
        if sum(tensor.nbytes for tensor in self.shard.values()) >= SHARD:
            self._save()

    def _save(self) -> None:
        self.bytes += sum(tensor.nbytes for tensor in self.shard.values())
        file = self.folder / f"{len(self.saved)}.safetensors"
        try:
            self.mx.save_safetensors(str(file), self.shard, metadata={"format": "mlx"})
        except RuntimeError as error:  # MLX's word for a full disk too
            raise OSError(errno.EIO, str(error), str(file)) from None
        self.saved.append(list(self.shard))
        self.shard = {}
        self.mx.clear_cache()

    def finish(self, parameters: int) -> None:
        if self.shard:
            self._save()
        count, weight_map = len(self.saved), dict[str, str]()
        for number, names in enumerate(self.saved):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            (self.folder / f"{number}.safetensors").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        size = {"total_size": self.bytes, "total_parameters": parameters}
        index = {"metadata": size, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)


def low_bits(recipe: str) -> int:
    """The bits of most matrices under a recipe."""
    if recipe not in RECIPES:
        raise BadArgument(f"no MLX recipe {recipe!r}; choose one of: {', '.join(RECIPES)}")
    return int(recipe.split("_")[1])


def _recipe_bits(model: Path, recipe: str, group_size: int) -> Callable[[str], int]:
    """mlx-lm's rule for a recipe, as tensor name -> bits."""
    require("mlx_lm", "mlx")
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model

    network, _ = load_model(model, lazy=True)  # its weights are not read
    rule: Any = mixed_quant_predicate_builder(recipe, network, group_size)
    return lambda name: rule(name.removesuffix(".weight"), None)["bits"]


def check_kernels(bits: int, group_size: int) -> None:
    """Raises BadArgument where MLX has no kernels for such bits or groups."""
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise BadArgument(
            f"MLX can't quantize to {bits} bits in groups of {group_size}; "
            f"it has bits {BITS} and group sizes {GROUP_SIZES}"
        )


def check_mlx(config: HfConfig, bits: int | None, group_size: int) -> None:
    """mlx-lm silently leaves a layer as it is when the group size doesn't divide its width.

    Raises:
        BadArgument: it doesn't, or MLX lacks such bits or groups.
    """
    if bits is None:
        return
    check_kernels(bits, group_size)
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_size)
    if any(width % group_size for width in widths):
        fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
        raise BadArgument(
            f"the group size {group_size} doesn't divide all of the model's widths {widths}; "
            f"those that do: {fitting or 'none, so this model can only be exported unquantized'}"
        )
