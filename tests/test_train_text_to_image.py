"""`examples/train_text_to_image.py` from captioned images to an adapter, on tiny pipelines of several families."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from text_pipelines import PIPELINES, make_captioned_folder, make_text_pipeline, qwen_image

from difffit_peft import DiffFitConfig, save_pipeline
from difffit_peft.training.images import load_captioned_images
from difffit_peft.training.objective import noising
from difffit_peft.training.prompts import Prompts, encode_prompts
from difffit_peft.training.text_to_image import family_of_pipeline
from difffit_peft.training.vae import moments

SCRIPT = Path(__file__).parents[1] / "examples" / "train_text_to_image.py"
CAPTIONS = ["a red bird", "a red bird", "two blue fish", "a cat, asleep", "dog", "dog on the left"]
STEPS = 4
SIDES = dict.fromkeys(PIPELINES, 16) | {"Sana": 32}  # of pictures; Sana's pipeline takes multiples of 32
UNBINNED = dict.fromkeys(("PixArt", "Sana"), {"use_resolution_binning": False})
UNPACKED = {
    "FLUX.2": lambda x: x.permute(0, 2, 1).reshape(1, 16, 4, 4),
    "Qwen-Image": lambda x: x.view(1, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 4, 8, 8),
    "Z-Image": lambda x: torch.stack([*x]).squeeze(2),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_text_to_image", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    make_captioned_folder(folder / "images", CAPTIONS)
    for family in PIPELINES:
        make_text_pipeline(family).save_pretrained(folder / family)
    return folder


def arguments(workdir: Path, output: str, base: str) -> list[str]:
    argv = ["--pretrained_model_name_or_path", str(workdir / base), "--train_data_dir", str(workdir / "images")]
    argv += [
        "--output_dir",
        str(workdir / output),
        "--cache_dir",
        str(workdir / "cache"),
        "--resolution",
        str(SIDES.get(base, 16)),
    ]
    argv += ["--max_train_steps", str(STEPS), "--num_inference_steps", "2", "--num_validation_images", "1"]
    return argv + ["--mixed_precision", "no", "--report_to", "none", "--learning_rate", "0.01"]


def run(script, workdir: Path, output: str, *flags: str, base: str = "PixArt"):
    AcceleratorState._reset_state(reset_partial_state=True)
    return script.main(script.parse_args([*arguments(workdir, output, base), *flags]))


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


# What a family gives is what its pipeline does


def first_call(model: torch.nn.Module, compute) -> tuple[list, dict]:
    """The arguments of a model's first call in `compute`."""
    calls = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    compute()
    handle.remove()
    return calls[0]


def tensors(value) -> list[torch.Tensor]:
    """All tensors of nested arguments, in order, but for dictionaries by their names."""
    if isinstance(value, torch.Tensor):
        return [value.float()]
    if isinstance(value, dict):
        return [tensor for name in sorted(value) for tensor in tensors(value[name])]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("family", PIPELINES)
def test_a_model_is_called_as_its_pipeline_calls_it(family, monkeypatch):
    """The same embeddings, noise, timestep and the rest: what the pipeline's own loop gives the model at first."""
    pipe = make_text_pipeline(family)
    text = family_of_pipeline(type(pipe).__name__)(pipe)
    embeddings = text.encode("a red bird")
    model, settings = text.model, {"height": SIDES[family], "width": SIDES[family], "num_inference_steps": 2}
    settings |= UNBINNED.get(family, {})
    settings["generator"] = torch.Generator().manual_seed(0)
    unguided = {text.guidance: 0.0 if family == "Z-Image" else 1.0}

    args, kwargs = first_call(model, lambda: pipe(prompt="a red bird", **settings, **unguided))
    named = dict(zip(text.takes, (None, *args), strict=False)) | kwargs
    called = {name: value for name, value in named.items() if value is not None and name not in ("self", "return_dict")}
    x_t = next(named[name] for name in ("hidden_states", "sample", "x") if name in named)
    timestep = next(named[name] for name in ("timestep", "t") if name in named).reshape(-1).float()
    seen = UNPACKED.get(family, lambda x: x)(x_t)
    timesteps = 1000 * (1 - timestep) if family == "Z-Image" else timestep
    timesteps = timesteps * 1000 if family in ("FLUX.2", "Qwen-Image") else timesteps

    ours_args, ours = first_call(model, lambda: text.predict(model, seen, timesteps, [embeddings]))
    ours = dict(zip(text.takes, (None, *ours_args), strict=False)) | ours
    for name, value in called.items():
        for theirs, mine in zip(tensors(value), tensors(ours.get(name)), strict=True):
            torch.testing.assert_close(mine.reshape(theirs.shape), theirs, rtol=1e-6, atol=1e-6, msg=name)
    assert text.predict(model, seen, timesteps, [embeddings]).shape[2:] == seen.shape[2:]


