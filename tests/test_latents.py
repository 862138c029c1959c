"""Images to latents: broken images, the cache, and the samples drawn from it."""

import os
import pickle
import shutil
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import PIL.Image
import pytest
import torch
from conftest import cut, picture, png, write_folder, write_parquet, write_zip
from datasets import Dataset, Features, Image, Value
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from difffit_peft.training.images import load_labelled_images, to_pixels
from difffit_peft.training.latents import LatentDataset, encode_latents
from difffit_peft.training.sampling import draw, sample_latents

SIDE = 16


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.5,
    ).eval()


# Broken images


def cached(folder) -> list[str]:
    """What the folder holds of latents, whole or not."""
    return sorted(path.name for path in folder.glob("latents-*") if path.suffix != ".lock")


def identity(folder) -> list[tuple[int, int]]:
    """Of the cached latents: it stays as it is if they are used."""
    stats = [path.stat() for path in sorted(folder.glob("latents-*/latents.bin"))]
    return [(stat.st_ino, stat.st_mtime_ns) for stat in stats]


@pytest.fixture
def broken_folder(tmp_path):
    """Four images, of which bee/0.png is cut off and ant/1.png is empty."""
    folder = write_folder(tmp_path / "images")
    cut(folder / "bee" / "0.png")
    (folder / "ant" / "1.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_all_broken_files_are_named(tmp_path, load, vae, broken_folder, workers):
    with pytest.raises(ValueError, match="2 of 4 images cannot be read") as error:
        encode_latents(vae, load(broken_folder), SIDE, tmp_path / "latents", batch_size=1, num_workers=workers)
    assert f"{broken_folder}/ant/1.png (row 1): it is empty, or not an image\n" in str(error.value)
    assert f"{broken_folder}/bee/0.png (row 2): " in str(error.value)
    assert "ant/0.png" not in str(error.value)
    assert "--skip_broken_images (skip_broken_images=True)" in str(error.value)
    assert cached(tmp_path / "latents") == []


def test_twenty_broken_images_are_named_and_all_are_counted(tmp_path, load, vae):
    images = [png(picture())] + [b"no image"] * 22
    path = write_parquet(tmp_path / "data.parquet", ["ant"] * 23, Value("string"), images)
    with pytest.raises(ValueError, match="22 of 23 images cannot be read") as error:
        encode_latents(vae, load(path), SIDE, tmp_path / "latents")
    assert "row 20: " in str(error.value) and "row 21: " not in str(error.value)
    assert "and 2 more" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no image", png(picture())[:100], None])
def test_a_broken_row_is_named(tmp_path, load, vae, content):
    rows = {"image": [png(picture()), content], "label": ["ant", "bee"]}
    features = Features({"image": Value("binary"), "label": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="1 of 2 images cannot be read:\n  row 1: "):
        encode_latents(vae, load(tmp_path / "data.parquet"), SIDE, tmp_path / "latents")


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 1)])
def test_broken_images_are_left_out(tmp_path, load, vae, broken_folder, caplog, batch_size, workers):
    """Also from the cache, and where that takes a class's last image."""
    cut(broken_folder / "bee" / "1.png")
    picture(7).save(broken_folder / "ant" / "2.png")
    data, options = load(broken_folder), {"skip_broken_images": True, "batch_size": batch_size, "num_workers": workers}
    dataset = encode_latents(vae, data, SIDE, tmp_path / "latents", **options)
    assert dataset.labels.tolist() == [0, 0]
    whole = load_labelled_images(train_data_dir=write_folder(tmp_path / "whole", ["ant"]), cache_dir=tmp_path / "cache")
    picture(7).save(tmp_path / "whole" / "ant" / "1.png")
    expected = encode_latents(vae, whole, SIDE, tmp_path / "latents")
    for name in ("mean", "std"):
        assert getattr(dataset, name).shape == (2, 2, 4, SIDE // 2, SIDE // 2)
        torch.testing.assert_close(getattr(dataset, name), getattr(expected, name), rtol=1e-2, atol=1e-3)

    assert "3 of 5 images cannot be read" in caplog.text and "left out" in caplog.text
    assert all(name in caplog.text for name in ("ant/1.png", "bee/0.png", "bee/1.png"))
    warned = caplog.text
    assert "No image is left of bee" in warned
    caplog.clear()
    before = identity(tmp_path / "latents")
    again = encode_latents(vae, data, SIDE, tmp_path / "latents", **options)
    assert torch.equal(again.mean, dataset.mean) and torch.equal(again.std, dataset.std)
    assert torch.equal(again.labels, dataset.labels)
    assert caplog.messages[0] in warned
    assert identity(tmp_path / "latents") == before


def test_a_cache_that_leaves_images_out_is_not_used_for_all(tmp_path, load, vae, broken_folder):
    data = load(broken_folder)
    with pytest.raises(ValueError) as first:
        encode_latents(vae, data, SIDE, tmp_path / "latents")
    assert len(encode_latents(vae, data, SIDE, tmp_path / "latents", skip_broken_images=True)) == 2
    with pytest.raises(ValueError) as second:
        encode_latents(vae, data, SIDE, tmp_path / "latents")
    assert str(first.value) == str(second.value)
    for name in ("ant/1.png", "bee/0.png"):
        picture(3).save(broken_folder / name)
    for skip in (False, True):
        assert len(encode_latents(vae, data, SIDE, tmp_path / "latents", skip_broken_images=skip)) == 4


@pytest.mark.parametrize("skip", [False, True])
def test_refuses_when_all_images_are_broken(tmp_path, load, vae, skip):
    path = write_parquet(tmp_path / "data.parquet", ["ant", "bee"], Value("string"), [b"", b"no image"])
    with pytest.raises(ValueError, match="2 of 2 images cannot be read(.|\n)*None is left"):
        encode_latents(vae, load(path), SIDE, tmp_path / "latents", skip_broken_images=skip)
    assert cached(tmp_path / "latents") == []


# Latents


@torch.no_grad()
def test_latents_are_the_scaled_posterior_of_both_views(tmp_path, load, vae):
    data = load(write_folder(tmp_path / "images", ["ant", "bee"], count=3))
    dataset = encode_latents(vae, data, SIDE, tmp_path, batch_size=4)
    assert dataset.mean.shape == dataset.std.shape == (2, 6, 4, SIDE // 2, SIDE // 2)
    assert dataset.mean.dtype == dataset.std.dtype == torch.float16
    assert torch.equal(dataset.labels, data.labels)
    for row, (mean, std, _) in enumerate(dataset):
        pixels = to_pixels(picture(row % 3), SIDE)[None]
        for view, seen in enumerate([pixels, pixels.flip(-1)]):
            posterior = vae.encode(seen).latent_dist
            torch.testing.assert_close(mean[view].float(), 0.5 * posterior.mean[0], rtol=2e-3, atol=1e-4)
            torch.testing.assert_close(std[view].float(), 0.5 * posterior.std[0], rtol=2e-3, atol=1e-4)
    assert len(encode_latents(vae, data, SIDE, tmp_path, random_flip=False).mean) == 1


@torch.no_grad()
def test_latents_show_the_background(tmp_path, load, vae):
    images = [png(PIL.Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)))]
    data = load(write_parquet(tmp_path / "data.parquet", ["ant"], Value("string"), images))
    mean, _, _ = encode_latents(vae, data, SIDE, tmp_path, background="blue")[0]
    pixels = torch.tensor([-1.0, -1, 1]).view(1, 3, 1, 1).expand(-1, -1, SIDE, SIDE)
    torch.testing.assert_close(mean[0].float(), 0.5 * vae.encode(pixels).latent_dist.mean[0], rtol=2e-3, atol=1e-4)
    with pytest.raises(ValueError, match="'sky', which is not a valid colour"):
        encode_latents(vae, data, SIDE, tmp_path / "other", background="sky")
    assert not (tmp_path / "other").exists()


