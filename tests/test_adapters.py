"""What a user sees: adapters saved and loaded, what the config names, and what is refused."""

import contextlib
import json
import warnings

import numpy as np
import pytest
import torch
from conftest import CLOSE, images, make_dit, make_inputs, make_pipeline, outputs, randomise, save_adapter
from diffusers import DiTPipeline, DiTTransformer2DModel
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import PeftType
from safetensors.torch import load_file, save_file

import difffit_peft
from difffit_peft import DiffFitConfig, DiffFitLayer
from difffit_peft.config import nearest
from difffit_peft.publishing import base_model_id, base_parameters

LABELS = {0: "fox", 1: "hound", 2: "hare"}


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(first: dict, second: dict) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def adapter(tmp_path):
    """A folder with the trained adapter of `make_dit()`."""
    save_adapter(tmp_path / "adapter", id2label=LABELS)
    return tmp_path / "adapter"


def test_importing_twice_is_harmless():
    import importlib

    importlib.reload(difffit_peft.plugin)
    importlib.reload(difffit_peft)
    assert PeftType("DIFFFIT") is PeftType.DIFFFIT and json.dumps(PeftType.DIFFFIT) == '"DIFFFIT"'


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0.dev0"])
def test_another_peft_is_refused_on_import(version, monkeypatch):
    import importlib
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=rf"needs peft>=0.21,<0.22, but peft {version} is installed: pip install"):
        importlib.reload(difffit_peft.plugin)


def test_saved_and_loaded_is_bit_identical(tmp_path, inputs):
    model = get_peft_model(make_dit(), DiffFitConfig(id2label=LABELS))
    randomise(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make_dit(), tmp_path)
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    names = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert sum("timestep_embedder.linear_1" in name for name in names) == 1
    assert sum("embedding_table" in name for name in names) == 1


def test_the_config_travels(adapter):
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert saved["sample_size"] == 8 and saved["num_classes"] == 3
    assert saved["base_config"]["num_layers"] == 4 and saved["target_modules"] is None
    config = PeftConfig.from_pretrained(adapter)
    assert isinstance(config, DiffFitConfig) and config.id2label == LABELS


def test_numbers_of_numpy_and_pytorch_are_numbers(tmp_path):
    numbers = {"num_classes": np.int64(3), "r": torch.tensor(1), "gamma_layers": [np.uint8(0), torch.tensor(2)]}
    config = DiffFitConfig(**numbers, sample_size=np.int32(8), id2label={np.int64(i): str(i) for i in range(3)})
    assert config == DiffFitConfig(num_classes=3, r=1, gamma_layers=[0, 2], sample_size=8, id2label=config.id2label)
    get_peft_model(make_dit(), config).save_pretrained(tmp_path, save_embedding_layers=False)
    assert DiffFitConfig.from_pretrained(tmp_path).gamma_layers == [0, 2]
    assert DiffFitConfig(gamma_layers=np.arange(2)).gamma_layers == [0, 1]
    for wrong in (np.float32(3), torch.tensor(3.0), np.bool_(True), torch.arange(2)):
        with pytest.raises(ValueError, match="num_classes=.*: must be an integer of at least 1"):
            DiffFitConfig(num_classes=wrong)


@pytest.mark.parametrize("modules_to_save", [None, ["proj_out_2"]])
def test_parameters_of_the_base_are_counted_without_adapters(dit, modules_to_save):
    copies = sum(p.numel() for block in dit.transformer_blocks[1:] for p in block.norm1.emb.parameters())
    expected = sum(p.numel() for p in dit.parameters()) - copies  # one embedder, as in the paper
    model = get_peft_model(dit, DiffFitConfig(modules_to_save=modules_to_save))
    model.add_adapter("other", DiffFitConfig(r=1))
    assert base_parameters(model) == expected


def test_the_config_names_the_base(tmp_path):
    make_dit().save_pretrained(tmp_path / "models--org--dit" / "snapshots" / ("0" * 40) / "transformer")
    dit = DiTTransformer2DModel.from_pretrained(
        tmp_path / "models--org--dit" / "snapshots" / ("0" * 40) / "transformer"
    )
    model = get_peft_model(dit, DiffFitConfig())
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("org/dit", "0" * 40)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "adapter").glob("*.[mj]*"))
    assert "base_model: org/dit\n" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_local_path_is_never_published(tmp_path):
    (tmp_path / "my-base" / "transformer").mkdir(parents=True)
    assert base_model_id(str(tmp_path / "my-base" / "transformer")) == ("my-base", None)
    assert base_model_id(str(tmp_path / "my-base")) == ("my-base", None)
    assert base_model_id(str(tmp_path / "deleted" / "transformer")) == ("deleted", None)
    assert base_model_id("facebook/DiT-XL-2-256") == ("facebook/DiT-XL-2-256", None)


