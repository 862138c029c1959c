"""`Family`: what DiffFit needs to know of a model, and what a family of models does otherwise than most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base_layers import is_supported


@dataclass(frozen=True)
class Family:
    """Where things are in a model. The methods do nothing unless a family says otherwise.

    Attributes:
        blocks: names of the lists of blocks.
        gamma_modules: endings of the names of a block's layers that get γ by default; `None`: all of them.
        gamma_share: the share of each list of blocks, counted from the first, whose layers get γ by default. Rounded
            up.
        low_rank_modules: the endings, in every block, that get a change of low rank where a config asks for one.
        added_modules: names of the modules that `prepare` adds to the model.
        class_table: ending of the name of the `nn.Embedding` of classes, whose last row is the null class.
        pipeline: name of the class of this package that is a pipeline of such a model, if there is one.
    """

    blocks: tuple[str, ...] = ()
    gamma_modules: tuple[str, ...] | None = None
    gamma_share: float = 1.0
    low_rank_modules: tuple[str, ...] | None = None
    added_modules: tuple[str, ...] = ()
    class_table: str | None = None
    pipeline: str | None = None

    def of_format(self, version: int | None) -> Family:
        """The family with the presets that configs of this format mean."""
        return self

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
    """The names of a model's lists of blocks: what no other list holds, and holds modules that are made of layers."""
    outermost: list[str] = []
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{other}." for other in outermost)):
            outermost.append(name)
            if any(not _is_layer(block) and any(map(_is_layer, block.modules())) for block in module):
                found.append(name)
    return tuple(found)


def _is_layer(module: nn.Module) -> bool:
    return is_supported(module.get_base_layer() if hasattr(module, "get_base_layer") else module)
