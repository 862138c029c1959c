"""Where things are in a model: its blocks, the layers that get γ, its embedder and class table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .config import FORMAT_VERSION


@dataclass(frozen=True)
class Architecture:
    """What DiffFit needs to know of a model family.

    Attributes:
        blocks: name of the `ModuleList` of blocks, or "" where a model has none.
        gamma_modules: endings of the names of a block's layers that get γ by default; `None`: all of them.
        gamma_share: the share of the blocks, counted from the first, whose layers get γ by default. Rounded up.
        low_rank_modules: the endings, in every block, that get a change of low rank where a config asks for one.
        class_table: ending of the name of the `nn.Embedding` of classes, whose last row is the null class.
        copied_embedder: whether every block holds a copy of one timestep and class embedder (see `conditioning`).
        base_config: fields of `model.config` that must agree between an adapter and its base.
    """

    blocks: str
    gamma_modules: tuple[str, ...] | None = None
    gamma_share: float = 1.0
    low_rank_modules: tuple[str, ...] | None = None
    class_table: str | None = None
    copied_embedder: bool = False
    base_config: tuple[str, ...] = ()


# γ where public DiffFit code for DiT has it (thuml/Diffusion-Tuning and vimar-gu/MinimaxDiffusion, `models.py`): on the
# outputs of qkv and proj, and on the two branches of a block, in the first 14 of 28 blocks. A branch's γ and that of
# the layer it ends in multiply the same vector, so that one parameter is both (see `convert`).
ARCHITECTURES = {
    "DiTTransformer2DModel": Architecture(
        blocks="transformer_blocks",
        gamma_modules=("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.2"),
        gamma_share=0.5,
        low_rank_modules=("attn1.to_out.0", "ff.net.2"),
        class_table="class_embedder.embedding_table",
        copied_embedder=True,
        base_config=(
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "patch_size",
            "in_channels",
            "out_channels",
            "num_embeds_ada_norm",
        ),
    ),
}


# The presets of configs of format 0: γ on what adaLN computes, in every block.
_FORMAT_0: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {"gamma_modules": ("norm1.linear",), "gamma_share": 1.0}
}


def architecture_of(model: nn.Module, format_version: int | None = FORMAT_VERSION) -> Architecture:
    """The record of `model`'s family, with the presets that configs of this format mean.

    Another model gets γ on all layers of its longest `ModuleList`.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in ARCHITECTURES:
            presets = _FORMAT_0.get(cls.__name__, {}) if format_version == 0 else {}
            return replace(ARCHITECTURES[cls.__name__], **presets)
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return Architecture(blocks=max(lists, key=lists.__getitem__, default=""))
