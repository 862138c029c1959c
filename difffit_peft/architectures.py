"""Where things are in a model: its blocks, the layers that get γ, its embedder and class table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """What DiffFit needs to know of a model family.

    Attributes:
        blocks: name of the `ModuleList` of blocks, or "" where a model has none.
        gamma_modules: endings of the names of a block's layers that get γ by default; `None`: all of them.
        low_rank_modules: the same for the layers that get a change of low rank where a config asks for one.
        class_table: ending of the name of the `nn.Embedding` of classes, whose last row is the null class.
        copied_embedder: whether every block holds a copy of one timestep and class embedder (see `conditioning`).
        base_config: fields of `model.config` that must agree between an adapter and its base.
    """

    blocks: str
    gamma_modules: tuple[str, ...] | None = None
    low_rank_modules: tuple[str, ...] | None = None
    class_table: str | None = None
    copied_embedder: bool = False
    base_config: tuple[str, ...] = ()


# γ on what adaLN computes from timestep and class, shift, scale and gate, in every block: 800,672 parameters for
# DiT-XL/2 and 101 classes, where the paper publishes 0.83 M. docs/results.md compares it with other places. Here γ
# multiplies vectors of a sample and not of each of its tokens, which costs next to no time. The gates' γ are the
# `gamma1` and `gamma2` that public DiffFit code gives to a block (see `convert`).
ARCHITECTURES = {
    "DiTTransformer2DModel": Architecture(
        blocks="transformer_blocks",
        gamma_modules=("norm1.linear",),
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


def architecture_of(model: nn.Module) -> Architecture:
    """The record of `model`'s family. Another model gets γ on all layers of its longest `ModuleList`."""
    for cls in type(model).__mro__:
        if cls.__name__ in ARCHITECTURES:
            return ARCHITECTURES[cls.__name__]
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return Architecture(blocks=max(lists, key=lists.__getitem__, default=""))