def test_stock_pipeline_takes_the_adapter(adapter):
    pipe = make_pipeline()
    before = images(pipe)
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, adapter)
    after = images(pipe)
    assert not torch.allclose(before, after, atol=1e-2)
    with pipe.transformer.disable_adapter():
        assert torch.equal(images(pipe), before)


def test_a_bf16_pipeline_samples(adapter):
    pipe = make_pipeline().to(torch.bfloat16)
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, adapter)
    assert {p.dtype for name, p in pipe.transformer.named_parameters() if "difffit" in name} == {torch.float32}
    assert pipe.transformer.dtype == torch.bfloat16
    assert images(pipe).isfinite().all()


def test_a_merged_model_is_plain_diffusers(adapter, tmp_path):
    pipe = make_pipeline()
    keys = list(pipe.transformer.state_dict())
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, adapter)
    expected = images(pipe)
    pipe.transformer = pipe.transformer.merge_and_unload()
    assert list(pipe.transformer.state_dict()) == keys
    pipe.save_pretrained(tmp_path / "merged")
    reloaded = DiTPipeline.from_pretrained(tmp_path / "merged")
    assert (images(reloaded) - expected).abs().max() < 1e-4


def test_unload_leaves_no_trace(adapter, tmp_path, inputs):
    dit = make_dit()
    before, attributes, expected = state(dit), set(vars(dit)), outputs(dit, inputs)
    base = PeftModel.from_pretrained(dit, adapter).unload()
    assert base is dit and set(vars(dit)) == attributes
    assert_equal(state(dit), before)
    assert torch.equal(outputs(dit, inputs), expected)
    assert not any("difffit" in type(module).__module__ for module in dit.modules())
    assert not dit._forward_pre_hooks and not dit._forward_pre_hooks_with_kwargs
    dit.save_pretrained(tmp_path / "base")
    assert_equal(state(DiTTransformer2DModel.from_pretrained(tmp_path / "base")), before)


def test_who_gives_a_name_is_not_asked_whether_it_was_meant():
    assert nearest("fix", ["fox", "owl"]) == " Did you mean 'fox'?"
    assert nearest("fox", ["fox", "fix"]) == nearest("fox", []) == ""


@pytest.mark.parametrize("name", ["v1.0", ""])
def test_names_that_are_none_to_pytorch(dit, name):
    with pytest.raises(
        ValueError, match=f"adapter_name='{name}': PyTorch allows no dot in it, and it must not be empty"
    ):
        get_peft_model(dit, DiffFitConfig(), name)
    assert [*dit.state_dict()] == [*make_dit().state_dict()]
    model = get_peft_model(dit, DiffFitConfig())
    with pytest.raises(ValueError, match="PyTorch allows no dot"):
        model.add_adapter(name, DiffFitConfig())
    assert [*model.peft_config] == ["default"]


@pytest.mark.parametrize("name", ["0", "attn1", "linear", "model", "norm1_emb", "difffit_delta", "bias"])
def test_names_of_modules_are_not_names_of_adapters(dit, name, tmp_path):
    """PEFT 0.21 would save the other adapters without those modules, which is seen when they are loaded."""
    save_adapter(tmp_path)
    for refused in (
        lambda: get_peft_model(dit, DiffFitConfig(), adapter_name=name),
        lambda: PeftModel.from_pretrained(dit, tmp_path, adapter_name=name),
    ):
        with pytest.raises(ValueError, match=f"adapter_name='{name}' is the name of a module.*'adapter_{name}'"):
            refused()
    assert [*dit.state_dict()] == [*make_dit().state_dict()]
    model = get_peft_model(dit, DiffFitConfig())
    for refused in (
        lambda: model.add_adapter(name, DiffFitConfig()),
        lambda: model.load_adapter(tmp_path, name),
        lambda: model.add_weighted_adapter(["default"], [1.0], name),
    ):
        with pytest.raises(ValueError, match=f"adapter_name='{name}' is the name of a module"):
            refused()
    assert [*model.peft_config] == ["default"]
    model.add_adapter(f"adapter_{name}", DiffFitConfig())
    model.save_pretrained(tmp_path / "both", save_embedding_layers=False)
    PeftModel.from_pretrained(make_dit(), tmp_path / "both")


