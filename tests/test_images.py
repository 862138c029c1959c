"""Images: what is read of a folder, a file or a dataset, and what is refused."""

import io
import os

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import cut, picture, png, write_folder, write_parquet, write_zip
from datasets import ClassLabel, Dataset, Features, Value

from difffit_peft.config import parse_colour
from difffit_peft.training.images import LabelledImages, center_crop, load_labelled_images, to_pixels, to_rgb

SIDE = 16


# Pixels


def test_transparency_is_composited_on_white():
    rgba = PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    rgb = to_rgb(rgba)
    assert rgb.mode == "RGB"
    assert [rgb.getpixel(at) for at in [(0, 0), (1, 0), (2, 0)]] == [(255, 0, 0), (127, 127, 127), (255, 255, 255)]


@pytest.mark.parametrize("colour", ["orange", "#ffa500"])
def test_transparency_is_composited_on_another_colour(colour):
    assert parse_colour(colour) == (255, 165, 0)
    for image in (PIL.Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)), PIL.Image.new("LA", (SIDE, SIDE), (0, 0))):
        assert to_rgb(image, colour).getpixel((0, 0)) == (255, 165, 0)
        assert to_pixels(image, SIDE, colour)[:, 0, 0].tolist() == pytest.approx([1, 165 / 127.5 - 1, -1])


@pytest.mark.parametrize("colour", ["sky", "", "ffffff", "#ffffff80"])
def test_unknown_colours_are_refused(colour):
    with pytest.raises(ValueError, match=f"background is '{colour}', which is not a valid colour.*#rrggbb"):
        parse_colour(colour)


def test_a_transparent_palette_colour_is_white():
    image = PIL.Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image = PIL.Image.open(io.BytesIO(png(image, transparency=0)))
    assert image.mode == "P"
    assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    white = {"I;16": 65535, "CMYK": (0, 0, 0, 0), "P": 0}.get(mode, "white")
    image = PIL.Image.new(mode, (SIDE, SIDE), white)
    if mode == "P":
        image.putpalette([255, 255, 255])
    pixels = to_pixels(image, SIDE)
    assert pixels.shape == (3, SIDE, SIDE)
    assert pixels.dtype == torch.float32
    assert pixels.eq(1).all()


def test_sixteen_bits_keep_their_range():
    image = PIL.Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


def test_float_images_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        to_rgb(PIL.Image.new("F", (4, 4)))


def test_pixels_span_minus_one_to_one():
    image = PIL.Image.new("RGB", (SIDE, SIDE), (0, 255, 51))
    assert to_pixels(image, SIDE)[:, 0, 0].tolist() == pytest.approx([-1, 1, 51 / 127.5 - 1])


def test_exif_orientation_is_applied():
    image = PIL.Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the top left corner goes to the top right
    turned = to_rgb(PIL.Image.open(io.BytesIO(png(image, exif=exif))))
    assert turned.size == (2, 4)
    assert turned.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (70, 33), (128, 64), (5, 9)])
def test_crop_is_dits(size):
    """`center_crop_arr` of facebookresearch/DiT, written out."""
    image = picture(size=size[::-1])
    expected = image
    while min(*expected.size) >= 2 * SIDE:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=PIL.Image.BOX)
    scale = SIDE / min(*expected.size)
    expected = expected.resize(tuple(round(x * scale) for x in expected.size), resample=PIL.Image.BICUBIC)
    array = np.array(expected)
    y, x = (array.shape[0] - SIDE) // 2, (array.shape[1] - SIDE) // 2
    cropped = center_crop(image, SIDE)
    assert cropped.size == (SIDE, SIDE)
    assert np.array_equal(np.array(cropped), array[y : y + SIDE, x : x + SIDE])


# Loading


def test_folder_of_classes(tmp_path, load):
    """Also with classes that `datasets` takes for splits, and a name that is a pattern."""
    data = load(write_folder(tmp_path / "images [1]", ["train", "bus", "test"]))
    assert data.class_names == ["bus", "test", "train"]
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [os.path.basename(os.path.dirname(row["image"]["path"])) for row in data.images] == ["bus"] * 2 + [
        "test"
    ] * 2 + ["train"] * 2


def test_folder_of_splits(tmp_path, load):
    write_folder(tmp_path / "images" / "train", ["ant", "bee"])
    write_folder(tmp_path / "images" / "test", ["ant", "bee"], count=1)
    assert len(load(tmp_path / "images")) == 4
    assert len(load(tmp_path / "images", split="test")) == 2


