"""The verbs of PEFT that go beyond one adapter: blended, swapped, injected, mixed with other methods, trained on."""

import contextlib
import warnings

import pytest
import torch
from conftest import CLOSE, make_dit, make_inputs, outputs, randomise, save_adapter
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from difffit_peft import DiffFitConfig, DiffFitLayer, hotswap_adapter


@pytest.fixture
def saved(tmp_path):
    """Two adapters of `make_dit()` on disk, of the same layers and classes."""
    for seed, name in enumerate(("fox", "owl")):
        save_adapter(tmp_path / name, seed, id2label={0: name, 1: "den"})
    return tmp_path


# Attached twice


def attach(kind: str, model, path) -> PeftModel:
    if kind == "loaded":
        return PeftModel.from_pretrained(model, path)
    if kind == "loaded under another name":
        return PeftModel.from_pretrained(model, path, adapter_name="owl")
    return get_peft_model(model, DiffFitConfig())


KINDS = ("loaded", "loaded under another name", "new")
TWICE = {
    "PeftModel": KINDS,
    "DiffFitModel": KINDS,
    "base": ("loaded", "new"),
}  # else as peft allows, and Diffusers does


@pytest.mark.parametrize(("given", "kind"), [(given, kind) for given, kinds in TWICE.items() for kind in kinds])
def test_a_model_that_has_adapters_is_told_where_to_load_another(saved, inputs, kind, given):
    dit = make_dit()
    model = PeftModel.from_pretrained(dit, saved / "fox")
    expected, config = outputs(model, inputs), model.peft_config["default"]
    target = {"PeftModel": model, "DiffFitModel": model.base_model, "base": dit}[given]
    message = "has an adapter 'default' already" if given == "base" else f"is a {given}, which has adapters already"
    with pytest.raises(ValueError, match=rf"The model {message}.*load_adapter\(path, adapter_name\)"):
        attach(kind, target, saved / "owl")
    assert model.peft_config == {"default": config} and model.peft_config["default"] is config
    assert torch.equal(outputs(model, inputs), expected)
    model.load_adapter(saved / "owl", "owl")
    model.set_adapter("owl")
    assert torch.equal(outputs(model, inputs), outputs(PeftModel.from_pretrained(make_dit(), saved / "owl"), inputs))


# Merging


def test_modules_saved_whole_go_with_the_active_adapter(dit, inputs):
    """A merge of another adapter would give a model that computes with neither."""
    model = get_peft_model(dit, DiffFitConfig(modules_to_save=["proj_out_2"]), "a").eval()
    model.add_adapter("b", DiffFitConfig(exclude_modules=["proj_out_2"]))
    randomise(model, "a", 1), randomise(model, "b", 2)
    model.base_model.model.proj_out_2.modules_to_save["a"].weight.data += 0.1
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'a' has modules_to_save.* Call set_adapter\(\['b'\]\) first"):
            merge(adapter_names=["b"])
    model.set_adapter("b")
    expected = outputs(model, inputs)
    with pytest.raises(ValueError, match="'a' has modules_to_save"):
        model.merge_adapter(["a", "b"])
    torch.testing.assert_close(outputs(model.merge_and_unload(adapter_names=["b"]), inputs), expected, **CLOSE)


def test_merges_of_no_adapter_and_of_one_twice(dit, inputs):
    model = get_peft_model(dit, DiffFitConfig(), "a").eval()
    randomise(model, "a", 1)
    expected = outputs(model, inputs)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="name each adapter once"):
            merge(adapter_names=["a", "a"])
        with pytest.raises(ValueError, match="There is no adapter to merge"):
            merge(adapter_names=[])
        with pytest.raises(TypeError, match="should be a list of strings, got 'a'"):
            merge(adapter_names="a")
    with pytest.raises(ValueError, match="name each adapter once"):
        model.base_model.set_adapter(["a", "a"])
    assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("merged", [[], ["a"]])