def test_two_adapters_are_independent(adapter, inputs):
    dit = make_dit()
    expected = outputs(dit, inputs)
    model = PeftModel.from_pretrained(dit, adapter, adapter_name="a")
    a = outputs(model, inputs)
    model.add_adapter("b", DiffFitConfig(target_modules=["attn1.to_q", "embedding_table"]))
    assert torch.equal(outputs(model, inputs), a)
    model.set_adapter("b")
    assert torch.equal(outputs(model, inputs), expected)
    model.delete_adapter("b")
    layers = [module for module in model.modules() if isinstance(module, DiffFitLayer)]
    kinds = [*layers[0].adapter_layer_names, "scale"]
    assert layers and not any("b" in getattr(layer, kind) for layer in layers for kind in kinds)
    model.set_adapter("a")
    assert torch.equal(outputs(model, inputs), a)


def test_low_cpu_mem_usage(adapter, inputs):
    expected = outputs(PeftModel.from_pretrained(make_dit(), adapter), inputs)
    loaded = PeftModel.from_pretrained(make_dit(), adapter, low_cpu_mem_usage=True)
    assert torch.equal(outputs(loaded, inputs), expected)


def test_target_and_exclude_modules(dit):
    model = get_peft_model(dit, DiffFitConfig(target_modules=r".*attn1\.to_[qk]", exclude_modules=["to_k"]))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum("to_q.difffit_delta" in name for name in names) == 4
    assert not any("to_k" in name or "embedding_table" in name for name in names)


def test_models_without_a_preset():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2, bias=False))
    x = torch.randn(3, 4)
    expected = model(x)
    adapted = get_peft_model(model, DiffFitConfig(target_modules=["0", "1", "2"]))
    assert torch.equal(adapted(x), expected)
    names = {n.removeprefix("base_model.model.") for n, p in adapted.named_parameters() if p.requires_grad}
    assert names == {
        "0.difffit_gamma.default",
        "0.difffit_delta.default",
        "1.difffit_gamma.default",
        "1.difffit_delta.default",
        "2.difffit_gamma.default",
    }


