"""Parameters that are no layer's, such as `scale_shift_table`, are trained like biases."""

import copy
import json
import pickle

import pytest
import torch
from conftest import CLOSE, randomise
from diffusers import PixArtTransformer2DModel, WanTransformer3DModel
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from difffit_peft import DiffFitConfig
from difffit_peft.reading import read_adapter


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=8, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip


def wan() -> nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def run(model: nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    is_pixart = any(isinstance(module, PixArtTransformer2DModel) for module in model.modules())
    size = (2, 4, 8, 8) if is_pixart else (2, 4, 1, 8, 8)
    x, text = torch.randn(size, generator=g), torch.randn(2, 3, 8, generator=g)
    extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if len(size) == 4 else {}
    return model(x, encoder_hidden_states=text, timestep=torch.tensor([5, 700]), **extra).sample


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return run(model)


@pytest.fixture(params=[pixart, wan])
def base(request) -> nn.Module:
    torch.manual_seed(0)
    return request.param().eval().requires_grad_(False)


def only_tables() -> DiffFitConfig:
    return DiffFitConfig(target_modules=r".*scale_shift_table", gamma_modules=[])


def test_trained_like_a_bias(base, tmp_path):
    plain, state = output(base), {name: value.clone() for name, value in base.state_dict().items()}
    tables = {name: value for name, value in state.items() if "scale_shift_table" in name}
    model = get_peft_model(copy.deepcopy(base), only_tables())
    assert torch.equal(output(model), plain)
    deltas = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(tables) == 3 and sum(p.numel() for p in deltas.values()) == sum(t.numel() for t in tables.values())
    gradients: list = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.get_base_model().enable_gradient_checkpointing()
        model.zero_grad()
        run(model).square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in deltas.values()), checkpointing
        if checkpointing:
            torch.testing.assert_close([p.grad for p in deltas.values()], gradients)
        gradients = [p.grad for p in deltas.values()]
    model.eval()
    model = get_peft_model(copy.deepcopy(base), only_tables())  # Diffusers' checkpointing does not pickle

    randomise(model)
    trained = output(model)
    assert not torch.allclose(trained, plain, **CLOSE)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(copied), trained)
        next(p for p in copied.parameters() if p.requires_grad).data += 1
        assert not torch.equal(output(copied), trained) and torch.equal(output(model), trained)
    model.set_scale("default", 0.0)
    assert torch.equal(output(model), plain)
    model.set_scale("default", 1.0)
    with model.disable_adapter():
        assert torch.equal(output(model), plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded.eval()), trained)

    model.merge_adapter()
    assert torch.equal(output(model), trained)
    model.unmerge_adapter()
    assert torch.equal(output(model), trained)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(output(merged), trained) and merged.state_dict().keys() == state.keys()
    back = model.unload()
    assert torch.equal(output(back), plain)
    assert [*back.state_dict()] == [*state] and all(torch.equal(v, state[k]) for k, v in back.state_dict().items())
    assert {name for name, _ in back.named_modules()} == {name for name, _ in base.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in back.modules())
    pickle.dumps(back)


