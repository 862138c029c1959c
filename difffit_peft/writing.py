"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def write(path: Path, save: Callable[[Path], Any]) -> Path:
    """Calls `save` with a temporary path that then becomes `path`; on an error `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial-{path.name}")
    try:
        save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
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
