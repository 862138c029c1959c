"""`examples/train_difffit.py` from a folder of images to an adapter that loads."""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import accelerate.tracking
import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import make_pipeline
from diffusers import DiTPipeline, FlowMatchEulerDiscreteScheduler
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from difffit_peft import DiffFitDiTPipeline
from difffit_peft.training import prepare
from difffit_peft.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from difffit_peft.training.run import peak_memory
from difffit_peft.training.visualize import sample_grid

SCRIPT = Path(__file__).parents[1] / "examples" / "train_difffit.py"
CLASSES = ["ant", "bee", "cow"]
STEPS = 4
CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes it")


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


def arguments(workdir: Path, output: str, base: str = "base") -> list[str]:
    argv = ["--pretrained_model_name_or_path", str(workdir / base), "--train_data_dir", str(workdir / "images")]
    argv += ["--output_dir", str(workdir / output), "--cache_dir", str(workdir / "cache")]
    argv += ["--train_batch_size", "4", "--max_train_steps", str(STEPS), "--num_inference_steps", "2"]
    return argv + ["--mixed_precision", "no", "--report_to", "none"]


def run(script, workdir: Path, output: str, *flags: str, base: str = "base"):
    argv = arguments(workdir, output, base)
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps its precision for as long as the process lives
    return script.main(script.parse_args([*argv, *flags]))


@pytest.fixture(scope="module")
def result(script, workdir):
    return run(script, workdir, "adapter", "--validation_steps", "2", "--num_validation_images", "2")


def test_writes_an_adapter_that_loads(result, workdir):
    base = DiTPipeline.from_pretrained(workdir / "base")
    blocks = base.transformer.transformer_blocks
    copies = sum(p.numel() for block in blocks[1:] for p in block.norm1.emb.parameters())
    size = sum(p.numel() for p in base.transformer.parameters()) - copies  # as the paper's model has one
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


def test_starts_from_the_classes_that_are_named(script, workdir, capsys):
    flags = ("--num_validation_images", "0", "--max_train_steps", "1", "--init_classes", "7", "7", "3")
    result = run(script, workdir, "like", *flags)
    assert PeftConfig.from_pretrained(result.output_dir).init_class_rows == [7, 7, 3]
    assert "Classes start from the rows of these of the base: 7, 7, 3" in capsys.readouterr().out


def test_starts_from_the_bases_rows_when_the_labels_agree(script, workdir, capsys):
    pipe = DiTPipeline.from_pretrained(workdir / "base")
    pipe.register_to_config(id2label={0: "ant", 1: "bee, honeybee", 2: "cow", 3: "dog"})
    pipe.save_pretrained(workdir / "labelled")
    flags = ("--num_validation_images", "0", "--max_train_steps", "1", "--background", "#010203")
    flags += ("--new_biases", "--r", "1", "--gamma_modules")
    result = run(script, workdir, "same", *flags, base="labelled")
    config = PeftModel.from_pretrained(pipe.transformer, result.output_dir).peft_config["default"]
    assert config.init_class_rows == "base" and config.background == "#010203" and config.new_biases
    printed = capsys.readouterr().out
    assert printed.index("12 images in 3 classes: ant 4, bee 4, cow 4") < printed.index("base's own rows")
    # console, summary and card count alike
    count, share = f"{result.trained_parameters:,}", f"{result.trained_share:.3%} of the base's"
    assert f"Training {count} parameters, {share}" in printed and f"{count} parameters, {share}\n" in printed
    card = (result.output_dir / "README.md").read_text()
    assert f"{count} trained parameters, {share}." in card and "- `background`: `#010203`" in card
    summary = json.loads((result.output_dir / "summary.json").read_text())
    assert [summary[name] for name in ("trained_parameters", "trained_share")] == [
        result.trained_parameters,
        result.trained_share,
    ]
    assert "AdamW at 0.001, 10x the rate that published DiTs are pre-trained at" in printed
    assert "weight decay 0\n" in printed
    assert config.gamma_modules == []
    names = load_file(result.output_dir / "adapter_model.safetensors").keys()
    assert not any("gamma" in name for name in names) and any("difffit_B" in name for name in names)