def files_of(data: LabelledImages) -> list[str]:
    """The last two parts of the images' paths."""
    return ["/".join(row["image"]["path"].split("/")[-2:]) for row in data.images]


@pytest.mark.parametrize("links", [["ant"], ["ant", "bee", "__other__"]])
def test_every_folder_with_images_is_a_class(tmp_path, load, caplog, links):
    """Also one that is a link, as a whole or in its images, and one with a name that `datasets` passes over."""
    folder = write_folder(tmp_path / "images", ["ant", "bee", "__other__"])
    for name in links:
        (folder / name).rename(tmp_path / f"the {name}s")
        (folder / name).symlink_to(tmp_path / f"the {name}s", target_is_directory=True)
    (folder / "bee" / "2.PNG").symlink_to(folder / "ant" / "0.png")
    data = load(folder)
    assert data.class_names == ["__other__", "ant", "bee"]
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert files_of(data)[-3:] == ["bee/0.png", "bee/1.png", "bee/2.PNG"]
    assert caplog.text == ""


def test_what_is_left_out_is_said(tmp_path, load, caplog):
    folder = write_folder(tmp_path / "images", ["cat", "dog"])
    write_zip(folder / "cat" / "cats.zip", "0.png", "1.png")
    write_zip(folder / "dog" / "more.zip", "cow/0.png")
    write_zip(folder / "all.zip", "cat/0.png", "dog/0.png")
    for name in ("horse", "goat", ".thumbs"):
        (folder / name).mkdir()
    picture().save(folder / ".thumbs" / "0.png")
    for name in ("horse/0.heic", "dog/0.png.txt", "dog/plain", "dog/._0.png", "dog/.DS_Store", "cat/notes.md"):
        (folder / name).write_bytes(b"no image")
    (folder / "dog" / "round").symlink_to(folder, target_is_directory=True)
    (folder / "wolf").symlink_to(tmp_path / "nowhere", target_is_directory=True)
    data = load(folder)
    assert data.class_names == ["cat", "dog"]
    assert files_of(data) == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert caplog.messages == [
        f"{folder}: this is left out.\n"
        "  hidden: .thumbs, dog/._0.png\n"
        "  .zip files: all.zip, cat/cats.zip, dog/more.zip\n"
        "  .md files: cat/notes.md\n"
        "  .txt files: dog/0.png.txt\n"
        "  other files: dog/plain\n"
        "  links to a folder that they lie in: dog/round\n"
        "  .heic files: horse/0.heic\n"
        "  links to nothing: wolf\n"
        "  folders without images, which become no classes: goat, horse\n"
        "Files that belong to the data must be converted to another format, or unpacked."
    ]


def test_many_files_that_are_left_out_are_counted(tmp_path, load, caplog):
    folder = write_folder(tmp_path / "images")
    for i in range(1007):
        (folder / "ant" / f"{i:04d}.txt").touch()
    load(folder)
    assert "  .txt files: ant/0000.txt, ant/0001.txt, ant/0002.txt, ant/0003.txt, ant/0004.txt and 1,002 more\n" in (
        caplog.text
    )


def test_links_in_circles_end(tmp_path, load):
    """Also through a folder that lies elsewhere, and to one that holds the data."""
    folder, elsewhere = write_folder(tmp_path / "images"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "ant" / "elsewhere").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(folder / "ant", target_is_directory=True)
    (folder / "bee" / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "bee" / "itself").symlink_to("itself")
    assert files_of(load(folder)) == ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"]


def test_what_lies_beside_a_split_is_said(tmp_path, load, caplog):
    folder = tmp_path / "images"
    write_folder(folder / "train")
    write_folder(folder, ["cow", "test"])
    assert load(folder).class_names == ["ant", "bee"]
    assert caplog.messages == [f"{folder / 'train'}: this is left out.\n  what lies beside train/: cow, test"]


def test_one_class(tmp_path, load):
    data = load(write_folder(tmp_path / "images", ["ant"]))
    assert data.class_names == ["ant"]
    assert data.labels.tolist() == [0, 0]


def test_folder_with_metadata(tmp_path, load):
    write_folder(tmp_path / "images", ["all"])
    (tmp_path / "images" / "metadata.csv").write_text("file_name,kind\nall/0.png,bee\nall/1.png,ant\n")
    data = load(tmp_path / "images", label_column="kind")
    assert data.class_names == ["ant", "bee"]
    assert data.labels.tolist() == [1, 0]


