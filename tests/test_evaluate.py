"""`examples/evaluate_images.py`: metrics against plain NumPy, the script from images and an adapter to a report."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from conftest import make_pipeline, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from torchmetrics.utilities.imports import _TORCH_FIDELITY_AVAILABLE

from difffit_peft import DiffFitConfig, DiffFitDiTPipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
COUNTS = {"ant": 6, "bee": 4, "cow": 2}
METRICS = ["fid", "kid", "kid_std", "precision", "recall"]
FEATURES = """
import torch

class Means(torch.nn.Module):
    def forward(self, images):
        assert images.dtype == torch.uint8
        return torch.nn.functional.avg_pool2d(images.float() / 255, 8).flatten(1)

def means():
    return Means()

def pixels():
    return torch.nn.Identity()

def nothing():
    return None
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("evaluate_images", EXAMPLES / "evaluate_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A tiny random DiT in `base`, an adapter of three classes, their images in `images`, `features.py`."""
    folder = tmp_path_factory.mktemp("evaluate")
    pipe = make_pipeline(num_layers=2)
    pipe.save_pretrained(folder / "base")
    model = get_peft_model(pipe.transformer, DiffFitConfig(id2label=dict(enumerate(COUNTS))))
    randomise(model)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    generator = np.random.default_rng(0)
    for name, count in COUNTS.items():
        (folder / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).resize((20, 16)).save(folder / "images" / name / f"{i}.png")
    (folder / "features.py").write_text(FEATURES)
    return folder


def arguments(workdir: Path, output: str, *flags: str) -> list[str]:
    argv = ["--pretrained_model_name_or_path", str(workdir / "base"), "--train_data_dir", str(workdir / "images")]
    argv += ["--cache_dir", str(workdir / "cache"), "--output_dir", str(workdir / output)]
    argv += ["--features", f"{workdir / 'features.py'}:means", "--num_images", "13", "--num_inference_steps", "2"]
    return [*argv, "--adapter", str(workdir / "adapter"), "--batch_size", "3", *flags]


def run(script, workdir: Path, output: str, *flags: str) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps its precision for as long as the process lives
    return script.main(script.parse_args(arguments(workdir, output, *flags)))


@pytest.fixture(scope="module")
def report(script, workdir) -> dict:
    return run(script, workdir, "report")


def numbers(report: dict) -> list[float]:
    return pytest.approx([report[name] for name in METRICS], rel=1e-4, abs=1e-4)


def test_writes_a_report_and_samples(report, workdir):
    assert all(np.isfinite(report[name]) for name in METRICS)
    assert report["fid"] > 0
    assert (report["num_images"], report["num_real_images"], report["num_features"]) == (13, 12, 12)
    assert report["kid_subset_size"] == 12
    assert report["classes"] == "by name"
    assert report["adapter"] == str(workdir / "adapter")
    assert report["features"].endswith("features.py:means")
    assert json.loads((workdir / "report" / "report.json").read_text()) == report
    assert PIL.Image.open(workdir / "report" / "samples.png").size == (3 * 16, 3 * 16)
    assert sorted(os.listdir(workdir / "report")) == ["report.json", "samples.png"]  # no partial files


def test_batch_size_does_not_matter_but_the_seed_does(script, workdir, report, capsys):
    again = run(script, workdir, "again", "--batch_size", "5")
    assert [again[name] for name in METRICS] == numbers(report)
    printed = capsys.readouterr().out
    for part in (
        "13 images",
        str(workdir / "adapter"),
        "12 images in 3 classes: ant 6, bee 4, cow 2\n",
        "12 real images",
        "features.py:means",
        "subsets of 12 for lack",
        "at guidance 4 (class) in 2 steps:",
    ):
        assert part in printed
    samples = [(workdir / name / "samples.png").read_bytes() for name in ("report", "again")]
    assert samples[0] == samples[1]
    other = run(script, workdir, "other", "--seed", "1")
    assert [other[name] for name in METRICS] != numbers(report)


def test_two_processes_give_what_one_gives(workdir, report):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "accelerate" / "ddp.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", "0", EXAMPLES / "evaluate_images.py"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*map(str, launch), *arguments(workdir, "two")]
    (workdir / "images" / "notes.txt").touch()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("this is left out.\n  .txt files: notes.txt") == 1
    assert "7/7" in done.stderr  # each process sampled its half
    two = json.loads((workdir / "two" / "report.json").read_text())
    assert [two[name] for name in METRICS] == numbers(report)
    pictures = [np.asarray(PIL.Image.open(workdir / name / "samples.png"), int) for name in ("report", "two")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_base_alone(script, workdir, report, capsys):
    argv = arguments(workdir, "base_alone")
    at = argv.index("--adapter")
    AcceleratorState._reset_state(reset_partial_state=True)
    base = script.main(script.parse_args(argv[:at] + argv[at + 2 :]))
    assert base["classes"] == "by index"
    assert [base[name] for name in METRICS] != numbers(report)
    assert "no adapter" in capsys.readouterr().out


def test_bf16_and_fewer_images(script, workdir, report):
    half = run(script, workdir, "bf16", "--mixed_precision", "bf16")
    assert half["fid"] != report["fid"]
    assert half["fid"] == pytest.approx(report["fid"], rel=0.05)
    few = run(script, workdir, "few", "--num_images", "4", "--max_train_samples", "5")
    assert (few["num_real_images"], few["kid_subset_size"]) == (5, 4)
    assert all(np.isfinite(few[name]) for name in METRICS)


def test_a_set_against_itself(script):
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    metrics = script.compare(features, features)
    assert metrics["fid"] == pytest.approx(0, abs=1e-6)
    assert metrics["precision"] == metrics["recall"] == 1


def test_metrics_against_numpy(script):
    generator = np.random.default_rng(0)
    real, fake = generator.normal(size=(30, 2)), generator.normal(1, 0.6, size=(30, 2))
    metrics = script.compare(torch.from_numpy(real), torch.from_numpy(fake))

    covariances = np.cov(real.T), np.cov(fake.T)
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1])).sum()
    fid = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * root
    assert metrics["fid"] == pytest.approx(fid, rel=1e-9)

    def kernel(a, b):
        return (a @ b.T / 2 + 1) ** 3

    within = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (30 * 29) for x in (real, fake))
    assert metrics["kid"] == pytest.approx(within - 2 * kernel(real, fake).mean(), rel=1e-9)
    assert metrics["kid_std"] == pytest.approx(0, abs=1e-9)  # every subset is the whole set

    def share_inside(points, manifold, k=3):
        inside = 0
        for point in points:
            for i, centre in enumerate(manifold):
                others = np.delete(manifold, i, axis=0)
                radius = sorted(np.linalg.norm(others - centre, axis=1))[k - 1]
                if np.linalg.norm(point - centre) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    assert metrics["precision"] == share_inside(fake, real)
    assert metrics["recall"] == share_inside(real, fake)
    assert 0 < metrics["recall"] < metrics["precision"] < 1