@pytest.mark.parametrize("null", [10, 1500])
def test_validates_a_base_by_its_own_null_class(script, workdir, null):
    """Its pictures are those of a pipeline that is guided by it."""
    pipe = DiffFitDiTPipeline(**make_pipeline(num_layers=2, num_embeds_ada_norm=null).components)
    pipe.save_pretrained(workdir / f"base-{null}")
    flags = ("--num_validation_images", "2", "--learning_rate", "0.1")
    result = run(script, workdir, f"null-{null}", *flags, base=f"base-{null}")
    pipe.load_difffit_weights(result.output_dir)
    pipe.set_progress_bar_config(disable=True)
    expected = sample_grid(pipe, [0, 1, 2], 2, num_inference_steps=2)
    assert np.array_equal(PIL.Image.open(result.grids[-1]), expected)
    assert not np.array_equal(PIL.Image.open(result.grids[-1]), PIL.Image.open(result.grids[0]))


def test_a_base_with_adapters_is_refused(script, workdir, result):
    pipe = DiffFitDiTPipeline.from_pretrained(workdir / "base")
    pipe.load_difffit_weights(result.output_dir)
    pipe.save_pretrained(workdir / "adapted")
    with pytest.raises(ValueError, match="adapted comes with adapters: name their base, or save it with them fused"):
        run(script, workdir, "refused", base="adapted")
    assert not (workdir / "refused").exists()


def test_accumulated_steps_bf16_int8_and_no_average(script, workdir, capsys):
    flags = ("--gradient_accumulation_steps", "2", "--mixed_precision", "bf16", "--no-use_ema", "--no-random_flip")
    flags += ("--lr_scheduler", "linear", "--lr_warmup_steps", "1", "--num_validation_images", "1")
    flags += ("--base_precision", "int8", "--checkpointing_steps", "4")
    result = run(script, workdir, "bf16", *flags, "--validation_labels", "cow", "0")
    assert result.steps == STEPS
    schedule = torch.load(result.output_dir / "checkpoint-4" / "state.pt")["lr_scheduler"]
    assert schedule["last_epoch"] == STEPS and schedule["_last_lr"] == [0]  # a step of it for each of the optimizer
    assert "in bf16, its blocks in int8: 4 steps" in capsys.readouterr().out
    assert PIL.Image.open(result.grids[-1]).size == (16, 2 * 16)
    adapter = load_file(result.output_dir / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in adapter.values())


