"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def write(path: Path, save: Callable[[Path], Any]) -> Path:
    """Calls `save` with a temporary path that then becomes `path`; on an error `path` is as it was.

    Several processes may write one path at once: the last one's file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix="partial-") as folder:
        partial = Path(folder, path.name)
        save(partial)
        partial.replace(path)
    return path


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move to `folder`, over those of the same names, if nothing goes wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="partial-") as partial:
        yield Path(partial)
        for file in [path for path in Path(partial).rglob("*") if path.is_file()]:
            target = folder / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
