"""One adapter's values exchanged for another's in place, so that compiled code stays as it is."""

from __future__ import annotations

import os

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from typing_extensions import Unpack

from .config import DiffFitConfig
from .layer import DiffFitLayer
from .reading import HubOptions, adapter_folder, read_adapter


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike,
    adapter_name: str = "default",
    **hub: Unpack[HubOptions],
) -> None:
    """Puts the values of a saved adapter in the place of those of a loaded one, which keeps its name and scale.

    The counterpart of `peft.utils.hotswap.hotswap_adapter`, which knows LoRA alone. Tensors are written in place:
    `torch.compile` compiles nothing anew, and an optimiser keeps its parameters.

    Args:
        model: the `PeftModel`, compiled or not.
        model_name_or_path: folder or Hub id of the adapter to take the values of.
        adapter_name: the adapter to give them to.
        subfolder, revision, token, cache_dir, local_files_only, force_download: where on the Hub the adapter is, as for
            `load_adapter`.

    Raises:
        ValueError: if there is no such adapter or it is merged, or if the two belong to different bases, train
            different layers or have different numbers of classes. The model is then as it was.
        HfHubHTTPError: of `huggingface_hub`, if the Hub does not give it.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel) or adapter_name not in model.peft_config:
        names = sorted(getattr(model, "peft_config", {}))
        raise ValueError(f"There is no adapter {adapter_name!r} in this {type(model).__name__}: it has {names}.")
    if any(adapter_name in m.merged_adapters for m in model.modules() if isinstance(m, DiffFitLayer)):
        raise ValueError(f"The adapter {adapter_name!r} is merged: call unmerge_adapter() first.")
    if any(p.is_meta for name, p in model.named_parameters() if name.endswith(f".{adapter_name}")):
        raise ValueError(
            f"The weights of {adapter_name!r} are not where they are computed with: enable_sequential_cpu_offload() "
            "keeps them elsewhere, and new ones would be lost."
        )
    old = model.peft_config[adapter_name]
    if not isinstance(old, DiffFitConfig):
        raise ValueError(f"Only DiffFit adapters can be swapped here, but {adapter_name!r} is of {old.peft_type}.")
    new, weights = read_adapter(adapter_folder(model_name_or_path, **hub))
    expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    facts = old.base_config or {}
    if all(name in facts and facts[name] == value for name, value in (new.base_config or {}).items()):
        new.base_config = old.base_config  # an adapter of before may say less of its base
    differing = [
        f"{field} is {getattr(new, field)} there and {getattr(old, field)} here"
        for field in ("task_type", "base_config", "sample_size")
        if getattr(new, field) != getattr(old, field)
    ] + [
        f"{name} has shape {[*weights[name].shape] if name in weights else None} there and "
        f"{[*expected[name].shape] if name in expected else None} here"
        for name in sorted(weights.keys() | expected.keys())
        if name not in weights or name not in expected or weights[name].shape != expected[name].shape
    ]
    if differing:
        raise ValueError(
            f"{model_name_or_path} cannot take the place of {adapter_name!r}: {differing[0]}"
            + (f", and {len(differing) - 1} more differences" if differing[1:] else "")
            + ". Load it with load_adapter() under a name of its own."
        )
    new.inference_mode = old.inference_mode
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
    model.peft_config[adapter_name] = new
