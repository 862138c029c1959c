"""Avatars are drawn alike everywhere, and the bundled domains are what examples/avatars/README.md says they are."""

import json
import re
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import load_dataset

pytest.importorskip("dicebear", reason="the avatars' packages are installed for the newest versions alone")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/avatars"))
import text_to_image  # noqa: E402
from render import BASE, BUNDLED, DOMAINS, HERE, draw, pictures  # noqa: E402

from difffit_peft.training.text_to_image import PixArt  # noqa: E402


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


def test_captions_say_what_is_drawn():
    """Hair has the colour that is named, and glasses are worn where the caption has them."""
    for i in range(5):
        picture, caption = text_to_image.portrait(f"test-{i}", "person", "miniavs", ["red", "green"])
        colour, worn = re.fullmatch(r"a person with (red|green) hair( and glasses)?, style miniavs", caption).groups()
        hair = {name: [*bytes.fromhex(text_to_image.HAIR[name])] for name in ("red", "green")}
        assert [name for name in hair if (picture == hair[name]).all(-1).any()] == [colour]
        bare = draw(f"test-{i}", "miniavs", hairColor=[text_to_image.HAIR[colour]], glassesProbability=0)
        assert np.array_equal(picture, bare) == (worn is None)


def test_a_folder_with_captions(tmp_path):
    text_to_image.write_images(SimpleNamespace(output_dir=tmp_path / "new", count=2))
    rows = [json.loads(line) for line in (tmp_path / "new" / "metadata.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        style, hair = text_to_image.ZOMBIE_STYLE, text_to_image.ZOMBIE_HAIR
        picture, caption = text_to_image.portrait(f"train-{i}", "zombie", style, hair)
        assert row == {"file_name": f"{i:03}.png", "text": caption}
        assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / "new" / row["file_name"])), picture)
    assert len(rows) == 2


def test_the_text_encoder_tells_words_apart_and_spells_others():
    captions = ["a person with red hair, style big-smile", "a person with blue hair and glasses, style lorelei"]
    pipe = text_to_image.new_pipeline(captions)
    tokens = pipe.tokenizer.tokenize("a person with blue hair, style micah")
    assert tokens == ["▁a", "▁person", "▁with", "▁blue", "▁hair", ",", "▁style", "▁", *"micah"]
    red, blue = (PixArt(pipe).encode(f"a person with {colour} hair")["prompt_embeds"][3] for colour in ("red", "blue"))
    assert torch.cosine_similarity(red, blue, dim=0) < 0.5