def test_cached_latents_are_used(tmp_path, load, vae):
    data = load(write_folder(tmp_path / "images"))
    dataset = encode_latents(vae, data, SIDE, tmp_path / "latents")
    assert cached(tmp_path / "latents") == [f"latents-{dataset.key}"]
    before = identity(tmp_path / "latents")
    again = encode_latents(vae, data, SIDE, tmp_path / "latents")
    assert torch.equal(again.mean, dataset.mean) and torch.equal(again.std, dataset.std)
    assert again.key == dataset.key and again.about == dataset.about
    assert identity(tmp_path / "latents") == before


def test_data_are_their_bytes(tmp_path, load, vae):
    """New times, another folder and other names of files change nothing; other bytes of the same size and time do."""

    def encode(folder) -> LatentDataset:
        return encode_latents(vae, load(folder), SIDE, tmp_path / "latents")

    folder = write_folder(tmp_path / "images")
    dataset, before = encode(folder), identity(tmp_path / "latents")
    file = folder / "bee" / "1.png"
    os.utime(file, ns=(10**18, 10**18))
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "ant" / "1.png").rename(tmp_path / "copy" / "ant" / "a.png")
    for same in (folder, tmp_path / "copy"):
        again = encode(same)
        assert (again.key, again.about) == (dataset.key, dataset.about)
    assert identity(tmp_path / "latents") == before

    stat, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size and file.stat().st_mtime_ns == stat.st_mtime_ns
    assert encode(folder).key != dataset.key


