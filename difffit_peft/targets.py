"""Which layers get γ, δ and a change of low rank: `plan`, from a config, the layers of a model and its family.

Nothing here knows PEFT, or touches a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import DiffFitConfig, listed, nearest, short
from .families import Family


@dataclass(frozen=True)
class Layer:
    """What is needed to know of a layer."""

    kind: str  # the name of its class
    bias: bool = False
    takes_bias: bool = False  # it has none, but computes with one where it is given one
    norm: bool = False  # an affine one
    max_rank: int = 0  # of a change of its weight; 0: none goes on such a layer
    num_classes: int | None = None  # of a class table, without the null class
    parameter: bool = False  # not a layer, but a parameter of a module: it takes δ alone


@dataclass(frozen=True)
class Target:
    """What an adapter puts on a layer. On a class table δ is on rows, those of the config's classes."""

    gamma: bool = False
    delta: bool = False
    rank: int = 0


def plan(
    config: DiffFitConfig, layers: Mapping[str, Layer], family: Family, model: str, excluded: Collection[str] = ()
) -> dict[str, Target]:
    """What each layer gets, by name, without the layers that get nothing.

    `model` is what messages call the model; `excluded` are layers to leave alone beside those the config excludes.

    Raises:
        ValueError: if a field of `config` does not fit the model, naming what would.
    """
    layers = _trainable(layers, family)
    tables = {name: layer.num_classes for name, layer in layers.items() if layer.num_classes is not None}
    others = {name: layer for name, layer in layers.items() if name not in tables}
    if config.num_classes is not None and not tables:
        raise ValueError(f"num_classes={config.num_classes}, but {model} has no class table.")
    excluded = {*excluded, *matching(config.exclude_modules, layers)}
    if config.target_modules is None:
        targets = {*layers}
    elif config.target_modules == "all-linear":
        targets = {name for name, layer in others.items() if layer.max_rank}
    else:
        targets = {*matching(config.target_modules, layers, "target_modules")}
    gammas = _gamma_layers(config, family, others, model)
    if config.gamma_modules is None:  # the preset stays within the targets, as whoever names targets expects
        gammas &= targets
    low_rank = _low_rank_layers(config, family, others)
    if config.low_rank_modules is None:
        low_rank &= targets

    planned = {
        name: Target(
            gamma=name in gammas or (layer.norm and name in targets),
            delta=(layer.bias or (config.new_biases and layer.takes_bias)) and name in targets,
            rank=config.r if name in low_rank else 0,
        )
        for name, layer in others.items()
    }
    for name, classes in tables.items():
        if config.num_classes is not None and config.num_classes > classes:
            raise ValueError(
                f"num_classes={config.num_classes}, but the class table of this model has rows for {classes} classes "
                "and the null class: at most that many can be adapted."
            )
        if not isinstance(config.init_class_rows, str) and max(config.init_class_rows) >= classes:
            raise ValueError(
                f"init_class_rows names the class {max(config.init_class_rows)}, but the base has the classes 0 to "
                f"{classes - 1}."
            )
        planned[name] = Target(delta=name in targets or config.num_classes is not None)
    planned = {name: target for name, target in planned.items() if target != Target() and name not in excluded}
    if not planned:
        raise ValueError(
            f"target_modules={config.target_modules}, exclude_modules={config.exclude_modules} and "
            f"gamma_modules={config.gamma_modules} leave no layer of {model} to train."
            + " Layers without a bias get δ with new_biases=True."
            * any(layers[name].takes_bias for name in targets - excluded)
        )
    return planned


def spelled_out(
    config: DiffFitConfig, planned: Mapping[str, Target], layers: Mapping[str, Layer], family: Family
) -> dict[str, Any]:
    """The presets and expressions of the config as the names of what they select in this model.

    So presets may change one day, and whoever loads the file of an adapter matches no expression of a stranger's.
    """
    fields: dict[str, Any] = {}
    layers = _trainable(layers, family)

    def having(kind: str) -> set[str]:
        return {name for name, target in planned.items() if getattr(target, kind) and not layers[name].norm}

    if config.target_modules == "all-linear":
        fields["target_modules"] = exactly({name for name in planned if planned[name].delta}, layers)
    for field in ("target_modules", "exclude_modules"):
        if isinstance(patterns := getattr(config, field), str) and field not in fields:
            fields[field] = exactly(matching(patterns, layers), layers)
    if not isinstance(config.gamma_modules, list):
        fields["gamma_modules"], fields["gamma_layers"] = _shortest(having("gamma"), layers, family)
    if config.r and not isinstance(config.low_rank_modules, list):
        endings, blocks = _shortest(having("rank"), layers, family)
        fields["low_rank_modules"] = endings if blocks is None else exactly(having("rank"), layers)
    return fields


def exactly(selected: Iterable[str], names: Iterable[str]) -> list[str]:
    """What selects these of the names and no others. A dot in front marks a name that others end in too."""
    selected = {*selected}
    others = [name for name in names if name not in selected]
    return sorted(f".{name}" if any(o.endswith(f".{name}") for o in others) else name for name in selected)


def _trainable(layers: Mapping[str, Layer], family: Family) -> dict[str, Layer]:
    """The layers without those that the family leaves out."""
    left_out = family.left_out(layers)
    return {name: layer for name, layer in layers.items() if name not in left_out}