def test_a_layer_has_modules_only_for_what_its_adapters_have():
    """Loading an adapter walks over all modules a dozen times."""
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 6)), DiffFitConfig(gamma_modules=[]))
    layer = model.base_model.model[0]
    assert [name for name, _ in layer.named_children()] == ["base_layer", "difffit_delta"]
    model.add_adapter("b", DiffFitConfig(gamma_modules=["0"], r=1, low_rank_modules=["0"]))
    assert {name for name, _ in layer.named_children()} == {"base_layer", *DiffFitLayer.adapter_layer_names}
    model.delete_adapter("b")
    model.add_adapter("c", DiffFitConfig(gamma_modules=["0"]))
    assert [*layer.difffit_gamma] == ["c"] and not layer.difffit_A


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 0}, "num_classes=0: must be an integer of at least 1"),
        ({"num_classes": 2.5}, "num_classes=2.5: must be an integer"),
        ({"num_classes": 4, "id2label": LABELS}, "num_classes=4, but id2label names 3 classes"),
        ({"id2label": {1: "fox", 2: "hare"}}, "id2label has the keys 1, 2: they must be 0 to 1"),
        ({"id2label": dict.fromkeys(range(1, 16), "x")}, "keys 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 3 more: they"),
        ({"id2label": {0.5: "fox"}}, "keys 0.5: they must be class indices"),
        ({"id2label": {"zero": "fox", "a, b": "x"}}, "keys 'zero', 'a, b': they must be class indices"),
        ({"id2label": ["fox"]}, "must be a dict"),
        ({"id2label": {0: 1}}, "names of classes must be strings"),
        ({"init_class_rows": "bases"}, "'null', 'base', or a list of classes of the base. Did you mean 'base'?"),
        ({"init_class_rows": [1], "num_classes": 2}, "a list of classes of the base, one for each of the 2 new ones"),
        ({"init_class_rows": []}, "a list of classes of the base, one for each of the 0 new ones"),
        ({"init_class_rows": [-1], "num_classes": 1}, "classes of the base are integers from 0 up"),
        ({"gamma_layers": [-1]}, "gamma_layers=[-1]: must be a list of block indices from 0 up"),
        ({"gamma_layers": 2}, "gamma_layers=2: must be a list of block indices"),
        ({"gamma_layers": ["0", 1]}, "must be a list of block indices"),
        ({"modules_to_save": "proj_out_2"}, "must be a list of module names"),
        ({"gamma_modules": "("}, "is not a regular expression"),
        ({"target_modules": [1]}, "must be a list of at most 4096 module names"),
        (
            {"background": "sky"},
            "background is 'sky', which is not a valid colour: give a name such as white, or #rrggbb",
        ),
        ({"r": -1}, "r=-1: must be an integer, 0 for no change of low rank"),
        ({"r": 1.0}, "r=1.0: must be an integer"),
        ({"low_rank_modules": ["to_q"]}, "low_rank_modules=['to_q']: give a rank too, such as r=1"),
        ({"sample_size": 0}, "sample_size=0: the side of the latents is an integer above 0"),
        ({"init_weights": "gaussian"}, "init_weights='gaussian': must be True or False"),
        ({"new_biases": "yes"}, "new_biases='yes': must be True or False"),
        ({"format_version": 2}, "format_version=2: this difffit_peft reads configs of the formats 0 to 1"),
        ({"format_version": "1"}, "format_version='1': this difffit_peft reads"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError) as error:
        DiffFitConfig(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gamma_modules": ["to_z"]}, "gamma_modules=['to_z']: 'to_z' matches no layer that DiffFit can train."),
        ({"gamma_modules": ["attn1.to_qq"]}, "Did you mean 'attn1.to_q'?"),
        ({"gamma_modules": r"blocks\.9\..*"}, "matches no layer"),
        ({"gamma_modules": "to_q"}, "regular expression for the whole name: did you mean the list ['to_q']? Names"),
        (
            {"gamma_modules": ["to_z"]},
            "Names end in 'attn1.to_k', 'attn1.to_out.0', 'attn1.to_q', 'attn1.to_v', 'ff.net.2', 'norm1.linear', "
            "'norm1_emb.timestep_embedder.linear_1', 'norm1_emb.timestep_embedder.linear_2', 'pos_embed.proj', 'proj', "
            "'proj_out_1', 'proj_out_2'.",
        ),
        (
            {"gamma_modules": r".*blocks\.3\..*to_q", "gamma_layers": [0]},
            "matches layers of the blocks [3], but gamma_layers=[0] lets γ onto [0] alone",
        ),
        ({"modules_to_save": ["proj_out_3"]}, "'proj_out_3' names no module of the model. Did you mean 'proj_out_2'?"),
        ({"target_modules": ["conv_in"]}, "target_modules=['conv_in']"),
        ({"target_modules": [], "gamma_modules": []}, "leave no layer of DiTTransformer2DModel to train"),
        ({"gamma_layers": [0, 4]}, "gamma_layers=[0, 4]: this model has 4 blocks, so indices go from 0 to 3."),
        ({"r": 1, "low_rank_modules": ["to_z"]}, "low_rank_modules=['to_z']: 'to_z' matches no layer"),
        (
            {"r": 1, "low_rank_modules": ["pos_embed.proj"]},
            "pos_embed.proj is of type Conv2d, but a change of low rank",
        ),
        ({"r": 17}, "r=17: the rank of transformer_blocks.0.attn1.to_out.0 is at most 16"),
        ({"num_classes": 1001}, "num_classes=1001, but the class table of this model has rows for 1000 classes"),
        ({"sample_size": 9}, "sample_size=9 is not a multiple of the patch size of this model, 2"),
    ],
)
def test_configs_that_do_not_fit_the_model(dit, fields, message, inputs):
    before, expected = state(dit), outputs(dit, inputs)
    config = DiffFitConfig(**fields)
    with pytest.raises(ValueError) as error:
        get_peft_model(dit, config)
    assert message in str(error.value)
    assert config == DiffFitConfig(**fields)
    assert_equal(state(dit), before)
    assert torch.equal(outputs(dit, inputs), expected)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"attention_head_dim": 12}, "attention_head_dim is 8 there and 12 here"),
        ({"num_layers": 3}, "num_layers is 4 there and 3 here"),
        ({"patch_size": 4}, "patch_size is 2 there and 4 here"),
        ({"num_embeds_ada_norm": 10}, "num_embeds_ada_norm is 1000 there and 10 here"),
    ],
)
def test_another_base_is_refused(adapter, other, message):
    dit = make_dit(**other)
    before = state(dit)
    with pytest.raises(ValueError, match="belongs to another base") as error:
        PeftModel.from_pretrained(dit, adapter)
    assert message in str(error.value)
    assert_equal(state(dit), before)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(adapter, keep, dit):
    path = adapter / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    before = state(dit)
    with pytest.raises(ValueError, match="adapter_model.safetensors is truncated, or is not a safetensors file"):
        PeftModel.from_pretrained(dit, adapter)
    assert_equal(state(dit), before)


