"""A merged Hugging Face folder -> an MLX folder for Apple silicon, by mlx-lm's own converter."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

from qe_edge.errors import BadArgument, BadInput, require
from qe_edge.export.gguf import HfConfig, read_config, rope_theta
from qe_edge.export.vocab import read_json
from qe_edge.manifest import atomic_path, write_json
from qe_edge.spec import ModelSpec, write_spec

# What MLX's affine quantization has kernels for.
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def convert_mlx(
    model: Path, out: Path, *, bits: int | None = 4, group_size: int = 64, spec: ModelSpec | None = None
) -> Path:
    """Convert a model folder to an MLX folder; matrices are quantized to `bits`, or bfloat16 if None.

    `group_size` weights of a row share one scale and one offset, both bfloat16. `spec` is written
    beside the weights as `qe_edge.json`.

    Raises:
        BadArgument: bits or a group size that MLX lacks, or one that doesn't divide the model's widths.
        BadInput: the model can't be read.
    """
    mlx_lm = require("mlx_lm", "mlx")
    _, config = read_config(model)
    theta = rope_theta(config, model / "config.json")
    if bits is not None:
        _check_groups(config, bits, group_size)
    with atomic_path(out) as partial:
        try:
            with redirect_stdout(io.StringIO()):
                mlx_lm.convert(
                    str(model),
                    str(partial),
                    quantize=bits is not None,
                    q_bits=bits,
                    q_group_size=group_size,
                    dtype="bfloat16",  # transformers 5 writes `dtype`, mlx-lm reads only `torch_dtype`
                )
        except (ValueError, KeyError, RuntimeError) as error:
            raise BadInput(f"mlx-lm can't convert it: {error}", path=model) from None
        # mlx-lm's Llama knows only the older place of this key, and assumes 10000 without it.
        path = partial / "config.json"
        write_json(path, read_json(path) | {"rope_theta": theta})
        (partial / "README.md").unlink(missing_ok=True)  # a card that says only that the model speaks English
        if spec:
            write_spec(partial, spec)
    return out


def _check_groups(config: HfConfig, bits: int, group_size: int) -> None:
    """mlx-lm silently leaves a layer as it is when the group size doesn't divide its width."""
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise BadArgument(
            f"MLX can't quantize to {bits} bits in groups of {group_size}; "
            f"it has bits {BITS} and group sizes {GROUP_SIZES}"
        )
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_size)
    if any(width % group_size for width in widths):
        fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
        raise BadArgument(
            f"the group size {group_size} doesn't divide all of the model's widths {widths}; "
            f"those that do: {fitting or 'none, so this model can only be exported unquantized'}"
        )
