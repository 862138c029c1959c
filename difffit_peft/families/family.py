"""`Family`: what DiffFit needs to know of a model, and what a family of models does otherwise than most."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base_layers import is_supported

ATTENTION = (
    *("to_q", "to_k", "to_v", "to_kv", "to_qkv", "to_qkv_mlp_proj", "to_out", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("to_q_t", "to_k_t", "to_v_t", "to_out_t"),
    *("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer"),
    *("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj", "img_qkv_proj", "txt_kv_proj"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "c_attn", "attn.c_proj"),
    *("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"),
)
FEED_FORWARD = (
    *("net.2", "w2", "ffn.2", "ff.3", "fc2", "linear_fc2", "wo", "ff_out", "down_proj", "ff.down", "linear_out"),
    *("out_projection", "feed_forward.linear_2", "feed_forward.out_layer", "ff.conv_point", "ff.proj_out"),
    *("img_mlp.out", "mlp.c_proj"),
)
"""What Diffusers and Transformers call the layers that get γ by the published rule: q, k, v and the output of
attention, and the output of the feed-forward."""


@dataclass(frozen=True)
class Family:
    """Where things are in a model. The methods do nothing unless a family says otherwise.

    Attributes:
        blocks: names of the lists of blocks; `None`: those that `lists_of_blocks` finds.
        gamma_modules: endings of the names of a block's layers that get γ by default. Where a model has none of them,
            all layers of its blocks do.
        gamma_share: the share of each list of blocks, counted from the first, whose layers get γ by default. Rounded
            up.
        closed: names of modules whose layers are never called: another part of the model reads their weights, so that
            what is put on their output has no effect. In a name * is any index, and -1 the last one of a list.
        unused: names of modules that have no part in what the model computes, and get no gradient.
        low_rank_modules: the endings, in every block, that get a change of low rank where a config asks for one.
        added_modules: names of the modules that `prepare` adds to the model.
        class_table: ending of the name of the `nn.Embedding` of classes, whose last row is the null class.
        pipeline: name of the class of this package that is a pipeline of such a model, if there is one.
    """

    blocks: tuple[str, ...] | None = None
    gamma_modules: tuple[str, ...] = ATTENTION + FEED_FORWARD
    gamma_share: float = 0.5
    closed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    low_rank_modules: tuple[str, ...] | None = None
    added_modules: tuple[str, ...] = ()
    class_table: str | None = None
    pipeline: str | None = None

    def of_format(self, version: int | None) -> Family:
        """The family with the presets that configs of this format mean."""
        return self

    def left_out(self, names: Iterable[str]) -> dict[str, str]:
        """Those of a model's names that are, or lie in, a closed or unused module, and why they cannot be trained."""
        names = list(names)
        reasons = {
            "closed: its weights are read without a call": self.closed,
            "unused: it has no part in the output": self.unused,
        }
        return {
            name: reason
            for reason, modules in reasons.items()
            for module in modules
            for name in names
            if re.match(_expression(module, names), f"{name}.")
        }

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """What must agree between an adapter and its base.

        Where the model can be moved, "sample_size" is the latent side it was trained at, wherever it is now.
        """
        return {}

    def move_to(self, model: nn.Module, sample_size: int) -> None:
        """Moves the model to latents of another side, or raises `ValueError` and leaves it as it was."""

    def prepare(self, model: nn.Module) -> Callable[[], None]:
        """Makes the model ready for adapters. Returns what undoes that."""
        return lambda: None

    def restore(self, model: nn.Module, merged: bool) -> None:
        """Undoes `prepare` and `move_to` when the adapters are gone or, if `merged`, are part of the weights."""


def lists_of_blocks(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's lists of blocks: what no other holds, and whose items are made of layers."""
    outermost: list[str] = []
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{other}." for other in outermost)):
            outermost.append(name)
            made_of_layers = any(_is_layer(part) for block in module for part in block.modules())
            if made_of_layers and not any(map(_is_layer, module)):
                found.append(name)
    return tuple(found)


def _expression(module: str, names: list[str]) -> str:
    """A regular expression for the names, with a dot after them, that are or lie in a module."""
    while ".-1" in module:
        before, after = module.split(".-1", 1)
        indices = [re.match(rf"{_expression(before, names)}(\d+)\.", f"{name}.") for name in names]
        module = f"{before}.{max((int(found[1]) for found in indices if found), default=0)}{after}"
    return re.escape(module).replace(r"\*", r"\d+") + r"\."


def _is_layer(module: nn.Module) -> bool:
    return is_supported(module.get_base_layer() if hasattr(module, "get_base_layer") else module)
