"""Avatars are drawn alike everywhere, and the bundled domains are what examples/avatars/README.md says they are."""

import json
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

pytest.importorskip("dicebear", reason="the avatars' packages are installed for the newest versions alone")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/avatars"))
from render import BASE, BUNDLED, DOMAINS, HERE, draw, pictures  # noqa: E402


@pytest.mark.parametrize("domain", BUNDLED)
def test_the_domains_are_what_is_rendered(domain, tmp_path):
    file = str(HERE / "data" / domain / "train.parquet")
    dataset = load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path))
    assert dataset.features["label"].names == list(DOMAINS[domain])
    for label, (style, options) in enumerate(DOMAINS[domain].values()):
        rows = [row for row, other in enumerate(dataset["label"]) if other == label]
        assert len(rows) == BUNDLED[domain]
        for i in (0, len(rows) - 1):
            drawn = draw(f"train-{i}", style, **options)
            assert drawn.shape == (64, 64, 3) and np.array_equal(np.asarray(dataset[rows[i]]["image"]), drawn)


def test_pictures_differ_between_seeds_and_splits_and_are_kept(tmp_path):
    train, test = (pictures("lorelei", 20, split, tmp_path) for split in ("train", "test"))
    assert len({picture.tobytes() for picture in [*train, *test]}) == 40
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert np.array_equal(pictures("lorelei", 20, "train", tmp_path), train)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == kept and len(kept) == 2


def test_options_narrow_a_style(tmp_path):
    """Hair of one colour is seen, and pictures with options are kept apart from those without."""
    red = pictures("lorelei", 10, cache_dir=tmp_path, hairColor=["ff0000"])
    assert all((picture == (255, 0, 0)).all(-1).any() for picture in red)
    assert not any((picture == (255, 0, 0)).all(-1).any() for picture in pictures("lorelei", 10, cache_dir=tmp_path))


def test_licences_of_all_styles():
    new = {style for domain in DOMAINS.values() for style, _ in domain.values()}
    assert len(BASE) == len({*BASE}) >= 40 and len(new - {*BASE}) == 10
    for style in {*BASE, *new}:
        meta = json.loads(files("dicebear_styles").joinpath(f"{style}.json").read_text("utf-8"))["meta"]
        assert meta["license"]["name"] in ("CC0 1.0", "CC BY 4.0", "MIT")