def test_metadata_decides_and_what_it_does_not_name_is_said(tmp_path, load, caplog):
    folder = write_folder(tmp_path / "images", ["all", "rest"])
    (folder / "metadata.csv").write_text("file_name,label\nall/1.png,bee\nrest/0.png,ant\nall/1.png,cow\n")
    write_zip(folder / "all.zip", "0.png")
    data = load(folder)
    assert files_of(data) == ["all/1.png", "rest/0.png", "all/1.png"]
    assert [data.class_names[i] for i in data.labels] == ["bee", "ant", "cow"]
    assert "images that metadata.csv does not name: all/0.png, rest/1.png\n" in caplog.text
    assert ".zip files: all.zip\n" in caplog.text


def test_metadata_of_splits_stays_apart(tmp_path, load):
    for split, label in (("train", "ant"), ("test", "bee")):
        (tmp_path / "images" / split).mkdir(parents=True)
        picture().save(tmp_path / "images" / split / "0.png")
        (tmp_path / "images" / split / "metadata.csv").write_text(f"file_name,label\n0.png,{label}\n")
    assert files_of(load(tmp_path / "images")) == ["train/0.png"]
    assert load(tmp_path / "images", split="test").class_names == ["bee"]


def test_parquet_file_and_folder(tmp_path, load):
    (tmp_path / "data").mkdir()
    feature = ClassLabel(names=["ant", "bee", "cow"])
    path = write_parquet(tmp_path / "data" / "train.parquet", [2, 0, 2], feature)
    write_parquet(tmp_path / "data" / "test.parquet", [1], feature)
    for given, options in [(path, {}), (path.parent, {}), (str(path.parent), {"split": "train"})]:
        data = load(given, **options)
        assert data.class_names == ["ant", "bee", "cow"]
        assert data.labels.tolist() == [2, 0, 2]
    assert load(path.parent, split="test").labels.tolist() == [1]


def test_parquet_that_datasets_does_not_find_is_said(tmp_path, load, caplog):
    feature = ClassLabel(names=["ant", "bee"])
    (tmp_path / "data" / "__more__").mkdir(parents=True)
    write_parquet(tmp_path / "data" / "train.parquet", [0, 1], feature)
    write_parquet(tmp_path / "data" / "__more__" / "train.parquet", [1], feature)
    assert load(tmp_path / "data").labels.tolist() == [0, 1]
    assert "does not find __more__/train.parquet, which are left out: it follows no links" in caplog.text
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "data").symlink_to(tmp_path / "data", target_is_directory=True)
    with pytest.raises(
        ValueError, match=r"links holds parquet files \(data/__more__.*does not find: it follows no links"
    ):
        load(tmp_path / "links")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("name,label\n0.png,ant\n", "metadata.csv in .*images cannot be read as metadata of images: .*file_name"),
        ("", "metadata.csv in .*images cannot be read as metadata of images: No columns"),
        (
            "file_name,label\n0.png,ant\n1.png,bee,3\n",
            "cannot be read as metadata of images: .*Expected 2 fields in line 3, saw 3",
        ),
    ],
)
def test_refuses_metadata_that_is_none(tmp_path, load, metadata, message):
    folder = write_folder(tmp_path / "images")
    (folder / "metadata.csv").write_text(metadata)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_refuses_parquet_that_is_cut_off(tmp_path, load):
    path = write_parquet(tmp_path / "data.parquet", ["ant"], Value("string"))
    cut(path)
    with pytest.raises(ValueError, match="data.parquet.*cannot be read: .*Parquet"):
        load(path)


@pytest.mark.parametrize(
    ("values", "feature", "names", "labels"),
    [
        (["bee", "ant", "bee"], Value("string"), ["ant", "bee"], [1, 0, 1]),
        ([2, 0, 2], Value("int64"), ["0", "1", "2"], [2, 0, 2]),
    ],
)
def test_labels_that_are_no_class_label(tmp_path, load, values, feature, names, labels):
    data = load(write_parquet(tmp_path / "data.parquet", values, feature))
    assert data.class_names == names
    assert data.labels.tolist() == labels


def test_integers_are_indices(tmp_path, load):
    """A class that no image has is one all the same."""
    data = load(write_parquet(tmp_path / "data.parquet", [1, 2, 2], Value("int64")), max_classes=3)
    assert data.class_names == ["0", "1", "2"]
    assert data.summary() == "3 images in 3 classes: 0 0, 1 1, 2 2\nNo images of 0"


def test_other_column_names(tmp_path, load):
    rows = {"picture": [png(picture())], "kind": ["ant"]}
    Dataset.from_dict(rows, features=Features({"picture": Value("binary"), "kind": Value("string")})).to_parquet(
        tmp_path / "data.parquet"
    )
    data = load(tmp_path / "data.parquet", image_column="picture", label_column="kind")
    assert data.images.column_names == ["image"]
    assert data.images[0]["image"]["bytes"] == rows["picture"][0]


