"""Adapters on stock pipelines of several families, by the functions that take any pipeline."""

import inspect
import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import CLOSE, randomise
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from family_checks import output, relative
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from text_pipelines import PIPELINES, make_text_pipeline
from tiny import TINY

import difffit_peft
from difffit_peft import DiffFitConfig

NAMES = {family: re.sub(r"\W", "", family).lower() for family in PIPELINES}
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def part_of(pipe: DiffusionPipeline) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def model_of(pipe: DiffusionPipeline) -> torch.nn.Module:
    return getattr(pipe, part_of(pipe))


def picture(pipe: DiffusionPipeline, prompt: str = "a red fox") -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    wanted = {"height": 32, "width": 32, "num_inference_steps": 2, "use_resolution_binning": False, "output_type": "np"}
    wanted = {name: value for name, value in wanted.items() if name in inspect.signature(pipe.__call__).parameters}
    return torch.as_tensor(pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), **wanted).images)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained(pipe: DiffusionPipeline, component: str, seed: int) -> DiffusionPipeline:
    """The pipeline with a trained adapter on a model, put there by PEFT."""
    setattr(pipe, component, get_peft_model(getattr(pipe, component), DiffFitConfig()).eval())
    randomise(getattr(pipe, component), seed=seed)
    return pipe


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("any")


def publish(hub: Path, family: str) -> str:
    """The base `me/FAMILY` on the Hub, its adapters `a` and `b` in FAMILY/, and `me/FAMILY-a`.

    The picture that the pipeline drew with `a` when it was trained is in FAMILY/a.pt.
    """
    name = NAMES[family]
    if (hub / name).is_dir():
        return name
    make_text_pipeline(family).push_to_hub(f"me/{name}")
    for seed, adapter in enumerate("ba"):
        pipe = DiffusionPipeline.from_pretrained(f"me/{name}", cache_dir=hub / "cache")
        trained(pipe, part_of(pipe), seed)
        difffit_peft.save_adapter(pipe, hub / name / adapter)
    difffit_peft.push_adapter(pipe, f"me/{name}-a", prompt="a red fox")
    torch.save(picture(pipe), hub / name / "a.pt")
    return name


@pytest.fixture(params=PIPELINES)
def name(hub, request) -> str:
    return publish(hub, request.param)


@pytest.fixture
def pipe(hub, name) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(f"me/{name}", cache_dir=hub / "cache")


def test_from_a_folder_and_from_the_hub_and_off_again(hub, name, pipe):
    base, before, cls = picture(pipe), state(model_of(pipe)), type(pipe)
    attributes = {*vars(pipe)}
    expected = torch.load(hub / name / "a.pt")
    assert not torch.allclose(base, expected, **CLOSE)
    difffit_peft.load_adapter(pipe, hub / name / "a")
    assert type(pipe) is cls and torch.equal(picture(pipe), expected)
    assert difffit_peft.get_list_adapters(pipe) == difffit_peft.get_active_adapters(pipe) == ["default_0"]
    difffit_peft.unload_adapters(pipe)
    assert torch.equal(picture(pipe), base) and same(state(model_of(pipe)), before)
    assert {*vars(pipe)} == attributes and difffit_peft.get_list_adapters(pipe) == []
    difffit_peft.load_adapter(pipe, f"me/{name}-a", "fox", cache_dir=hub / "cache")
    assert torch.equal(picture(pipe), expected)
    difffit_peft.delete_adapters(pipe, "fox")
    assert torch.equal(picture(pipe), base) and same(state(model_of(pipe)), before)


def test_base_and_part_are_recorded(hub, name, pipe):
    for config in (hub / name / "a" / CONFIG, HfApi().hf_hub_download(f"me/{name}-a", CONFIG)):
        saved = json.loads(Path(config).read_text())
        assert saved["base_model_name_or_path"] == f"me/{name}"
        assert saved["revision"] == HfApi().model_info(f"me/{name}").sha
        assert saved["component"] == part_of(pipe)
    assert f"base_model: me/{name}" in (hub / name / "a" / "README.md").read_text()


