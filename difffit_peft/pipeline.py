"""`DiffFitDiTPipeline`: Diffusers' `DiTPipeline` with DiffFit adapters, loaded and blended as LoRA is elsewhere."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

from diffusers import DiTPipeline
from huggingface_hub import CommitInfo, HfApi, create_repo, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .class_names import class_indices, join_names, keep_names, names_of_adapters, names_of_base, split_names
from .config import DiffFitConfig, plain
from .files import write
from .hotswap import hotswap_adapter
from .hub import (
    adapter_folder,
    cached_commit,
    check_base_model_id,
    check_has_weights,
    hub_file,
    local_path,
    push_adapter,
    save_adapter,
)
from .layer import DiffFitLayer
from .merging import check_names

_ADAPTERS = "adapters"  # where save_pretrained puts the adapters, beside transformer/, vae/ and scheduler/


class DiffFitLoaderMixin:
    """Loads, blends, fuses and saves DiffFit adapters on `self.transformer`; verbs as for LoRA in Diffusers.

    For a pipeline class of your own: `class MyPipeline(DiffFitLoaderMixin, DiTPipeline)`.
    """

    transformer: Any
    _base_labels: dict[str, int] = {}
    _base_id2label: dict[int, str] = {}

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes that the transformer has now, however its adapters got there.

        They are those of the first active adapter that has any, else the base's. New classes of an adapter without
        names have none.
        """
        layer = next((m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer)), None)
        active = [] if layer is None or layer.disable_adapters else layer.merged_adapters or layer.active_adapters
        names = names_of_adapters(self.transformer.peft_config[name] for name in active)
        return self._base_names() if names is None else names

    @property
    def labels(self) -> dict[str, int]:
        """Class indices by name, as `DiTPipeline` has them. What is assigned are the names of the base."""
        names = self.id2label
        return self._base_labels if names is self._base_id2label else split_names(names)

    @labels.setter
    def labels(self, labels: dict[str, int]) -> None:
        self._base_labels, self._base_id2label = labels, join_names(labels)
        if labels:  # DiTPipeline's constructor assigns {} first
            keep_names(self.transformer, self._base_id2label)

    def _base_names(self) -> dict[int, str]:
        kept = names_of_base(self.transformer)
        return self._base_id2label if kept is None else kept

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
            ValueError: if it is no DiffFit adapter, belongs to another base, is broken, or has no safetensors file; if
                the name is taken, or with `hotswap` is not.
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
        check_has_weights(folder)
        if DiffFitConfig.from_pretrained(str(folder)).task_type is not None:
            raise ValueError(f"{folder} is an adapter for another task than a pipeline's.")
        if hotswap:
            hotswap_adapter(self.transformer, str(folder), adapter_name)
        elif isinstance(self.transformer, PeftModel):
            self.transformer.load_adapter(str(folder), adapter_name)
        else:
            self.transformer = PeftModel.from_pretrained(self.transformer, str(folder), adapter_name)
        self.set_adapters(adapter_name, None if hotswap else 1.0)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: list[float] | float | None = None) -> None:
        """Makes these adapters the active ones, at these strengths; `None` leaves their strengths as they are.

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
        if not self.get_list_adapters() or not self.transformer.get_model_status().enabled:
            return []
        return self._fused() or self.transformer.base_model.active_adapters

    def get_list_adapters(self) -> list[str]:
        """Names of all the adapters that are loaded."""
        return list(self.transformer.peft_config) if isinstance(self.transformer, PeftModel) else []

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
        active = [name for name in self.transformer.base_model.active_adapters if name in remaining]
        enabled = bool(self.get_active_adapters())
        for name in names:
            self.transformer.delete_adapter(name)
        self._activate(active or remaining[:1])
        if not enabled:
            self.disable_difffit()

    def unload_difffit_weights(self) -> None:
        """Takes all adapters off, fused ones too: the transformer is the base's again, and so are the class names."""
        if isinstance(self.transformer, PeftModel):
            self.transformer = self.transformer.unload()

    def disable_difffit(self) -> None:
        """Computes with the base alone, until `enable_difffit`.

        Raises:
            ValueError: if adapters are fused, or there is none.
        """
        self._model()
        self._refuse_fused()
        self.transformer.base_model.disable_adapter_layers()

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
                that are not finite; always, if the base is quantised. Nothing is then changed.
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

        Keyword arguments are of the model card: `license`, `dataset`, `training`, `picture`; see `hub.save_adapter`.
        """
        save_adapter(self._model(), save_directory, self._one_adapter(adapter_name), **card)

    def push_difffit_to_hub(self, repo_id: str, adapter_name: str | None = None, **kwargs: Any) -> CommitInfo:
        """Uploads one adapter, by default the only one that is active, with a model card, in one commit.

        Keyword arguments: `commit_message`, `private`, `token`, `revision`, `create_pr`, and those of the card as in
        `save_difffit_weights`; see `hub.push_adapter`, also for what is raised.
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
                "Strengths go apart, as in set_adapters(['a', 'b'], [0.8, 0.2])."
            )
        check_names(names, self._model().peft_config)
        return list(names)

    def _model(self) -> PeftModel:
        if not isinstance(self.transformer, PeftModel):
            raise ValueError("The pipeline has no DiffFit adapter: call load_difffit_weights() first.")
        return self.transformer

    def _fused(self) -> list[str]:
        # PEFT's get_model_status says it too, but takes twice as long as switching adapters does
        return next((m.merged_adapters for m in self.transformer.modules() if isinstance(m, DiffFitLayer)), [])

    def _refuse_fused(self) -> None:
        if self._fused():
            raise ValueError("Adapters are fused: call unfuse_difffit() first.")

    def _activate(self, names: list[str]) -> None:
        model = self._model()
        model.set_adapter(names[0])  # PeftModel's own note of it, which holds one name
        model.base_model.enable_adapter_layers()  # first: it makes the active ones trainable
        model.base_model.set_adapter(names, inference_mode=True)