def test_parquet_that_is_copied_is_the_same_data(tmp_path, load, vae):
    path = write_parquet(tmp_path / "data.parquet", ["ant", "bee"], Value("string"))
    first = encode_latents(vae, load(path), SIDE, tmp_path / "latents")
    before = identity(tmp_path / "latents")
    os.utime(shutil.copy(path, tmp_path / "copy.parquet"), ns=(10**18, 10**18))
    second = encode_latents(vae, load(tmp_path / "copy.parquet"), SIDE, tmp_path / "latents")
    assert (first.key, first.about) == (second.key, second.about)
    assert identity(tmp_path / "latents") == before
    folder = write_folder(tmp_path / "images", [])
    for i, name in enumerate(["ant", "bee"]):
        (write_folder(folder, [name], count=0) / name / "0.png").write_bytes(png(picture(i)))
    assert encode_latents(vae, load(folder), SIDE, tmp_path / "latents").about == first.about


def test_images_in_an_archive_are_their_bytes(tmp_path, load, vae):
    """As `datasets` leaves those of a repository of archives: with paths into its own copy."""
    (tmp_path / "images" / "ant").mkdir(parents=True)
    write_zip(tmp_path / "images.zip", "ant/0.png", "ant/1.png")
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        archive.extractall(tmp_path / "images")
    data = load(tmp_path / "images")
    rows = {"image": [f"zip://ant/{i}.png::{tmp_path}/images.zip" for i in range(2)]}
    packed = replace(data, images=Dataset.from_dict(rows, features=Features({"image": Image(decode=False)})))
    plain = encode_latents(vae, data, SIDE, tmp_path / "latents")
    assert encode_latents(vae, packed, SIDE, tmp_path / "other").key == plain.key


def test_images_are_read_once_to_know_them(tmp_path, load, vae):
    folder = write_folder(tmp_path / "images")
    files = list(folder.rglob("*.png"))

    def key(number: int) -> str:
        return encode_latents(vae, load(folder), SIDE, tmp_path / f"latents {number}").key

    def kept(number: int) -> list:
        return [path for path in (tmp_path / f"latents {number}").glob("hashes-*") if path.suffix != ".lock"]

    first = key(0)
    assert kept(0) == []  # the files are so new that another change might not show
    for file in files:
        os.utime(file, ns=(10**18, 10**18))
    assert key(0) == first
    (hashes,) = kept(0)
    whole = hashes.read_bytes()
    assert len(whole) == 16 * len(files)
    hashes.write_bytes(whole[:-1])
    assert key(0) == first and hashes.read_bytes() == whole
    hashes.write_bytes(whole[::-1])
    assert key(0) != first  # so it was believed
    os.utime(files[0], ns=(10**18, 10**18 + 1))
    assert key(0) == first and len(kept(0)) == 2

    files[0].write_bytes(b"")
    os.utime(files[0], ns=(10**18, 10**18))
    with pytest.raises(ValueError, match="1 of 4 images cannot be read"):
        key(1)
    assert kept(1) == []  # a disk that cannot be read now may be well tomorrow