def _gamma_layers(config: DiffFitConfig, family: Family, layers: Mapping[str, Layer], model: str) -> set[str]:
    """Names of the layers whose output gets γ: those of `gamma_modules`, and of the blocks in `gamma_layers`."""
    block_of = _blocks(family, layers)
    length = {blocks: index + 1 for blocks, index in sorted(block_of.values())}
    longest = max(length.values(), default=0)
    if config.gamma_layers is not None and {*config.gamma_layers} - {*range(longest)}:
        raise ValueError(
            f"gamma_layers={short(config.gamma_layers)}: this model has {longest} blocks"
            + (f", so indices go from 0 to {longest - 1}." if longest else ": leave gamma_layers out.")
        )
    if config.gamma_modules is not None:
        found = matching(config.gamma_modules, [n for n in layers if not layers[n].parameter], "gamma_modules")
    elif not block_of and config.target_modules is None:
        raise ValueError(
            f"{model} has no list of blocks, so that no rule says where γ goes. Name the layers in gamma_modules, or "
            f"give gamma_modules=[] for none. Names end in {listed(_common(layers))}."
        )
    else:
        not_norms = [name for name, layer in layers.items() if not (layer.norm or layer.parameter)]
        found = _preset(family.gamma_modules, not_norms, block_of)

    def allowed(name: str) -> bool:
        if name not in block_of:
            return True
        blocks, index = block_of[name]
        if config.gamma_layers is not None:
            return index in config.gamma_layers
        return config.gamma_modules is not None or index < math.ceil(family.gamma_share * length[blocks])

    selected = {name for name in found if allowed(name)}
    if config.gamma_modules and config.gamma_layers and not selected:
        indices = sorted({block_of[name][1] for name in found})
        raise ValueError(
            f"gamma_modules={config.gamma_modules!r} matches layers of the blocks {indices}, but "
            f"gamma_layers={config.gamma_layers} lets γ onto {config.gamma_layers} alone."
        )
    return selected


def _low_rank_layers(config: DiffFitConfig, family: Family, layers: Mapping[str, Layer]) -> set[str]:
    """Names of the layers that get a change of rank `config.r`."""
    if not config.r:
        return set()
    if config.low_rank_modules is None:
        linear = [name for name, layer in layers.items() if layer.max_rank]
        selected = _preset(family.low_rank_modules, linear, _blocks(family, layers))
    else:
        selected = matching(config.low_rank_modules, layers, "low_rank_modules")
    for name in selected:
        if not layers[name].max_rank:
            raise ValueError(
                f"low_rank_modules: {name} is of type {layers[name].kind}, but a change of low rank goes on linear "
                "layers alone."
            )
        if config.r > layers[name].max_rank:
            raise ValueError(
                f"r={short(config.r)}: the rank of {name} is at most {layers[name].max_rank}. Use a lower r."
            )
    return {*selected}


def _shortest(selected: set[str], layers: Mapping[str, Layer], family: Family) -> tuple[list[str], list[int] | None]:
    """Endings and blocks that select exactly these layers, no blocks meaning all of them; or else the whole names."""
    names = [name for name, layer in layers.items() if layer.num_classes is None]
    block_of = _blocks(family, names)
    blocks = {block_of[name][1] for name in selected if name in block_of}
    prefixes = {name: f"{blocks}.{index}." for name, (blocks, index) in block_of.items()}
    endings = sorted({name.removeprefix(prefixes.get(name, "")) for name in selected})
    found = matching(endings, names)
    if blocks:
        found = [name for name in found if name not in block_of or block_of[name][1] in blocks]
    if {*found} != selected:
        return exactly(selected, names), None
    return endings, sorted(blocks) if blocks and blocks < {index for _, index in block_of.values()} else None


def _blocks(family: Family, names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The list and the index of the block that each layer lies in; without the layers that lie in none."""
    inside = [(name, blocks) for name in names for blocks in family.blocks or () if name.startswith(f"{blocks}.")]
    return {name: (blocks, int(name.removeprefix(f"{blocks}.").split(".")[0])) for name, blocks in inside}


def _preset(endings: tuple[str, ...] | None, names: Iterable[str], block_of: Collection[str]) -> list[str]:
    """Those of `names` that lie in a block, if there are any, and have one of the endings; or all, if none has."""
    inside = [name for name in names if name in block_of or not block_of]
    return [name for name in inside if f".{name}".endswith(tuple(f".{end}" for end in endings or ()))] or inside


def matching(patterns: list[str] | str | None, names: Iterable[str], field: str | None = None) -> list[str]:
    """The names that a list of names and endings, or a regular expression, selects.

    Raises:
        ValueError: if the expression, or an entry of the list, selects nothing, and the `field` it is of is named.
    """
    names = list(names)
    if not patterns:
        return []
    endings = {name: {f".{name}", *(name.split(".", i)[-1] for i in range(name.count(".") + 1))} for name in names}
    known = set().union(*endings.values())
    if isinstance(patterns, str):
        selected = [name for name in names if re.fullmatch(patterns, name)]
        missing = [] if selected else [patterns]
    else:
        selected = [name for name in names if not endings[name].isdisjoint(patterns)]
        missing = [pattern for pattern in patterns if pattern not in known]
    if missing and field:
        common = _common(names)
        hint = nearest(missing[0][:200], common + names)
        if missing[0] in known:
            hint = f" A string is a regular expression for the whole name: did you mean the list {missing}?"
        raise ValueError(
            f"{field}={short(patterns)}: {missing[0][:200]!r} matches no layer that DiffFit can train.{hint} "
            f"Names end in {listed(common)}."
        )
    return selected


def _common(names: Iterable[str]) -> list[str]:
    """The endings of the names, after the index of a block."""
    return sorted({re.sub(r"^.*\.\d+\.", "", name) for name in names})
