"""`DiffFitLoaderMixin`: DiffFit adapters on a pipeline, loaded, blended and saved as LoRA is elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import PeftModel, set_peft_model_state_dict

from .config import DiffFitConfig, plain
from .hotswap import hotswap_adapter
from .layer import DiffFitLayer
from .merging import check_names
from .publishing import push_adapter, save_adapter
from .reading import adapter_folder, read_adapter


class DiffFitLoaderMixin:
    """Loads, blends, fuses and saves DiffFit adapters on `self.transformer`; verbs as for LoRA in Diffusers.

    For a pipeline class of your own: `class MyPipeline(DiffFitLoaderMixin, SanaPipeline)`.
    """

    transformer: Any

    def load_difffit_weights(
        self,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> None:
        """Loads an adapter and makes it the active one.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the adapter. What exists on this machine is taken from
                there. A path of its weights or config stands for the folder they are in.
            adapter_name: name to give it; `None`: "default_0", "default_1" and so on, the first that is free.
            hotswap: put its values in the place of those of the adapter `adapter_name` that is there already.
            subfolder: where in the folder or repository the adapter is.
            revision: branch, tag or commit of the repository; a folder has none, and is refused with one.
            token, cache_dir, local_files_only, force_download: as for every download from the Hub.

        Raises:
            ValueError: if it is not a DiffFit adapter, belongs to another base, is broken, or has no safetensors file;
                if the name is taken, or with `hotswap` is not.
            HfHubHTTPError: of `huggingface_hub`, or one of its subclasses, if the Hub does not give it.

        The pipeline is then as it was.
        """
        names = self.get_list_adapters()
        if adapter_name is not None and (not adapter_name or {*adapter_name} & {*"./\\"}):
            raise ValueError(f"adapter_name={adapter_name!r}: it must not be empty, nor hold a dot or a slash.")
        if adapter_name is None:
            adapter_name = next(f"default_{i}" for i in range(len(names) + 1) if f"default_{i}" not in names)
        if (adapter_name in names) != hotswap:
            raise ValueError(
                f"There is no adapter {adapter_name!r} to swap: the pipeline has {names}."
                if hotswap
                else f"The name {adapter_name!r} is taken: choose another, delete_adapters({adapter_name!r}) first, or "
                "pass hotswap=True to put the new values in its place."
            )
        self._refuse_fused()
        folder = adapter_folder(
            pretrained_model_name_or_path,
            subfolder,
            revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        if hotswap:
            hotswap_adapter(self._model(), folder, adapter_name)
            self.set_adapters(adapter_name)
        else:
            self._attach(*read_adapter(folder), adapter_name)

    def _attach(self, config: DiffFitConfig, weights: dict[str, torch.Tensor], adapter_name: str) -> None:
        """Adds an adapter that was read, and makes it the active one."""
        if config.task_type is not None:
            raise ValueError(f"task_type={config.task_type}: this adapter is for another task than a pipeline's.")
        config.inference_mode, adapted = True, self._adapted()
        if adapted is None:
            with self._not_offloaded():
                self.transformer = adapted = PeftModel(self.transformer, config, adapter_name)
        else:
            adapted.add_adapter(adapter_name, config)
        set_peft_model_state_dict(adapted, weights, adapter_name)
        adapted.eval()
        self.set_adapters(adapter_name, 1.0)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: list[float] | float | None = None) -> None:
        """Makes these adapters the active ones, at these scales; `None` leaves their scales as they are.

        Adapters that were disabled are enabled.

        Raises:
            ValueError: for an unknown adapter, for weights that are not finite or not as many, and if adapters are
                fused. Nothing is then changed.
        """
        model, names = self._model(), self._names(adapter_names)
        weights = plain(adapter_weights)
        weights = [plain(w) for w in weights] if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(weights) != len(names) or not all(
            weight is None or (isinstance(weight, (int, float)) and math.isfinite(weight)) for weight in weights
        ):
            raise ValueError(f"adapter_weights={adapter_weights}: must be one finite number for each of {names}.")
        self._refuse_fused()
        for name, weight in zip(names, weights, strict=True):
            if weight is not None:
                model.set_scale(name, weight)
        self._activate(names)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that have an effect: none while they are disabled, those fused while any is fused."""
        adapted = self._adapted()
        if adapted is None or not adapted.get_model_status().enabled:
            return []
        return self._fused() or adapted.base_model.active_adapters

    def get_list_adapters(self) -> list[str]:
        """Names of all the adapters that are loaded."""
        adapted = self._adapted()
        return [] if adapted is None else list(adapted.peft_config)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Removes adapters; without the last one the pipeline is as it was before the first.

        Raises:
            ValueError: for an unknown adapter, or if adapters are fused. Nothing is then changed.
        """
        names, loaded = self._names(adapter_names), self.get_list_adapters()
        self._refuse_fused()
        remaining = [name for name in loaded if name not in names]
        if not remaining:
            self.unload_difffit_weights()
            return
        model = self._model()
        active = [name for name in model.base_model.active_adapters if name in remaining]
        enabled = bool(self.get_active_adapters())
        for name in names:
            model.delete_adapter(name)
        self._activate(active or remaining[:1])
        if not enabled:
            self.disable_difffit()

    def unload_difffit_weights(self) -> None:
        """Takes all adapters off, fused ones too: the transformer is the base's again.

        One that was compiled with them is then not compiled any more.
        """
        adapted = self._adapted()
        if adapted is not None:
            with self._not_offloaded():
                self.transformer = adapted.unload()

    def disable_difffit(self) -> None:
        """Computes with the base alone, until `enable_difffit`.

        Raises:
            ValueError: if adapters are fused, or there is none.
        """
        model = self._model()
        self._refuse_fused()
        model.base_model.disable_adapter_layers()

    def enable_difffit(self) -> None:
        """Computes with the active adapters again.

        Raises:
            ValueError: if adapters are fused, or there is none.
        """
        model = self._model()
        self._refuse_fused()
        self._activate(model.base_model.active_adapters)

    def fuse_difffit(self, adapter_names: list[str] | str | None = None, safe_fusing: bool = False) -> None:
        """Writes adapters, by default the active ones, into the weights, so that they cost nothing when sampling.

        While any is fused, those that are not have no effect. More can be fused; what is fused already stays so.

        Raises:
            ValueError: for an unknown adapter; while adapters are disabled; with `safe_fusing`, if that gives values
                that are not finite; if the base is quantised so that they do not fit in. Nothing is then changed.
        """
        model = self._model()
        active = self.get_active_adapters()
        names = active if adapter_names is None else self._names(adapter_names)
        if not active:
            raise ValueError("Adapters are disabled: call enable_difffit() first.")
        if {*names} - {*self._fused()}:
            model.merge_adapter(names, safe_merge=safe_fusing)

    def unfuse_difffit(self) -> None:
        """Puts the base's own weights back, to the last bit. The adapters active before are active again."""
        self._model().unmerge_adapter()

    def save_difffit_weights(
        self, save_directory: str | os.PathLike, adapter_name: str | None = None, **card: Any
    ) -> None:
        """Saves one adapter, by default the only one that is active, as a folder that `load_difffit_weights` takes.

        Keyword arguments are of the model card: `license`, `dataset`, `training`, `picture`. See
        `publishing.save_adapter`.
        """
        save_adapter(self._model(), save_directory, self._one_adapter(adapter_name), **card)

    def push_difffit_to_hub(self, repo_id: str, adapter_name: str | None = None, **kwargs: Any) -> CommitInfo:
        """Uploads one adapter, by default the only one that is active, with a model card, in one commit.

        Keyword arguments: `commit_message`, `private`, `token`, `revision`, `create_pr`, and those of the card as in
        `save_difffit_weights`; see `publishing.push_adapter`, also for what is raised.
        """
        return push_adapter(self._model(), repo_id, self._one_adapter(adapter_name), **kwargs)

    def _one_adapter(self, adapter_name: str | None) -> str:
        if adapter_name is None:
            active = self.get_active_adapters()
            if len(active) != 1:
                raise ValueError(f"adapter_name is None, but the active adapters are {active}: name one.")
            return active[0]
        return self._names([adapter_name])[0]

    def _names(self, adapter_names: list[str] | str) -> list[str]:
        """The names that a verb is given, which must be of adapters that are loaded, each once."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if not isinstance(names, (list, tuple)) or not names:
            raise ValueError(
                f"adapter_names={adapter_names!r}: name at least one adapter, as a string or a list of strings. "
                "Scales go apart, as in set_adapters(['a', 'b'], [0.8, 0.2])."
            )
        check_names(names, self._model().peft_config)
        return list(names)

    def _model(self) -> PeftModel:
        adapted = self._adapted()
        if adapted is None:
            raise ValueError("The pipeline has no DiffFit adapter: call load_difffit_weights() first.")
        return adapted

    def _adapted(self) -> PeftModel | None:
        """The transformer, also inside of `torch.compile`, if it has adapters."""
        transformer = getattr(self.transformer, "_orig_mod", self.transformer)
        return transformer if isinstance(transformer, PeftModel) else None

    @contextmanager
    def _not_offloaded(self) -> Iterator[None]:
        """Takes off what `enable_model_cpu_offload` put on the transformer while another takes its place.

        Accelerate cannot take its hooks off a `PeftModel` around a transformer that has them.
        """
        pipe: Any = self
        offloaded = bool(getattr(pipe, "_all_hooks", None))
        if offloaded:
            pipe.remove_all_hooks()
        try:
            yield
        finally:
            if offloaded:
                pipe.enable_model_cpu_offload(device=pipe._offload_device)

    def _fused(self) -> list[str]:
        # PEFT's get_model_status says it too, but takes twice as long as switching adapters does
        return next((m.merged_adapters for m in self.transformer.modules() if isinstance(m, DiffFitLayer)), [])

    def _refuse_fused(self) -> None:
        if self._fused():
            raise ValueError("Adapters are fused: call unfuse_difffit() first.")

    def _activate(self, names: list[str]) -> None:
        model = self._model()
        model.set_adapter(names[0])  # PeftModel's own note of it, which holds one name
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter(names, inference_mode=True)
