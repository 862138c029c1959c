"""Adapters as people publish them: their names, how far to trust their files, their card, their way to the Hub."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL.Image
import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .files import whole_files

_MAX_CONFIG_BYTES = 2**20
_PIPELINE_INDEX = "model_index.json"

_REVISION = re.compile(r"(?!.*\.\.)[\w.][\w./-]{0,255}")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HUB_CACHE = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})([/\\].*)?$")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def base_model_id(name_or_path: str) -> tuple[str, str | None]:
    """The Hub id and commit of a base, from what Diffusers remembers of where a model was loaded from.

    A pipeline loaded from the Hub remembers a folder of the local cache. Of a folder that is not in the cache only the
    pipeline folder's name is kept: an adapter never publishes a local path.
    """
    cached = _HUB_CACHE.search(name_or_path)
    if cached:
        return cached["id"].replace("--", "/"), cached["revision"]
    path = Path(name_or_path)
    if _HUB_ID.fullmatch(name_or_path) and not path.exists():
        return name_or_path, None
    path = path.resolve()
    return (path.parent if path.name == "transformer" else path).name, None


def check_base_model_id(name: Any, revision: Any = None) -> tuple[str, str | None]:
    """The base that an adapter names and its revision, if they are those of a repository on the Hub, and no path.

    A name without an owner is that of a local folder (see `base_model_id`).

    Raises:
        ValueError: if they are anything else.
    """
    if not is_repo_id(name) or "/" not in name:
        raise ValueError(
            f"The adapter names the base {str(name)[:200]!r}, which is not the id of a repository on the Hub. (Of a "
            "base in a folder, an adapter keeps the folder's name.) Load the base with from_pretrained, and then the "
            "adapter with load_difffit_weights."
        )
    if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        raise ValueError(f"The adapter names the revision {str(revision)[:200]!r} of its base, which is none.")
    return name, revision


def is_repo_id(name: Any) -> bool:
    """Whether `name` can be the id of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None


def local_path(path: str | os.PathLike, revision: str | None = None) -> Path | None:
    """The folder or file on this machine that `path` names, or `None` if it is the id of a repository on the Hub.

    What exists here is local, as in Diffusers. `~` is the home folder.

    Raises:
        ValueError: if it is neither, or a local path is given with a revision.
    """
    text = os.path.expanduser(path)
    if os.path.exists(text):
        if revision is not None:
            raise ValueError(f"revision={revision!r}: {text} is on this machine, where there are no revisions.")
        return Path(text)
    if url := re.match(r"\w+://[^/]+/?([^/?#]+/[^/?#]+)?", text):
        raise ValueError(
            f"{text!r} is a URL. Pass the id of the repository"
            + (f", {url[1]!r}." if url[1] else ", such as 'user/name'.")
        )
    if not is_repo_id(text):
        raise ValueError(
            f"There is no file or folder {os.path.abspath(text)}, and {text!r} cannot be the id of a repository on the "
            "Hub, such as 'user/name'."
        )
    return None


def hub_file(repo_id: str, filename: str, **hub: Any) -> Path:
    """A file of a repository on the Hub, in the local cache.

    Raises:
        EntryNotFoundError: if the repository has no such file.
        HfHubHTTPError: if the Hub does not give it.
    """
    try:
        return Path(hf_hub_download(repo_id, filename, **hub))
    except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:  # a folder may have been meant
        tried = f"There is no folder {os.path.abspath(repo_id)}, so the Hub was asked for the repository {repo_id!r}"
        error.args = (f"{tried}: {error}", *error.args[1:])
        raise


def cached_commit(file: Path) -> str | None:
    """The commit that a file of the local cache of the Hub belongs to."""
    cached = _HUB_CACHE.search(str(file))
    return cached and cached["revision"]