def test_blending_strength_and_fusing(hub, name, pipe):
    base, expected = picture(pipe), torch.load(hub / name / "a.pt")
    for adapter in "ab":
        difffit_peft.load_adapter(pipe, hub / name / adapter, adapter)
    assert difffit_peft.get_active_adapters(pipe) == ["b"] and difffit_peft.get_list_adapters(pipe) == ["a", "b"]
    difffit_peft.set_adapters(pipe, "a")
    assert torch.equal(picture(pipe), expected)
    difffit_peft.set_adapters(pipe, ["a", "b"], [0.5, 0.25])
    blended = picture(pipe)
    model_of(pipe).add_weighted_adapter(["a", "b"], [0.5, 0.25], "blend")
    difffit_peft.set_adapters(pipe, "blend", 1.0)
    torch.testing.assert_close(picture(pipe), blended, rtol=0, atol=1e-4)
    difffit_peft.delete_adapters(pipe, "blend")
    difffit_peft.set_adapters(pipe, ["a", "b"], 0.0)
    torch.testing.assert_close(picture(pipe), base, rtol=0, atol=1e-5)
    difffit_peft.set_adapters(pipe, ["a", "b"], [0.5, 0.25])
    difffit_peft.fuse_adapters(pipe)
    torch.testing.assert_close(picture(pipe), blended, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"unfuse_adapters\(pipe\)"):
        difffit_peft.set_adapters(pipe, "a")
    difffit_peft.unfuse_adapters(pipe)
    assert torch.equal(picture(pipe), blended)
    difffit_peft.disable_adapters(pipe)
    assert torch.equal(picture(pipe), base) and difffit_peft.get_active_adapters(pipe) == []
    difffit_peft.enable_adapters(pipe)
    assert torch.equal(picture(pipe), blended)
    difffit_peft.set_adapters(pipe, "b", 1.0)
    difffit_peft.load_adapter(pipe, hub / name / "a", "b", hotswap=True)
    assert torch.equal(picture(pipe), expected)


def test_a_pipeline_is_saved_with_its_adapters(hub, name, pipe, tmp_path):
    """By the pipeline's own verb too; a stock pipeline loads it without them."""
    base, before = picture(pipe), state(model_of(pipe))
    for adapter in "ab":
        difffit_peft.load_adapter(pipe, hub / name / adapter, adapter)
    difffit_peft.set_adapters(pipe, ["a", "b"], [0.5, 0.25])
    blended, config = picture(pipe), dict(pipe.config)
    pipe.save_pretrained(tmp_path / "own")
    difffit_peft.save_pipeline(pipe, tmp_path / "saved")
    assert torch.equal(picture(pipe), blended) and {**pipe.config}.items() >= config.items()
    for folder in ("own", "saved"):
        stock = DiffusionPipeline.from_pretrained(tmp_path / folder)
        assert torch.equal(picture(stock), base) and same(state(model_of(stock)), before)
        loaded = difffit_peft.load_pipeline(tmp_path / folder)
        assert type(loaded) is type(pipe) and torch.equal(picture(loaded), blended)
        assert difffit_peft.get_active_adapters(loaded) == ["a", "b"]
    pipe.push_to_hub(f"me/{name}-both")
    assert torch.equal(picture(difffit_peft.load_pipeline(f"me/{name}-both", cache_dir=tmp_path / "cache")), blended)
    difffit_peft.fuse_adapters(pipe)
    with pytest.raises(ValueError, match=rf"me/{name}-both holds the adapters \['a', 'b'\]"):
        pipe.push_to_hub(f"me/{name}-both")  # they would be loaded beside themselves
    pipe.save_pretrained(tmp_path / "fused")
    assert torch.equal(picture(DiffusionPipeline.from_pretrained(tmp_path / "fused")), picture(pipe))


def test_an_adapter_brings_its_base(hub, name):
    loaded = difffit_peft.load_pipeline(f"me/{name}-a", cache_dir=hub / "cache")
    assert torch.equal(picture(loaded), torch.load(hub / name / "a.pt"))


def test_the_card_runs(hub, name, tmp_path, monkeypatch):
    """Its first code draws with the adapter, its second loads it with PEFT."""
    card = Path(HfApi().hf_hub_download(f"me/{name}-a", "README.md")).read_text(encoding="utf-8")
    ours, peft = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len([line for line in ours.splitlines() if line]) == 5 and 'pipe(prompt="a red fox")' in ours
    monkeypatch.chdir(tmp_path)
    expected = torch.load(hub / name / "a.pt")
    small = (
        f'a red fox", height=16, width=16, num_inference_steps=2{", use_resolution_binning=False" * (name == "pixart")}'
    )
    for code in (ours.replace('a red fox"', small), peft):
        names: dict = {}
        exec(compile(code, "README.md", "exec"), names)
        assert torch.equal(picture(names["pipe"]), expected)
    assert (tmp_path / "sample.png").is_file()


