"""Diffusers' own ways in: the verbs of its models and pipelines, and `*_attention_kwargs={"scale": s}`."""

import copy

import diffusers
import pytest
import torch
from conftest import CLOSE, randomise
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from difffit_peft import DiffFitConfig, DiffFitLayer

SCALE = {"SD3Transformer2DModel": "joint_attention_kwargs", "UNet2DConditionModel": "cross_attention_kwargs"}


def sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


@torch.no_grad()
def output(model: nn.Module, **kwargs) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    inputs = (torch.randn(2, 4, 8, 8, generator=g), torch.tensor([5, 700]), torch.randn(2, 3, 8, generator=g))
    pooled = {"pooled_projections": torch.randn(2, 8, generator=g)} if type(model) is SD3Transformer2DModel else {}
    names = ("hidden_states" if pooled else "sample", "timestep", "encoder_hidden_states")
    return model(**dict(zip(names, inputs, strict=True)), **pooled, **kwargs).sample


@pytest.fixture(params=[sd3, unet])
def adapted(request) -> tuple[nn.Module, nn.Module]:
    """A base, and a copy with a trained adapter "x" that was added Diffusers' way."""
    torch.manual_seed(0)
    base = request.param().eval().requires_grad_(False)
    model = copy.deepcopy(base)
    model.add_adapter(DiffFitConfig(), "x")
    randomise(model, "x")
    return base, model.eval()


@pytest.mark.parametrize("own", [1.0, 0.8])
def test_attention_kwargs_scale(adapted, own):
    base, model = adapted
    if type(model) is UNet2DConditionModel and not hasattr(diffusers.utils, "apply_lora_scale"):
        pytest.skip("this Diffusers scales a UNet's layers after its time embedding and conv_in have been called")
    model.set_adapters("x", own)
    before, unscaled = output(model), output(base)
    argument = SCALE[type(model).__name__]
    assert not torch.allclose(before, unscaled, **CLOSE)
    for scale in (0, 0.5, 1.0, -0.3, 2):
        model.set_adapters("x", own * scale)
        expected = output(model)
        model.set_adapters("x", own)
        torch.testing.assert_close(output(model, **{argument: {"scale": scale}}), expected)
        assert torch.equal(output(model), before), scale  # also where Diffusers itself would set 1
    assert torch.equal(output(model, **{argument: {"scale": 0.0}}), unscaled)


def test_a_scale_within_a_scale_is_taken_back_in_order():
    layer = DiffFitLayer(nn.Linear(2, 2))
    layer.update_layer("x", DiffFitConfig(), gamma=True)
    layer.set_adapter(["x"])
    layer.set_scale("x", 0.7)
    first = layer.scale["x"].clone()
    layer.scale_layer(0.3)
    second = layer.scale["x"].clone()
    layer.scale_layer(0.1)
    layer.unscale_layer(0.1)
    assert layer.scale["x"] == second
    layer.unscale_layer(0.3)
    assert layer.scale["x"] == first
    layer.scale_layer(0.3)
    layer.scale_layer(0.0)
    layer.unscale_layer()
    assert layer.scale["x"] == first
    layer.scale_layer(0.3)
    layer.set_scale("x", 1.0)  # a scale that is set, not multiplied
    layer.unscale_layer(0.3)
    assert layer.scale["x"] == 1


def test_a_layer_that_is_called_by_the_name_of_its_input():
    """As Diffusers' UNetMotionModel calls `proj_in(input=x)`."""
    for base, name in ((nn.Linear(2, 2), "input"), (diffusers.models.normalization.RMSNorm(2, 1e-6), "hidden_states")):
        layer, x = DiffFitLayer(base), torch.randn(3, 2)
        layer.update_layer("x", DiffFitConfig(init_weights=False), gamma=True)
        layer.set_adapter(["x"])
        assert torch.equal(layer(**{name: x}), layer(x)) and not torch.equal(layer(x), base(x))
        assert torch.equal(layer(**{name: x}, adapter_names=["x"] * 3), layer(x))


def test_verbs_of_a_model(adapted):
    base, model = adapted
    trained, plain = output(model), output(base)
    model.disable_adapters()
    assert torch.equal(output(model), plain)
    model.enable_adapters()
    assert torch.equal(output(model), trained)
    model.add_adapter(DiffFitConfig(), "y")
    randomise(model, "y", seed=4)
    model.set_adapters(["x", "y"], [0.5, 0.5])
    both = output(model)
    model.fuse_lora(adapter_names=["x", "y"])
    torch.testing.assert_close(output(model), both, **CLOSE)
    with pytest.raises(ValueError, match=r"\['x', 'y'\] are merged, and cannot be scaled by 0.5"):
        output(model, **{SCALE[type(model).__name__]: {"scale": 0.5}})
    torch.testing.assert_close(output(model), both, **CLOSE)
    model.unfuse_lora()
    assert torch.equal(output(model), both)
    model.set_adapters("x")
    assert torch.equal(output(model), trained)
    model.delete_adapters(["y", "x"])
    assert torch.equal(output(model), plain)


def test_fuse_lora_at_a_scale(adapted):
    base, model = adapted
    model.set_adapters("x", 0.5)
    half = output(model)
    model.set_adapters("x")
    model.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(output(model), half, **CLOSE)