@pytest.mark.parametrize(
    ("variable", "value"), [("ACCELERATE_DYNAMO_BACKEND", "EAGER"), ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")]
)
def test_what_accelerate_launch_sets_changes_no_weights(script, workdir, result, monkeypatch, variable, value):
    """A backend puts `_orig_mod.` into the names of weights; steps are what the script is told."""
    monkeypatch.setenv(variable, value)
    other = run(script, workdir, value, "--num_validation_images", "0", "--checkpointing_steps", "2")
    assert other.steps == STEPS
    ours, theirs = (load_file(r.output_dir / "adapter_model.safetensors") for r in (other, result))
    assert ours.keys() == theirs.keys()
    for name in [name for name in ours if "to_k.difffit_delta" not in name]:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    checkpoint = load_file(other.output_dir / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in checkpoint.items())


def test_precision_is_what_accelerate_launch_was_told_or_the_flag(script, workdir, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    for flags, expected in (((), "fp16"), (("--mixed_precision", "no"), "no")):
        base = ["--pretrained_model_name_or_path", str(workdir / "base"), "--train_data_dir", "images"]
        assert script.parse_args([*base, "--output_dir", "out", *flags]).mixed_precision == expected


def test_a_loss_that_is_not_finite_stops_the_run(script, workdir):
    flags = ("--learning_rate", "1e30", "--num_validation_images", "0")
    with pytest.raises(RuntimeError, match=r"at step 2: lower the learning rate"):
        run(script, workdir, "diverged", *flags)
    assert not (workdir / "diverged").exists()


def test_a_loss_that_is_not_finite_names_the_last_checkpoint(script, workdir):
    flags = ("--num_validation_images", "0", "--checkpointing_steps", "1", "--max_train_steps", "2")
    run(script, workdir, "healthy", *flags)
    before = {path: path.read_bytes() for path in (workdir / "healthy").rglob("*") if path.is_file()}
    checkpoint = workdir / "healthy" / "checkpoint-2"
    state = torch.load(checkpoint / "state.pt")
    state["parameters"][:9].fill_(float("nan"))  # stands for data that makes the loss overflow
    torch.save(state, checkpoint / "state.pt")
    before[checkpoint / "state.pt"] = (checkpoint / "state.pt").read_bytes()
    with pytest.raises(RuntimeError, match="The loss is nan at step 3.*The last checkpoint is .*checkpoint-2"):
        run(script, workdir, "healthy", *flags, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert {path: path.read_bytes() for path in (workdir / "healthy").rglob("*") if path.is_file()} == before


# Resuming


def test_a_checkpoint_is_the_adapter_of_its_step(script, workdir):
    flags = ("--checkpointing_steps", "2", "--num_validation_images", "0")
    result = run(script, workdir, "kept", *flags)
    final = load_file(result.output_dir / "adapter_model.safetensors")
    pipe = DiffFitDiTPipeline.from_pretrained(workdir / "base")
    for step in (2, 4):
        checkpoint = result.output_dir / f"checkpoint-{step}"
        pipe.load_difffit_weights(checkpoint, checkpoint.name)
        tensors = load_file(checkpoint / "adapter_model.safetensors")
        assert all(torch.equal(tensors[name], final[name]) for name in final) == (step == 4)
        assert f"# `checkpoint-{step}`" in (checkpoint / "README.md").read_text()
    assert pipe.get_list_adapters() == ["checkpoint-2", "checkpoint-4"]


def test_the_home_folder(script, workdir, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/someone")
    flags = ["--output_dir=~/adapter", "--cache_dir=~/cache", "--resume_from_checkpoint=~/adapter/checkpoint-4"]
    args = script.parse_args([*arguments(workdir, "x"), *flags])
    assert args.output_dir == Path("/home/of/someone/adapter") and args.cache_dir == Path("/home/of/someone/cache")
    assert args.resume_from_checkpoint == Path("/home/of/someone/adapter/checkpoint-4")
    assert (
        script.parse_args([*arguments(workdir, "x"), "--resume_from_checkpoint", "latest"]).resume_from_checkpoint
        == "latest"
    )


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(script, workdir):
    flags = ["--max_train_steps", "30", "--checkpointing_steps", "1", "--num_validation_images", "0"]
    whole = run(script, workdir, "whole", *flags)
    command = [sys.executable, str(SCRIPT), *arguments(workdir, "killed"), *flags]
    output = workdir / "killed"

    def interrupted(number: int, moment) -> int:
        """Starts or goes on, and sends the signal when `moment()` is true."""
        process = subprocess.Popen(
            [*command, "--resume_from_checkpoint", "latest"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        while process.poll() is None and not moment():
            time.sleep(0.0005)
        process.send_signal(number)
        return process.wait(timeout=60)

    assert interrupted(signal.SIGINT, lambda: len(checkpoints(output)) >= 1) == 130  # so `train && evaluate` ends
    after = int(checkpoints(output)[-1].name.split("-")[1])
    assert 1 <= after < 30
    assert interrupted(signal.SIGKILL, lambda: any(output.glob("partial-checkpoint-*"))) == -signal.SIGKILL
    result = run(script, workdir, "killed", *flags, "--resume_from_checkpoint", "latest")
    adapters = [(r.output_dir / "adapter_model.safetensors").read_bytes() for r in (whole, result)]
    assert adapters[0] == adapters[1]
    assert len(checkpoints(output)) == 2  # --checkpoints_total_limit
    assert not any("partial" in path.name for path in output.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "2e-3"], "learning_rate was 0.001 and is 0.002"),
        (["--no-random_flip"], "random_flip was True and is False"),
        (["--gamma_modules", "attn1.to_q"], r"gamma_modules was \['attn1.to_k', .* and is \['attn1.to_q'\]"),
        (["--r", "1"], "r was 0 and is 1"),
        (["--new_biases"], "new_biases was False and is True"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is not a checkpoint"),
    ],
)
def test_another_run_is_not_resumed(script, workdir, result, flags, message):
    if not (workdir / "stopped").exists():
        run(script, workdir, "stopped", "--checkpointing_steps", "2", "--num_validation_images", "0")
    with pytest.raises(ValueError, match=message):
        run(script, workdir, "stopped", "--resume_from_checkpoint", "latest", "--num_validation_images", "0", *flags)


def test_data_are_their_images_wherever_they_lie(script, workdir, tmp_path):
    flags = ("--num_validation_images", "0", "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest")
    if not (workdir / "stopped").exists():
        run(script, workdir, "stopped", *flags)
    shutil.copytree(workdir / "stopped", workdir / "moved")
    shutil.copytree(workdir / "images", tmp_path / "images", copy_function=shutil.copy)
    flags += ("--train_data_dir", str(tmp_path / "images"))
    assert run(script, workdir, "moved", *flags, "--max_train_steps", "5").steps == 5
    (tmp_path / "images" / "cow").rename(tmp_path / "images" / "dog")
    (tmp_path / "images" / "ant" / "3.png").unlink()
    shutil.copy(tmp_path / "images" / "bee" / "0.png", tmp_path / "images" / "bee" / "1.png")
    with pytest.raises(ValueError, match="belongs to another run: ") as error:
        run(script, workdir, "moved", *flags)
    listed = str(error.value).split("another run: ")[1].split(". Resume")[0].split("; ")
    assert listed == [
        "new classes: dog",
        "classes that are gone: cow",
        "ant had 4 images and has 3",
        "of the 4 images of bee some are others",
    ]


def test_another_run_is_refused_before_images_are_encoded(script, workdir, tmp_path):
    """Also where images may be left out, by what is known of them before."""
    if not (workdir / "stopped").exists():
        run(script, workdir, "stopped", "--checkpointing_steps", "2", "--num_validation_images", "0")
    shutil.copytree(workdir / "images", tmp_path / "images")
    shutil.copy(workdir / "images" / "bee" / "0.png", tmp_path / "images" / "bee" / "4.png")
    resume = ("--num_validation_images", "0", "--resume_from_checkpoint", "latest", "--cache_dir", str(tmp_path))
    for flags, message in [
        (("--train_data_dir", str(tmp_path / "images")), "bee had 4 images and has 5"),
        (("--resolution", "32", "--skip_broken_images"), "resolution was 16 and is 32"),
    ]:
        with pytest.raises(ValueError, match=f"belongs to another run: {message}"):
            run(script, workdir, "stopped", *resume, *flags)
        assert not [path for path in tmp_path.glob("latents-*") if path.is_dir()]


def test_a_refusal_says_what_differs(tmp_path):
    about = {"images": {f"c{i}": [2, "aa"] for i in range(9)}, "order": "aa", "vae": "aa", "background": [255] * 3}
    saved = about | {"classes": list(about["images"]), "base": "aa", "seed": 0}
    path = save_checkpoint(tmp_path, 1, {}, saved)
    others = {f"c{i}": [2, "bb"] for i in range(9)}
    for changed, words in [
        ({"order": "bb"}, "the images come in another order"),
        ({"order": "bb", "images": saved["images"] | {"c1": [3, "bb"]}}, "c1 had 2 images and has 3"),
        ({"images": {name: saved["images"][name] for name in others if name != "c1"}}, "c1 had 2 images and has 0"),
        (
            {"images": others, "order": "bb"},
            "; ".join(f"of the 2 images of c{i} some are others" for i in range(5))
            + "; the images of 4 more classes differ",
        ),
        ({"classes": saved["classes"][::-1], "order": "bb"}, "the classes come in another order"),
        ({"classes": saved["classes"] + ["new"]}, "new classes: new"),
        ({"base": "bb", "vae": "bb"}, "the base's weights are others; the VAE's weights or config are others"),
        ({"background": [0, 0, 0]}, r"background was [255, 255, 255] and is [0, 0, 0]"),
    ]:
        with pytest.raises(ValueError) as error:
            load_checkpoint(path, saved | changed)
        assert str(error.value).startswith(f"{path} belongs to another run: {words}. Resume with the same data")
    assert load_checkpoint(path, saved) == {}


def test_a_folder_with_another_runs_checkpoints_is_not_written_to(script, workdir):
    run(script, workdir, "taken", "--checkpointing_steps", "2", "--num_validation_images", "0")
    with pytest.raises(ValueError, match="has checkpoints of another run, up to checkpoint-4: go on with --resume"):
        run(script, workdir, "taken", "--num_validation_images", "0")
    flags = ("--checkpointing_steps", "3", "--num_validation_images", "0")
    run(script, workdir, "taken", *flags, "--resume_from_checkpoint", str(workdir / "taken" / "checkpoint-2"))
    assert [path.name for path in checkpoints(workdir / "taken")] == ["checkpoint-2", "checkpoint-3"]
    run(script, workdir, "other", "--checkpointing_steps", "2", "--num_validation_images", "0")
    with pytest.raises(ValueError, match="has checkpoints of another run, up to checkpoint-4"):
        run(script, workdir, "other", *flags, "--resume_from_checkpoint", str(workdir / "taken" / "checkpoint-2"))
    assert [path.name for path in checkpoints(workdir / "other")] == ["checkpoint-2", "checkpoint-4"]


def test_a_folder_that_was_moved_is_resumed(script, workdir, monkeypatch):
    """Also from another working directory, and after pictures went."""
    flags = ("--checkpointing_steps", "1", "--validation_steps", "1", "--num_validation_images", "1")
    run(script, workdir, "before", *flags, "--max_train_steps", "2")
    (workdir / "before").rename(workdir / "after")
    monkeypatch.chdir(workdir)
    go_on = (*flags, "--resume_from_checkpoint", "latest")
    result = run(script, Path("."), "after", *go_on)
    assert result.grids == [Path("after/validation") / f"step-00000{step}.png" for step in range(5)]
    assert json.loads((workdir / "after" / "summary.json").read_text())["steps"] == STEPS
    assert PIL.Image.open(workdir / "after" / "validation.png").size == (3 * 16, 5 * 16)
    for step in (0, 4):
        (workdir / "after" / "validation" / f"step-00000{step}.png").unlink()
    assert [path.name[-5] for path in run(script, workdir, "after", *go_on).grids] == ["1", "2", "3"]
    (workdir / "elsewhere").mkdir()
    from_there = str(workdir / "after" / "checkpoint-4")
    assert run(script, workdir, "elsewhere", *flags, "--resume_from_checkpoint", from_there).grids == []


def test_ctrl_c_in_the_first_validation(workdir):
    """It shows that it goes on, says that it heard the first Ctrl-C, and ends at a second."""
    command = [sys.executable, str(SCRIPT), *arguments(workdir, "twice"), "--num_inference_steps", "1000"]
    command += ["--validation_labels", *["ant"] * 1000]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = b""

    def read_until(done) -> None:
        nonlocal said
        while not done():
            assert (read := os.read(process.stderr.fileno(), 1000)), said
            said += read

    read_until(lambda: b"Validation pictures" in said)
    process.send_signal(signal.SIGINT)
    read_until(lambda: b"Stopping after this step" in said)
    heard = time.monotonic()
    read_until(lambda: time.monotonic() > heard + 1.1)  # sooner it would be taken for the first one, passed on
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert (said + process.stderr.read()).endswith(b"Stopped.\n")
    assert not (workdir / "twice").exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    state, settings = {"parameters": [torch.arange(5.0)]}, {"seed": 0}
    path = save_checkpoint(tmp_path, 1, state, settings)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # stands for the end of the disk
        with pytest.raises((OSError, RuntimeError)):
            save_checkpoint(tmp_path, 2, {"parameters": [torch.zeros(100_000)]}, settings, total_limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert torch.equal(load_checkpoint(path, settings)["parameters"][0], torch.arange(5.0))


# Other systems, packages that are missing


def test_peak_memory_on_other_systems(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # stands for Windows
    cpu = torch.device("cpu")
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=12_345))
    assert peak_memory(cpu) == 12_345
    monkeypatch.undo()
    linux = peak_memory(cpu)
    assert linux > 100 * 2**20
    monkeypatch.setattr(sys, "platform", "darwin")
    usage = SimpleNamespace(ru_maxrss=linux)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    assert peak_memory(cpu) == linux


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused(script, workdir, monkeypatch, tracker):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match=f"--report_to {tracker} needs {tracker}, which is not installed: pip install"):
        run(script, workdir, "untracked", "--report_to", tracker)
    assert not (workdir / "untracked").exists()


def test_an_optimizer_that_is_not_installed_is_refused_first(script, workdir, monkeypatch):
    monkeypatch.setattr(prepare, "is_bnb_available", lambda: False)
    with pytest.raises(ValueError, match="--optimizer adamw_8bit needs bitsandbytes, which is not installed"):
        run(script, workdir, "no_8bit", "--optimizer", "adamw_8bit", base="not there")


def test_guidance_is_trained_in_and_known_by_the_adapter(script, workdir):
    flags = ["--guidance_loss_scale", "1.5", "--guidance_loss_start", "0.25", "--num_validation_images", "1"]
    flags += ["--checkpointing_steps", "2"]
    output = run(script, workdir, "guided", *flags).output_dir
    pipe = DiffFitDiTPipeline.from_pretrained(workdir / "base")
    pipe.load_difffit_weights(output)
    assert pipe.transformer.peft_config["default_0"].trained_guidance_scale == 1.5
    assert "guidance_loss_scale" in (output / "README.md").read_text()
    with pytest.raises(ValueError, match="guidance_loss_scale"):
        run(script, workdir, "guided", *flags[2:], "--resume_from_checkpoint", "latest", "--max_train_steps", "6")


# Several processes, another resolution, what is shown


def launch(workdir: Path, config: str, script: Path, output: str, *flags: str) -> None:
    """Trains in two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(SCRIPT.parent / "accelerate" / config), str(script), *arguments(workdir, output)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=600, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]


WARMUP = ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "5"]  # Accelerate steps it in each process


@pytest.fixture(scope="module")
def alone(script, workdir):
    return run(script, workdir, "alone", "--max_train_steps", "20", "--num_validation_images", "0", *WARMUP)


@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_two_processes_train_as_one_with_twice_the_batch(alone, workdir, config):
    flags = [*WARMUP, "--train_batch_size", "2", "--num_held_out_images", "0", "--num_validation_images"]
    if config == "ddp.yaml":
        launch(workdir, config, SCRIPT, config, *flags, "0", "--max_train_steps", "20")
    else:  # stopped and resumed, with pictures
        worker = Path(__file__).with_name("fsdp_worker.py")
        flags += ["1", "--checkpointing_steps", "7", "--resume_from_checkpoint", "latest"]
        launch(workdir, config, worker, config, *flags, "--max_train_steps", "14")
        launch(workdir, config, worker, config, *flags, "--max_train_steps", "20")
        assert len(list((workdir / config / "validation").iterdir())) == 3
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (workdir / config, alone.output_dir))
    assert ours.keys() == theirs.keys()
    # δ of keys has no effect (softmax ignores a shift): its gradient is rounding, which AdamW scales to full steps
    for name in [name for name in ours if "to_k.difffit_delta" not in name]:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                "DIFFFIT_TEST_INDUCTOR" not in os.environ,
                reason="takes a minute, and a compiler of C++: set DIFFFIT_TEST_INDUCTOR",
            ),
        ),
    ],
)
def test_compiled_whole_it_trains_the_same(script, workdir, result, monkeypatch, backend):
    """One graph, without a break: all of a step's forward is compiled."""
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    compiled = run(script, workdir, backend, "--torch_compile", "--num_validation_images", "0")
    assert counter.frame_count > 0
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (compiled.output_dir, result.output_dir))
    assert ours.keys() == theirs.keys()
    # δ of keys has no effect (softmax ignores a shift): its gradient is rounding, which AdamW scales to full steps
    for name in [name for name in ours if "to_k.difffit_delta" not in name]:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw_fused", "adamw_8bit"])
def test_other_optimizers(script, workdir, result, optimizer):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    other = run(script, workdir, optimizer, "--optimizer", optimizer, "--num_validation_images", "0")
    ours, theirs = (load_file(r.output_dir / "adapter_model.safetensors") for r in (other, result))
    for name in [name for name in ours if "to_k.difffit_delta" not in name]:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_another_resolution(script, workdir):
    result = run(script, workdir, "wide", "--resolution", "32", "--num_validation_images", "1")
    assert PIL.Image.open(result.grids[-1]).size == (32, 3 * 32)
    pipe = DiTPipeline.from_pretrained(workdir / "base")
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, result.output_dir)
    assert pipe.transformer.peft_config["default"].sample_size == 16
    pipe.set_progress_bar_config(disable=True)
    assert pipe([0], num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_what_a_run_leaves_to_see(script, workdir):
    flags = ("--report_to", "tensorboard", "--num_held_out_images", "3", "--validation_steps", "2")
    result = run(script, workdir, "seen", *flags, "--num_validation_images", "1", "--gradient_checkpointing")
    summary = json.loads((result.output_dir / "summary.json").read_text())
    assert summary["trained_parameters"] == result.trained_parameters and summary["peak_memory_bytes"] > 2**20
    assert summary["validation_loss"] == result.validation_loss > 0
    assert PIL.Image.open(result.output_dir / "loss.png").size[0] > 100
    assert PIL.Image.open(result.output_dir / "validation.png").size == (3 * 16, 3 * 16)  # three grids, three classes
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.output_dir / "logs" / "difffit")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("validation_loss")] == [0, 2, 4]
    assert events.Scalars("validation_loss")[-1].value == pytest.approx(result.validation_loss)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution", "30"], "--resolution is 30.*multiples of 4: 28 or 32"),
        (["--num_held_out_images", "12"], "--num_held_out_images is 12: it must be 0 to 11"),
        (["--init_classes", "1"], "--init_classes has 1 classes, but the images have 3: ant, bee, cow"),
        (["--init_classes", "1", "2", "bee"], "'bee' is not a class: give an index from 0 to 999"),
        (["--validation_labels", "beee"], "'beee' is not a class.*Did you mean 'bee'"),
        pytest.param(["--mixed_precision", "fp16"], "fp16 needs a GPU, and this is a CPU", marks=CPU),
        pytest.param(
            ["--base_precision", "fp8"], "fp8 needs an NVIDIA GPU.* or above, and this device is cpu", marks=CPU
        ),
        (["--label_column", "class"], "label_column is 'class'.*'image', 'label'"),
        (["--dataset_name", "also/given"], "exactly one"),
    ],
)
def test_refuses(script, workdir, flags, message):
    with pytest.raises(ValueError, match=message):
        run(script, workdir, "refused", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gamma_modules", "attn1.to_x"], "'attn1.to_x' matches no layer.*Did you mean 'attn1.to_v'"),
        (["--pretrained_model_name_or_path", "flow"], "FlowMatchEulerDiscreteScheduler, which has no betas"),
    ],
)
def test_refuses_before_images_are_encoded(script, workdir, tmp_path, flags, message):
    pipe = make_pipeline(num_layers=2)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.save_pretrained(tmp_path / "flow")
    flags = [str(tmp_path / flag) if flag == "flow" else flag for flag in flags]
    with pytest.raises(ValueError, match=message):
        run(script, workdir, "refused", *flags, "--cache_dir", str(tmp_path / "cache"))
    assert not list(tmp_path.glob("cache/latents-*"))
