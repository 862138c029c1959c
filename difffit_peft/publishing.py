"""Adapters as people publish them: the name of their base, their folder, their card, their way to the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL.Image
import torch
from diffusers import ModelMixin
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, constants
from huggingface_hub.utils import validate_repo_id
from torch import nn

from .config import COMPONENTS
from .families import FAMILIES, family_name, family_of
from .reading import HUB_CACHE, PIPELINE_INDEX, read_weights
from .writing import whole_files

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_PICTURE = "samples.png"
_COMPILED = "_orig_mod."  # what torch.compile puts into names


def base_model_id(name_or_path: str) -> tuple[str, str | None]:
    """The Hub id and commit of a base, from what Diffusers remembers of where a model was loaded from.

    A pipeline loaded from the Hub remembers a folder of the local cache. Of a folder that is not in the cache only the
    pipeline folder's name is kept: an adapter never publishes a local path.
    """
    cached = HUB_CACHE.search(name_or_path)
    if cached:
        return cached["id"].replace("--", "/"), cached["revision"]
    path = Path(name_or_path)
    if _HUB_ID.fullmatch(name_or_path) and not path.exists():
        return name_or_path, None
    path = path.resolve()
    part = path.name in COMPONENTS or (path.parent / PIPELINE_INDEX).is_file()
    return (path.parent if part else path).name, None


def base_parameters(model: Any) -> int:
    """Parameters of the base of a `PeftModel`, as it is while adapted: an embedder that blocks share counts once."""
    adapters = (".difffit_", ".modules_to_save.")
    return sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in adapters))


def save_adapter(
    model: Any,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    repo_id: str | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    license: str = "unknown",
    dataset: str | None = None,
    training: dict[str, Any] | None = None,
    picture: PIL.Image.Image | None = None,
    prompt: str | None = None,
) -> None:
    """Saves one adapter of a `PeftModel` right into `folder`, with a model card, as `load_adapter` takes it.

    Args:
        model: the `PeftModel`, compiled or not.
        folder: each file in it appears whole or not at all; files of other names stay.
        adapter_name: which of the model's.
        repo_id: the Hub repository that the card speaks of. `None`: it speaks of the folder.
        state_dict: weights to save in the place of the model's, by their names in the model, compiled or not.
        license: an identifier of the Hub's, for the card.
        dataset: a Hub id or a few words, for the card.
        training: settings, for the card.
        picture: becomes `samples.png`, which the card shows.
        prompt: one that suits the adapter, for the card.

    Raises:
        ValueError: if there is no such adapter, it was merged and taken off, or `state_dict` lacks weights of it.
            Nothing is then changed.
    """
    model = getattr(model, "_orig_mod", model)
    if adapter_name not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r}: the model has {sorted(model.peft_config)}.")
    folder = Path(folder).expanduser()
    options: dict[str, Any] = {"save_embedding_layers": False}
    if state_dict is not None:
        options["state_dict"] = {name.replace(_COMPILED, ""): tensor for name, tensor in state_dict.items()}
    with whole_files(folder) as partial:
        model.save_pretrained(str(partial), selected_adapters=[adapter_name], **options)
        for file in list((partial / adapter_name).glob("*")):  # where peft puts any adapter but "default"
            file.replace(partial / file.name)
        weights = read_weights(partial)
        _check_whole(model, adapter_name, weights)
        trained = sum(tensor.numel() for tensor in weights.values())
        if picture is not None:
            picture.save(partial / _PICTURE)
        name = repo_id or folder.resolve().name
        card = _model_card(model, adapter_name, name, trained, license, dataset, training, picture is not None, prompt)
        (partial / "README.md").write_text(str(card), encoding="utf-8")


def _check_whole(model: Any, adapter_name: str, saved: Iterable[str]) -> None:
    """Raises `ValueError` unless all weights of the adapter were saved: peft 0.21 saves those that it finds."""
    names = (name.replace(_COMPILED, "") for name, _ in model.named_parameters())
    own = [name for name in names if ".difffit_" in name and name.endswith(f".{adapter_name}")]
    if not own and not model.peft_config[adapter_name].modules_to_save:
        raise ValueError(
            f"The adapter {adapter_name!r} is not on the model any more, as after merge_and_unload(). What that "
            "returned is the merged model: save that one."
        )
    missing = {name.removesuffix(f".{adapter_name}") for name in own} - {*saved}
    if missing:
        raise ValueError(
            f"The weights to save lack {len(missing)} of the {len(own)} of the adapter {adapter_name!r}, for instance "
            f"{min(missing)}: pass the state dict of this model, with its names."
        )


def push_adapter(
    model: Any,
    repo_id: str,
    adapter_name: str = "default",
    *,
    commit_message: str = "Upload DiffFit adapter",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **kwargs: Any,
) -> CommitInfo:
    """Saves one adapter as `save_adapter` does, and uploads it in one commit, to a repository that is made if need be.

    Args:
        repo_id: "user/name", or "name" for a repository of the token's user.
        private: of a repository that is made; `None`: as the user's settings on the Hub are.
        token: `None`: the one that `huggingface_hub.login` or `HF_TOKEN` keeps.
        revision: a branch, made if need be; `None`: the main one.
        create_pr: open a pull request.
        kwargs: `state_dict` and what the card takes, as for `save_adapter`.

    Raises:
        ValueError: if there is no such adapter, or `repo_id` is not valid. Nothing is then changed.
        HfHubHTTPError: of `huggingface_hub`, if the Hub refuses. The repository is then as it was, or new and empty.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save_adapter(model, folder, adapter_name, repo_id=repo_id, **kwargs)  # first: it may refuse
        given, repo_id = repo_id, api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if repo_id != given:  # it had no owner
            save_adapter(model, folder, adapter_name, repo_id=repo_id, **kwargs)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def check_push(repo_id: str, create_pr: bool = False) -> None:
    """Asks the Hub, where nothing changes, whether `push_adapter` may write to a repository: before hours of work.

    Raises:
        ValueError: if `repo_id` is not valid, or the token may not write there.
        OSError: if there is no token, or the Hub does not take it; `httpx.HTTPError` if it cannot be reached.
    """
    validate_repo_id(repo_id)
    user = HfApi().whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(
            f"The token of {user['name']} may only read, so it cannot upload to {repo_id}. Log in with one that may "
            f"write: {constants.ENDPOINT}/settings/tokens."
        )
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read")]
    owner = repo_id.rpartition("/")[0]
    if owner and owner.lower() not in [name.lower() for name in owners]:
        if not create_pr:
            raise ValueError(
                f"{repo_id} belongs to {owner}, and the token is of {user['name']}, who may write to repositories of "
                f"{', '.join(owners)} alone. Choose one of those."
            )
        HfApi().model_info(repo_id)  # a pull request needs a repository that is there


