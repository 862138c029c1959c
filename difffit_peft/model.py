"""`DiffFitModel`: the tuner that PEFT puts into a model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.configuration_utils import FrozenDict
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _check_adapters_not_merged, _ExcludedModule
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .attach import check_weight_names, layer_class, named_layers, prepare, restore
from .bare_parameters import check_mixable, forget_parameters
from .base_layers import PlacedModules
from .class_names import keep_names, names_of_adapters
from .class_rows import DiffFitEmbedding
from .config import DiffFitConfig, finite, short
from .families import family_of
from .layer import DiffFitLayer, names_in
from .merging import check_names, merge_layers, names_to_merge, owners_of_parameters, tied_parameters
from .publishing import base_model_id
from .targets import exactly, matching


class DiffFitModel(PlacedModules, BaseTuner):
    """Adapts a model with DiffFit; made by `peft.get_peft_model(model, DiffFitConfig())`.

    While attached, the model is as its family needs it for adapters (`difffit_peft.families`). `unload()` and
    `merge_and_unload()` give the plain model back.

    Raises:
        ValueError: if the config names layers, blocks, classes or a base that this model does not have, or if the model
            has an adapter of that name. The model is then as it was.
    """

    prefix: str = "difffit_"
    tuner_layer_cls = DiffFitLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_not_adapted(model, adapter_name)  # before peft 0.21 writes the config to the model
        _check_model(model)
        _check_name(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    @property
    def config(self) -> Any:
        """The model's config, naming the base by its Hub id: PEFT's model card publishes that name."""
        config = self.model.config
        name = config.get("_name_or_path") if isinstance(config, FrozenDict) else None
        return FrozenDict({**config, "_name_or_path": base_model_id(str(name))[0]}) if name else config

    def _prepare_adapter_config(self, peft_config: DiffFitConfig, model_config: dict) -> DiffFitConfig:
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_name(model, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_model(self, peft_config: DiffFitConfig, model: nn.Module) -> None:
        _check_model(model)
        self._planned = prepare(peft_config, model, self.peft_config)
        self._owners = owners_of_parameters(model)

    def _check_tied_modules(self, model: nn.Module, peft_config: DiffFitConfig) -> None:
        """Nothing to check: what is on a layer's output has no part in a tied weight, but in a merge of it."""

    def _check_target_module_exists(self, peft_config: DiffFitConfig, key: str) -> bool | _ExcludedModule:
        # BaseTuner's is a static method that knows the config alone; the plan also knows the model (peft 0.21)
        if key not in self._planned and matching(peft_config.exclude_modules, [key]):
            return _ExcludedModule()  # peft warns where there is none
        return key in self._planned

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
        layer = target if isinstance(target, DiffFitLayer) else layer_class(target)(target)
        layer.update_layer(adapter_name, peft_config, **vars(self._planned[current_key]))
        layer.tied = tied_parameters(current_key, layer.get_base_layer(), self._owners)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # as peft 0.21 does it, in one walk over the model in the place of seven
        modules, kept = [*model.modules()], set()
        for module in modules:
            if isinstance(module, DiffFitLayer):
                kept |= {id(p) for kind in module.adapter_layer_names for p in getattr(module, kind).values()}
            elif isinstance(module, AuxiliaryTrainingWrapper):
                kept |= {id(p) for p in module.parameters()}
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in kept:
                    parameter.requires_grad = False

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DiffFitConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # peft 0.21 takes four walks for it, leaves what the file lacks as it was, and ignores what it has too many
        ours = (name for name, _ in model.named_parameters() if f".{cls.prefix}" in name)
        expected = {name for name in ours if name.endswith(f".{adapter_name}")}
        of_file = {name.removesuffix(f".{adapter_name}"): name for name in expected}
        of_file |= {f"base_model.model.{name}": own for name, own in of_file.items()}  # if in no PeftModel
        remapped = {of_file.get(name, name): tensor for name, tensor in state_dict.items()}
        found = {name for name in remapped if f".{cls.prefix}" in name}
        check_weight_names(expected, found)
        forget_parameters(model, config, adapter_name, expected - found)
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

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Scales the effect of an adapter: 0 is the base, 1 the adapter, any real number between or beyond.

        Active adapters i with scales s_i compose as γ = Π (1 + s_i (γ_i - 1)), δ = Σ s_i δ_i.

        Raises:
            ValueError: if there is no such adapter, the scale is not finite, or the adapter is merged.
        """
        check_names([adapter_name], self.peft_config)
        number = finite(scale)
        if number is None:
            raise ValueError(f"scale={short(scale)}: must be a finite number.")
        if any(adapter_name in layer.merged_adapters for layer in self._difffit_layers()):
            raise ValueError(f"The adapter {adapter_name!r} is merged: call unmerge_adapter() first.")
        for layer in self._difffit_layers():
            layer.set_scale(adapter_name, number)

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Adds an adapter that does alone what `adapters` do together at scales `weights`, whatever theirs are now.

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
        names = named_layers(self.model, family_of(self.model))

        def among(selected: set[str]) -> list[str]:
            return exactly(selected, names)

        def having(kind: str) -> set[str]:
            return {name for name, layer in layers.items() if not getattr(layer, kind).keys().isdisjoint(adapters)}

        norms = {name for name, layer in layers.items() if layer.norm}
        tables = {name for name, layer in layers.items() if isinstance(layer, DiffFitEmbedding)}
        deltas, gammas, low_rank = having("difffit_delta"), having("difffit_gamma"), having("difffit_A")
        classes = [config.num_classes for name, config in zip(adapters, configs, strict=True)
                   if any(name in layers[table].difffit_delta for table in tables)]  # fmt: skip
        labels, backgrounds = [config.id2label for config in configs], {config.background for config in configs}
        guidance = {config.trained_guidance_scale for config in configs}
        return dataclasses.replace(
            configs[0],
            target_modules=among(deltas | gammas & norms),
            exclude_modules=None,
            gamma_modules=among(gammas - norms),
            gamma_layers=None,
            new_biases=any(config.new_biases for config in configs),
            r=sum(config.r for config in configs) if low_rank else 0,
            low_rank_modules=among(low_rank),
            num_classes=max(classes) if classes and None not in classes else None,
            id2label=labels[0] if all(names == labels[0] for names in labels) else None,
            init_class_rows="base" if all(config.init_class_rows == "base" for config in configs) else "null",
            background=backgrounds.pop() if len(backgrounds) == 1 else None,
            trained_guidance_scale=guidance.pop() if len(guidance) == 1 else None,
            init_weights=True,
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands `adapter_names`, an entry per sample, to every layer; PeftModel.forward calls this (peft 0.21)."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = {name for entry in adapter_names for name in names_in(entry)} - {*self.peft_config, "__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        check_mixable(self.model, {name for entry in adapter_names for name in names_in(entry)})

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
        before = [layer.merged_adapters for layer in self._difffit_layers()]
        self._merge(adapter_names, safe_merge)
        if before == [layer.merged_adapters for layer in self._difffit_layers()]:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool) -> list[str]:
        self._check_merge_allowed()
        names = names_to_merge(self, adapter_names)
        layers = self._difffit_layers()
        merge_layers({layer: layer.active_adapters if adapter_names is None else names for layer in layers}, safe_merge)
        return names

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
            merged = self._merge(adapter_names, safe_merge)
            names = names_of_adapters(self.peft_config[name] for name in merged)
        else:
            for layer in self._difffit_layers():
                if layer.merged:
                    layer.unmerge()
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        restore(model, merged=merge)
        if names is not None:
            keep_names(model, names)
        return model


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


def _check_name(model: nn.Module, adapter_name: str) -> None:
    """Refuses what PyTorch takes for no name, and the name of a module: peft 0.21 saves every other adapter without the
    weights that have it in their name. See https://github.com/huggingface/peft/issues/3584.
    """
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r}: PyTorch allows no dot in it, and it must not be empty.")
    ours = {"model", "modules_to_save", *DiffFitLayer.adapter_layer_names, *family_of(model).added_modules}
    owners = [(name, module._parameters) for name, module in model.named_modules() if module._parameters]
    parts = {part for name, parameters in owners for part in (*name.split("."), *parameters)}
    if adapter_name in ours | parts:
        raise ValueError(
            f"adapter_name={adapter_name!r} is the name of a module, and PEFT would save other adapters without the "
            f"weights in it. Choose another name, such as {f'adapter_{adapter_name}'!r}."
        )


def _check_model(model: nn.Module) -> None:
    """Refuses models whose layers are not what they seem."""
    if hasattr(model, "_orig_mod"):
        raise ValueError("The model is compiled: attach the adapter first, and compile the model then.")
    other = next(
        (m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, DiffFitLayer)), None
    )
    if other is not None:
        raise ValueError(
            f"The model already has adapters of another method ({type(other).__module__}): merge or unload them first."
        )
