"""Verbs of Diffusers that a model with adapters refuses: `fuse_qkv_projections()` and `save_lora_adapter()`."""

import copy
import pickle

import pytest
import torch
from conftest import CLOSE, randomise
from diffusers import DDIMScheduler, StableDiffusionPipeline
from family_checks import output
from peft import LoraConfig, get_peft_model
from tiny import TINY

import difffit_peft
from difffit_peft import DiffFitConfig

FUSED = ["Flux.1", "SD3", "Wan"]  # all the ways in which Diffusers fuses


@pytest.fixture(params=FUSED)
def tiny(request):
    return TINY[request.param]


def processors(model: torch.nn.Module) -> dict[str, int]:
    return {name: id(processor) for name, processor in model.attn_processors.items()}


def test_refused_with_an_adapter(tiny):
    model, inputs = tiny.make(), tiny.inputs()
    adapted = get_peft_model(model, DiffFitConfig(), "x").eval()
    randomise(adapted, "x")
    trained, keys, own, before = output(adapted, inputs), [*model.state_dict()], processors(model), {*vars(model)}
    attention = next(module for module in model.modules() if hasattr(module, "fuse_projections"))
    for copied in (adapted, pickle.loads(pickle.dumps(adapted))):
        for verb in (copied.fuse_qkv_projections, copied.base_model.model.fuse_qkv_projections):
            with pytest.raises(
                ValueError, match=r"fuse_qkv_projections\(\) copies .* the adapters \['x'\] put on them"
            ):
                verb()
        assert torch.equal(output(copied, inputs), trained)
    with pytest.raises(ValueError, match=r"^fuse_projections\(\) copies"):
        attention.fuse_projections()
    assert [*model.state_dict()] == keys and processors(model) == own and {*vars(model)} == before

    merged = copy.deepcopy(adapted).merge_and_unload()
    merged.fuse_qkv_projections()
    torch.testing.assert_close(output(merged, inputs), trained, **CLOSE)
    plain = adapted.unload()
    assert all("fuse" not in name for module in plain.modules() for name in vars(module) if name in dir(type(module)))
    plain.fuse_qkv_projections()
    assert any(name.endswith("to_qkv.weight") for name in plain.state_dict())


def test_a_fused_model_refuses_an_adapter(tiny):
    model, inputs = tiny.make(), tiny.inputs()
    model.fuse_qkv_projections()
    expected, names = output(model, inputs), [name for name, _ in model.named_modules()]
    for attach in (lambda: get_peft_model(model, DiffFitConfig()), lambda: model.add_adapter(DiffFitConfig(), "x")):
        with pytest.raises(ValueError, match="projections of q, k and v are fused .* Call unfuse_qkv_projections"):
            attach()
        assert [name for name, _ in model.named_modules()] == names and torch.equal(output(model, inputs), expected)


def test_unfused_it_takes_one():
    model, inputs = TINY["Flux.1"].make(), TINY["Flux.1"].inputs()
    names = {name for name, _ in model.named_parameters()}
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    expected = output(model, inputs)
    adapted = get_peft_model(model, DiffFitConfig())
    assert torch.equal(output(adapted, inputs), expected)
    assert {name for name, _ in adapted.unload().named_parameters()} == names


def test_diffusers_own_way_in():
    model = TINY["SD1.5"].make()
    model.add_adapter(DiffFitConfig(), "x")
    with pytest.raises(ValueError, match=r"the adapters \['x'\]"):
        model.fuse_qkv_projections()
    model.delete_adapters("x")
    model.fuse_qkv_projections()
    assert any(name.endswith("to_qkv.weight") for name in model.state_dict())


def test_of_a_pipeline(tmp_path):
    get_peft_model(TINY["SD1.5"].make(), DiffFitConfig()).save_pretrained(tmp_path, save_embedding_layers=False)
    none = {"vae": None, "text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(
        unet=TINY["SD1.5"].make(), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), **none
    )
    difffit_peft.load_adapter(pipe, tmp_path, "x")
    with pytest.raises(ValueError, match=r"the adapters \['x'\]"):
        pipe.fuse_qkv_projections(vae=False)
    difffit_peft.unload_adapters(pipe)
    pipe.fuse_qkv_projections(vae=False)


def test_a_file_of_lora_is_for_lora(tmp_path):
    model = TINY["Flux.1"].make()
    model.add_adapter(DiffFitConfig(), "x")
    with pytest.raises(ValueError, match="'x' is an adapter of DiffFit.*save_adapter"):
        model.save_lora_adapter(tmp_path / "x", adapter_name="x")
    with pytest.raises(ValueError, match="default not found"):  # Diffusers' own
        model.save_lora_adapter(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    model.delete_adapters("x")
    model.add_adapter(LoraConfig(target_modules=["to_q"]), "lora")
    model.save_lora_adapter(tmp_path / "lora", adapter_name="lora")
    assert any((tmp_path / "lora").iterdir())