def test_a_merge_that_fails_changes_nothing(dit, inputs, verb, merged):
    model = get_peft_model(dit, DiffFitConfig(r=1), "a").eval()
    model.add_adapter("b", DiffFitConfig(r=1))
    randomise(model, "a", 1), randomise(model, "b", 2)
    model.base_model.set_adapter(["a", "b"])
    model.base_model.model.proj_out_2.difffit_delta["b"].data[0] = float("nan")  # of the last layer
    if merged:
        model.merge_adapter(merged)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    computed = []
    for name, layer in model.named_modules():
        if isinstance(layer, DiffFitLayer):
            one = layer._merged
            layer._merged = lambda *args, name=name, one=one: computed.append(name) or one(*args)
    with pytest.raises(ValueError, match=r"Merging .*'b'\] gives values that are not finite"):
        getattr(model, verb)(adapter_names=["a", "b"], safe_merge=True)
    assert len(computed) > 20
    layers = [layer for layer in model.modules() if isinstance(layer, DiffFitLayer)]
    assert all(layer.merged_adapters == merged for layer in layers)
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in make_dit_under(model).items())


def make_dit_under(model: PeftModel) -> dict[str, torch.Tensor]:
    """The base's tensors by the names they have in `model`."""
    base, plain = make_dit().state_dict(), {}
    for name in model.state_dict():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if own in base:
            plain[name] = base[own]
    assert len(plain) > 20
    return plain


def test_a_merge_takes_what_is_active_in_each_layer(dit, inputs):
    """PEFT's own tests, and callers without a tuner, set adapters layer by layer."""
    model = get_peft_model(dit, DiffFitConfig(), "a").eval()
    model.add_adapter("b", DiffFitConfig())
    randomise(model, "a", 1), randomise(model, "b", 2)
    for layer in model.modules():
        if isinstance(layer, DiffFitLayer):
            layer.set_adapter(["a", "b"])
    expected = outputs(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, inputs), expected, **CLOSE)


def test_a_merge_computes_each_tensor_once(dit):
    model = get_peft_model(dit, DiffFitConfig(num_classes=3)).eval()
    computed = []
    for name, layer in model.named_modules():
        if isinstance(layer, DiffFitLayer):
            one = layer._merged
            layer._merged = lambda *args, name=name, one=one: computed.append(name) or one(*args)
    model.merge_and_unload(safe_merge=True)
    assert len(computed) == len({*computed}) > 20


def test_a_base_that_cannot_be_merged_is_refused_before_any_layer_is(dit):
    model = get_peft_model(dit, DiffFitConfig()).eval()
    last = model.base_model.model.transformer_blocks[1].ff.net[2]
    last.base_layer.weight = torch.nn.Parameter(last.base_layer.weight.data.to(torch.int8), requires_grad=False)
    computed = []
    first = model.base_model.model.pos_embed.proj
    first._merged = lambda *args: computed.append(args)
    with pytest.raises(ValueError, match="Cannot merge γ into Linear, whose weights are quantised or sharded"):
        model.merge_adapter()
    assert not computed and not first.merged
    model.add_adapter("elsewhere", DiffFitConfig(exclude_modules=["pos_embed.proj"], gamma_modules=["to_q"]))
    model.set_adapter("elsewhere")
    model.merge_adapter()  # it has δ alone on that layer, which goes into the bias
    assert first.merged and not computed


def test_what_a_verb_says_it_says_once(saved):
    model = PeftModel.from_pretrained(make_dit(), saved / "fox", adapter_name="fox")
    model.load_adapter(saved / "owl", "owl")
    model.unmerge_adapter()
    model.merge_adapter()
    for verb in (lambda: model.merge_adapter(), lambda: model.set_adapter("owl"), lambda: model.delete_adapter("owl")):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            verb()
        assert len(said) <= 1
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_and_unload()


# One batch, many adapters


def test_32_samples_with_32_adapters_equal_32_forwards(dit):
    names = [f"domain{i}" for i in range(32)]
    model = get_peft_model(dit, DiffFitConfig(num_classes=3), adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, DiffFitConfig(num_classes=3))
    for seed, name in enumerate(names):
        randomise(model, name, seed)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(32, 4, 8, 8, generator=generator),
        "timestep": torch.randint(1000, (32,), generator=generator),
        "class_labels": torch.tensor([0, 1, 2, 1000] * 8),
    }
    mixed = outputs(model, inputs | {"adapter_names": names})
    for i, name in enumerate(names):
        model.set_adapter(name)
        alone = outputs(model, {key: value[i : i + 1] for key, value in inputs.items()})
        torch.testing.assert_close(mixed[i : i + 1], alone, **CLOSE)