def test_about_says_what_differs(tmp_path, load, vae):
    folder = write_folder(tmp_path / "images")
    about = encode_latents(vae, load(folder), SIDE, tmp_path / "latents").about
    assert {name: images[0] for name, images in about["images"].items()} == {"ant": 2, "bee": 2}
    assert (about["resolution"], about["random_flip"], about["background"]) == (SIDE, True, [255, 255, 255])
    (folder / "ant" / "0.png").rename(folder / "ant" / "2.png")
    renamed = encode_latents(vae, load(folder), SIDE, tmp_path / "latents").about
    assert {name for name in about if renamed[name] != about[name]} == {"order"}
    picture(9).save(folder / "bee" / "0.png")
    changed = encode_latents(vae, load(folder), SIDE, tmp_path / "latents").about
    assert changed["images"]["ant"] == about["images"]["ant"] and changed["images"]["bee"] != about["images"]["bee"]


def test_latents_stay_on_disk(tmp_path, load, vae):
    data = load(write_folder(tmp_path / "images"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dataset = encode_latents(vae, data, SIDE, tmp_path / "latents")
    assert dataset.mean.ne(0).any()
    file = tmp_path / "latents" / f"latents-{dataset.key}" / "latents.bin"
    with open(file, "r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert dataset.mean.eq(0).all() and dataset.std.eq(0).all()


def test_worker_processes_map_latents_again(tmp_path, load, vae):
    data = load(write_folder(tmp_path / "images", count=40))
    dataset = encode_latents(vae, data, SIDE, tmp_path / "latents")
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 4000 < dataset.mean.nbytes
    again = pickle.loads(pickled)
    assert torch.equal(again.mean, dataset.mean) and torch.equal(again.std, dataset.std)
    assert torch.equal(again.labels, dataset.labels) and again.key == dataset.key
    means, stds, labels = zip(*DataLoader(dataset, 32, num_workers=2), strict=True)
    assert torch.equal(torch.cat(means), dataset.mean.transpose(0, 1))
    assert torch.equal(torch.cat(stds), dataset.std.transpose(0, 1))
    assert torch.equal(torch.cat(labels), dataset.labels)


def test_the_key_holds_all_that_shapes_latents(tmp_path, load, vae):
    folder = write_folder(tmp_path / "images")

    def key(vae=vae, resolution=SIDE, images=None, **options) -> str:
        data = load(folder)
        data = data if images is None else replace(data, images=data.images.select(images))
        return encode_latents(vae, data, resolution, tmp_path / "latents", **options).key

    first = key()
    assert key(background="#ffffff", batch_size=1) == first
    other = AutoencoderKL.from_config(vae.config)
    keys = [key(resolution=2 * SIDE), key(random_flip=False), key(other), key(images=[1, 0, 2, 3])]
    keys.append(key(background="black"))
    other.load_state_dict(vae.state_dict())
    assert key(other) == first
    other.register_to_config(scaling_factor=0.25)
    keys.append(key(other))
    picture(99).save(folder / "ant" / "0.png")
    keys.append(key())
    assert len({first, *keys}) == 1 + len(keys)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other shape", "no description", "no dictionary"])
def test_a_damaged_cache_is_written_anew(tmp_path, load, vae, damage, caplog):
    data = load(write_folder(tmp_path / "images"))
    dataset = encode_latents(vae, data, SIDE, tmp_path / "latents")
    folder = tmp_path / "latents" / f"latents-{dataset.key}"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    latents = folder / "latents.bin"
    for path in folder.iterdir():  # what is mapped stays as it is
        path.unlink()
        path.write_bytes(whole[path.name])
    if damage == "other shape":
        fewer = encode_latents(
            vae, replace(data, images=data.images.select([0]), labels=data.labels[:1]), SIDE, tmp_path / "fewer"
        )
        for path in (tmp_path / "fewer" / f"latents-{fewer.key}").iterdir():
            path.replace(folder / path.name)
    elif damage == "no description":
        (folder / "about.json").unlink()
    elif damage == "no dictionary":
        (folder / "about.json").write_text("[]")
    else:
        latents.write_bytes(whole["latents.bin"][: len(whole["latents.bin"]) // 2] if damage == "truncated" else b"")
    again = encode_latents(vae, data, SIDE, tmp_path / "latents")
    assert torch.equal(again.mean, dataset.mean) and torch.equal(again.std, dataset.std)
    assert "encoding the images again" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert cached(tmp_path / "latents") == [folder.name]


def test_what_a_killed_encoder_left_is_removed(tmp_path, load, vae):
    data = load(write_folder(tmp_path / "images"))
    expected = encode_latents(vae, data, SIDE, tmp_path / "whole")
    left = tmp_path / "latents" / f"latents-{expected.key}.partial"
    left.mkdir(parents=True)
    for name in ("latents.bin", "more.bin"):
        (left / name).write_bytes(b"half")
    assert torch.equal(encode_latents(vae, data, SIDE, tmp_path / "latents").mean, expected.mean)
    assert cached(tmp_path / "latents") == [f"latents-{expected.key}"]


def test_two_encoders_at_once(tmp_path, load, vae, capfd):
    data = load(write_folder(tmp_path / "images", count=20))
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(encode_latents, vae, data, SIDE, tmp_path / "latents", batch_size=1) for _ in range(2)]
        first, second = (run.result() for run in runs)
    assert torch.equal(first.mean, second.mean) and torch.equal(first.std, second.std)
    assert capfd.readouterr().err.count("Encoding images:   0%") == 1  # the other waited
    assert cached(tmp_path / "latents") == [f"latents-{first.key}"]


def test_latents_that_are_not_finite_are_refused(tmp_path, load, vae):
    broken = AutoencoderKL.from_config(vae.config)
    broken.quant_conv.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite for rows 0 to 1"):
        encode_latents(broken, load(write_folder(tmp_path / "images", ["ant"])), SIDE, tmp_path / "latents")
    assert cached(tmp_path / "latents") == []


def test_samples_draw_views_and_posterior():
    torch.manual_seed(0)
    mean = torch.tensor([-10.0, 10.0]).view(2, 1, 1, 1, 1) + torch.tensor([0.0, 100, 200]).view(1, 3, 1, 1, 1)
    mean = mean.expand(2, 3, 2, 1, 1).half()
    dataset = LatentDataset(mean, torch.full_like(mean, 0.5), torch.tensor([4, 5, 6]))
    assert len(dataset) == 3
    means, stds, labels = next(iter(DataLoader(dataset, 600, sampler=[1, 2] * 300)))
    assert labels.tolist() == [5, 6] * 300
    draws = draw(0, 3, means.shape, 1000)
    samples = sample_latents(means, stds, draws.view, draws.posterior)
    assert samples.shape == (600, 2, 1, 1) and samples.dtype == torch.float32
    samples = samples.flatten(1) - 100 * (labels - 4).view(-1, 1)
    mirrored = samples[:, 0] > 0
    assert 0.4 < mirrored.float().mean() < 0.6
    assert samples[mirrored].mean() == pytest.approx(10, abs=0.1)
    assert samples[~mirrored].mean() == pytest.approx(-10, abs=0.1)
    assert samples[mirrored].std() == pytest.approx(0.5, abs=0.05)


def test_dataset_refuses_other_shapes():
    mean = torch.zeros(1, 3, 4, 2, 2)
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 2, 2\).*2 labels"):
        LatentDataset(mean, mean, torch.zeros(2))
    with pytest.raises(ValueError, match=r"std \(2, 3, 4, 2, 2\)"):
        LatentDataset(mean, mean.expand(2, -1, -1, -1, -1), torch.zeros(3))


def test_draws_depend_on_the_seed_and_the_step_alone():
    whole, again, other = (draw(seed, 5, (6, 2, 4, 3, 3), 1000) for seed in (1, 1, 2))
    halves = [draw(1, 5, (3, 2, 4, 3, 3), 1000, process=process, num_processes=2) for process in (0, 1)]
    for name in ("view", "posterior", "noise", "timesteps", "dropped"):
        assert torch.equal(getattr(whole, name), getattr(again, name))
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))
    assert not torch.equal(whole.noise, other.noise) and not torch.equal(
        whole.noise, draw(1, 6, (6, 2, 4, 3, 3), 9).noise
    )
    dropped = draw(0, 0, (10_000, 1, 1, 1, 1), 1000).dropped
    assert 0.09 < dropped.float().mean() < 0.11