def adapter_folder(
    path: str | os.PathLike, subfolder: str | None = None, revision: str | None = None, **hub: Any
) -> Path:
    """The local folder of an adapter. From the Hub, its config and weights are downloaded, before a model is touched.

    Args:
        path: a folder, the config or the weights in it, or the id of a repository on the Hub.
        subfolder: where in the folder or repository the adapter is.
        revision: branch, tag or commit of the repository.
        hub: `token`, `cache_dir` and so on, as for `hf_hub_download`.

    Raises:
        ValueError: if there is no adapter at `path`.
        HfHubHTTPError: if the Hub does not give it.
    """
    local = local_path(path, revision)
    if local is not None:
        folder = local.parent if local.name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) and local.is_file() else local
        folder = folder / (subfolder or "")
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(_no_adapter(folder))
        return folder
    repo_id = os.fspath(path)
    folder = hub_file(repo_id, CONFIG_NAME, subfolder=subfolder, revision=revision, **hub).parent
    revision = cached_commit(folder) or revision  # both of one commit
    try:
        hub_file(repo_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, revision=revision, **hub)
    except LocalEntryNotFoundError:  # the Hub cannot be asked
        raise
    except EntryNotFoundError:  # see `check_has_weights`
        pass
    return folder


def _no_adapter(path: Path) -> str:
    """Why there is no adapter at `path`, and where there may be one."""
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        return (
            f"{path} {what}: pass the folder of the adapter, which holds {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME}."
        )
    if (path / _PIPELINE_INDEX).is_file():
        what = f"{path} is a pipeline, not an adapter: load it with DiffFitDiTPipeline.from_pretrained."
    else:
        what = f"{path} is neither an adapter nor a pipeline: it holds no {CONFIG_NAME} and no {_PIPELINE_INDEX}."
    inside = [config.parent for config in sorted([*path.glob(f"*/{CONFIG_NAME}"), *path.glob(f"*/*/{CONFIG_NAME}")])]
    return what + (
        f" Adapters in it: {', '.join(str(folder.relative_to(path)) for folder in inside)}." if inside else ""
    )


def check_has_weights(folder: Path) -> None:
    """Raises `ValueError` if there is nothing in an adapter's folder that may be read."""
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}. {WEIGHTS_NAME} is never read, as a pickle can run any code. "
            "Save the adapter as safetensors."
        )


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a DiffFit adapter: a JSON object of at most 1 MiB.

    Raises:
        ValueError: if it is not.
    """
    size = path.stat().st_size
    if size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {size:,} bytes: the config of an adapter has at most {_MAX_CONFIG_BYTES:,}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}: the config of an adapter is a JSON object.")
    if config.get("peft_type") != "DIFFFIT":
        raise ValueError(f"{path} is of an adapter of {str(config.get('peft_type'))[:200]}, not of DiffFit.")
    return config


def check_adapter_file(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads an adapter's weights once, before anything is changed for their sake, and returns their names and shapes.

    Raises:
        ValueError: if the file is truncated, no safetensors file, or holds values that are not finite floating point
            numbers.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}): save or download the adapter again."
        ) from error
    other = next((name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES), None)
    if other:
        raise ValueError(f"{path} holds {other} in {tensors[other].dtype}: weights are in one of {_DTYPES}.")
    broken = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if broken:
        raise ValueError(f"{path} holds values that are not finite, in {broken}: the training run diverged.")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def base_parameters(model: Any) -> int:
    """Parameters of the base of a `PeftModel`. While adapted, a DiT has one embedder, and so it is counted once."""
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
) -> None:
    """Saves one adapter of a `PeftModel` right into `folder`, with a model card, as `load_difffit_weights` takes it.

    Args:
        model: the `PeftModel`.
        folder: each file in it appears whole or not at all; files of other names stay.
        adapter_name: which of the model's.
        repo_id: the Hub repository that the card speaks of. `None`: it speaks of the folder.
        state_dict: weights to save in the place of the model's, as for `PeftModel.save_pretrained`.
        license: an identifier of the Hub's, for the card.
        dataset: a Hub id or a few words, for the card.
        training: settings, for the card.
        picture: becomes `samples.png`, which the card shows.

    Raises:
        ValueError: if there is no such adapter.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r}: the model has {sorted(model.peft_config)}.")
    folder = Path(folder).expanduser()
    with whole_files(folder) as partial:
        options: dict[str, Any] = {"save_embedding_layers": False} | ({"state_dict": state_dict} if state_dict else {})
        model.save_pretrained(str(partial), selected_adapters=[adapter_name], **options)
        for file in list((partial / adapter_name).glob("*")):  # where peft puts any adapter but "default"
            file.replace(partial / file.name)
        shapes = check_adapter_file(partial / SAFETENSORS_WEIGHTS_NAME)
        trained = sum(math.prod(shape) for shape in shapes.values())
        if picture is not None:
            picture.save(partial / _PICTURE)
        config = model.peft_config[adapter_name]
        name = repo_id or folder.resolve().name
        base = base_parameters(model)
        card = _model_card(config, name, trained, base, license, dataset, training, picture is not None)
        (partial / "README.md").write_text(str(card), encoding="utf-8")


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