# add_weighted_adapter


@pytest.mark.parametrize(
    "other",
    [{"num_classes": 3}, {"num_classes": 5, "gamma_layers": [3]}, {"gamma_modules": []}, {"r": 2}],
    ids=str,
)
def test_a_blend_is_an_adapter_of_its_own(dit, inputs, other, tmp_path):
    model = get_peft_model(dit, DiffFitConfig(num_classes=3), adapter_name="a")
    model.add_adapter("b", DiffFitConfig(**other))
    randomise(model, "a", 1), randomise(model, "b", 2)
    model.add_weighted_adapter(["a", "b"], [0.8, -0.3], "blend")
    assert model.active_adapters == ["a"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".blend"))
    model.set_adapter("blend")
    blended = outputs(model, inputs)

    model.set_scale("a", 0.8), model.set_scale("b", -0.3)
    model.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(outputs(model, inputs), blended, **CLOSE)
    model.save_pretrained(tmp_path, selected_adapters=["blend"], save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make_dit(), tmp_path / "blend")
    torch.testing.assert_close(outputs(loaded, inputs), blended, **CLOSE)


def test_a_blend_has_the_labels_its_adapters_agree_on(dit):
    labels = {0: "fox", 1: "owl"}
    model = get_peft_model(dit, DiffFitConfig(id2label=labels), adapter_name="a")
    model.add_adapter("b", DiffFitConfig(id2label=labels))
    model.add_adapter("c", DiffFitConfig(id2label={0: "cat"}))
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "agreeing")
    model.add_weighted_adapter(["a", "c"], [0.5, 0.5], "differing")
    assert model.peft_config["agreeing"].id2label == labels
    config = model.peft_config["differing"]
    assert config.id2label is None and config.num_classes == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "x"], [1, 1], "new"), "adapters=['a', 'x']: must be names of ['a', 'b', 'c']"),
        ((["a", "a"], [1, 1], "new"), "each at most once"),
        (([], [], "new"), "adapters=[]: must be names"),
        ((["a"], [1, 2], "new"), "must be one finite number for each of the 1 adapters"),
        ((["a"], [float("inf")], "new"), "must be one finite number"),
        ((["a"], [1], "b"), "There is an adapter 'b' already"),
        ((["b"], [1], "new"), "'b' has modules_to_save"),
        ((["a", "c"], [1, 1], "new"), "r=24: the rank of transformer_blocks.0.attn1.to_out.0 is at most 16"),
        ((["a"], [1], "v1.0"), "adapter_name='v1.0': PyTorch allows no dot in it"),
    ],
)
def test_blends_that_are_refused(dit, arguments, message):
    model = get_peft_model(dit, DiffFitConfig(modules_to_save=["proj_out_2"]), adapter_name="b")
    model.add_adapter("a", DiffFitConfig(r=12))
    model.add_adapter("c", DiffFitConfig(r=12))
    with pytest.raises(ValueError) as error:
        model.add_weighted_adapter(*arguments)
    assert message in str(error.value)
    assert list(model.peft_config) == ["b", "a", "c"]


# Hot-swapping


