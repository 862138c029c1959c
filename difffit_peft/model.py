"""`DiffFitModel`: the tuner that PEFT puts into a model."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.configuration_utils import FrozenDict
from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _check_adapters_not_merged, _ExcludedModule
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from . import conditioning, resolution
from .architectures import ARCHITECTURES, Architecture, architecture_of
from .class_embedding import DiffFitEmbedding
from .class_names import keep_names, names_of_adapters
from .config import FORMAT_VERSION, DiffFitConfig, finite, fullmatches, listed, nearest, short
from .hub import base_model_id
from .layer import DiffFitLayer, is_norm, is_supported, parameter_shapes

_MAX_UPSCALING = 16  # an adapter from a stranger must not ask for any amount of memory

# Which of γ, δ and a change of low rank each layer gets, by the layer's name.
_Plan = dict[str, dict[str, bool]]


class DiffFitModel(BaseTuner):
    """Adapts a model with DiffFit; made by `peft.get_peft_model(model, DiffFitConfig())`.

    While attached, a DiT has one timestep and class embedder instead of a copy per block (`conditioning`).
    `unload()` and `merge_and_unload()` give the plain model back.

    Raises:
        ValueError: if the config names layers, blocks, classes or a base that this model does not have, or if the model
            has an adapter of that name. The model is then as it was.
    """

    prefix: str = "difffit_"
    tuner_layer_cls = DiffFitLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_not_adapted(model, adapter_name)  # before peft 0.21 writes the config to the model
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    @property
    def config(self) -> Any:
        """The model's config, naming the base by its Hub id: PEFT's model card publishes that name."""
        config = self.model.config
        name = config.get("_name_or_path") if isinstance(config, FrozenDict) else None
        return FrozenDict({**config, "_name_or_path": base_model_id(str(name))[0]}) if name else config

    def _prepare_adapter_config(self, peft_config: DiffFitConfig, model_config: dict) -> DiffFitConfig:
        return peft_config

    def _prepare_model(self, peft_config: DiffFitConfig, model: nn.Module) -> None:
        _check_model(model)
        self._plan, self._excluded = prepare(peft_config, model, self.peft_config)

    def _check_tied_modules(self, model: nn.Module, peft_config: DiffFitConfig) -> None:
        """Nothing to check: what is on a layer's output has no part in a tied weight.

        BaseTuner's matches `target_modules` by `re`, which an expression can keep busy for ever (peft 0.21).
        """

    def _check_target_module_exists(self, peft_config: DiffFitConfig, key: str) -> bool | _ExcludedModule:
        # BaseTuner's is a static method that knows the config alone; the plan also knows the model (peft 0.21)
        return _ExcludedModule() if key in self._excluded else key in self._plan

    def _create_and_replace(
        self,
        peft_config: DiffFitConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(target, DiffFitLayer):
            layer = DiffFitEmbedding(target) if isinstance(target, nn.Embedding) else DiffFitLayer(target)
        layer.update_layer(adapter_name, peft_config, **self._plan[current_key])
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DiffFitConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # peft 0.21 leaves weights that the file lacks at their initial values, and ignores those it has too many
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        names = [name for name, _ in model.named_parameters() if f".{cls.prefix}" in name]
        expected = {name for name in names if name.endswith(f".{adapter_name}")}
        _check_names(expected, {name for name in remapped if f".{cls.prefix}" in name})
        return remapped

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones. What is merged is unmerged first, with a warning, as in all of PEFT.

        Raises:
            ValueError: if there is no such adapter, or one is named twice.
        """
        check_names([adapter_name] if isinstance(adapter_name, str) else adapter_name, self.peft_config)
        if any(layer.merged for layer in self._difffit_layers()):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter. If no other is active then, the first of the others becomes so, in every layer.

        Raises:
            ValueError: if there is no such adapter, or it is merged.
        """
        check_names([adapter_name], self.peft_config)
        _check_adapters_not_merged(self.model, adapter_name)
        if adapter_name in self.active_adapters:  # else peft 0.21 has each layer choose among the adapters it holds
            others = [name for name in self.peft_config if name != adapter_name]
            names = [name for name in self.active_adapters if name in others] or others[:1]
            inference_mode = any(self.peft_config[name].inference_mode for name in names)
            for layer in self._difffit_layers():
                layer.set_adapter(names, inference_mode=inference_mode)
        super().delete_adapter(adapter_name)

    def set_scale(self, adapter_name: str, strength: float) -> None:
        """Scales the effect of an adapter: 0 is the base, 1 the adapter, any real number between or beyond.

        Active adapters i with strengths s_i compose as γ = Π (1 + s_i (γ_i - 1)), δ = Σ s_i δ_i.

        Raises:
            ValueError: if there is no such adapter, the strength is not finite, or the adapter is merged.
        """
        check_names([adapter_name], self.peft_config)
        number = finite(strength)
        if number is None:
            raise ValueError(f"strength={short(strength)}: must be a finite number.")
        if any(adapter_name in layer.merged_adapters for layer in self._difffit_layers()):
            raise ValueError(f"The adapter {adapter_name!r} is merged: call unmerge_adapter() first.")
        for layer in self._difffit_layers():
            layer.set_scale(adapter_name, number)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Adds an adapter that does alone what `adapters` do together at strengths `weights`, whatever theirs are now.

        γ = Π (1 + w_i (γ_i - 1)), δ = Σ w_i δ_i, class rows too, index by index: the rule of `set_scale`, written into
        one adapter that can be saved. Ranks add up. Its class names are the adapters' where they agree.

        Raises:
            ValueError: if an adapter is unknown, named twice or has modules saved whole, if weights are not finite or
                not as many, or if `adapter_name` is taken. The model is then as it was.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters or len({*adapters}) < len(adapters):
            raise ValueError(f"adapters={adapters}: must be names of {sorted(self.peft_config)}, each at most once.")
        numbers = [number for weight in weights if (number := finite(weight)) is not None]
        if not len(numbers) == len(weights) == len(adapters):
            raise ValueError(f"weights={weights}: must be one finite number for each of the {len(adapters)} adapters.")
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already: delete it first, or choose another name.")
        if not adapter_name or "." in adapter_name:
            raise ValueError(f"adapter_name={adapter_name!r}: PyTorch allows no dot in it.")
        whole = [name for name in adapters if self.peft_config[name].modules_to_save]
        if whole:
            raise ValueError(f"The adapter {whole[0]!r} has modules_to_save, which are saved whole and do not blend.")
        config = self._covering_config(adapters)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except ValueError:  # ranks that add up to more than a layer takes
            del self.peft_config[adapter_name]
            raise
        for layer in self._difffit_layers():
            layer.blend(adapter_name, dict(zip(adapters, numbers, strict=True)))

    def _covering_config(self, adapters: list[str]) -> DiffFitConfig:
        """A config that selects what any of the adapters trains."""
        configs = [self.peft_config[name] for name in adapters]
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, DiffFitLayer)}

        def having(kind: str) -> set[str]:
            return {name for name, layer in layers.items() if not getattr(layer, kind).keys().isdisjoint(adapters)}

        norms = {name for name, layer in layers.items() if is_norm(layer.get_base_layer())}
        tables = {name for name, layer in layers.items() if isinstance(layer, DiffFitEmbedding)}
        deltas, gammas, low_rank = having("difffit_delta"), having("difffit_gamma"), having("difffit_A")
        classes = [config.num_classes for name, config in zip(adapters, configs, strict=True)
                   if any(name in layers[table].difffit_delta for table in tables)]  # fmt: skip
        labels, backgrounds = [config.id2label for config in configs], {config.background for config in configs}
        return dataclasses.replace(
            configs[0],
            target_modules=_exactly(deltas | gammas & norms),
            exclude_modules=None,
            gamma_modules=_exactly(gammas - norms),
            gamma_layers=None,
            r=sum(config.r for config in configs) if low_rank else 0,
            low_rank_modules=_exactly(low_rank),
            num_classes=max(classes) if classes and None not in classes else None,
            id2label=labels[0] if all(names == labels[0] for names in labels) else None,
            background=backgrounds.pop() if len(backgrounds) == 1 else None,
            init_weights=True,
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands `adapter_names`, one adapter per sample, to every layer; PeftModel.forward calls this (peft 0.21)."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = {*adapter_names} - {*self.peft_config, "__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

        def hand_on(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, kwargs | {"adapter_names": adapter_names}

        handles = [
            module.register_forward_pre_hook(hand_on, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (DiffFitLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges the adapters named, or else the active ones, beside those that are merged already.

        While any is merged, those that are not have no effect, active or not.

        Raises:
            ValueError: if one of them is unknown, named twice or cannot be merged, or if adapters are disabled. Nothing
                is then changed.
        """
        if self._check_merge(adapter_names, safe_merge):
            super().merge_adapter(adapter_names, safe_merge)
        else:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> bool:
        """Whether anything is left to merge; raises what `merge_adapter` raises."""
        names_to_merge(self, adapter_names)
        pending = False
        for layer in self._difffit_layers():
            names = {*(layer.active_adapters if adapter_names is None else adapter_names)} - {*layer.merged_adapters}
            pending = pending or bool(names)
            if held := names & layer._get_available_adapters():
                layer.check_merge(sorted(held), safe_merge)
        return pending

    def _difffit_layers(self) -> list[DiffFitLayer]:
        return [module for module in self.modules() if isinstance(module, DiffFitLayer)]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        names = None
        if merge:
            self._check_merge(adapter_names, safe_merge)
            names = names_of_adapters(self.peft_config[name] for name in adapter_names or self.active_adapters)
        else:
            for layer in self._difffit_layers():
                if layer.merged:
                    layer.unmerge()
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        restore(model, merged=merge)
        if names is not None:
            keep_names(model, names)
        return model