def test_max_samples_draws_images_with_their_labels(tmp_path, load):
    folder = write_folder(tmp_path / "images", [f"{i:02d}" for i in range(10)], count=1)
    data = load(folder, max_samples=6, seed=3)
    assert [int(os.path.basename(os.path.dirname(row["image"]["path"]))) for row in data.images] == data.labels.tolist()
    assert len(set(data.labels.tolist())) == 6
    assert load(folder, max_samples=6, seed=3).labels.tolist() == data.labels.tolist()
    assert load(folder, max_samples=6, seed=4).labels.tolist() != data.labels.tolist()
    assert len(data.class_names) == 10


def test_summary():
    labels = torch.tensor([1, 0, 1])
    assert LabelledImages([None] * 3, labels, ["ant", "bee"]).summary() == "3 images in 2 classes: ant 1, bee 2"
    names = [f"c{i}" for i in range(30)]
    labels = torch.tensor([i for i in range(29) for _ in range(1 + i)])
    summary = LabelledImages([None] * len(labels), labels, names).summary()
    assert summary.startswith("435 images in 30 classes: c0 1, c1 2, c2 3")
    assert summary.endswith("c19 20, and 10 more of 0 to 29 images each\nNo images of c29")


def test_class_index():
    data = LabelledImages(None, torch.empty(0), ["ant", "1", "bee"])
    assert [data.class_index(label) for label in ("bee", "1", "2")] == [2, 1, 2]
    for label in ("bees", "3", "-1"):
        with pytest.raises(ValueError, match=f"{label!r} is not a class.*an index from 0 to 2"):
            data.class_index(label)


@pytest.mark.parametrize(
    ("id2label", "agree"),
    [
        ({0: "ant", 1: "bee, honeybee", 2: "cow"}, True),
        ({0: "ant, emmet", 1: "honeybee, Apis, bee"}, True),
        ({0: "ant", 1: "bee, honeybee", 2: "ant"}, True),
        ({0: "ant", 1: "bee"}, False),
        ({0: "bee, honeybee", 1: "ant"}, False),
        ({}, False),
    ],
)
def test_classes_agree(id2label, agree):
    assert LabelledImages(None, torch.empty(0), ["ant", "bee, honeybee"]).classes_agree(id2label) is agree


# Refusals


def test_refuses_what_holds_no_images(tmp_path, load):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="neither images nor parquet.*one folder of images per class"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="a file but not .parquet"):
        load(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="exactly one"):
        load(tmp_path / "empty", dataset_name="some/data")
    with pytest.raises(ValueError, match="exactly one"):
        load(None)
    folder = write_folder(tmp_path / "images")
    with pytest.raises(ValueError, match="images' is a folder or file here: give it as train_data_dir"):
        load_labelled_images(str(folder), cache_dir=tmp_path / "cache")


def test_refuses_a_folder_of_other_files(tmp_path, load):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "0.HEIC").write_bytes(b"no image")
    write_zip(tmp_path / "images" / "dogs.zip", "0.png")
    message = r"neither images(.|\n)*  .heic files: cat/0.HEIC\n  .zip files: dogs.zip\nFiles that .* converted"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "images")
    with pytest.raises(ValueError, match="dogs.zip is a file but not .parquet.*unpack"):
        load(tmp_path / "images" / "dogs.zip")


def test_refuses_images_beside_parquet(tmp_path, load):
    folder = write_folder(tmp_path / "images", ["assets"], count=1)
    write_parquet(folder / "train.parquet", ["ant"], Value("string"))
    with pytest.raises(ValueError, match=r"holds images \(assets/0.png\) and parquet files \(train.parquet\)"):
        load(folder)


def test_refuses_a_split_that_is_not_there(tmp_path, load):
    """Rather than take the images that are trained on for others."""
    folder = write_folder(tmp_path / "images", ["ant", "test"])
    with pytest.raises(ValueError, match=f"split is 'test', but {folder}/test is not a folder with classes"):
        load(folder, split="test")
    (folder / "metadata.csv").write_text("file_name,label\nant/0.png,ant\n")
    with pytest.raises(ValueError, match="split is 'val', but .*/val is not a folder with classes or metadata"):
        load(folder, split="val")


