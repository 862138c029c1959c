"""How an adapter names its base."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_CACHE = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})([/\\].*)?$")


def base_model_id(name_or_path: str) -> tuple[str, str | None]:
    """The Hub id and commit of a base, from what Diffusers remembers of where a model was loaded from.

    A pipeline loaded from the Hub remembers a folder of the local cache. Of a folder that is not in the cache only the
    pipeline folder's name is kept: an adapter never publishes a local path.
    """
    cached = _HUB_CACHE.search(name_or_path)
    if cached:
        return cached["id"].replace("--", "/"), cached["revision"]
    path = Path(name_or_path)
    if not path.exists():
        return name_or_path, None
    path = path.resolve()
    return (path.parent if path.name == "transformer" else path).name, None
