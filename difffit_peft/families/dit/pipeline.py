"""`DiffFitDiTPipeline`: Diffusers' `DiTPipeline` with DiffFit adapters, and the names of their classes."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from diffusers import DiTPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...class_names import class_indices, join_names, keep_names, names_of_adapters, names_of_base, split_names
from ...components import fused, models
from ...config import finite, nearest, plain, short
from ...layer import Entry, names_in
from ...pipelines import DiffFitLoaderMixin
from ...writing import write


class DiffFitDiTPipeline(DiffFitLoaderMixin, DiTPipeline):
    """`DiTPipeline` with DiffFit adapters.

        pipe = DiffFitDiTPipeline.from_pretrained("facebook/DiT-XL-2-256")
        pipe.load_difffit_weights("me/dit-food101", adapter_name="food")
        images = pipe(pipe.get_label_ids("ramen")).images

    Class names and sample size are those of the active adapter, and the base's again after unloading.
    """

    _base_id2label: dict[int, str] = {}

    @functools.wraps(DiTPipeline.__init__)  # type: ignore[misc]  # Diffusers reads the parameters and their types
    def __init__(self, transformer: Any, vae: Any, scheduler: Any, id2label: dict[int, str] | None = None) -> None:
        super().__init__(transformer, vae, scheduler)
        if transformer.config.out_channels is None:  # as many as go in, which `DiTPipeline` does not know
            transformer.register_to_config(out_channels=transformer.config.in_channels)
        names = names_of_base(transformer) if id2label is None else id2label
        if names is not None:
            # JSON's indices are strings
            self._base_id2label = dict(sorted((int(index), name) for index, name in names.items()))
            keep_names(transformer, self._base_id2label)

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes that the transformer has now, however its adapters got there.

        They are those of the first active adapter that has any, else the base's. New classes of an adapter without
        names have none.
        """
        return self._names_under(self._effective())

    @property
    def labels(self) -> dict[str, int]:
        """Class indices by name, as `DiTPipeline` has them. What is assigned are the names of the base."""
        return split_names(self.id2label)

    @labels.setter
    def labels(self, labels: dict[str, int]) -> None:
        self._base_id2label = join_names(labels)
        if labels:  # DiTPipeline's constructor assigns {} first
            keep_names(self.transformer, self._base_id2label)

    @property
    def default_guidance_scale(self) -> float:
        """The scale of a call that is given none: 1 where the active adapters have guidance trained in, else 4."""
        return self._default_guidance_scale([self._effective()])

    def _default_guidance_scale(self, entries: list[Entry]) -> float:
        configs = [[self.transformer.peft_config[n] for n in names_in(e) if n != "__base__"] for e in entries]
        guided = [[getattr(config, "trained_guidance_scale", None) for config in own] for own in configs]
        return 1.0 if all(own and all(own) for own in guided) else 4.0

    def _effective(self) -> tuple[str, ...]:
        """The adapters that have an effect, however the transformer got them."""
        layer = next((m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer)), None)
        if layer is None or layer.disable_adapters:
            return ()
        return tuple(layer.merged_adapters or layer.active_adapters)

    def _fused(self) -> bool:
        return any(map(fused, models(self).values()))

    def _base_names(self) -> dict[int, str]:
        kept = names_of_base(self.transformer)
        return self._base_id2label if kept is None else kept

    def __call__(
        self,
        class_labels: list[int | str] | int | str,
        guidance_scale: float | None = None,
        *args: Any,
        guidance: str = "class",
        adapter_names: list[Entry] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `DiTPipeline` does, with guidance by the base if asked for, and an adapter per image.

        With w the `guidance_scale`, c the class and ∅ the null class, the noise is ε(∅) + w (ε(c) - ε(∅)).
        `guidance="class"` is the usual one: both ε are of the adapted model. `guidance="domain"` takes ε(∅) from the
        base: Domain Guidance (Zhong et al., ICLR 2025, arXiv 2504.01521). Where w is at most 1 there is no guidance:
        the noise is the adapted model's ε(c), and a step takes one forward.

        Args:
            class_labels: by index, the null class among them, or by name, as to `get_label_ids`.
            guidance_scale: w; `None`: 4, or 1 if all adapters have guidance trained in.
            guidance: "class" or "domain".
            adapter_names: for each image the name of an adapter, a tuple of several that compose, or "__base__", with
                names of classes as they are there; `None`: the active ones for all.

        Raises:
            ValueError: for a label that is not a class; for a scale that is not finite; for an adapter that is not
                there; while adapters are fused, if the base or an adapter per image is asked for, and if they were put
                into the transformer without a `PeftModel`; for a scheduler that starts from noise of another standard
                deviation than 1, which is what `DiTPipeline` would give it.
        """
        deviation = float(getattr(self.scheduler, "init_noise_sigma", 1))
        if abs(deviation - 1) > 1e-3:
            raise ValueError(
                f"{type(self.scheduler).__name__} starts from noise of standard deviation {deviation:.4g}, and a "
                "DiTPipeline starts from 1: use a scheduler that does too, such as DDIMScheduler, "
                "DPMSolverMultistepScheduler or UniPCMultistepScheduler."
            )
        if guidance not in ("class", "domain"):
            raise ValueError(f'guidance={guidance!r} is not a kind of guidance: use "class" or "domain".')
        given, null = plain(class_labels), self.transformer.config.num_embeds_ada_norm
        given = [given] if isinstance(given, (int, str)) else list(given)
        if not given:
            raise ValueError("class_labels is empty: give at least one class.")
        entries = self._entries(adapter_names, len(given), guidance)
        names = {entry: self._names_under(entry) for entry in {*entries}}
        pairs = zip(given, entries, strict=True)
        labels = [class_indices([label], names[entry], null + 1)[0] for label, entry in pairs]
        scale = finite(self._default_guidance_scale(entries) if guidance_scale is None else guidance_scale)
        if scale is None:  # it is not above 1, and would be no guidance
            raise ValueError(f"guidance_scale={short(guidance_scale)}: must be a finite number.")
        by_base = guidance == "domain" and scale > 1
        unguided: list[Entry] = ["__base__"] * len(entries) if by_base else entries
        mixed = "transformer" in models(self) and (by_base or adapter_names is not None)

        def hand_on(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            guided = kwargs["class_labels"].clone()
            guided[len(labels) :] = null  # the second half, where there is guidance
            kwargs = kwargs | {"class_labels": guided}
            return args, kwargs | {"adapter_names": (entries + unguided)[: len(guided)]} if mixed else kwargs

        if null == 1000 and not mixed:
            return super().__call__(labels, scale, *args, **kwargs)
        handle = self.transformer.register_forward_pre_hook(hand_on, with_kwargs=True)
        try:
            return super().__call__(labels, scale, *args, **kwargs)
        finally:
            handle.remove()

    def _entries(self, adapter_names: list[Entry] | None, count: int, guidance: str) -> list[Entry]:
        """The adapters of each of `count` images, checked."""
        if adapter_names is not None or guidance == "domain":
            if self._fused():
                raise ValueError("Adapters are fused, and so part of the base: call unfuse_difffit() first.")
            if not models(self) and self._effective():
                raise ValueError(
                    "The adapters were put into the transformer without a PeftModel: for guidance by the base, or an "
                    "adapter per image, load them with load_difffit_weights()."
                )
        if adapter_names is None:
            return [self._effective()] * count
        if isinstance(adapter_names, str) or len(adapter_names) != count:
            raise ValueError(f"adapter_names={short(adapter_names)}: give a list of {count}, one entry for each image.")
        loaded = [*self.get_list_adapters(), "__base__"]
        for name in [name for entry in adapter_names for name in names_in(entry)]:
            if name not in loaded:
                raise ValueError(f"There is no adapter {name!r}: the pipeline has {loaded}.{nearest(name, loaded)}")
        return list(adapter_names)

    def _names_under(self, entry: Entry) -> dict[int, str]:
        """Names of the classes under the adapters of one image."""
        adapters = [name for name in names_in(entry) if name != "__base__"]
        names = names_of_adapters(self.transformer.peft_config[name] for name in adapters)
        return self._base_names() if names is None else names

    @classmethod
    def from_pipe(cls, pipeline: DiTPipeline, **kwargs: Any) -> DiffFitDiTPipeline:
        """A `DiffFitDiTPipeline` of another pipeline's parts, or of those in `kwargs`, which stay in their dtypes.

        `dtype` casts them.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if isinstance(pipeline, DiffFitDiTPipeline):
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
        super().save_pretrained(save_directory, **kwargs)
        index = Path(save_directory, self.config_name).expanduser()
        names = {"id2label": self.id2label if self._fused() else self._base_names()}
        text = json.dumps(json.loads(index.read_text()) | names, indent=2)
        write(index, lambda partial: partial.write_text(text + "\n"))

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class indices of names: of one, or of each in a list.

        A name is one of `id2label`, or what stands between its commas. An integer, or a name of digits that no class
        has, is an index.

        Raises:
            ValueError: for what is not a class, with the nearest name that is; for a name of several classes.
        """
        labels = [label] if isinstance(label, str) else list(label)
        return class_indices(labels, self.id2label, self.transformer.config.num_embeds_ada_norm)
