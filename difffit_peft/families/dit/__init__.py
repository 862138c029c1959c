"""Diffusers' `DiTTransformer2DModel`, the class-conditional transformer of Peebles and Xie (ICCV 2023).

γ is where public DiffFit code for DiT has it (thuml/Diffusion-Tuning and vimar-gu/MinimaxDiffusion, `models.py`): on
the outputs of qkv and proj, and on the two branches of a block, in the first 14 of 28 blocks. A branch's γ and that of
the layer it ends in multiply the same vector, so that one parameter is both (see `convert`).

While an adapter is attached, a DiT has one timestep and class embedder instead of a copy per block (`conditioning`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from ..family import Family
from . import conditioning, resolution

_FACTS = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "patch_size",
    "in_channels",
    "out_channels",
    "num_embeds_ada_norm",
)


@dataclass(frozen=True)
class DiT(Family):
    blocks: tuple[str, ...] | None = ("transformer_blocks",)
    gamma_modules: tuple[str, ...] = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.2")
    low_rank_modules: tuple[str, ...] | None = ("attn1.to_out.0", "ff.net.2")
    added_modules: tuple[str, ...] = ("norm1_emb",)
    class_table: str | None = "class_embedder.embedding_table"
    pipeline: str | None = "DiffFitDiTPipeline"

    def of_format(self, version: int | None) -> Family:
        # the preset of format 0: γ on what adaLN computes, in every block
        return replace(self, gamma_modules=("norm1.linear",), gamma_share=1.0) if version == 0 else self

    def facts(self, model: nn.Module) -> dict[str, Any]:
        resolved = {"out_channels": model.out_channels, "sample_size": resolution.base_sample_size(model)}
        return {name: model.config[name] for name in _FACTS} | resolved

    def move_to(self, model: nn.Module, sample_size: int) -> None:
        resolution.set_sample_size(model, sample_size)

    def prepare(self, model: nn.Module) -> Callable[[], None]:
        return partial(conditioning.unshare, model) if conditioning.share(model) else super().prepare(model)

    def restore(self, model: nn.Module, merged: bool) -> None:
        base_sample_size = resolution.base_sample_size(model)
        if not merged:
            resolution.set_sample_size(model, base_sample_size)
        elif model.config.sample_size != base_sample_size:
            warnings.warn(
                f"The merged model works at sample_size={model.config.sample_size} in memory, but Diffusers does "
                f"not store that its positions are those of {base_sample_size}: saved and loaded again it would "
                "compute others. Keep the adapter unmerged on disk.",
                stacklevel=4,
            )
        conditioning.unshare(model)


FAMILY = {"DiTTransformer2DModel": DiT()}