class DiffFitDiTPipeline(DiffFitLoaderMixin, DiTPipeline):
    """`DiTPipeline` with DiffFit adapters.

        pipe = DiffFitDiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
        pipe.load_difffit_weights("me/dit-food101", adapter_name="food")
        images = pipe(pipe.get_label_ids("ramen")).images

    Class names and sample size are those of the active adapter, and the base's again after unloading.
    """

    @functools.wraps(DiTPipeline.__init__)  # type: ignore[misc]  # Diffusers reads the parameters and their types
    def __init__(self, transformer: Any, vae: Any, scheduler: Any, id2label: dict[int, str] | None = None) -> None:
        super().__init__(transformer, vae, scheduler)
        names = names_of_base(transformer) if id2label is None else id2label
        if names is not None:
            self._base_id2label = dict(
                sorted((int(index), name) for index, name in names.items())
            )  # JSON's are strings
            self._base_labels = split_names(self._base_id2label)
            keep_names(transformer, self._base_id2label)

    def __call__(self, class_labels: list[int], *args: Any, **kwargs: Any) -> Any:
        """As `DiTPipeline` does, but guided by the base's own null class, where that one takes class 1000 for it."""
        null = self.transformer.config.num_embeds_ada_norm
        if null == 1000:
            return super().__call__(class_labels, *args, **kwargs)

        def with_null_class(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            labels = kwargs["class_labels"].clone()
            labels[len(class_labels) :] = null  # the second half, where there is guidance
            return args, kwargs | {"class_labels": labels}

        handle = self.transformer.register_forward_pre_hook(with_null_class, with_kwargs=True)
        try:
            return super().__call__(class_labels, *args, **kwargs)
        finally:
            handle.remove()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> DiffFitDiTPipeline:
        """Loads a pipeline, or the base of an adapter and the adapter.

        What `save_pretrained` or `push_to_hub` wrote comes with its adapters. Of an adapter (a folder or Hub id without
        `model_index.json`, or with `subfolder`), the base and its revision are those its config names. `revision` and
        `subfolder` are then the adapter's; other keyword arguments go to the base.

        Raises:
            ValueError: if it is neither, or an adapter that names no base, or one that is no id of the Hub.
            HfHubHTTPError: of `huggingface_hub`, or one of its subclasses, if the Hub does not give it.
        """
        path, names = os.fspath(pretrained_model_name_or_path), ("cache_dir", "token", "local_files_only")
        hub = {name: kwargs[name] for name in (*names, "force_download") if name in kwargs}
        revision, subfolder = kwargs.pop("revision", None), kwargs.pop("subfolder", None)
        local = local_path(path, revision)
        if local is not None:
            is_pipeline = (local / cls.config_name).is_file()
        else:
            try:
                index = hub_file(path, cls.config_name, revision=revision, **hub)
                is_pipeline, revision = True, cached_commit(index) or revision  # all files of one commit
            except EntryNotFoundError:
                is_pipeline = False
        if subfolder or not is_pipeline:
            folder = adapter_folder(path, subfolder, revision, **hub)
            config = DiffFitConfig.from_pretrained(str(folder))
            if not config.base_model_name_or_path:
                raise ValueError(
                    f"{path} is an adapter that names no base: load the base with from_pretrained, and then "
                    f"load_difffit_weights({path!r})."
                )
            base, revision = check_base_model_id(config.base_model_name_or_path, config.revision)
            pipe = super().from_pretrained(base, revision=revision, **kwargs)
            pipe.load_difffit_weights(folder)
            return pipe
        pipe = super().from_pretrained(path if local is None else str(local), revision=revision, **kwargs)
        if local is None:  # Diffusers downloads the parts alone
            wanted = [cls.config_name, f"{_ADAPTERS}/*.json", f"{_ADAPTERS}/*.safetensors"]
            local = Path(snapshot_download(path, revision=revision, allow_patterns=wanted, **hub))
        adapters = sorted(folder for folder in (local / _ADAPTERS).glob("*") if folder.is_dir())
        for folder in adapters:
            pipe.load_difffit_weights(folder, folder.name)
        state = local / _ADAPTERS / "active.json"
        if adapters and state.is_file():
            active = json.loads(state.read_text())
            if not isinstance(active, dict):
                raise ValueError(
                    f"{state} holds a {type(active).__name__}: it must be an object of names and strengths."
                )
            if active:
                pipe.set_adapters(list(active), list(active.values()))
            else:
                pipe.disable_difffit()
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiTPipeline, **kwargs: Any) -> DiffFitDiTPipeline:
        """A `DiffFitDiTPipeline` of another pipeline's parts, or of those in `kwargs`, which stay in their dtypes.

        `dtype` casts them.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if isinstance(pipeline, DiffFitLoaderMixin):
            names = pipeline._base_names()
        else:
            kept = names_of_base(pipeline.transformer)
            names = join_names(pipeline.labels) if kept is None else kept
        pipe = cls(**{**pipeline.components, "id2label": names, **kwargs})
        pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        if dtype is not None:
            pipe.to(dtype=dtype)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Saves the base and, in `adapters/`, the adapters; fused adapters are saved as part of the weights instead.

        A stock `DiTPipeline` loads what this writes too, without the adapters.

        Raises:
            ValueError: with `push_to_hub`; and if the folder holds adapters that this would not write over, which
                would be loaded with what it does write. Nothing is then changed.
        """
        save_directory = os.path.expanduser(save_directory)
        adapted, fused = self.transformer, self._fused()
        folder = Path(save_directory, _ADAPTERS)
        saved = self._refuse_others(str(folder), {f.name for f in folder.glob("*") if f.is_dir()})
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub=True: call push_to_hub(repo_id), which uploads the pipeline and its adapters."
            )
        if saved:
            layers = adapted.base_model._difffit_layers()
            strengths = {
                name: next(float(layer.strength[name]) for layer in layers if name in layer.strength)
                for name in self.get_active_adapters()
            }
        try:
            if isinstance(adapted, PeftModel):
                plain = copy.deepcopy(adapted)
                self.transformer = plain.merge_and_unload(adapter_names=fused) if fused else plain.unload()
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.transformer = adapted
        index = Path(save_directory, self.config_name)
        stock = {"_class_name": "DiTPipeline", "id2label": self._base_names() if saved else self.id2label}
        text = json.dumps(json.loads(index.read_text()) | stock, indent=2)
        write(index, lambda partial: partial.write_text(text + "\n"))
        if saved:
            for name in saved:
                save_adapter(adapted, folder / name, name)
            write(folder / "active.json", lambda partial: partial.write_text(json.dumps(strengths)))
        else:
            folder.joinpath("active.json").unlink(missing_ok=True)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Uploads what `save_pretrained` writes, in one commit: `from_pretrained(repo_id)` gives it back.

        Keyword arguments as for every pipeline of Diffusers.

        Raises:
            ValueError: if the repository holds adapters that this would not write over. Nothing is then uploaded.
            HfHubHTTPError: of `huggingface_hub`, if the Hub refuses.
        """
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        parts = [file.split("/") for file in HfApi(token=token).list_repo_files(repo_id)]
        self._refuse_others(repo_id, {part[1] for part in parts if part[0] == _ADAPTERS and len(part) > 2})
        return super().push_to_hub(repo_id, commit_message, private, token, **kwargs)

    def _refuse_others(self, place: str, there: set[str]) -> list[str]:
        """The adapters to save; refuses a place with others, which would be loaded with them."""
        saved = [] if self._fused() else self.get_list_adapters()
        if others := sorted(there - {*saved}):
            raise ValueError(
                f"{place} holds the adapters {others}, which this pipeline has not to save: they would be loaded with "
                "it. Remove them, or choose another place."
            )
        return saved

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class indices of names: of one, or of each in a list.

        A name is one of `id2label`, or what stands between its commas. An integer, or a name of digits that no class
        has, is an index.

        Raises:
            ValueError: for what is no class, with the nearest name that is; for a name of several classes.
        """
        labels = [label] if isinstance(label, str) else list(label)
        return class_indices(labels, self.id2label, self.transformer.config.num_embeds_ada_norm)