def _model_card(
    model: Any,
    adapter_name: str,
    name: str,
    trained: int,
    license: str,
    dataset: str | None,
    training: dict[str, Any] | None,
    has_picture: bool,
    prompt: str | None,
) -> ModelCard:
    config, base_model = model.peft_config[adapter_name], model.get_base_model()
    base = config.base_model_name_or_path or ""
    on_hub = bool(_HUB_ID.fullmatch(base)) and "/" in base  # a name without an owner is that of a local folder
    data = ModelCardData(
        base_model=base if on_hub else None,
        datasets=[dataset] if dataset and _HUB_ID.fullmatch(dataset) else None,
        library_name="peft",
        license=license,
        tags=["difffit", "diffusers", "peft"],
    )
    classes = ", ".join(_code(label) for label in (config.id2label or {}).values())
    settings = ({"dataset": dataset} if dataset else {}) | (training or {})
    path, base_path = json.dumps(name), json.dumps((base or "path/to/the/base")[:200])
    at_revision = f", revision={json.dumps(config.revision)}" if on_hub and config.revision else ""
    text = files(__package__).joinpath("card.md").read_text(encoding="utf-8")
    text = text.format(
        title=_code(name),
        base=(_code(base) if base else f"a {_code(type(base_model).__name__)}")
        + (f" at revision {_code(config.revision)}" if base and config.revision else ""),
        trained=trained,
        share=trained / base_parameters(model),
        picture=f"\n![Samples]({_PICTURE})\n" if has_picture else "",
        with_pipeline=_with_pipeline(config, base_model, path, base_path, on_hub, at_revision, prompt),
        with_peft=_with_peft(config, base_model, path, base_path + at_revision),
        classes=f"## Classes\n\n{classes or config.num_classes}\n\n" if config.num_classes else "",
        training="\n".join(f"- {_code(key)}: {_code(value)}" for key, value in settings.items()) or "Not recorded.",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _with_pipeline(
    config: Any, base_model: nn.Module, path: str, base_path: str, on_hub: bool, at_revision: str, prompt: str | None
) -> str:
    """How to load the adapter into a pipeline, and to make a picture with it where that takes a class or a prompt."""
    pipeline = family_of(base_model).pipeline
    folder = "" if on_hub else "  # a folder: this base is not on the Hub"
    if pipeline is not None:
        load = [f"pipe = {pipeline}.from_pretrained({path if on_hub else base_path}){folder}"]
        load += [] if on_hub else [f"pipe.load_difffit_weights({path})"]
        lines = [f"from difffit_peft import {pipeline}", "", *load]
        lines += [f"images = pipe({_label_in_code(config)}).images", 'images[0].save("sample.png")']
    elif isinstance(base_model, ModelMixin):
        lines = ["import difffit_peft", "from diffusers import DiffusionPipeline", ""]
        lines += [f"pipe = DiffusionPipeline.from_pretrained({base_path}{at_revision}){folder}"]
        lines += [f"difffit_peft.load_adapter(pipe, {path})"]
        family = family_name(base_model)
        if family in FAMILIES and not re.search("Edit|ControlNet", family):  # what draws with a prompt alone
            prompt = (prompt or "A picture")[:200]
            call = f"pipe(prompt={json.dumps(prompt, ensure_ascii=not prompt.isprintable())})"
            lines += [f"frames = {call}.frames" if "3D" in family else f'{call}.images[0].save("sample.png")']
    else:
        return ""
    return "\n".join(["With the package `difffit-peft`:", "", "```python", *lines, "```", "", ""])


def _label_in_code(config: Any) -> str:
    names = [*(config.id2label or {}).values()]
    plain = next((label for label in names if re.fullmatch(r"[\w -]{1,60}", label) and names.count(label) == 1), None)
    return "[0]" if plain is None else f"pipe.get_label_ids({json.dumps(plain, ensure_ascii=False)})"


def _with_peft(config: Any, base_model: nn.Module, path: str, base_arguments: str) -> str:
    """Python that loads the adapter with PEFT, onto a part of a pipeline of Diffusers or onto a model by itself."""
    cls = type(base_model)
    library, loaded, variable, part = cls.__module__.split(".")[0], cls.__name__, "model", "model"
    if isinstance(base_model, ModelMixin):
        usual = "unet" if cls.__name__.startswith("UNet") else "transformer"
        library, loaded, variable, part = "diffusers", "DiffusionPipeline", "pipe", f"pipe.{config.component or usual}"
    lines = ["import difffit_peft", f"from {library} import {loaded}", "from peft import PeftModel", ""]
    lines += [f"{variable} = {loaded}.from_pretrained({base_arguments})"]
    return "\n".join([*lines, f"{part} = PeftModel.from_pretrained({part}, {path})"])


def _code(value: Any) -> str:
    """A value as code in Markdown, in which nothing it holds is markup."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split()).replace("`", "'")
    return f"`{text[:200] or ' '}`"
