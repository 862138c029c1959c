"""What is read from a folder of images, and what is left out of it."""

import glob
import hashlib
import json
import logging
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Features, Image, load_dataset, load_dataset_builder
from datasets import Dataset as Table
from datasets.data_files import SPLIT_KEYWORDS, EmptyDatasetError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

logger = logging.getLogger(__name__)

_SHOWN = 5  # so many examples in a message
_SPLIT_NAMES = {name for names in SPLIT_KEYWORDS.values() for name in names}


def load_local(path: Path, split: str, cache_dir: str | None, captioned: bool = False) -> Table:
    """A folder or file as a table. With `captioned`, a folder of images needs metadata."""
    path = path.expanduser().resolve()
    if not path.exists():
        raise ValueError(
            f"train_data_dir {path} does not exist: give a folder of images or parquet, or a .parquet file."
        )
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ValueError(
                f"train_data_dir {path} is a file but not .parquet: give a folder (unpack archives) or a .parquet file."
            )
        files = {split: glob.escape(str(path))}
        return load_dataset("parquet", _state([path]), data_files=files, split=split, cache_dir=cache_dir)

    nested = path / split
    divided = nested.is_dir() and any(_divides(child) for child in nested.iterdir())
    root = nested if divided else path
    scan = _scan(root)
    if not scan.images:
        if scan.parquet:
            return _load_parquet(path, split, cache_dir)
        raise ValueError(
            f"train_data_dir {root} holds neither images nor parquet files: "
            f"expected one folder of images per class, <class>/<image>.{_told(scan.left_out)}"
        )
    if scan.parquet:
        raise ValueError(
            f"train_data_dir {root} holds images ({listed(scan.images)}) and parquet files ({listed(scan.parquet)}): "
            "give a folder that holds only one of the two, or one .parquet file."
        )
    if not divided and split != "train":
        raise ValueError(
            f"split is {split!r}, but {nested} is not a folder with classes or metadata in it. Without it, all of "
            f"{path} is the split 'train': leave split out, or give another folder."
        )
    if captioned and not scan.metadata:
        raise ValueError(
            f"train_data_dir {root} holds {len(scan.images)} images and no captions: put them into a file called "
            f"{' or '.join(ImageFolder.METADATA_FILENAMES)} there, one row per image with its file_name and text."
        )
    if divided:
        left_out = [child.name for child in sorted(path.iterdir()) if child != nested and not _hidden(child)]
        scan.left_out[f"what lies beside {split}/"] = left_out
    table = _load_metadata(root, scan, split, cache_dir) if scan.metadata else _load_classes(root, scan)
    if told := _told(scan.left_out):
        logger.warning("%s: this is left out.%s", root, told)
    return table


def _divides(child: Path) -> bool:
    """Whether `child` shows that the folder it lies in is a split, not a class."""
    return child.is_dir() and not _hidden(child) or child.name in ImageFolder.METADATA_FILENAMES


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


@dataclass
class _Scan:
    """What lies in a folder: paths relative to it, in sorted order."""

    images: list[str]
    metadata: list[str]
    parquet: list[str]
    folders: list[str]  # right in it
    left_out: dict[str, list[str]]  # by the reason


def _scan(root: Path) -> _Scan:
    """Follows links. Leaves out what is hidden, and files that do not end as those of images do."""
    scan = _Scan([], [], [], [], defaultdict(list))

    def visit(folder: str, above: set[str]) -> None:
        for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
            path, suffix = os.path.join(folder, entry.name), os.path.splitext(entry.name)[1].lower()
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            real = os.path.realpath(entry.path) if is_folder else ""
            if entry.name.startswith("."):
                if is_folder or suffix in ImageFolder.EXTENSIONS:
                    scan.left_out["hidden"].append(path)
            elif real in above:
                scan.left_out["links to a folder that they lie in"].append(path)
            elif is_folder:
                if not folder:
                    scan.folders.append(path)
                visit(path, above | {real})
            elif entry.name in ImageFolder.METADATA_FILENAMES:
                scan.metadata.append(path)
            elif suffix in ImageFolder.EXTENSIONS:
                scan.images.append(path)
            elif suffix == ".parquet":
                scan.parquet.append(path)
            elif not os.path.exists(entry.path):
                scan.left_out["links to nothing"].append(path)
            else:
                scan.left_out[f"{suffix or 'other'} files"].append(path)

    visit("", {str(root), *map(str, root.parents)})
    no_text = [file for file in scan.images if re.search("[\ud800-\udfff]", file)]
    if no_text:
        raise ValueError(f"The names of {listed(no_text)} in {root} are not UTF-8: rename them.")
    return scan


