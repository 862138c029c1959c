"""The families of models that DiffFit knows. A new one is a module or package beside this one, and an entry in
`FAMILIES`."""

from __future__ import annotations

from torch import nn

from ..config import FORMAT_VERSION
from .dit import FAMILY as DIT
from .family import Family, lists_of_blocks

FAMILIES: dict[str, Family] = {**DIT}
"""By the name of the model's class."""


def family_of(model: nn.Module, format_version: int | None = FORMAT_VERSION) -> Family:
    """The model's family, with the presets that configs of this format mean.

    Another model gets γ on all layers of all its blocks.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__].of_format(format_version)
    return Family(blocks=lists_of_blocks(model))
