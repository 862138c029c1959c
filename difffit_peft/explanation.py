"""`explain`: what DiffFit trains in a model, and what the published filter would train beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from peft import PeftModel
from torch import nn

from .attach import named_layers, planned_shapes, saved_whole
from .bare_parameters import attach_parameters
from .base_layers import is_supported
from .config import DiffFitConfig
from .families import Family, family_of
from .layer import DiffFitLayer
from .norms import looks_like_a_norm
from .targets import Layer, plan

_FILTER = ("bias", "norm", "gamma", "y_embed")  # of the published code, on the names of parameters
_OF_LAYERS = {"difffit_gamma": "scale factors γ", "difffit_delta": "biases δ"}
_NEW_BIASES = "new biases δ"
_OF_NORMS = {"difffit_gamma": "norms' weights γ", "difffit_delta": "norms' biases δ"}


@dataclass
class Row:
    """Parameters of one kind, in one list of blocks or outside of them."""

    kind: str
    where: str  # the list of blocks; "" is outside of them
    why: str = ""  # they are left out
    blocks: set[int] = field(default_factory=set)
    layers: list[str] = field(default_factory=list)  # names within a block; * is any index
    parameters: int = 0

    @property
    def place(self) -> str:
        """The list of blocks and the ranges of indices in it."""
        if not self.where:
            return "outside the blocks"
        indices = sorted(self.blocks)
        starts = [i for i in indices if i - 1 not in self.blocks]
        ends = [i for i in indices if i + 1 not in self.blocks]
        return f"{self.where} " + ", ".join(
            str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)
        )


@dataclass
class Explanation:
    """What is trained in a model, and what is left out. `str` of it is two tables in Markdown.

    Attributes:
        model: the name of the model's class.
        total: the parameters of the base, as it is while an adapter is attached.
        trained: rows of what is trained.
        left_out: rows of what the published filter, `["bias", "norm", "gamma", "y_embed"]`, would train but an adapter
            does not, and of biases that the model does not have.
    """

    model: str
    total: int
    trained: list[Row]
    left_out: list[Row]

    @property
    def trained_parameters(self) -> int:
        return sum(row.parameters for row in self.trained)

    def table(self) -> str:
        """What is trained, as a table in Markdown."""
        lines = ["| trained | where | layers | parameters | share |", "| --- | --- | --- | ---: | ---: |"]
        lines += [f"| {row.kind} | {row.place} | {_several(row.layers)} | {self._count(row)} |" for row in self.trained]
        total = self.trained_parameters
        share = total / max(self.total, 1)
        return "\n".join([*lines, f"| **all** | {self.model} | | **{total:,}** | **{share:.3%}** of {self.total:,} |"])

    def __str__(self) -> str:
        lines = ["", "| left out | where | layers | parameters | why |", "| --- | --- | --- | ---: | --- |"]
        for row in self.left_out:
            lines.append(f"| {row.kind} | {row.place} | {_several(row.layers)} | {row.parameters:,} | {row.why} |")
        return "\n".join([self.table(), *(lines if self.left_out else [])])

    def _count(self, row: Row) -> str:
        return f"{row.parameters:,} | {row.parameters / max(self.total, 1):.3%}"


def explain(
    model: nn.Module | dict[str, Any], config: DiffFitConfig | None = None, *, adapter_name: str | None = None
) -> Explanation:
    """What an adapter trains in a model, by kind and place, and what it leaves out and why.

    Args:
        model: a model, whose adapter is explained if it has one, else what `config` would train in it; or the config of
            a model of Diffusers, as its `load_config` returns it. Weights are not needed: a model on the meta device
            will do.
        config: for a model without adapters. `None`: `DiffFitConfig()`.
        adapter_name: which of the model's adapters. `None`: the first that is active.

    Raises:
        ValueError: if the config does not fit the model, or there is no such adapter. The model is always as it was.
    """
    if isinstance(model, dict):
        model = _without_weights(model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"A {type(model).__name__} is not a model: pass one of its parts, such as pipe.transformer.")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    adapted = [module for module in inner.modules() if isinstance(module, DiffFitLayer)]
    if not adapted:
        if adapter_name is not None:
            raise ValueError(f"adapter_name={adapter_name!r}, but the model has no adapter of DiffFit.")
        return _of_plain(inner, config or DiffFitConfig())
    if config is not None:
        raise ValueError("The model has an adapter, which is what is explained: leave the config out.")
    names = sorted({name for layer in adapted for name in layer._get_available_adapters()})
    adapter_name = adapter_name or next(iter(adapted[0].active_adapters), names[0])
    if adapter_name not in names:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has {names}.")
    trained, ending = {}, f".{adapter_name}"
    for name, parameter in inner.named_parameters():
        if ".difffit_" in name and name.endswith(ending):
            trained[name.removesuffix(ending)] = parameter.numel()
    return _explanation(inner, family_of(inner), trained, DiffFitConfig(), {})


def _without_weights(config: dict[str, Any]) -> nn.Module:
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(
            f"_class_name={config.get('_class_name')!r}: must be the name of a class of models of Diffusers, as in the "
            "config that its load_config returns."
        )
    with torch.device("meta"):
        return cls.from_config(config)  # type: ignore[attr-defined]


def _of_plain(model: nn.Module, config: DiffFitConfig) -> Explanation:
    """What an adapter of this config would train."""
    family = family_of(model, config.format_version)
    own = {name: parameter.numel() for name, parameter in model.named_parameters()}
    undo_family, undo_parameters = family.prepare(model), attach_parameters(model)
    try:
        layers = named_layers(model, family)
        whole = saved_whole(config, model, layers)
        planned = plan(config, layers, family, type(model).__name__, whole)
        trained = {name: math.prod(shape) for name, shape in planned_shapes(config, planned, model).items()}
        kept, seen, redundant = {name for name, _ in model.named_parameters()}, set[str](), {}
        for name in own:
            pattern = re.sub(r"\.\d+\.", ".*.", name)
            if name not in kept and pattern in seen:  # the first of the copies is the one that is trained
                redundant[name] = own[name]
            seen.add(pattern)
        return _explanation(model, family, trained, config, redundant)
    finally:
        undo_parameters()
        undo_family()


def _explanation(
    model: nn.Module, family: Family, trained: dict[str, int], config: DiffFitConfig, redundant: dict[str, int]
) -> Explanation:
    layers = named_layers(model, family)
    rows: dict[tuple[str, str, str], Row] = {}

    def add(name: str, kind: str, parameters: int, why: str = "") -> None:
        where = next((blocks for blocks in family.blocks or () if name.startswith(f"{blocks}.")), "")
        row = rows.setdefault((why, kind, where), Row(kind, where, why))
        row.parameters += parameters
        within = name
        if where:
            index, _, within = name.removeprefix(f"{where}.").partition(".")
            row.blocks.add(int(index))
        within = re.sub(r"\.\d+(?=\.)", ".*", within)
        if within not in row.layers:
            row.layers.append(within)

    for name, parameters in trained.items():
        layer, _, kind = name.rpartition(".")
        add(layer, _kind(kind, layers.get(layer)), parameters)
    total = 0
    for name, parameter in model.named_parameters():
        if ".difffit_" not in name and ".modules_to_save." not in name:
            total += parameter.numel()
    for name, kind, parameters, why in _left_out(model, family, layers, trained):
        add(name, kind, parameters, why)
    for name, parameters in redundant.items():
        if any(part in name for part in _FILTER):
            layer, _, kind = name.rpartition(".")
            add(layer, kind, parameters, "redundant: one for all blocks is trained")
    found = sorted(rows.values(), key=lambda row: _order(row, family))
    return Explanation(
        type(model).__name__, total, [row for row in found if not row.why], [row for row in found if row.why]
    )


def _left_out(
    model: nn.Module, family: Family, layers: dict[str, Layer], trained: dict[str, int]
) -> Iterator[tuple[str, str, int, str]]:
    """Layer, kind, number and reason of parameters that the filter would train but the adapter does not."""
    modules = {name: module for name, module in model.named_modules() if "difffit_" not in name}
    plain = {name.replace(".base_layer", "") for name in modules}
    reasons = family.left_out(plain)
    for name, parameter in model.named_parameters():
        if ".difffit_" in name or ".modules_to_save." in name:
            continue
        holder, _, attribute = name.rpartition(".")
        name, layer = name.replace(".base_layer", ""), holder.replace(".base_layer", "").removesuffix("base_layer")
        of = layers.get(layer, Layer(""))
        if not any(part in name for part in _FILTER) and of.num_classes is None:
            continue
        is_matrix = attribute == "weight" and not of.norm and of.num_classes is None
        needed = "difffit_gamma" if of.norm and attribute == "weight" else "difffit_delta"
        if not is_matrix and f"{layer}.{needed}" in trained:
            continue
        if layer in reasons:
            why = reasons[layer]
        elif layer not in layers:
            why = _unknown(modules.get(holder, model))
        elif is_matrix:
            why = "a matrix, which the filter takes by the name of its module"
        else:
            why = "the config leaves it out"
        yield layer or name, attribute, parameter.numel(), why
    for name, of in layers.items():
        if not of.bias and not of.norm and of.num_classes is None and f"{name}.difffit_delta" not in trained:
            base = modules[name]
            base = base.get_base_layer() if isinstance(base, DiffFitLayer) else base
            size = math.prod(DiffFitLayer.shapes(base, DiffFitConfig(), delta=True)["difffit_delta"])
            yield name, "bias", size, reasons.get(name, "the layer has no bias (see new_biases)")


def _unknown(module: nn.Module) -> str:
    """Why a parameter of a module that is none of the layers is left out."""
    kind = type(module).__name__
    if is_supported(module):
        return f"closed: a {kind} that is used without a call"
    if looks_like_a_norm(module):
        return f"a {kind}, which computes no norm that γ could be put on"
    return f"a parameter of a {kind}, which is not a layer that is known"


def _order(row: Row, family: Family) -> tuple[int, str, int]:
    kinds = [*_OF_LAYERS.values(), _NEW_BIASES, *_OF_NORMS.values()]
    blocks = [*(family.blocks or ()), row.where]
    return kinds.index(row.kind) if row.kind in kinds else len(kinds), row.kind, blocks.index(row.where)


def _kind(kind: str, layer: Layer | None) -> str:
    if layer is not None and layer.num_classes is not None:
        return "class rows"
    if kind == "difffit_delta" and layer is not None and layer.takes_bias:
        return _NEW_BIASES
    names = _OF_NORMS if layer is not None and layer.norm else _OF_LAYERS
    return names.get(kind, f"low rank {kind[-1]}" if kind in ("difffit_A", "difffit_B") else kind)


def _several(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{name}`" for name in names[:most]) + more