def test_values_that_are_not_finite_are_refused(adapter, dit):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    weights[name][0] = float("nan")
    save_file(weights, path)
    before = state(dit)
    with pytest.raises(ValueError, match="not finite"):
        PeftModel.from_pretrained(dit, adapter)
    assert_equal(state(dit), before)


def test_a_file_that_lacks_weights_is_refused(adapter, dit):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(iter(weights)))
    save_file(weights, path)
    before = state(dit)
    with pytest.raises(ValueError, match="1 are missing and 0 belong to no layer"):
        PeftModel.from_pretrained(dit, adapter)
    assert_equal(state(dit), before)
    assert not hasattr(dit, "peft_config")
    model = get_peft_model(dit, DiffFitConfig(id2label=LABELS))
    with pytest.raises(ValueError, match="1 are missing"):  # weights given by hand
        set_peft_model_state_dict(model, weights)


def test_adapters_for_two_sizes_do_not_share_a_model(dit):
    model = get_peft_model(dit, DiffFitConfig())
    with pytest.raises(ValueError, match="for latents of side 16, but the model has adapters for 8"):
        model.add_adapter("large", DiffFitConfig(sample_size=16))
    assert list(model.peft_config) == ["default"]


def test_no_class_table_for_num_classes():
    with pytest.raises(ValueError, match="num_classes=3, but Linear has no class table|Sequential has no class table"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), DiffFitConfig(num_classes=3))


def test_attaching_and_loading_warn_of_nothing(adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(make_dit(), adapter)
        get_peft_model(make_dit(), DiffFitConfig(exclude_modules=["pos_embed.proj"]))(**make_inputs())


# Several adapters


@pytest.fixture
def three_adapters():
    model = get_peft_model(make_dit(), DiffFitConfig(num_classes=3), adapter_name="a")
    model.add_adapter("b", DiffFitConfig(num_classes=8, gamma_layers=[0, 3]))
    model.add_adapter("c", DiffFitConfig(gamma_modules=[]))
    for name in "abc":
        randomise(model, name)
    return model.eval()


def test_one_adapter_per_sample(three_adapters, inputs):
    names = ["a", "__base__", "b", "c", "b"]
    mixed = outputs(three_adapters, {**inputs, "adapter_names": names})
    for i, name in enumerate(names):
        with three_adapters.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                three_adapters.set_adapter(name)
            torch.testing.assert_close(mixed[i], outputs(three_adapters, inputs)[i], **CLOSE)


def test_one_adapter_per_sample_in_every_kind_of_layer():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.GroupNorm(2, 6), torch.nn.LayerNorm((6, 5, 5)))
    model = get_peft_model(model, DiffFitConfig(init_weights=False, gamma_modules=["0"]), adapter_name="a").eval()
    model.add_adapter("b", DiffFitConfig(init_weights=False, gamma_modules=["0"]))
    x = torch.randn(3, 4, 7, 7)
    mixed = model(x, adapter_names=["b", "a", "b"])
    for i, name in enumerate("bab"):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[i], model(x)[i])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"] * 4, "Length of `adapter_names` should be the same as the number of inputs, but got 4 and 5"),
        (["a", "x", "a", "a", "a"], "non-existing adapter(s): x"),
    ],
)
def test_wrong_adapter_names(three_adapters, inputs, names, message):
    with pytest.raises(ValueError) as error:
        three_adapters(**inputs, adapter_names=names)
    assert message in str(error.value)
    assert not any(
        module._forward_pre_hooks for module in three_adapters.modules() if "DiffFit" in type(module).__name__
    )