def listed(names: list[str]) -> str:
    names = [name.encode(errors="backslashreplace").decode() for name in names]  # names of files may be no text
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _told(left_out: dict[str, list[str]]) -> str:
    """A line for each reason to leave something out; nothing where nothing is."""
    lines = [f"\n  {reason}: {listed(names)}" for reason, names in left_out.items() if names]
    if any(reason.endswith(" files") for reason in left_out):
        lines.append("\nFiles that belong to the data must be converted to another format, or unpacked.")
    return "".join(lines)


def _load_classes(root: Path, scan: _Scan) -> Table:
    """Every folder with images is a class, whatever its name."""
    misplaced = [file for file in scan.images if len(Path(file).parts) != 2]
    if misplaced:
        raise ValueError(
            f"{root / misplaced[0]} does not lie in a class's folder: expected {root}/<class>/<image> for every image "
            f"({len(misplaced)} of {len(scan.images)} lie elsewhere). One class needs its folder too. Classes may also "
            f"stand in a file called {' or '.join(ImageFolder.METADATA_FILENAMES)}.{_told(scan.left_out)}"
        )
    folders = [os.path.dirname(file) for file in scan.images]
    names = sorted(set(folders))
    if {*names} <= _SPLIT_NAMES:
        raise ValueError(
            f"The images in {root} lie right in {listed(names)}, which is what splits are called, and no class: put "
            f"them into a folder per class, such as {names[-1]}/<class>/<image>."
        )
    scan.left_out["folders without images, which become no classes"] = sorted(set(scan.folders) - set(names))
    rows = {"image": [str(root / file) for file in scan.images], "label": folders}
    return Table.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(names=names)}))


def _load_metadata(root: Path, scan: _Scan, split: str, cache_dir: str | None) -> Table:
    """The rows of the metadata files. They alone decide what is read."""
    files = [glob.escape(str(root / file)) for file in scan.metadata]
    try:
        state = _state([root / file for file in scan.metadata])
        table = load_dataset("imagefolder", state, data_files={split: files}, split=split, cache_dir=cache_dir)
    except ValueError as error:
        raise ValueError(f"{listed(scan.metadata)} in {root} cannot be read as metadata of images: {error}") from error
    columns = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    named = {
        path for name in columns for path in table.cast_column(name, Image(decode=False)).flatten()[f"{name}.path"][:]
    }
    unnamed = [file for file in scan.images if str(root / file) not in named]
    scan.left_out[f"images that {listed(scan.metadata)} does not name"] = unnamed
    return table


def _state(files: list[Path]) -> str:
    """A name of the state that files are in, for `datasets` to keep what it read of them under.

    By itself it looks at their paths and times, and an edit may leave the time as it was; but not the time of change.
    """
    stats = [(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file in files if (stat := file.stat())]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def _load_parquet(path: Path, split: str, cache_dir: str | None) -> Table:
    """Loads the files that `datasets` takes for the split. Warns if there are more."""
    files = _scan(path).parquet
    why = "it follows no links to folders, and passes over names that start with __"
    try:
        state = _state([path / file for file in files])
        builder = load_dataset_builder("parquet", state, data_dir=glob.escape(str(path)), cache_dir=cache_dir)
    except EmptyDatasetError as error:
        raise ValueError(
            f"train_data_dir {path} holds parquet files ({listed(files)}) that `datasets` does not find: {why}. Give "
            "the folder that they lie in, or one of the files."
        ) from error
    found = {file for files in builder.config.data_files.values() for file in files}
    if missed := [file for file in files if str(path / file) not in found]:
        logger.warning("%s: `datasets` does not find %s, which are left out: %s.", path, listed(missed), why)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)