def check_names(names: Iterable[str], adapters: Iterable[str]) -> None:
    """Raises `ValueError` unless these are names of adapters, each at most once."""
    names, adapters = list(names), list(adapters)
    for name in names:
        if name not in adapters:
            raise ValueError(
                f"There is no adapter {name!r}: the model has {sorted(adapters)}.{nearest(name, adapters)}"
            )
    if len({*names}) < len(names):
        raise ValueError(f"adapter_names={names}: name each adapter once.")


def names_to_merge(tuner: BaseTuner, adapter_names: list[str] | None) -> list[str]:
    """The adapters that a merge is asked for: those named or, for `None`, the active ones.

    Raises:
        ValueError: if one is unknown or named twice, or there is none; if adapters are disabled, so that the model is
            the base; if those named are not the active ones and modules saved whole, which do not merge, go with the
            active ones.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    names = list(tuner.active_adapters if adapter_names is None else adapter_names)
    check_names(names, tuner.peft_config)
    if not names:
        raise ValueError("There is no adapter to merge: name one, or call unload() for the base.")
    if any(layer.disable_adapters for layer in tuner.modules() if isinstance(layer, BaseTunerLayer)):
        raise ValueError(
            "The adapters are disabled: call enable_adapter_layers() before they are merged, or unload() for the base."
        )
    whole = [n for n in {*names} ^ {*tuner.active_adapters} if getattr(tuner.peft_config[n], "modules_to_save", None)]
    if whole:
        raise ValueError(
            f"The adapter {whole[0]!r} has modules_to_save, which do not merge: the model computes with those of the "
            f"active adapter. Call set_adapter({names}) first."
        )
    return names


def prepare(config: DiffFitConfig, model: nn.Module, adapters: dict[str, PeftConfig]) -> tuple[_Plan, set[str]]:
    """Checks the config against the model, plans what each layer gets, and makes the model ready for it.

    `adapters` are all of the model's. Returns the plan and the names of the layers excluded.

    Raises:
        ValueError: if the config does not fit the model, which is then as it was.
    """
    architecture = architecture_of(model, config.format_version)
    facts = _facts_of_base(config, model, architecture, adapters)
    newly_shared = architecture.copied_embedder and conditioning.share(model)
    try:
        plan, excluded = _plan(config, model, architecture)
        _check_file(config, plan, model)
        if "sample_size" in facts:
            resolution.set_sample_size(model, facts["sample_size"])
    except Exception:
        if newly_shared:
            conditioning.unshare(model)
        raise
    if config.target_modules == "all-linear":  # peft would look for them among the layers wrapped by now
        facts["target_modules"] = sorted(name for name in plan if plan[name]["delta"])
    facts |= _spelled_out(config, plan, model, architecture) | {"format_version": FORMAT_VERSION}
    for name, value in facts.items():
        setattr(config, name, value)
    return plan, excluded


def restore(model: nn.Module, merged: bool) -> None:
    """Undoes `prepare` on a model whose adapters are gone or, if `merged`, part of its weights."""
    if not architecture_of(model).copied_embedder:
        return
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


def _facts_of_base(
    config: DiffFitConfig, model: nn.Module, architecture: Architecture, adapters: dict[str, PeftConfig]
) -> dict[str, Any]:
    """What the config is to say of this base; raises if it speaks of another."""
    if not architecture.base_config:
        if config.sample_size is not None:
            raise ValueError(
                f"sample_size={config.sample_size}: {type(model).__name__} cannot be moved to other latents, only "
                f"{listed(ARCHITECTURES)} can. Leave it out."
            )
        return {}
    base = {name: model.config[name] for name in architecture.base_config}
    base["sample_size"] = resolution.base_sample_size(model)
    expected = config.base_config or base
    differing = [name for name in expected if expected[name] != base.get(name)]
    if differing:
        raise ValueError(
            "This adapter belongs to another base: "
            + ", ".join(f"{name} is {short(expected[name])} there and {base.get(name)} here" for name in differing[:9])
            + f". Load it onto {config.base_model_name_or_path or 'the base it was trained on'}, or start a new "
            "adapter from a new DiffFitConfig."
        )
    sample_size = config.sample_size or base["sample_size"]
    if sample_size > _MAX_UPSCALING * base["sample_size"]:
        raise ValueError(
            f"sample_size={sample_size}: at most {_MAX_UPSCALING} times the base's own, {base['sample_size']}."
        )
    others = [other for other in adapters.values() if other is not config and isinstance(other, DiffFitConfig)]
    if any(other.sample_size != sample_size for other in others):
        raise ValueError(
            f"This adapter is for latents of side {sample_size}, but the model has adapters for "
            f"{others[0].sample_size}: one model holds adapters of one side. Use a second model."
        )
    facts = {"base_config": base, "sample_size": sample_size}
    name = getattr(model.config, "_name_or_path", None)
    if config.base_model_name_or_path is None and name:
        facts["base_model_name_or_path"], facts["revision"] = base_model_id(str(name))
    return facts


def _check_file(config: DiffFitConfig, plan: _Plan, model: nn.Module) -> None:
    """Refuses a file whose weights are not those of the plan."""
    if config._shapes_in_file is None:
        return
    prefix = DiffFitModel.prefix
    planned = {}
    for name, kinds in plan.items():
        module = model.get_submodule(name)
        layer = getattr(module, "get_base_layer", lambda m=module: m)()
        planned |= {f"{name}.{kind}": shape for kind, shape in parameter_shapes(layer, config, **kinds).items()}
    saved = tuple(f".{module}." for module in config.modules_to_save or ())
    found = {  # peft would write any other weights to the base
        name.removeprefix("base_model.model."): shape
        for name, shape in config._shapes_in_file.items()
        if f".{prefix}" in name or not any(module in f".{name}" for module in saved)
    }
    _check_names({*planned}, {*found})
    for name, shape in planned.items():
        if found[name] != shape:
            raise ValueError(f"The file's weights do not fit its config: {name} has shape {found[name]}, not {shape}.")


def _exactly(names: set[str]) -> str | list[str]:
    """What selects these modules and no others: a regular expression, as a name in a list is a name ending too."""
    return "|".join(re.escape(name) for name in sorted(names)) or []


def _check_not_adapted(model: nn.Module, adapter_name: str) -> None:
    """Refuses a model that is a `PeftModel` already, or has an adapter of this name."""
    if isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        raise ValueError(
            f"The model is a {type(model).__name__}, which has adapters already. Load another one into it with "
            "model.load_adapter(path, adapter_name), or add a new one with model.add_adapter(adapter_name, config)."
        )
    if any(adapter_name in m._get_available_adapters() for m in model.modules() if isinstance(m, DiffFitLayer)):
        raise ValueError(
            f"The model has an adapter {adapter_name!r} already, in the PeftModel that it was put into: use that one, "
            "with load_adapter(path, adapter_name), or take its adapters off with unload()."
        )


def _check_model(model: nn.Module) -> None:
    """Refuses models whose layers are not what they seem."""
    if hasattr(model, "_orig_mod"):
        raise ValueError("The model is compiled: attach the adapter first, and compile what get_peft_model returns.")
    other = next(
        (m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, DiffFitLayer)), None
    )
    if other is not None:
        raise ValueError(
            f"The model already has adapters of another method ({type(other).__module__}): merge or unload them first."
        )


def _check_names(expected: set[str], found: set[str]) -> None:
    if expected != found:
        raise ValueError(
            f"The file's weights do not fit its config: {len(expected - found)} are missing and "
            f"{len(found - expected)} belong to no layer, for instance {min(expected ^ found)}."
        )


def _plan(config: DiffFitConfig, model: nn.Module, architecture: Architecture) -> tuple[_Plan, set[str]]:
    """What each layer gets, by name, and the names of the layers excluded.

    Raises:
        ValueError: if a field of `config` does not fit the model, naming what would.
    """
    layers, table = _layers(model, architecture)
    names = [*layers, *table]
    excluded = set(_matching("exclude_modules", config.exclude_modules, names, required=False))
    excluded |= _saved_whole(config, model, names)

    if config.target_modules is None:
        targets = set(names)
    elif config.target_modules == "all-linear":
        targets = {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    else:
        targets = set(_matching("target_modules", config.target_modules, names))
    gammas = _gamma_layers(config, architecture, layers)
    if config.gamma_modules is None:  # the preset stays within the targets, as whoever names targets expects
        gammas &= targets
    low_rank = _low_rank_layers(config, architecture, layers)
    if config.low_rank_modules is None:
        low_rank &= targets

    plan: _Plan = {}
    for name, layer in layers.items():
        target = name in targets
        gamma = name in gammas or (target and is_norm(layer))
        delta = target and getattr(layer, "bias", None) is not None
        if (gamma or delta or name in low_rank) and name not in excluded:
            plan[name] = {"gamma": gamma, "delta": delta, "low_rank": name in low_rank}

    if config.num_classes is not None and not table:
        raise ValueError(f"num_classes={config.num_classes}, but {type(model).__name__} has no class table.")
    for name, layer in table.items():
        classes = layer.num_embeddings - 1
        if config.num_classes is not None and config.num_classes > classes:
            raise ValueError(
                f"num_classes={config.num_classes}, but the class table of this model has rows for {classes} classes "
                "and the null class: at most that many can be adapted."
            )
        if (name in targets or config.num_classes is not None) and name not in excluded:
            plan[name] = {"delta": True}
    if not plan:
        raise ValueError(
            f"target_modules={config.target_modules}, exclude_modules={config.exclude_modules} and "
            f"gamma_modules={config.gamma_modules} leave no layer of {type(model).__name__} to train."
        )
    return plan, excluded


def _spelled_out(
    config: DiffFitConfig, plan: _Plan, model: nn.Module, architecture: Architecture
) -> dict[str, list[str] | list[int] | None]:
    """The presets that the config asks for, as what they select in this model, so that they may change one day."""
    layers, _ = _layers(model, architecture)
    fields: dict[str, list[str] | list[int] | None] = {}

    def having(kind: str) -> set[str]:
        return {name for name, kinds in plan.items() if kinds.get(kind) and not is_norm(layers[name])}

    if config.gamma_modules is None:
        fields["gamma_modules"], fields["gamma_layers"] = _shortest(having("gamma"), layers, architecture)
    if config.r and config.low_rank_modules is None:
        endings, blocks = _shortest(having("low_rank"), layers, architecture)
        fields["low_rank_modules"] = endings if blocks is None else sorted(having("low_rank"))
    return fields


def _shortest(
    selected: set[str], layers: Iterable[str], architecture: Architecture
) -> tuple[list[str], list[int] | None]:
    """Endings and blocks that select exactly these layers, no blocks meaning all of them; or else the whole names."""
    block_of = _blocks(architecture, layers)
    blocks = {block_of[name] for name in selected if name in block_of}
    endings = sorted({name.removeprefix(f"{architecture.blocks}.{block_of.get(name)}.") for name in selected})
    matching = {name for name in _matching("", endings, layers) if block_of.get(name) in {None, *blocks}}
    if matching != selected:
        return sorted(selected), None
    return endings, sorted(blocks) if blocks < {*block_of.values()} and blocks else None


def _saved_whole(config: DiffFitConfig, model: nn.Module, names: list[str]) -> set[str]:
    """The layers among `names` that are, or lie in, a module of `modules_to_save`."""
    modules = dict(model.named_modules())
    saved: set[str] = set()
    for ending in config.modules_to_save or ():
        matching = tuple(name for name in modules if name.endswith(ending))  # as peft matches them
        if not matching:
            raise ValueError(f"modules_to_save: {ending!r} names no module of the model.{nearest(ending, [*modules])}")
        adapted = next((name for name in matching if isinstance(modules[name], BaseTunerLayer)), None)
        if adapted:
            raise ValueError(
                f"modules_to_save: {adapted} has adapters of its own already. Attach the adapter that saves it whole "
                "first, or name it in the others' exclude_modules."
            )
        saved |= {name for name in names if name in matching or name.startswith(tuple(f"{m}." for m in matching))}
    return saved


def _layers(model: nn.Module, architecture: Architecture) -> tuple[dict[str, nn.Module], dict[str, nn.Embedding]]:
    """The layers γ and δ can be put on, and the class table, by the names they have without adapters."""
    layers: dict[str, nn.Module] = {}
    table: dict[str, nn.Embedding] = {}
    # what is inside adapter layers and other adapters' modules_to_save, and what MultiheadAttention uses without a call
    closed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(closed or "\0"):
            continue
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if base is not module or isinstance(module, (nn.MultiheadAttention, AuxiliaryTrainingWrapper)):
            closed += (f"{name}.",)
        if is_supported(base):
            layers[name] = base
        elif architecture.class_table and isinstance(base, nn.Embedding) and name.endswith(architecture.class_table):
            table[name] = base
    return layers, table


def _gamma_layers(config: DiffFitConfig, architecture: Architecture, layers: dict[str, nn.Module]) -> set[str]:
    """Names of the layers whose output gets γ: those of `gamma_modules`, and of the blocks in `gamma_layers`."""
    block_of = _blocks(architecture, layers)
    num_blocks = max(block_of.values(), default=-1) + 1
    share = architecture.gamma_share if config.gamma_modules is None else 1
    blocks = set(range(math.ceil(share * num_blocks)) if config.gamma_layers is None else config.gamma_layers)
    if blocks - set(range(num_blocks)):
        raise ValueError(
            f"gamma_layers={short(config.gamma_layers)}: this model has {num_blocks} blocks"
            + (f", so indices go from 0 to {num_blocks - 1}." if num_blocks else ": leave gamma_layers out.")
        )
    if config.gamma_modules is not None:
        matching = _matching("gamma_modules", config.gamma_modules, layers)
    else:
        not_norms = {name: layer for name, layer in layers.items() if not is_norm(layer)}
        matching = _preset(architecture.gamma_modules, not_norms, block_of)
    selected = {name for name in matching if block_of.get(name) in {None, *blocks}}
    if config.gamma_modules and config.gamma_layers and not selected:
        found = sorted({block_of[name] for name in matching})
        raise ValueError(
            f"gamma_modules={config.gamma_modules!r} matches layers of the blocks {found}, but "
            f"gamma_layers={config.gamma_layers} lets γ onto {sorted(blocks)} alone."
        )
    return selected


def _low_rank_layers(config: DiffFitConfig, architecture: Architecture, layers: dict[str, nn.Module]) -> set[str]:
    """Names of the layers that get a change of rank `config.r`."""
    if not config.r:
        return set()
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    if config.low_rank_modules is None:
        selected = _preset(architecture.low_rank_modules, linear, _blocks(architecture, layers))
    else:
        selected = _matching("low_rank_modules", config.low_rank_modules, layers)
    for name in selected:
        if name not in linear:
            raise ValueError(
                f"low_rank_modules: {name} is of type {type(layers[name]).__name__}, but a change of low rank goes on "
                "linear layers alone."
            )
        side = min(linear[name].in_features, linear[name].out_features)
        if config.r > side:
            raise ValueError(f"r={short(config.r)}: the rank of {name} is at most {side}. Use a lower r.")
    return set(selected)


def _blocks(architecture: Architecture, names: Iterable[str]) -> dict[str, int]:
    """The index of the block that each layer lies in; without the layers that lie in none."""
    prefix = f"{architecture.blocks}."
    inside = [name for name in names if architecture.blocks and name.startswith(prefix)]
    return {name: int(name.removeprefix(prefix).split(".")[0]) for name in inside}


def _preset(endings: tuple[str, ...] | None, names: Iterable[str], block_of: dict[str, int]) -> list[str]:
    """Those of `names` that lie in a block, if there are any, and have one of the endings."""
    inside = [name for name in names if name in block_of or not block_of]
    return [name for name in inside if endings is None or name.endswith(tuple(f".{end}" for end in endings))]


def _matching(field: str, patterns: list[str] | str | None, names: Iterable[str], required: bool = True) -> list[str]:
    """The names that a list of names and endings, or a regular expression, selects.

    Raises:
        ValueError: if `required` and the expression, or an entry of the list, selects nothing.
    """
    names = list(names)
    if not patterns:
        return []
    endings = {name: {name.split(".", i)[-1] for i in range(name.count(".") + 1)} for name in names}
    known = set().union(*endings.values())
    if isinstance(patterns, str):
        selected = fullmatches(field, patterns, names)
        missing = [] if selected else [patterns]
    else:
        selected = [name for name in names if not endings[name].isdisjoint(patterns)]
        missing = [pattern for pattern in patterns if pattern not in known]
    if missing and required:
        common = sorted({re.sub(r"^.*\.\d+\.", "", name) for name in names})
        hint = nearest(missing[0][:200], common + names)
        if missing[0] in known:
            hint = f" A string is a regular expression for the whole name: did you mean the list {missing}?"
        raise ValueError(
            f"{field}={short(patterns)}: {missing[0][:200]!r} matches no layer that DiffFit can train.{hint} "
            f"Names end in {listed(common)}."
        )
    return selected