def test_scale(three_adapters, inputs):
    model = three_adapters
    model.set_adapter("a")
    full = outputs(model, inputs)
    with model.disable_adapter():
        base = outputs(model, inputs)
    model.set_scale("a", 0.0)
    torch.testing.assert_close(outputs(model, inputs), base, **CLOSE)
    model.set_scale("a", 1.0)
    torch.testing.assert_close(outputs(model, inputs), full, **CLOSE)
    model.set_scale("a", -0.5)
    model.set_scale("b", 1.5)
    model.base_model.set_adapter(["a", "b"])
    blended = outputs(model, inputs)
    layer = model.base_model.model.transformer_blocks[0].attn1.to_q
    gamma = (1 - 0.5 * (layer.difffit_gamma["a"] - 1)) * (1 + 1.5 * (layer.difffit_gamma["b"] - 1))
    delta = -0.5 * layer.difffit_delta["a"] + 1.5 * layer.difffit_delta["b"]
    x = torch.randn(2, 16)
    torch.testing.assert_close(layer(x), gamma * (layer.base_layer(x) + delta))
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, inputs), blended, **CLOSE)
    with pytest.raises(ValueError, match="'a' is merged"):
        model.set_scale("a", 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("aa", 1.0), "no adapter 'aa'"),
        (("a", float("nan")), "scale=nan: must be a finite number"),
        (("a", "0.5"), "scale='0.5': must be a finite number"),
        (("a", torch.ones(2)), "must be a finite number"),
    ],
)
def test_wrong_scale(three_adapters, arguments, message):
    with pytest.raises(ValueError, match=message):
        three_adapters.set_scale(*arguments)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.array(0.25), torch.tensor(0.25)])
def test_numbers_of_numpy_and_pytorch_are_scales(number, dit, inputs):
    model = get_peft_model(dit, DiffFitConfig(init_weights=False))
    model.set_scale("default", 0.25)
    expected = outputs(model, inputs)
    model.set_scale("default", 1.0)
    model.set_scale("default", number)
    assert torch.equal(outputs(model, inputs), expected)
    model.add_weighted_adapter(["default"], [number], "quarter")
    model.set_adapter("quarter")
    torch.testing.assert_close(outputs(model, inputs), expected)


@pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor])
def test_integers_of_numpy_and_pytorch_are_integers(integer, tmp_path):
    fields = {"num_classes": 3, "r": 1, "sample_size": 8}
    given = {name: integer(value) for name, value in fields.items()}
    labels = {integer(index): label for index, label in LABELS.items()}
    config = DiffFitConfig(**given, gamma_layers=[integer(1)], id2label=labels)
    assert config == DiffFitConfig(**fields, gamma_layers=[1], id2label=LABELS)
    config.save_pretrained(tmp_path)
    assert DiffFitConfig.from_pretrained(tmp_path) == config