# What is refused


def seen(pipe: DiffusionPipeline) -> tuple:
    pixels = picture(pipe).numpy().tobytes()
    lists = difffit_peft.get_list_adapters(pipe), difffit_peft.get_active_adapters(pipe), {*vars(pipe)}
    return *lists, type(model_of(pipe)), [name for name, _ in model_of(pipe).named_modules()], pixels


def truncated(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:500])


def with_a_nan(folder: Path) -> None:
    weights = load_file(folder / FILE)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, folder / FILE)


def with_weights_of_the_base(folder: Path) -> None:
    save_file(load_file(folder / FILE) | {"base_model.model.proj_out.weight": torch.zeros(4)}, folder / FILE)


def pickled(folder: Path) -> None:
    (folder / FILE).rename(folder / "adapter_model.bin")


def for_another_part(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"component": "../vae"}))


HOSTILE = [truncated, with_a_nan, with_weights_of_the_base, pickled, for_another_part]


def test_a_hostile_file_changes_nothing(hub, name, pipe, tmp_path):
    """Neither on a pipeline without adapters nor on one that has one."""
    for loaded in (False, True):
        if loaded:
            difffit_peft.load_adapter(pipe, hub / name / "b", "good")
        before = seen(pipe)
        for corrupt in HOSTILE:
            folder = tmp_path / f"{corrupt.__name__}-{loaded}"
            shutil.copytree(hub / name / "a", folder)
            corrupt(folder)
            with pytest.raises(ValueError):
                difffit_peft.load_adapter(pipe, folder, "bad")
            assert seen(pipe) == before, corrupt


def test_the_family_of_another_base_is_named(hub, name, pipe):
    before, own = seen(pipe), type(model_of(pipe)).__name__
    families = [*PIPELINES]
    other = publish(hub, families[[NAMES[family] for family in families].index(name) - 1])
    theirs = json.loads((hub / other / "a" / CONFIG).read_text())["base_config"]["model_class"]
    for component in (None, part_of(pipe)):
        with pytest.raises(ValueError, match=f"(?s){theirs}.*{own}.*me/{other}"):
            difffit_peft.load_adapter(pipe, hub / other / "a", component=component)
        assert seen(pipe) == before


def test_what_cannot_be_meant_is_refused(hub, name, pipe):
    before = seen(pipe)
    with pytest.raises(ValueError, match=f"component='unet_2'.*the pipeline has .*{part_of(pipe)}"):
        difffit_peft.load_adapter(pipe, hub / name / "a", component="unet_2")
    with pytest.raises(ValueError, match="call load_adapter"):
        difffit_peft.set_adapters(pipe, "a")
    with pytest.raises(ValueError, match="There is no adapter 'a' to swap"):
        difffit_peft.load_adapter(pipe, hub / name / "a", "a", hotswap=True)
    with pytest.raises(ValueError, match="takes no adapters"):
        difffit_peft.load_adapter(pipe.vae, hub / name / "a")
    assert seen(pipe) == before


def test_modules_saved_whole_that_do_not_fit_change_nothing(hub, tmp_path):
    """PEFT finds this out when it loads the weights."""
    name = publish(hub, "SD1.5")
    pipe = DiffusionPipeline.from_pretrained(f"me/{name}", cache_dir=hub / "cache")
    pipe.unet = get_peft_model(pipe.unet, DiffFitConfig(modules_to_save=["conv_out"])).eval()
    for folder in ("good", "bad"):
        difffit_peft.save_adapter(pipe, tmp_path / folder)
    difffit_peft.unload_adapters(pipe)
    weights = load_file(tmp_path / "bad" / FILE)
    weights |= {name: tensor[:1].contiguous() for name, tensor in weights.items() if "conv_out" in name}
    save_file(weights, tmp_path / "bad" / FILE)
    for loaded in (False, True):
        if loaded:
            difffit_peft.load_adapter(pipe, tmp_path / "good", "good")
        before = seen(pipe)
        with pytest.raises(RuntimeError, match="conv_out"):
            difffit_peft.load_adapter(pipe, tmp_path / "bad", "bad")
        assert seen(pipe) == before