def test_several_adapters_and_the_default_config(base):
    plain = output(base)
    model = get_peft_model(base, DiffFitConfig(), "a")
    names = {name.split(".difffit_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert sum(name.endswith("scale_shift_table") for name in names) == 3
    model.add_adapter("b", only_tables())
    randomise(model, "a")
    randomise(model, "b", seed=5)
    table = next(p for n, p in base.named_parameters() if n.endswith("blocks.0.scale_shift_table"))
    model.base_model.set_adapter(["a", "b"])
    model.set_scale("b", 0.5)
    both = output(model)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "both")
    model.set_adapter("both")
    torch.testing.assert_close(output(model), both, **CLOSE)
    before = table.clone()
    model.eval()
    with pytest.raises(ValueError, match=r"\['a'\] change \['scale_shift_table'\], which a model has once for all"):
        model(torch.zeros(()), adapter_names=["a", "__base__"])
    assert torch.equal(table, before)
    alone = output(model)
    for name in ("a", "b"):
        model.delete_adapter(name)
    assert torch.equal(output(model), alone)
    assert torch.equal(output(model.unload()), plain)


def test_a_forward_that_fails_leaves_the_parameter(base):
    model = get_peft_model(base, only_tables())
    randomise(model)
    trained = output(model)
    with pytest.raises((TypeError, RuntimeError, AttributeError, ValueError, IndexError)):
        model(torch.zeros(1), encoder_hidden_states=None, timestep=None)
    assert all("scale_shift_table" not in module.__dict__ for module in model.modules())
    assert torch.equal(output(model), trained)


def test_a_refused_config_leaves_no_trace(base):
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="matches no layer"):
        get_peft_model(base, DiffFitConfig(target_modules=["nothing"]))
    assert [name for name, _ in base.named_modules()] == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_positions_and_tokens_are_left_alone():
    model = nn.Module()
    for name in ("pos_embed", "latents", "query_tokens", "class_embedding", "mask_token"):
        setattr(model, name, nn.Parameter(torch.zeros(2, 4)))
    model.layer = nn.Linear(4, 4)
    adapted = get_peft_model(model, DiffFitConfig(gamma_modules=[]))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained == ["base_model.model.layer.difffit_delta.default"]


def of_before(base: nn.Module, folder) -> torch.Tensor:
    """Saves an adapter as versions did that trained no such parameters. Returns what it computes."""
    model = get_peft_model(copy.deepcopy(base), DiffFitConfig(exclude_modules=["adapted_scale_shift_table"]))
    randomise(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"exclude_modules": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return output(model)


def read_here(base: nn.Module, folder) -> PeftModel:
    config, weights = read_adapter(folder)
    model = PeftModel(base, config)
    set_peft_model_state_dict(model, weights)
    return model


@pytest.mark.parametrize("load", [PeftModel.from_pretrained, read_here])
def test_an_adapter_of_before_loads_without_them(base, load, tmp_path):
    expected, keys = of_before(base, tmp_path), [*base.state_dict()]
    model = load(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(model), expected)
    assert not any("adapted_" in name for name, _ in model.named_parameters())
    assert model.peft_config["default"].exclude_modules == ["adapted_scale_shift_table"]
    model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert torch.equal(output(load(copy.deepcopy(base), tmp_path / "again")), expected)
    assert [*model.unload().state_dict()] == keys


@pytest.mark.parametrize("load", [PeftModel.from_pretrained, read_here])
def test_a_file_with_some_of_them_is_refused(base, load, tmp_path):
    get_peft_model(copy.deepcopy(base), DiffFitConfig()).save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    one = next(name for name in weights if "adapted_" in name)
    for kept in ({n: w for n, w in weights.items() if n != one}, {one: weights[one]}, {}):
        save_file(kept, file)
        with pytest.raises(ValueError, match=f"{len(weights) - len(kept)} are missing"):
            load(copy.deepcopy(base), tmp_path)


def test_compiled(base):
    model = get_peft_model(base, only_tables())
    randomise(model)
    expected = output(model)
    torch._dynamo.reset()
    torch.testing.assert_close(output(torch.compile(model, backend="eager", fullgraph=True)), expected, **CLOSE)


def test_a_mixed_model_gives_the_parameters_back():
    base = pixart()
    names, expected = [name for name, _ in base.named_modules()], run(base)
    model = get_peft_model(base, DiffFitConfig(init_weights=False), mixed=True)
    assert any("adapted_scale_shift_table" in name for name, _ in model.named_modules())
    assert not torch.equal(run(model), expected)
    unloaded = model.unload()
    assert [name for name, _ in unloaded.named_modules()] == names
    assert not any(module._forward_pre_hooks for module in unloaded.modules())
    assert torch.equal(run(unloaded), expected)