def test_merged_adapters_and_adapter_names_exclude_each_other(three_adapters, inputs):
    three_adapters.merge_adapter(["a"])
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter`"):
        three_adapters(**inputs, adapter_names=["b"] * 5)
    three_adapters.unmerge_adapter()
    with pytest.raises(ValueError, match="training mode"):
        three_adapters.train()(**inputs, adapter_names=["b"] * 5)


def test_modules_to_save_of_one_adapter_are_closed_to_the_next(inputs, tmp_path):
    model = get_peft_model(make_dit(), DiffFitConfig(modules_to_save=["proj_out_2"]), adapter_name="a")
    model.add_adapter("b", DiffFitConfig())
    assert not any("proj_out_2" in name and name.endswith(".b") for name, _ in model.named_parameters())
    randomise(model, "b")
    model.set_adapter("b")
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path, selected_adapters=["b"], save_embedding_layers=False)
    config = PeftConfig.from_pretrained(tmp_path / "b")
    config.exclude_modules = ["proj_out_2"]
    loaded = PeftModel.from_pretrained(make_dit(), tmp_path / "b", config=config)
    assert torch.equal(outputs(loaded, inputs), expected)


def test_an_adapter_of_modules_that_another_saves_whole_is_refused(dit, tmp_path):
    save_adapter(tmp_path)
    model = get_peft_model(dit, DiffFitConfig(modules_to_save=["proj_out_2"]), adapter_name="a")
    with pytest.raises(ValueError, match="weights for proj_out_2, which another adapter of this model saves whole"):
        model.load_adapter(tmp_path, "b")
    assert [*model.peft_config] == ["a"]


def test_modules_to_save_that_are_adapted_already_are_refused(dit):
    model = get_peft_model(dit, DiffFitConfig(), adapter_name="a")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="proj_out_2 has adapters of its own already"):
        model.add_adapter("b", DiffFitConfig(modules_to_save=["proj_out_2"]))
    assert [name for name, _ in model.named_parameters()] == names and list(model.peft_config) == ["a"]


def test_all_linear_on_a_second_adapter_loads_again(inputs, tmp_path):
    model = get_peft_model(make_dit(), DiffFitConfig(), adapter_name="a")
    model.add_adapter("b", DiffFitConfig(target_modules="all-linear"))
    randomise(model, "b")
    model.set_adapter("b")
    model.save_pretrained(tmp_path, selected_adapters=["b"], save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make_dit(), tmp_path / "b")
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def test_a_merge_that_fails_changes_nothing(three_adapters, inputs):
    model = three_adapters
    expected, before = outputs(model, inputs), state(model)
    delta = model.base_model.model.proj_out_1.difffit_delta["a"].data
    value = delta[0].item()
    for merge in (model.merge_adapter, model.merge_and_unload):
        delta[0] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            merge(safe_merge=True)
        delta[0] = value
        assert_equal(state(model), before)
    assert torch.equal(outputs(model, inputs), expected)


def test_unloading_a_merged_model_gives_the_base(three_adapters):
    before = state(make_dit())
    three_adapters.merge_adapter(["a", "b"])
    assert_equal(state(three_adapters.unload()), before)


def test_a_base_cast_while_merged_unmerges_in_its_new_type(three_adapters):
    three_adapters.merge_adapter(["a"])
    three_adapters.to(torch.bfloat16)
    three_adapters.unmerge_adapter()
    assert_equal(state(three_adapters.unload()), state(make_dit().to(torch.bfloat16)))


def test_merging_a_larger_size_keeps_it_and_says_what_saving_loses():
    model = get_peft_model(make_dit(), DiffFitConfig(sample_size=16))
    randomise(model)
    wide = make_inputs(side=16)
    expected = outputs(model, wide)
    with pytest.warns(UserWarning, match="works at sample_size=16 in memory"):
        merged = model.merge_and_unload()
    assert merged.config.sample_size == 16
    torch.testing.assert_close(outputs(merged, wide), expected, **CLOSE)


def test_a_model_with_another_methods_adapters_is_refused(dit):
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), dit)
    with pytest.raises(ValueError, match="already has adapters of another method"):
        get_peft_model(dit, DiffFitConfig())


def test_a_compiled_model_is_refused(dit):
    with pytest.raises(ValueError, match="attach the adapter first"):
        get_peft_model(torch.compile(dit), DiffFitConfig())


def test_a_subclass_is_known_by_its_parent(dit):
    dit.__class__ = type("MyDiT", (DiTTransformer2DModel,), {})
    names = [name for name, p in get_peft_model(dit, DiffFitConfig()).named_parameters() if p.requires_grad]
    assert sum("class_embedder" in name for name in names) == 1


@pytest.mark.filterwarnings("ignore:The merge gives biases")
@pytest.mark.parametrize(
    ("target", "what"),
    [({"gamma": True}, "γ"), ({"rank": 1}, "a change of rank r"), ({"gamma": True, "rank": 1}, "a ch")],
)
def test_quantised_weights_are_not_merged_into(target, what):
    def adapted(bias=True, **target):
        layer = DiffFitLayer(torch.nn.Linear(4, 4, bias=bias))
        layer.update_layer("a", DiffFitConfig(init_weights=False), delta=True, **target)
        layer.set_adapter("a")
        layer.base_layer.weight.requires_grad_(False)
        layer.base_layer.weight.data = layer.base_layer.weight.data.to(torch.int8)
        return layer

    with pytest.raises(ValueError, match=f"Cannot merge {what}.* quantised or sharded"):
        adapted(**target).merge()
    only_bias = adapted()
    expected = only_bias.base_layer.bias + only_bias.difffit_delta["a"]
    only_bias.merge()
    assert torch.equal(only_bias.base_layer.bias, expected)
    new_bias = adapted(bias=False)
    new_bias.merge()
    assert torch.equal(new_bias.base_layer.bias, new_bias.difffit_delta["a"])