# A pipeline with two models


def wan() -> WanPipeline:
    """Its first model draws the first of two steps, its second the other."""
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "text_dim": 8, "freq_dim": 16, "ffn_dim": 24}
    sizes |= {"rope_max_seq_len": 16, "num_attention_heads": 2, "attention_head_dim": 12}
    both = [WanTransformer3DModel(**sizes).eval() for _ in range(2)]
    for part in both:
        for parameter in part.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": both[0], "transformer_2": both[1]}
    return WanPipeline(**NONE, **parts, boundary_ratio=0.6)


NONE = {"tokenizer": None, "text_encoder": None, "vae": None}


def frames(pipe: WanPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 2, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt_embeds=torch.ones(1, 3, 8), output_type="latent", generator=generator, **options).frames


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A base, adapters `first` and `second` of its models, and what it draws with neither, one, or both."""
    folder, drawn = tmp_path_factory.mktemp("two"), {}
    wan().save_pretrained(folder / "base")
    adapters = {"transformer": "first", "transformer_2": "second"}
    loaded = WanPipeline.from_pretrained(folder / "base", **NONE)
    drawn["base"] = frames(loaded)  # not of `wan()`: where weights lie decides the last bit
    for component, adapter in adapters.items():
        pipe = trained(WanPipeline.from_pretrained(folder / "base", **NONE), component, 0)
        drawn[adapter] = frames(pipe)
        difffit_peft.save_adapter(pipe, folder / adapter)
    pipe = WanPipeline.from_pretrained(folder / "base", **NONE)
    for component in adapters:
        trained(pipe, component, 0)
    drawn["both"] = frames(pipe)
    assert len({tensor.numpy().tobytes() for tensor in drawn.values()}) == 4
    return folder, drawn


def test_an_adapter_goes_onto_the_model_it_was_trained_on(two):
    folder, drawn = two
    pipe = WanPipeline.from_pretrained(folder / "base", **NONE)
    difffit_peft.load_adapter(pipe, folder / "second")
    assert not isinstance(pipe.transformer, PeftModel) and torch.equal(frames(pipe), drawn["second"])
    difffit_peft.load_adapter(pipe, folder / "first")
    assert torch.equal(frames(pipe), drawn["both"])
    assert difffit_peft.get_active_adapters(pipe) == ["default_1", "default_0"]
    difffit_peft.set_adapters(pipe, "default_1")
    assert torch.equal(frames(pipe), drawn["first"])
    difffit_peft.delete_adapters(pipe, "default_0")
    assert type(pipe.transformer_2) is WanTransformer3DModel and torch.equal(frames(pipe), drawn["first"])
    difffit_peft.unload_adapters(pipe)
    assert torch.equal(frames(pipe), drawn["base"])


def test_one_name_on_both_models(two, tmp_path):
    folder, drawn = two
    pipe = WanPipeline.from_pretrained(folder / "base", **NONE)
    for adapter in ("first", "second"):
        difffit_peft.load_adapter(pipe, folder / adapter, "style")
    assert torch.equal(frames(pipe), drawn["both"]) and difffit_peft.get_list_adapters(pipe) == ["style"]
    with pytest.raises(ValueError, match=r"'style' is on \['transformer', 'transformer_2'\]"):
        difffit_peft.save_adapter(pipe, tmp_path / "unclear")
    assert not (tmp_path / "unclear").exists()
    difffit_peft.save_adapter(pipe, tmp_path / "one", component="transformer_2")
    assert (tmp_path / "one" / FILE).read_bytes() == (folder / "second" / FILE).read_bytes()
    assert "pipe.transformer_2 = PeftModel" in (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    difffit_peft.set_adapters(pipe, "style", 0.5)
    half = frames(pipe)
    pipe.save_pretrained(tmp_path / "pipeline")
    assert torch.equal(frames(difffit_peft.load_pipeline(tmp_path / "pipeline", **NONE)), half)
    assert torch.equal(frames(WanPipeline.from_pretrained(tmp_path / "pipeline", **NONE)), drawn["base"])
    difffit_peft.disable_adapters(pipe)
    assert torch.equal(frames(pipe), drawn["base"])


def test_models_are_fused_together_or_not_at_all(two):
    folder, _ = two
    pipe = WanPipeline.from_pretrained(folder / "base", **NONE)
    for adapter in ("first", "second"):
        difffit_peft.load_adapter(pipe, folder / adapter, adapter)
    unfused = frames(pipe)
    gamma = next(p for name, p in pipe.transformer_2.named_parameters() if "difffit_gamma" in name)
    gamma.data *= 1e38  # twice that is not finite
    difffit_peft.set_adapters(pipe, ["first", "second"], [1.0, 1e10])
    with pytest.raises(ValueError, match="finite"):
        difffit_peft.fuse_adapters(pipe, safe_fusing=True)
    gamma.data /= 1e38
    difffit_peft.set_adapters(pipe, ["first", "second"], 1.0)
    torch.testing.assert_close(frames(pipe), unfused)
    difffit_peft.fuse_adapters(pipe)
    torch.testing.assert_close(frames(pipe), unfused, rtol=0, atol=1e-3)


def test_an_adapter_of_a_second_model_needs_one(two, tmp_path):
    folder, drawn = two
    parts = WanPipeline.from_pretrained(folder / "base", **NONE).components | {"transformer_2": None}
    pipe = WanPipeline(**parts)
    with pytest.raises(ValueError, match="is the transformer_2 of its pipeline.*transformer, a WanTransformer3DModel"):
        difffit_peft.load_adapter(pipe, folder / "second")
    assert type(pipe.transformer) is WanTransformer3DModel
    difffit_peft.load_adapter(pipe, folder / "second", component="transformer")
    assert difffit_peft.get_list_adapters(pipe) == ["default_0"]


# The other families, whose pipelines have no more than the model that takes adapters


ALONE = {
    "Flux.1": "FluxPipeline",
    "Chroma": "ChromaPipeline",
    "Lumina2": "Lumina2Pipeline",
    "HunyuanDiT": "HunyuanDiTPipeline",
    "AuraFlow": "AuraFlowPipeline",
    "CogView4": "CogView4Pipeline",
    "LTX": "LTXPipeline",
    "SDXL": "StableDiffusionXLPipeline",
}


@pytest.mark.parametrize("family", ALONE)
def test_a_pipeline_of_each_other_family(family, tmp_path):
    if family == "HunyuanDiT" and diffusers.__version__.startswith("0.36."):
        pytest.skip("Diffusers 0.36 imports a tokenizer for it that Transformers 5 does not have.")
    cls = getattr(diffusers, ALONE[family])
    inputs, model = TINY[family].inputs(), TINY[family].make()
    part = "unet" if family == "SDXL" else "transformer"
    names = [n for n, p in inspect.signature(cls.__init__).parameters.items() if p.default is p.empty and n != "self"]
    none: dict = dict.fromkeys({*names} - {part, "scheduler"})
    cls(**none, **{part: model, "scheduler": FlowMatchEulerDiscreteScheduler()}).save_pretrained(tmp_path / "base")
    api, name = HfApi(), f"me/alone-{family.lower()}"
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=tmp_path / "base")
    options = none | {"cache_dir": tmp_path / "cache"}
    pipe = trained(cls.from_pretrained(name, **options), part, 0)
    expected = output(getattr(pipe, part), inputs)
    difffit_peft.push_adapter(pipe, f"{name}-a", prompt="a red fox")

    pipe = difffit_peft.load_pipeline(f"{name}-a", **options)
    assert type(pipe) is cls and torch.equal(output(getattr(pipe, part), inputs), expected)
    difffit_peft.unload_adapters(pipe)
    assert torch.equal(output(getattr(pipe, part), inputs), output(model, inputs))
    for adapter in "ab":
        difffit_peft.load_adapter(pipe, f"{name}-a", adapter, cache_dir=tmp_path / "cache")
    difffit_peft.set_adapters(pipe, ["a", "b"], [0.5, 0.25])
    blended = output(getattr(pipe, part), inputs)
    assert relative(blended, expected) > 1e-3
    pipe.save_pretrained(tmp_path / "saved")
    again = difffit_peft.load_pipeline(tmp_path / "saved", **none)
    assert torch.equal(output(getattr(again, part), inputs), blended)
    difffit_peft.fuse_adapters(pipe)
    assert relative(output(getattr(pipe, part), inputs), blended) <= 1e-5
    difffit_peft.unfuse_adapters(pipe)
    assert torch.equal(output(getattr(pipe, part), inputs), blended)