@pytest.mark.parametrize("other", [{}, {"r": 1}, {"r": 1, "low_rank_modules": ["norm1.linear", "to_q"]}])
def test_adapters_of_other_ranks_in_one_batch(dit, inputs, other):
    model = get_peft_model(dit, DiffFitConfig(r=2, low_rank_modules=["norm1.linear", "to_q"]), "a").eval()
    model.add_adapter("b", DiffFitConfig(**other))
    randomise(model, "a", 1), randomise(model, "b", 2)
    names = ["b", "a", "__base__", "a", "a"]
    mixed = outputs(model, inputs | {"adapter_names": names})
    for i, name in enumerate(names):
        model.set_adapter("a" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            torch.testing.assert_close(mixed[i], outputs(model, inputs)[i], **CLOSE)


def test_hotswap_is_the_other_adapter_in_the_same_tensors(saved, inputs):
    expected = outputs(PeftModel.from_pretrained(make_dit(), saved / "owl"), inputs)
    model = PeftModel.from_pretrained(make_dit(), saved / "fox", is_trainable=True)
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    assert not torch.equal(outputs(model, inputs), expected)
    hotswap_adapter(model, saved / "owl")
    assert torch.equal(outputs(model, inputs), expected)
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before
    assert model.peft_config["default"].id2label[0] == "owl" and not model.peft_config["default"].inference_mode


def test_swaps_that_are_refused(saved, inputs, tmp_path):
    model = PeftModel.from_pretrained(make_dit(), saved / "fox")
    expected = outputs(model, inputs)
    for name, config in {"classes": {"num_classes": 3}, "layers": {"num_classes": 2, "gamma_modules": []}}.items():
        other = get_peft_model(make_dit(), DiffFitConfig(**config))
        other.save_pretrained(tmp_path / name, save_embedding_layers=False)
        with pytest.raises(ValueError, match="cannot take the place of 'default'.*load_adapter"):
            hotswap_adapter(model, tmp_path / name)
    other = get_peft_model(make_dit(num_layers=3), DiffFitConfig(num_classes=2))
    other.save_pretrained(tmp_path / "base", save_embedding_layers=False)
    with pytest.raises(ValueError, match="base_config is .*'num_layers': 3.* there"):
        hotswap_adapter(model, tmp_path / "base")
    get_peft_model(make_dit(), LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="adapter of LORA, not of DiffFit"):
        hotswap_adapter(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="no adapter 'other' in this PeftModel: it has \\['default'\\]"):
        hotswap_adapter(model, saved / "owl", "other")
    path = saved / "owl" / "adapter_model.safetensors"
    weights = load_file(path)
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, path)
    with pytest.raises(ValueError, match="not finite"):
        hotswap_adapter(model, saved / "owl")
    assert torch.equal(outputs(model, inputs), expected)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        hotswap_adapter(model, saved / "fox")


# Loaded and trained on, injected, described


def test_a_loaded_adapter_is_trained_on(saved, inputs):
    model = PeftModel.from_pretrained(make_dit(), saved / "fox", is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs).sample.square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < losses[0]
    frozen = PeftModel.from_pretrained(make_dit(), saved / "fox")
    assert not any(p.requires_grad for p in frozen.parameters())


def test_disabled_for_a_while_frozen_adapters_stay_frozen(saved):
    """PEFT 0.21 makes them trainable: https://github.com/huggingface/peft/issues/3447."""
    model = PeftModel.from_pretrained(make_dit(), saved / "fox", adapter_name="fox")
    model.load_adapter(saved / "owl", "owl", is_trainable=True)
    for active in ("fox", "owl"):
        model.base_model.set_adapter(active, inference_mode=active == "fox")
        if active == "fox":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.endswith(".owl"))
        with model.disable_adapter():
            pass
        found = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert found == {"owl"}


def test_injected_without_a_peft_model(saved, inputs):
    expected = outputs(PeftModel.from_pretrained(make_dit(), saved / "fox"), inputs)
    dit = make_dit()
    inject_adapter_in_model(DiffFitConfig(num_classes=2), dit, adapter_name="fox", low_cpu_mem_usage=True)
    weights = load_file(saved / "fox" / "adapter_model.safetensors")
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    set_peft_model_state_dict(dit, weights, adapter_name="fox", low_cpu_mem_usage=True)
    assert torch.equal(outputs(dit, inputs), expected)
    state = get_peft_model_state_dict(dit, adapter_name="fox")
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)


def test_adapters_in_half_precision_if_asked_for(saved):
    dtypes = {
        p.dtype
        for autocast in (True, False)
        for name, p in PeftModel.from_pretrained(
            make_dit().to(torch.bfloat16), saved / "fox", autocast_adapter_dtype=autocast
        ).named_parameters()
        if "difffit_" in name
    }
    assert dtypes == {torch.float32, torch.bfloat16}