@pytest.mark.parametrize("family", PIPELINES)
def test_prompts_of_several_lengths_in_a_batch(family):
    """Each sample is as it is alone."""
    pipe = make_text_pipeline(family)
    text = family_of_pipeline(type(pipe).__name__)(pipe)
    prompts = [text.encode(prompt) for prompt in ("dog", "", "two blue fish, asleep")]
    shape = (3, 16, 4, 4) if family == "FLUX.2" else (3, 4, 8, 8)
    x_t, timesteps = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 300.0, 900.0])
    with torch.no_grad():
        together = text.predict(text.model, x_t, timesteps, prompts)
        alone = [text.predict(text.model, x_t[i : i + 1], timesteps[i : i + 1], prompts[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
        others = text.predict(text.model, x_t, timesteps, prompts[::-1])
    assert (together - others)[[0, 2]].abs().amax() > 1e-3  # prompts tell


@pytest.mark.skipif("Qwen-Image" in PIPELINES, reason="needs Diffusers 0.36")
def test_qwen_image_is_refused_where_it_masks_no_text():
    with pytest.raises(ValueError, match="Qwen-Image masks no text in Diffusers 0.36.*: install Diffusers 0.37"):
        family_of_pipeline("QwenImagePipeline")(qwen_image())


@pytest.mark.parametrize("family", PIPELINES)
def test_latents_decode_to_the_image(family):
    """What a pipeline decodes, given our latents as what its loop ends with, is what the VAE gives for the image."""
    pipe = make_text_pipeline(family)
    text = family_of_pipeline(type(pipe).__name__)(pipe)
    pixels = torch.rand(1, 3, SIDES[family], SIDES[family], generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents, deviation = moments(pipe.vae, pixels)
        encoded = pipe.vae.encode(pixels.unsqueeze(2) if family == "Qwen-Image" else pixels)
        if family == "Sana":
            expected = pipe.vae.decode(encoded.latent).sample
            assert latents.shape == deviation.shape and not deviation.any()
        else:
            posterior = encoded.latent_dist
            expected = pipe.vae.decode(posterior.mean).sample.view(pixels.shape)
            # one deviation from the mean before they are normalised is one after it
            posterior.mean = posterior.mean + posterior.std
            pipe.vae.encode = lambda pixels: SimpleNamespace(latent_dist=posterior)
            torch.testing.assert_close(latents + deviation, moments(pipe.vae, pixels)[0])
    sizes = latents.shape if family == "Qwen-Image" else ()
    packed = pipe._pack_latents(latents, *sizes) if hasattr(pipe, "_pack_latents") else latents
    pipe.scheduler.step = lambda *args, **kwargs: (packed, packed)  # the loop ends with them
    call = text.call(text.encode("dog"), text.encode(""), 1, SIDES[family], 2.0)
    image = pipe(**call, num_inference_steps=1, output_type="pt").images
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


# Targets


def test_the_target_of_flow_matching():
    x_0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    flow = noising(FlowMatchEulerDiscreteScheduler(shift=3.0), weighting_scheme="none")
    steps = torch.tensor([0, 400, 999])
    x_t, timesteps = flow.add_noise(x_0, noise, steps)
    uniform = 1 - steps.double() / 1000  # step 0 is all noise
    sigma = (3 * uniform / (1 + 2 * uniform)).float()
    torch.testing.assert_close(timesteps, 1000 * sigma, rtol=1e-4, atol=0)
    torch.testing.assert_close(x_t, (1 - sigma.view(3, 1, 1, 1)) * x_0 + sigma.view(3, 1, 1, 1) * noise)
    output = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    expected = [((output[i] - (noise[i] - x_0[i])) ** 2).mean() for i in range(3)]
    torch.testing.assert_close(flow.losses(output, x_0, noise, steps), torch.stack(expected))
    torch.testing.assert_close(flow.losses(noise - x_0, x_0, noise, steps), torch.zeros(3))
    shift = torch.full_like(x_0, 0.25)
    torch.testing.assert_close(flow.losses(noise - x_0 + shift, x_0, noise, steps, shift), torch.zeros(3))


def test_logit_normal_timesteps():
    """Uniform steps become those that a sigmoid of normal draws gives, to the rounding of steps."""
    flow = noising(FlowMatchEulerDiscreteScheduler())
    drawn = torch.sigmoid(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert flow.sigmas.quantile(share).item() == pytest.approx(drawn.quantile(share).item(), abs=6e-3)


def test_a_solver_of_a_flow_has_its_shift():
    """As Sana is published."""
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    expected = noising(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert torch.equal(noising(solver).sigmas, expected.sigmas)
    assert not torch.equal(noising(FlowMatchEulerDiscreteScheduler()).sigmas, expected.sigmas)


def test_the_target_of_noise():
    """The mean squared error of the noise, for a model without learned variance."""
    x_0, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 400, 999])
    diffusion = noising(DDPMScheduler())
    x_t, timesteps = diffusion.add_noise(x_0, noise, steps)
    kept = torch.linspace(1e-4, 0.02, 1000).neg().add(1).cumprod(0)[steps].view(3, 1, 1, 1)
    torch.testing.assert_close(x_t, kept.sqrt() * x_0 + (1 - kept).sqrt() * noise)
    assert torch.equal(timesteps, steps)
    expected = (x_t - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(diffusion.losses(x_t, x_0, noise, steps), expected)


# A run from end to end


@pytest.fixture(scope="module")
def results(script, workdir):
    return {
        family: run(script, workdir, f"adapter-{family}", "--validation_steps", "2", base=family)
        for family in PIPELINES
    }


@pytest.mark.parametrize("family", PIPELINES)
def test_writes_an_adapter_that_loads(results, workdir, family):
    result = results[family]
    assert [path.name for path in result.grids] == [f"step-00000{step}.png" for step in (0, 2, 4)]
    assert PIL.Image.open(result.grids[-1]).size == (SIDES[family], 3 * SIDES[family])  # three of five captions
    trained = load_file(result.output_dir / "adapter_model.safetensors")
    assert result.steps == STEPS and all(tensor.isfinite().all() for tensor in trained.values())
    assert any(not torch.equal(t, torch.ones_like(t)) for name, t in trained.items() if "gamma" in name)
    card = (result.output_dir / "README.md").read_text()
    assert "- `caption_dropout`: `0.1`" in card and "![Samples](samples.png)" in card
    pipe = DiffusionPipeline.from_pretrained(workdir / family)
    part = "unet" if family == "SD1.5" else "transformer"
    setattr(pipe, part, PeftModel.from_pretrained(getattr(pipe, part), result.output_dir).eval())
    pipe.set_progress_bar_config(disable=True)
    guided = {"Qwen-Image": {"true_cfg_scale": 4.0, "negative_prompt": ""}, "Z-Image": {"guidance_scale": 3.0}}
    settings = (
        {"height": SIDES[family], "width": SIDES[family]}
        | UNBINNED.get(family, {})
        | guided.get(family, {"guidance_scale": 4.0})
    )
    generator = torch.Generator().manual_seed(0)
    picture = pipe(prompt="a cat, asleep", num_inference_steps=2, generator=generator, **settings).images[0]
    row = np.asarray(PIL.Image.open(result.grids[-1]))[: SIDES[family]]  # the first caption in the alphabet
    assert np.abs(np.asarray(picture).astype(int) - row).max() <= 1
    assert not np.array_equal(row, np.asarray(PIL.Image.open(result.grids[0]))[: SIDES[family]])  # training shows


@pytest.mark.parametrize("family", [name for name in ("PixArt", "FLUX.2", "SD1.5") if name in PIPELINES])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(script, workdir, results, family):
    flags = ("--num_validation_images", "0", "--checkpointing_steps", "2", "--validation_steps", "2")
    run(script, workdir, f"stopped-{family}", *flags, "--max_train_steps", "2", base=family)
    run(script, workdir, f"stopped-{family}", *flags, "--resume_from_checkpoint", "latest", base=family)
    assert adapter(workdir / f"stopped-{family}") == adapter(results[family].output_dir)
    other = run(script, workdir, f"seed-{family}", *flags, "--seed", "1", base=family)
    assert adapter(other.output_dir) != adapter(results[family].output_dir)


def test_a_killed_process_is_resumed(script, workdir):
    """SIGKILL at some moment after its first checkpoint; prompts and latents come from the cache then."""
    flags = ["--num_validation_images", "0", "--checkpointing_steps", "1", "--max_train_steps", "400"]
    command = [sys.executable, str(SCRIPT), *arguments(workdir, "killed", "SD3"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((workdir / "killed").glob("checkpoint-*")):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    reached = max(int(path.name.split("-")[1]) for path in (workdir / "killed").glob("checkpoint-*"))
    end = ["--num_validation_images", "0", "--max_train_steps", str(reached + 3)]
    resumed = run(script, workdir, "killed", *end, "--resume_from_checkpoint", "latest", base="SD3")
    whole = run(script, workdir, "whole", *end, base="SD3")
    assert adapter(resumed.output_dir) == adapter(whole.output_dir)


def test_another_caption_or_dropout_is_another_run(script, workdir, tmp_path):
    flags = ("--num_validation_images", "0", "--checkpointing_steps", "2", "--max_train_steps", "2")
    run(script, workdir, "captions", *flags)
    make_captioned_folder(tmp_path / "images", [*CAPTIONS[:-1], "dog on the right"])
    again = (*flags, "--resume_from_checkpoint", "latest")
    with pytest.raises(
        ValueError, match="run: new captions: dog on the right; captions that are gone: dog on the left"
    ):
        run(script, workdir, "captions", *again, "--train_data_dir", str(tmp_path / "images"))
    with pytest.raises(ValueError, match=r"belongs to another run: caption_dropout was 0.1 and is 0.5"):
        run(script, workdir, "captions", *again, "--caption_dropout", "0.5")


TWO_PROCESSES = """
import json, sys
import torch
from accelerate.state import AcceleratorState
sys.path.insert(0, sys.argv[1])
from train_text_to_image import main, parse_args
torch.distributed.destroy_process_group = lambda group: None  # a second one would meet what the first left in the store
for argv in json.loads(sys.argv[2]):
    AcceleratorState._reset_state(reset_partial_state=True)
    main(parse_args(argv))
"""


def test_two_processes_train_as_one_with_twice_the_batch(script, workdir):
    """One of the families in two parts, the second from a checkpoint of the first."""
    families = [family for family in ("PixArt", "SD3", "FLUX.2", "SD1.5") if family in PIPELINES]
    flags = ["--num_held_out_images", "0", "--num_validation_images", "0", "--checkpointing_steps", "2"]
    runs = [
        [*arguments(workdir, f"two-{family}", family), *flags, "--train_batch_size", "2", *more]
        for family in families
        for more in ([["--max_train_steps", "2"]] if family == "PixArt" else [])
        + [["--resume_from_checkpoint", "latest"]]
    ]
    (workdir / "two.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(SCRIPT.parent / "accelerate" / "ddp.yaml"), str(workdir / "two.py")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command += [str(SCRIPT.parent), json.dumps(runs)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Resuming from" in process.stdout
    for family in families:
        alone = run(script, workdir, f"alone-{family}", *flags, "--train_batch_size", "4", base=family)
        folders = (workdir / f"two-{family}", alone.output_dir)
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not name.endswith("to_k.difffit_delta"):  # a softmax cancels it: its gradient is rounding alone
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=f"{family}: {name}")


def test_in_bf16_with_checkpointing_and_new_biases(script, workdir):
    flags = ("--mixed_precision", "bf16", "--gradient_checkpointing", "--random_flip", "--validation_prompts", "x", "y")
    flags += ("--new_biases",)
    for family in {"PixArt", "FLUX.2"} & {*PIPELINES}:
        result = run(script, workdir, f"bf16-{family}", *flags, "--max_train_steps", "1", base=family)
        assert PIL.Image.open(result.grids[-1]).size == (16, 2 * 16)
        trained = load_file(result.output_dir / "adapter_model.safetensors")
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in trained.values())
        added = [trained[name] for name in trained if "delta" in name and family == "FLUX.2"]  # which has no biases
        assert len(added) > 20 or family != "FLUX.2"
        assert all(delta.any() for delta in added)


# Captions and prompts


def test_captions_are_dropped_to_the_empty_prompt(workdir):
    """A share of the samples, and then the model sees what the pipeline's empty prompt is."""
    pipe = make_text_pipeline("PixArt")
    text = family_of_pipeline(type(pipe).__name__)(pipe)
    prompts = encode_prompts(["dog", ""], text.encode, "key", workdir / "dropped", hidden=True)
    objective = text.objective(noising(pipe.scheduler), prompts, 1, 0.5)
    from difffit_peft.training.sampling import draw

    draws = draw(0, 0, (64, 1, 4, 8, 8), 1000, label_dropout=objective.dropout)
    labels = objective.drop(draws, torch.zeros(64, dtype=torch.long))
    assert 16 < labels.sum() < 48 and torch.equal(labels.bool(), draws.dropped)
    _, given = first_call(text.model, lambda: objective.losses(text.model, draws, torch.randn(64, 4, 8, 8), labels))
    for label, seen in zip(labels, given["encoder_hidden_states"], strict=True):
        assert torch.equal(seen, text.encode(["dog", ""][label])["prompt_embeds"])


def test_prompts_are_encoded_once(tmp_path):
    asked = []

    def encode(prompt: str) -> dict[str, torch.Tensor]:
        asked.append(prompt)
        return {"prompt_embeds": torch.full((len(prompt) + 1, 2), 0.5, dtype=torch.bfloat16)}

    encode_prompts(["a", "", "a"], encode, "key", tmp_path, hidden=True)
    prompts = encode_prompts(["", "bcd", "a"], encode, "key", tmp_path, hidden=True)
    assert asked == ["a", "", "bcd"]
    assert isinstance(prompts, Prompts) and len(prompts) == 3
    assert [tuple(prompts[i]["prompt_embeds"].shape) for i in range(3)] == [(1, 2), (4, 2), (2, 2)]
    assert prompts[1]["prompt_embeds"].dtype == torch.bfloat16
    prompts.files[1].write_bytes(b"broken")
    assert torch.equal(
        encode_prompts(["bcd"], encode, "key", tmp_path)[0]["prompt_embeds"], torch.full((4, 2), 0.5).bfloat16()
    )
    encode_prompts(["a"], encode, "another", tmp_path)
    assert asked == ["a", "", "bcd", "bcd", "a"]
    with pytest.raises(ValueError, match="not finite .* for 'a': use --mixed_precision bf16"):
        encode_prompts(["a"], lambda prompt: {"x": torch.tensor([torch.nan])}, "nan", tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--caption_column", "prompt"],
            r"caption_column is 'prompt', but the dataset has the columns \['image', 'text'",
        ),
        (["--train_data_dir", "plain"], "plain holds 1 images and no captions: put them into a file called metadata"),
        (["--train_data_dir", "empty"], r"caption_column 'text' is empty in row 1 \(1 such rows\): every image needs"),
        (
            ["--pretrained_model_name_or_path", "class"],
            "The base is a DiTPipeline, which cannot be .* here: give one of ",
        ),
        (
            ["--pretrained_model_name_or_path", "adapted"],
            "adapted comes with adapters: name their base, or save it with",
        ),
        (
            ["--pretrained_model_name_or_path", "adapted/adapters/x"],
            "x is not a pipeline: it holds no model_index.json",
        ),
        (
            ["--pretrained_model_name_or_path", "./absent"],
            "There is no file or folder .*absent, and './absent' cannot be",
        ),
        (["--pretrained_model_name_or_path", "~/absent"], "There is no file or folder .*/absent, and "),
        (["--snr_gamma", "5", "--pretrained_model_name_or_path", "SD3"], "--snr_gamma is 5.0, but .* flow matching"),
        (["--weighting_scheme", "none"], "--weighting_scheme is 'none', but the base is trained to predict noise"),
        (["--resolution", "19"], "--resolution is 19, but this base takes multiples of 4: 16 or 20"),
        (["--gamma_modules", "attn1.to_x"], "'attn1.to_x' matches no layer"),
    ],
)
def test_refuses_before_anything_is_encoded(script, workdir, tmp_path, flags, message):
    make_captioned_folder(tmp_path / "plain", ["a"])
    (tmp_path / "plain" / "metadata.csv").unlink()
    make_captioned_folder(tmp_path / "empty", ["a", "", "b"])
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    if any("adapted" in flag for flag in flags):
        pipe = DiffusionPipeline.from_pretrained(workdir / "PixArt")
        pipe.transformer = get_peft_model(pipe.transformer, DiffFitConfig(), "x")
        save_pipeline(pipe, tmp_path / "adapted")
    for i, flag in enumerate(flags):
        flags[i] = str(tmp_path / flag) if (tmp_path / flag).exists() else flag
        flags[i] = str(workdir / flag) if flag == "SD3" else flags[i]
    with pytest.raises(ValueError, match=message):
        run(script, workdir, "refused", *flags, "--cache_dir", str(tmp_path / "cache"))
    assert not list(tmp_path.glob("cache/latents-*")) and not list(tmp_path.glob("cache/prompts-*"))
    assert not (workdir / "refused").exists()


def test_captioned_images(workdir):
    data = load_captioned_images(train_data_dir=workdir / "images")
    assert [data.class_names[label] for label in data.labels] == CAPTIONS and data.class_names == sorted({*CAPTIONS})
    some = load_captioned_images(train_data_dir=workdir / "images", max_samples=1, seed=0)
    assert len(some) == len(some.class_names) == 1
