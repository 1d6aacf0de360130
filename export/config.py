"""The settings of `export`, said once: recipes are read into them, flags are made of them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from qe_edge.records import said


class PruneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which tokens of a model's vocabulary stay: those of these texts, or the most frequent ones of them."""

    vocab_of: Annotated[
        tuple[str, ...],
        said("Keep the tokens of these: expansions, data sets (default: the expansions it was trained on)."),
    ] = ()
    vocab_size: Annotated[
        Annotated[int, Meta(ge=1)] | None, said("Keep about so many, the most frequent (default: all).")
    ] = None


class ExportConfig(
    PruneConfig,
    frozen=True,
    forbid_unknown_fields=True,
    kw_only=True,
    rename={"kinds": "quant", "formats": "format"},
):
    """Which files a student becomes.

    With `budget_mb` or `target_bpw` comes a mixed GGUF of at most so much, whose tensors have the types that
    change the answers least (see `choose_types`). `calibrate` names the expansions that the importance matrix
    of the quantized GGUFs is measured on: by default those that the student was trained on, where they are at
    hand. Bits or a recipe of MLX take the place of what the kinds say.
    """

    kinds: Annotated[tuple[str, ...], said("Another of llama.cpp's kinds, such as Q6_K.")] = ("Q4_K_M",)
    formats: Annotated[tuple[str, ...], said("gguf or mlx; repeat for both.")] = (
        "gguf",
        "mlx",
    )
    budget_mb: Annotated[
        Annotated[float, Meta(ge=0.1, le=1e9)] | None,
        said("Add a mixed GGUF of at most so many MB, by measurement."),
    ] = None
    target_bpw: Annotated[
        Annotated[float, Meta(ge=1, le=32)] | None,
        said("The same, by the file's bits per weight instead of its MB."),
    ] = None
    prune_vocab: Annotated[bool, said("First leave out the tokens that the student doesn't need.")] = False
    adapter: Annotated[bool, said("Add the LoRA adapter alone, for a GGUF of the base model.")] = False
    calibrate: Annotated[
        tuple[str, ...], said("Expansions for the importance matrix (default: those it was trained on).")
    ] = ()
    no_calibrate: Annotated[bool, said("Quantize without an importance matrix.")] = False
    mlx_bits: Annotated[int | None, said("2, 3, 4, 5, 6 or 8 (default: the kind's).")] = None
    mlx_group: Annotated[int, said("Weights that share a scale: 32, 64 or 128.")] = 64
    mlx_recipe: Annotated[str | None, said("mlx-lm's mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6.")] = None
    verify: Annotated[bool, said("Check every file against the source.", flag="")] = True

    def __post_init__(self) -> None:
        if self.calibrate and self.no_calibrate:
            raise ValueError("give either --calibrate or --no-calibrate")
        if (self.vocab_of or self.vocab_size) and not self.prune_vocab:
            raise ValueError("--vocab-of and --vocab-size need --prune-vocab")
        if self.prune_vocab and self.adapter:
            raise ValueError("give either --prune-vocab or --adapter, which fits the whole vocabulary alone")
        if self.budget_mb is not None and self.target_bpw is not None:
            raise ValueError("give either --budget-mb or --target-bpw")
        if self.mlx_recipe is not None and self.mlx_bits is not None:
            raise ValueError("give either MLX bits or a recipe, which says the bits itself")

    @property
    def mixed(self) -> bool:
        """Whether a mixed GGUF is wanted."""
        return self.budget_mb is not None or self.target_bpw is not None