class Mac(torch.Tensor):
    """Stands for a tensor on MPS, which has no float64."""

    device = property(lambda self: torch.device("mps"))

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_metrics_on_a_mac(script):
    real, fake = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    assert script.compare(real.as_subclass(Mac), fake.as_subclass(Mac)) == script.compare(real, fake)


def test_classes_are_drawn_as_the_real_images_have_them(script):
    labels = torch.tensor([2, 0, 0, 1, 0, 1])
    assert script.spread(labels, 12) == [0] * 6 + [1] * 4 + [2] * 2
    assert script.spread(labels, 3) == [0, 0, 1]


def test_classes_are_the_models_own_by_name(script, workdir):
    pipe = DiffFitDiTPipeline.from_pretrained(workdir / "base")
    assert script.model_classes(["cow"], pipe) is None
    pipe.labels = {"bee": 1, "honeybee": 1, "cow": 2}
    assert script.model_classes(["bee, honeybee", "cow"], pipe) == [1, 2]
    assert script.model_classes(["cow", "2"], pipe) is None  # names, not indices
    pipe.labels = {"salt, fine": 0, "salt, coarse": 1}
    assert script.model_classes(["salt, coarse"], pipe) == [1]
    assert script.model_classes(["salt, iodised"], pipe) is None and script.model_classes(["fine", "salt"], pipe) == [
        0,
        1,
    ]
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, workdir / "adapter")
    assert script.model_classes(["ant", "cow"], pipe) == [0, 2]
    with pytest.raises(ValueError, match="'dog'.*'ant', 'bee', 'cow'"):
        script.model_classes(["ant", "dog"], pipe)


