"""The families of models that DiffFit knows. A new one is an entry of `records`, or, where it has methods of its own, a
module or package beside this one."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..config import FORMAT_VERSION
from .dit import FAMILY as DIT
from .family import Family, lists_of_blocks
from .records import RECORDS

FAMILIES: dict[str, Family] = {**DIT, **RECORDS}
"""By the name of the model's class."""


def family_name(model: nn.Module) -> str:
    """The name in `FAMILIES` of the model's class or of the nearest one it derives from; else that of its own class."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((name for name in names if name in FAMILIES), names[0])


def family_of(model: nn.Module, format_version: int | None = FORMAT_VERSION) -> Family:
    """The model's family, with the presets that configs of this format mean.

    Another model has the same rule by its structure: γ on the layers that are named as those of attention and
    feed-forward are, in the first half of each of its lists of blocks.
    """
    family = FAMILIES.get(family_name(model), Family()).of_format(format_version)
    return family if family.blocks is not None else replace(family, blocks=lists_of_blocks(model))
