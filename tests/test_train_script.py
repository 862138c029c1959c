"""`examples/train_difffit.py` from a folder of images to an adapter that loads."""

import importlib.util
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_pipeline
from diffusers import DiTPipeline
from peft import PeftModel
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "examples" / "train_difffit.py"
CLASSES = ["ant", "bee", "cow"]
STEPS = 4


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_difffit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A tiny random DiT with learned variance in `base`, 12 images in 3 classes in `images`."""
    folder = tmp_path_factory.mktemp("train")
    make_pipeline(num_layers=2).save_pretrained(folder / "base")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    return folder


def run(script, workdir: Path, output: str, *flags: str, base: str = "base"):
    argv = ["--pretrained_model_name_or_path", str(workdir / base), "--train_data_dir", str(workdir / "images")]
    argv += ["--output_dir", str(workdir / output), "--cache_dir", str(workdir / "cache")]
    argv += ["--train_batch_size", "4", "--max_train_steps", str(STEPS), "--num_inference_steps", "2"]
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps its precision for as long as the process lives
    return script.main(script.parse_args([*argv, *flags]))


@pytest.fixture(scope="module")
def result(script, workdir):
    return run(script, workdir, "adapter", "--validation_steps", "2", "--num_validation_images", "2")


def test_writes_an_adapter_that_loads(result, workdir):
    base = DiTPipeline.from_pretrained(workdir / "base")
    size = sum(p.numel() for p in base.transformer.parameters())
    model = PeftModel.from_pretrained(base.transformer, result.output_dir)
    config = model.peft_config["default"]
    assert config.id2label == dict(enumerate(CLASSES))
    assert config.init_class_rows == "null"
    adapter = load_file(result.output_dir / "adapter_model.safetensors")
    assert sum(t.numel() for t in adapter.values()) == result.trained_parameters
    assert result.trained_share == result.trained_parameters / size
    assert result.adapter_bytes == (result.output_dir / "adapter_model.safetensors").stat().st_size
    base.transformer = model.eval()
    base.set_progress_bar_config(disable=True)
    assert base([0], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_training_moves_the_adapter(result):
    for name, tensor in load_file(result.output_dir / "adapter_model.safetensors").items():
        assert tensor.isfinite().all(), name
        if "gamma" in name:
            assert not tensor.equal(torch.ones_like(tensor)), name
    assert result.steps == STEPS
    assert result.seconds_per_step > 0


def test_writes_grids_before_during_and_after(result):
    assert [path.name for path in result.grids] == [f"step-00000{step}.png" for step in (0, 2, 4)]
    for path in result.grids:
        assert PIL.Image.open(path).size == (2 * 16, 3 * 16)
    assert sorted(path.parent.iterdir()) == sorted(result.grids)  # no partial files


def test_same_seed_gives_the_same_bytes(script, workdir, result):
    """Also with the latents from the cache, and without the pictures that the first run stopped for."""
    again = run(script, workdir, "again", "--num_validation_images", "0")
    other = run(script, workdir, "other", "--num_validation_images", "0", "--seed", "1")
    adapters = [(r.output_dir / "adapter_model.safetensors").read_bytes() for r in (result, again, other)]
    assert adapters[0] == adapters[1]
    assert adapters[0] != adapters[2]
    assert again.grids == []


def test_saves_the_average_of_the_weights(script, workdir):
    """After two steps, d * first + (1 - d) * second with the warm-up's d = 1 - 2 ** -0.75."""

    def trained(output: str, *flags: str) -> dict[str, torch.Tensor]:
        folder = run(script, workdir, output, "--num_validation_images", "0", *flags).output_dir
        return load_file(folder / "adapter_model.safetensors")

    first = trained("first", "--no-use_ema", "--max_train_steps", "1")
    second = trained("second", "--no-use_ema", "--max_train_steps", "2")
    average = trained("average", "--max_train_steps", "2")
    decay = 1 - 2**-0.75
    assert not all(first[name].equal(second[name]) for name in first)
    for name in average:
        expected = decay * first[name] + (1 - decay) * second[name]
        torch.testing.assert_close(average[name], expected, rtol=0, atol=1e-6)


def test_starts_from_the_bases_rows_when_the_labels_agree(script, workdir, capsys):
    pipe = DiTPipeline.from_pretrained(workdir / "base")
    pipe.register_to_config(id2label={0: "ant", 1: "bee, honeybee", 2: "cow", 3: "dog"})
    pipe.save_pretrained(workdir / "labelled")
    flags = ("--num_validation_images", "0", "--max_train_steps", "1", "--gamma_modules")
    result = run(script, workdir, "same", *flags, base="labelled")
    config = PeftModel.from_pretrained(pipe.transformer, result.output_dir).peft_config["default"]
    assert config.init_class_rows == "base"
    assert "base's own rows" in capsys.readouterr().out
    assert config.gamma_modules == []
    assert not any("gamma" in name for name in load_file(result.output_dir / "adapter_model.safetensors"))


def test_accumulated_steps_bf16_and_no_average(script, workdir):
    flags = ("--gradient_accumulation_steps", "2", "--mixed_precision", "bf16", "--no-use_ema", "--no-random_flip")
    flags += ("--lr_scheduler", "linear", "--lr_warmup_steps", "1", "--num_validation_images", "1")
    result = run(script, workdir, "bf16", *flags, "--validation_labels", "cow", "0")
    assert result.steps == STEPS
    assert PIL.Image.open(result.grids[-1]).size == (16, 2 * 16)
    adapter = load_file(result.output_dir / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in adapter.values())


def test_a_loss_that_is_not_finite_stops_the_run(script, workdir):
    flags = ("--learning_rate", "1e30", "--num_validation_images", "0")
    with pytest.raises(RuntimeError, match=r"at step 2.*learning_rate"):
        run(script, workdir, "diverged", *flags)
    assert not (workdir / "diverged").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "32"], "--resolution is 32.*16"),
        (["--validation_labels", "beee"], "'beee' is no class.*Did you mean 'bee'"),
        (["--label_column", "class"], "label_column is 'class'.*'image', 'label'"),
        (["--dataset_name", "also/given"], "exactly one"),
    ],
)
def test_refuses(script, workdir, flags, message):
    with pytest.raises(ValueError, match=message):
        run(script, workdir, "refused", *flags)