def test_an_adapter_without_names_is_not_mapped_by_the_bases(script, workdir):
    pipe = DiffFitDiTPipeline.from_pretrained(workdir / "base")
    pipe.labels = {"cow": 0, "bee": 1, "ant": 2}
    pipe.save_pretrained(workdir / "named")
    assert script.model_classes(["ant", "bee", "cow"], pipe) == [2, 1, 0]
    model = get_peft_model(pipe.transformer, DiffFitConfig(num_classes=3))
    model.save_pretrained(workdir / "nameless", save_embedding_layers=False)
    flags = ("--pretrained_model_name_or_path", str(workdir / "named"), "--num_images", "4")
    report = run(script, workdir, "nameless report", *flags, "--adapter", str(workdir / "nameless"))
    assert report["classes"] == "by index"
    pipe.transformer = model
    with pytest.raises(ValueError, match="have 4 classes, but the adapter has 3, without names"):
        script.model_classes(["ant", "bee", "cow", "dog"], pipe)
    model.delete_adapter("default")
    model.add_adapter("base's rows", DiffFitConfig(num_classes=3, init_class_rows="base"))
    assert script.model_classes(["ant", "bee", "cow"], pipe) == [2, 1, 0]
    pipe.transformer = get_peft_model(model.unload(), LoraConfig(target_modules=["to_q"]))
    assert script.model_classes(["ant", "bee"], pipe) == [2, 1] and script.model_classes(["dog"], pipe) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--background", "sky"], "background is 'sky', which is not a valid colour"),
        (["--num_images", "3"], "--num_images is 3.*4 images or more"),
        pytest.param(
            ["--mixed_precision", "fp16"],
            "fp16 needs a GPU, and this is a CPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes it"),
        ),
        (["--max_train_samples", "3"], "3 real images.*4 or more"),
        (["--features", "inceptoin"], "'inceptoin'.*module:callable"),
        (["--features", "no_such_module:means"], "no_such_module"),
        (["--features", "no_such_file.py:means"], "no_such_file.py"),
        (["--features", "{}/features.py:mean"], "no attribute 'mean'"),
        (["--features", "{}/features.py:nothing"], "returns NoneType"),
        (["--features", "{}/features.py:pixels"], r"\(2, 3, 16, 16\)"),
    ],
)
def test_refuses(script, workdir, flags, message):
    with pytest.raises(ValueError, match=message):
        run(script, workdir, "refused", *[flag.format(workdir) for flag in flags])
    assert not (workdir / "refused").exists()