def test_status(saved):
    model = PeftModel.from_pretrained(make_dit(), saved / "fox", adapter_name="fox", is_trainable=True)
    model.load_adapter(saved / "owl", "owl")
    model.merge_adapter(["fox"])
    status = model.get_model_status()
    assert (status.peft_types, status.active_adapters) == ({"fox": "DIFFFIT", "owl": "DIFFFIT"}, ["fox"])
    assert status.available_adapters == ["fox", "owl"] and status.merged_adapters == ["fox"]
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    layer = next(layer for layer in model.get_layer_status() if layer.name.endswith("0.attn1.to_q"))
    assert layer.module_type == "DiffFitLayer" and layer.available_adapters == ["fox", "owl"]


# Beside LoRA


def mixed_dit(first: str) -> torch.nn.Module:
    configs = {
        "lora": LoraConfig(target_modules=["to_q", "ff.net.2"], init_lora_weights=False),
        "difffit": DiffFitConfig(num_classes=3, gamma_modules=".*"),
    }
    torch.manual_seed(5)
    model = get_peft_model(make_dit(), configs[first], adapter_name=first, mixed=True)
    second = next(name for name in configs if name != first)
    model.add_adapter(second, configs[second])
    randomise(model, "difffit", 3)
    model.set_adapter(["lora", "difffit"])
    return model.eval()


@pytest.mark.parametrize("first", ["lora", "difffit"])
def test_mixed_with_lora(first, inputs):
    base = outputs(make_dit(), inputs)
    model = mixed_dit(first)
    both = outputs(model, inputs)
    layer = model.base_model.model.transformer_blocks[0].attn1.to_q
    x = torch.randn(3, 16)
    lora, difffit = (layer.base_layer, layer) if first == "lora" else (layer, layer.base_layer)
    w, gamma, delta = layer.get_base_layer(), difffit.difffit_gamma["difffit"], difffit.difffit_delta["difffit"]
    low_rank = lora.scaling["lora"] * lora.lora_B["lora"](lora.lora_A["lora"](x))
    expected = gamma * (w(x) + low_rank + delta) if first == "lora" else gamma * (w(x) + delta) + low_rank
    torch.testing.assert_close(layer(x), expected, **CLOSE)

    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, inputs), base, **CLOSE)
    for name in ("lora", "difffit"):
        model.set_adapter(name)
        assert not torch.allclose(outputs(model, inputs), both, atol=1e-3)
    model.set_adapter(["lora", "difffit"])
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, inputs), both, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model, inputs), both, **CLOSE)
    model.merge_adapter(["difffit"])
    with pytest.raises(ValueError, match="merged already"):
        model.merge_adapter(["lora"])
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(make_dit().state_dict())
    torch.testing.assert_close(outputs(merged, inputs), both, **CLOSE)


@pytest.mark.parametrize("first", ["lora", "difffit"])
def test_a_mixed_merge_that_fails_changes_nothing(first):
    model = mixed_dit(first)
    model.base_model.model.proj_out_1.difffit_delta["difffit"].data[0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "difffit_" not in name}
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert not any(getattr(module, "merged", False) for module in model.modules())
    for name, tensor in before.items():  # LoRA unmerges by subtracting
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", ["lora", "difffit"])
def test_mixed_merges_of_names_that_are_not_there(first, inputs):
    model = mixed_dit(first)
    expected = outputs(model, inputs)
    for merge in (model.base_model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="no adapter 'difffi'.* Did you mean 'difffit'?"):
            merge(adapter_names=["lora", "difffi"])
    assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("first", ["lora", "difffit"])
def test_mixed_and_unloaded(first, inputs):
    dit = mixed_dit(first).unload()
    expected = make_dit().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dit.state_dict().items())
    assert torch.equal(outputs(dit, inputs), outputs(make_dit(), make_inputs()))


def test_the_next_adapter_becomes_active_in_every_layer(dit, inputs):
    model = get_peft_model(dit, DiffFitConfig(), adapter_name="a")
    model.add_adapter("b", DiffFitConfig(target_modules=["attn1.to_v"]))
    model.add_adapter("c", DiffFitConfig())
    for seed, name in enumerate("abc"):
        randomise(model, name, seed)
    model.set_adapter("b")
    expected = outputs(model, inputs)
    model.set_adapter("a")
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert torch.equal(outputs(model, inputs), expected)
    assert all(p.requires_grad == name.endswith(".b") for name, p in model.named_parameters() if "difffit_" in name)
