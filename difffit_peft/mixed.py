"""DiffFit beside LoRA and its kin in one `PeftMixedModel`.

Adapters on one layer nest in the order they were added: DiffFit over LoRA is γ ⊙ (W x + b + B A x + δ), LoRA over
DiffFit is γ ⊙ (W x + b + δ) + B A x.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftConfig
from peft.tuners.mixed.model import MixedModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attach import prepare, restore
from .base_layers import PlacedModules
from .class_names import keep_names, names_of_adapters
from .config import DiffFitConfig
from .merging import merge_layers, names_to_merge, owners_of_parameters
from .model import DiffFitModel


class DiffFitMixedModel(PlacedModules, MixedModel):
    """PEFT's `MixedModel`, which knows DiffFit too."""

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        if isinstance(peft_config, DiffFitConfig):
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        if isinstance(peft_config, DiffFitConfig):
            self._planned = prepare(peft_config, self.model, self.peft_config)
            self._owners = owners_of_parameters(self.model)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        if isinstance(peft_config, DiffFitConfig):
            return DiffFitModel._check_target_module_exists(self, peft_config, self._key(key))
        return super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(self, config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        if isinstance(config, DiffFitConfig):
            kwargs["current_key"] = self._key(kwargs["current_key"])
            DiffFitModel._create_and_replace(self, config, *args, **kwargs)
        else:
            super()._create_and_replace(config, *args, **kwargs)

    @staticmethod
    def _key(key: str) -> str:
        # `PeftMixedModel.add_adapter` has the whole of itself searched, not the model alone
        return key.removeprefix("base_model.model.")

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges from the innermost adapter of a layer outwards, as the forward pass applies them.

        Raises:
            ValueError: if adapters are merged already where methods nest: what is merged first would have to be undone;
                and for the names that `DiffFitModel.merge_adapter` refuses.
        """
        names = names_to_merge(self, adapter_names)
        layers = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        pending = any({*names} & {*layer._get_available_adapters()} - {*layer.merged_adapters} for layer in layers)
        nested = [layer for layer in layers if isinstance(layer.base_layer, BaseTunerLayer)]
        if pending and any(layer.merged or layer.base_layer.merged for layer in nested):
            raise ValueError("Adapters are merged already: call unmerge_adapter() first, then merge all at once.")
        if pending:  # a module comes before what it contains
            merge_layers(
                {layer: [n for n in names if n in layer._get_available_adapters()] for layer in layers[::-1]},
                safe_merge,
            )

    def _unload_and_optionally_merge(self, merge: bool = True, **how: Any) -> nn.Module:
        names = None
        if merge:
            merged = names_to_merge(self, how.get("adapter_names"))
            self.merge_adapter(how.get("adapter_names"), how.get("safe_merge", False))
            names = names_of_adapters(self.peft_config[name] for name in merged)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            model = super()._unload_and_optionally_merge(merge, **how)
        restore(model, merged=merge)
        if names is not None:
            keep_names(model, names)
        return model
