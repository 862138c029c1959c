"""How an adapter names its base, and whether its file can be trusted to load."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

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


def check_adapter_file(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads an adapter's weights once, before anything is changed for their sake, and returns their names and shapes.

    Raises:
        ValueError: if the file is truncated, no safetensors file, or holds values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}): save or download the adapter again."
        ) from error
    broken = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if broken:
        raise ValueError(f"{path} holds values that are not finite, in {broken}: the training run diverged.")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