_PICTURE = "samples.png"

_CARD = """
# {title}

A [DiffFit](https://arxiv.org/abs/2304.06648) adapter of {base}: {trained:,} trained parameters, {share:.3%} of the base's.
{picture}
## Use it

With the package `difffit-peft`:

```python
from difffit_peft import DiffFitDiTPipeline

{load}
images = pipe({labels}).images
images[0].save("sample.png")
```

With PEFT, import the package too. It registers the method: without it, PEFT stops with `KeyError: 'DIFFFIT'`.

```python
import difffit_peft
from diffusers import DiTPipeline
from peft import PeftModel

pipe = DiTPipeline.from_pretrained({base_path})
pipe.transformer = PeftModel.from_pretrained(pipe.transformer, {path})
```

## Classes

{classes}

## Training

{training}

## Citation

```bibtex
@inproceedings{{xie2023difffit,
  title     = {{DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient Fine-Tuning}},
  author    = {{Xie, Enze and Yao, Lewei and Shi, Han and Liu, Zhili and Zhou, Daquan and Liu, Zhaoqiang and Li, Jiawei and Li, Zhenguo}},
  booktitle = {{ICCV}},
  year      = {{2023}}
}}
```
"""  # noqa: E501


def _model_card(
    config: Any,
    name: str,
    trained: int,
    base_parameters: int,
    license: str,
    dataset: str | None,
    training: dict[str, Any] | None,
    has_picture: bool,
) -> ModelCard:
    base = config.base_model_name_or_path or ""
    on_hub = bool(_HUB_ID.fullmatch(base)) and "/" in base  # a name without an owner is that of a local folder
    data = ModelCardData(
        base_model=base if on_hub else None,
        datasets=[dataset] if dataset and _HUB_ID.fullmatch(dataset) else None,
        library_name="peft",
        license=license,
        tags=["difffit", "diffusers", "peft"],
    )
    names = [*(config.id2label or {}).values()]
    labels = [_code(label) for label in names]
    plain = next((label for label in names if re.fullmatch(r"[\w -]{1,60}", label) and names.count(label) == 1), None)
    path, base_path = json.dumps(name), json.dumps((base or "path/to/the/base")[:200])
    if on_hub:
        load = f"pipe = DiffFitDiTPipeline.from_pretrained({path})"
        base_path += f", revision={json.dumps(config.revision)}" if config.revision else ""
    else:
        load = f"pipe = DiffFitDiTPipeline.from_pretrained({base_path})  # a folder: this base is not on the Hub\n"
        load += f"pipe.load_difffit_weights({path})"
    settings = ({"dataset": dataset} if dataset else {}) | (training or {})
    text = _CARD.format(
        title=_code(name),
        base=_code(base) + (f" at revision {_code(config.revision)}" if config.revision else "") if base else "a DiT",
        trained=trained,
        share=trained / base_parameters,
        picture=f"\n![Samples]({_PICTURE})\n" if has_picture else "",
        load=load,
        path=path,
        base_path=base_path,
        labels="[0]" if plain is None else f"pipe.get_label_ids({json.dumps(plain, ensure_ascii=False)})",
        classes=", ".join(labels) or "Those of the base.",
        training="\n".join(f"- {_code(key)}: {_code(value)}" for key, value in settings.items()) or "Not recorded.",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _code(value: Any) -> str:
    """A value as code in Markdown, in which nothing it holds is markup."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split()).replace("`", "'")
    return f"`{text[:200] or ' '}`"
