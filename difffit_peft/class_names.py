"""Names of classes as people write them: whole, by one of several names, or as an index.

Diffusers reads a name with commas, such as "tench, Tinca tinca", as several names of one class.

Names belong to weights. Those of an adapter are in its config. Those of a base are kept on the transformer: so they go
where it goes, and a merge can exchange them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft import PeftConfig
from torch import nn

from .config import nearest, plain, short


def names_of_adapters(configs: Iterable[PeftConfig]) -> dict[int, str] | None:
    """Names of the classes under these adapters: of the first that has any. `None`: the base's.

    New classes, which do not start from their own rows, are not the base's: without names in the config they have none.
    """
    configs = list(configs)
    named = next((config.id2label for config in configs if getattr(config, "id2label", None)), None)
    new = any(getattr(config, "num_classes", None) and config.init_class_rows != "base" for config in configs)
    return named or ({} if new else None)


def names_of_base(transformer: nn.Module) -> dict[int, str] | None:
    """The names that `keep_names` kept; `None` if it did not."""
    return getattr(transformer, "_difffit_id2label", None)  # PeftModel and compiled modules look inside


def keep_names(transformer: nn.Module, id2label: dict[int, str]) -> None:
    """Keeps names of the base's classes on the transformer, inside its adapters if it has any."""
    base = getattr(transformer, "get_base_model", lambda: transformer)()
    base._difffit_id2label = id2label


def split_names(id2label: dict[int, str]) -> dict[str, int]:
    """Class indices by name, as Diffusers' class-conditional pipeline has them."""
    named = {part.strip(): index for index, name in id2label.items() for part in name.split(",")}
    return dict(sorted(named.items()))


def join_names(labels: dict[str, int]) -> dict[int, str]:
    """The way back from `split_names`."""
    id2label: dict[int, str] = {}
    for name, index in labels.items():
        id2label[index] = f"{id2label[index]}, {name}" if index in id2label else name
    return dict(sorted(id2label.items()))


def classes_called(name: str, id2label: dict[int, str]) -> list[int]:
    """The classes of this name. If there are none: those that have all of its parts between commas among theirs."""
    whole = [index for index, other in id2label.items() if other == name]
    parts = {part.strip() for part in name.split(",")}
    return whole or [i for i, other in id2label.items() if parts <= {part.strip() for part in other.split(",")}]


def class_indices(labels: Iterable[Any], id2label: dict[int, str], num_classes: int) -> list[int]:
    """The index of each class, given by its name or its index. What is both is a name.

    Args:
        labels: names, integers, and integers written as strings.
        id2label: names of the classes, as far as they have any.
        num_classes: indices are below it.

    Raises:
        ValueError: for a label that is not a class, or the name of several.
    """
    indices = []
    for label in labels:
        called = classes_called(label, id2label) if isinstance(label, str) else []
        if len(called) > 1:
            raise ValueError(f"{label!r} is the name of the classes {called}: give one of these indices.")
        digits = isinstance(label, str) and label.isdecimal()
        index = called[0] if called else int(label) if digits else plain(label)
        if not isinstance(index, int) or not 0 <= index < num_classes:
            names = [*id2label.values()]
            close = nearest(label, [*names, *split_names(id2label)])
            shown = f" Names are {str(names[:12])[:-1]}{', ...' if len(names) > 12 else ''}]." if names else ""
            raise ValueError(
                f"{short(label)} is not a class: give "
                + ("the name of one, or " if names else "")
                + f"an index from 0 to {num_classes - 1}."
                + (close or shown or " The classes have no names.")
            )
        indices.append(index)
    return indices