def test_real_images_are_seen_as_the_adapter_saw_them(script, workdir, capsys):
    """Transparent pictures, on the colour that they were trained on: as if they had been put on it beforehand."""
    generator = np.random.default_rng(1)
    for name in COUNTS:
        for kind in ("transparent", "black", "white"):
            (workdir / kind / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (16, 16, 4), dtype=np.uint8)
            picture = PIL.Image.fromarray(pixels)
            picture.save(workdir / "transparent" / name / f"{i}.png")
            for colour in ("black", "white"):
                behind = PIL.Image.new("RGBA", picture.size, colour)
                PIL.Image.alpha_composite(behind, picture).convert("RGB").save(workdir / colour / name / f"{i}.png")
    base = DiffFitDiTPipeline.from_pretrained(workdir / "base").transformer
    model = get_peft_model(base, DiffFitConfig(id2label=dict(enumerate(COUNTS)), background="black"))
    model.save_pretrained(workdir / "on black", save_embedding_layers=False)

    def report_of(pictures: str, *flags: str) -> dict:
        flags = ("--train_data_dir", str(workdir / pictures), "--adapter", str(workdir / "on black"), *flags)
        return run(script, workdir, "colours", "--num_images", "4", *flags)

    black = report_of("black")
    travelled = report_of("transparent")
    assert travelled["background"] == "black" and travelled["resolution"] == 16
    assert "at 16x16, transparency on black" in capsys.readouterr().out
    assert travelled["fid"] == black["fid"]
    asked = report_of("transparent", "--background", "#ffffff")
    assert asked["background"] == "#ffffff" and asked["fid"] == report_of("white")["fid"] != black["fid"]
    other = run(script, workdir, "colours", "--train_data_dir", str(workdir / "transparent"))  # adapter does not say
    assert other["background"] == "white"


def test_broken_images_are_left_out_as_in_training(script, workdir, report, capsys):
    shutil.copytree(workdir / "images", workdir / "broken")
    (workdir / "broken" / "ant" / "0a.png").write_bytes(b"no image")
    flags = ("--train_data_dir", str(workdir / "broken"))
    with pytest.raises(ValueError, match="image of row 1 cannot be read: .* --skip_broken_images"):
        run(script, workdir, "refused", *flags)
    without = run(script, workdir, "without", *flags, "--skip_broken_images")
    assert "1 of 13 real images cannot be read, and are left out" in capsys.readouterr().out
    assert without["num_real_images"] == 12 and [without[name] for name in METRICS] == numbers(report)


def test_a_base_of_few_classes_and_a_base_with_adapters(script, workdir):
    pipe = DiffFitDiTPipeline(**make_pipeline(num_layers=2, num_embeds_ada_norm=10).components)
    pipe.save_pretrained(workdir / "ten")
    model = get_peft_model(pipe.transformer, DiffFitConfig(id2label=dict(enumerate(COUNTS)))).eval()
    model.save_pretrained(workdir / "of ten", save_embedding_layers=False)
    few = ("--num_images", "4")
    base = ("--pretrained_model_name_or_path", str(workdir / "ten"))
    report = run(script, workdir, "ten report", *base, "--adapter", str(workdir / "of ten"), *few)
    assert report["classes"] == "by name" and np.isfinite(report["fid"])
    pipe.transformer = model
    pipe.save_pretrained(workdir / "ten adapted")
    adapted = ("--pretrained_model_name_or_path", str(workdir / "ten adapted"))
    argv = [*arguments(workdir, "ten adapted report"), *adapted, *few]
    at = argv.index("--adapter")
    AcceleratorState._reset_state(reset_partial_state=True)
    own = script.main(script.parse_args(argv[:at] + argv[at + 2 :]))
    assert [own[name] for name in METRICS] == [report[name] for name in METRICS]
    with pytest.raises(ValueError, match="comes with adapters of its own: leave --adapter out"):
        run(script, workdir, "refused", *adapted, *few)


@pytest.mark.skipif(_TORCH_FIDELITY_AVAILABLE, reason="torch-fidelity is installed")
def test_says_what_inception_needs(script, workdir):
    with pytest.raises(RuntimeError, match="--features inception needs torch-fidelity"):
        run(script, workdir, "refused", "--features", "inception")


def test_an_adapter_for_another_size(script, workdir):
    base = DiffFitDiTPipeline.from_pretrained(workdir / "base").transformer
    model = get_peft_model(base, DiffFitConfig(sample_size=16))
    model.save_pretrained(workdir / "wide", save_embedding_layers=False)
    run(script, workdir, "wide report", "--adapter", str(workdir / "wide"))
    assert PIL.Image.open(workdir / "wide report" / "samples.png").height % 32 == 0


def test_accelerate_knows_the_configuration():
    assert load_config_from_file(str(EXAMPLES / "accelerate" / "ddp.yaml")).distributed_type == "MULTI_GPU"