def test_refuses_names_that_are_no_text(tmp_path, load):
    folder = write_folder(tmp_path / "images", ["ant"])
    try:
        os.rename(folder / "ant" / "0.png", os.fsencode(folder) + b"/ant/\xff.png")
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(ValueError, match=r"names of ant/\\udcff.png in .* are not UTF-8: rename them"):
        load(folder)


@pytest.mark.parametrize("stray", ["stray.png", "ant/deeper/stray.png"])
def test_refuses_images_outside_a_class(tmp_path, load, stray):
    folder = write_folder(tmp_path / "images")
    (folder / stray).parent.mkdir(exist_ok=True)
    picture().save(folder / stray)
    with pytest.raises(ValueError, match=f"{stray} does not lie in a class's folder.*1 of 5"):
        load(folder)


def test_refuses_metadata_of_another_name(tmp_path, load):
    write_folder(tmp_path, ["ant"])
    (tmp_path / "ant" / "0.png").rename(tmp_path / "0.png")
    (tmp_path / "labels.csv").write_text("file_name,label\n0.png,ant\n")
    with pytest.raises(ValueError, match=r"0.png does not lie in.*a file called metadata.csv or (.|\n)*labels.csv"):
        load(tmp_path)


@pytest.mark.parametrize("names", [["train"], ["train", "test"], ["training", "val", "eval"]])
def test_refuses_splits_that_would_be_classes(tmp_path, load, names):
    """`datasets` takes them for classes, too: https://github.com/huggingface/datasets/issues/7880."""
    folder = write_folder(tmp_path / "images", names)
    with pytest.raises(ValueError, match=f"lie right in .*{names[0]}.*what splits are called, .*/<class>/<image>"):
        load(folder)
    write_folder(folder, ["bus"])
    assert load(folder).class_names == sorted([*names, "bus"])


def test_refuses_missing_columns(tmp_path, load):
    folder = write_folder(tmp_path / "images")
    with pytest.raises(ValueError, match=r"image_column is 'img'.*\['image', 'label'\]"):
        load(folder, image_column="img")
    with pytest.raises(ValueError, match=r"label_column is 'class'.*\['image', 'label'\]"):
        load(folder, label_column="class")


def test_refuses_columns_of_another_type(tmp_path, load):
    path = write_parquet(tmp_path / "data.parquet", [0.5, 1.0], Value("float32"))
    with pytest.raises(ValueError, match="label_column 'label' holds.*float32.*ClassLabel"):
        load(path)
    with pytest.raises(ValueError, match="label_column 'image' holds"):
        load(path, label_column="image")
    with pytest.raises(ValueError, match="image_column 'label' holds"):
        load(path, image_column="label")


def test_refuses_an_empty_row_of_integers_in_csv(tmp_path, load):
    """It makes floats of the others."""
    write_folder(tmp_path, ["all"])
    (tmp_path / "metadata.csv").write_text("file_name,label\nall/0.png,1\nall/1.png,\n")
    with pytest.raises(ValueError, match="label_column 'label' is empty in row 1: every image needs a class"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("values", "feature", "message"),
    [
        ([0, -1, -1], ClassLabel(names=["ant", "bee"]), r"is -1 in row 1 \(2 such rows\).*0 to 1"),
        ([0, -1], Value("int64"), r"is -1 in row 1 \(1 such rows\).*0 to 0"),
        ([0, 20_000_000], Value("int64"), "integers from 0 to 20000000.*must lie in 0 to 99999. Make them strings if"),
        ([0, None], ClassLabel(names=["ant", "bee"]), "empty in row 1"),
        (["ant", "bee", None], Value("string"), "empty in row 2"),
        (["ant", ""], Value("string"), "empty in row 1"),
    ],
)
def test_refuses_labels_out_of_range(tmp_path, load, values, feature, message):
    with pytest.raises(ValueError, match=message):
        load(write_parquet(tmp_path / "data.parquet", values, feature))


def test_refuses_more_classes_than_the_base_has(tmp_path, load):
    folder = write_folder(tmp_path / "images", ["ant", "bee", "cow"])
    assert len(load(folder, max_classes=3).class_names) == 3
    with pytest.raises(ValueError, match="3 classes, but the base's class table holds 2"):
        load(folder, max_classes=2)
    path = write_parquet(tmp_path / "data.parquet", [1, 2, 3], Value("int64"))
    with pytest.raises(ValueError, match="integers from 1 to 3.*must lie in 0 to 2. Subtract 1 from each"):
        load(path, max_classes=3)
    with pytest.raises(ValueError, match="integers from 1 to 3.*must lie in 0 to 1. Make them strings"):
        load(path, max_classes=2)
