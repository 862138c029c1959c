"""What is known of families of models, and that it is known in one place."""

import re
from pathlib import Path

import pytest
import torch
from conftest import make_dit
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import get_peft_model
from torch import nn

import difffit_peft
from difffit_peft import DiffFitConfig
from difffit_peft.families import family_of, lists_of_blocks

PACKAGE = Path(difffit_peft.__file__).parent
OF_DIT = (
    r"\bDiT(Transformer2DModel|Pipeline|Block)\b|norm1|transformer_blocks|num_embeds_ada_norm|class_embedder|"
    r"embedding_table|timestep_embedder|pos_embed|patch_size|attn1|to_out|ff\.net|proj_out|facebook/DiT|\b100[01]\b"
)


def test_only_its_own_package_names_what_is_of_dit():
    others = [file for file in PACKAGE.rglob("*.py") if PACKAGE / "families" / "dit" not in file.parents]
    found = {
        f"{file.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for file in others
        if file != PACKAGE / "families" / "__init__.py"
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(OF_DIT, line)
    }
    assert not found
    assert len(others) > 10 and re.search(OF_DIT, (PACKAGE / "families" / "dit" / "__init__.py").read_text())


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def of_few_blocks() -> nn.Module:
    """One block, whose own list of layers is the longer one."""
    model, block = nn.Module(), nn.Module()
    block.net = nn.ModuleList([nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)])
    model.blocks, model.heads = nn.ModuleList([block]), nn.ModuleList([nn.Linear(2, 2)] * 3)
    model.forward = lambda x: model.heads[0](model.blocks[0].net[0](x))
    return model


@pytest.mark.parametrize(
    ("make", "lists"),
    [
        (make_dit, ("transformer_blocks",)),
        (flux, ("transformer_blocks", "single_transformer_blocks")),
        (unet, ("down_blocks", "up_blocks", "mid_block.attentions", "mid_block.resnets")),
        (of_few_blocks, ("blocks",)),
        (lambda: nn.Sequential(nn.Linear(2, 2)), ()),
    ],
)
def test_lists_of_blocks(make, lists):
    model = make()
    assert lists_of_blocks(model) == lists and family_of(model).blocks == lists


@pytest.mark.parametrize("make", [flux, unet, of_few_blocks])
def test_an_unknown_model_gets_gamma_on_all_its_blocks(make, tmp_path):
    model = make()
    lists = tuple(f"{name}." for name in lists_of_blocks(model))
    expected = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and
                name.startswith(lists)}  # fmt: skip
    adapted = get_peft_model(model, DiffFitConfig())
    names = (name.removeprefix("base_model.model.") for name, _ in adapted.named_parameters())
    found = {name.removesuffix(".difffit_gamma.default") for name in names if name.endswith("difffit_gamma.default")}
    modules = dict(adapted.base_model.model.named_modules())
    assert {name for name in found if isinstance(modules[name].get_base_layer(), (nn.Linear, nn.Conv2d))} == expected

    config = adapted.peft_config["default"]
    assert isinstance(config.gamma_modules, list) and config.base_config is None
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    again = get_peft_model(make(), DiffFitConfig.from_pretrained(tmp_path))
    assert adapted.state_dict().keys() == again.state_dict().keys()


def test_a_model_without_lists_of_blocks_is_told_what_to_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match="Sequential has no list of blocks.*Names end in '0', '1'"):
        get_peft_model(model, DiffFitConfig())
    assert type(model[0]) is nn.Linear
    x = torch.randn(3, 2)
    assert torch.equal(get_peft_model(model, DiffFitConfig(gamma_modules=["0"]))(x), model(x))
