"""What is true of the method: counts, identity, gradients, label dropout, merging."""

import copy
import pickle

import pytest
import reference
import torch
from conftest import CLOSE, NULL, make_dit, make_inputs, outputs, randomise
from diffusers import DiTTransformer2DModel, Flux2Transformer2DModel
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import TINY
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from difffit_peft import DiffFitConfig, DiffFitLayer
from difffit_peft.base_layers import takes_bias
from difffit_peft.class_rows import DiffFitEmbedding
from difffit_peft.families.dit.conditioning import _equal, share

EVERYWHERE = {"gamma_modules": ".*"}


def dit_xl_2() -> DiTTransformer2DModel:
    with torch.device("meta"):
        return DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=32,
            num_embeds_ada_norm=1000,
        )


def trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# Counts


def test_bitfit_trains_the_papers_count():
    model = get_peft_model(dit_xl_2(), DiffFitConfig(num_classes=101, gamma_modules=[]))
    assert trained(model) == 607_136


def test_difffit_trains_the_published_layout_name_by_name():
    """Diffusion-Tuning and MinimaxDiffusion, `models.py`: γ on qkv, proj and both branches, in the first 14 blocks."""
    model = get_peft_model(dit_xl_2(), DiffFitConfig(num_classes=101))
    layers = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.2"]
    published = {f"base_model.model.transformer_blocks.{i}.{layer}" for i in range(14) for layer in layers}
    modules = dict(model.named_modules())
    assert {name for name in modules if getattr(modules[name], "difffit_gamma", None)} == published
    biases = {name.removesuffix(".base_layer.bias") for name, _ in model.named_parameters() if name.endswith(".bias")}
    deltas = {name for name in modules if getattr(modules[name], "difffit_delta", None)}
    assert deltas == biases | {"base_model.model.norm1_emb.class_embedder.embedding_table"}
    assert trained(model) == 687_776 == 607_136 + 14 * 5 * 1152


def test_gamma_on_adaln_is_one_line_away():
    model = get_peft_model(dit_xl_2(), DiffFitConfig(num_classes=101, gamma_modules=["norm1.linear"]))
    assert trained(model) == 800_672 == 607_136 + 28 * 6 * 1152  # shift, scale, gate; of attention and feed-forward


@pytest.mark.parametrize(
    ("fields", "modules", "blocks"),
    [
        ({}, ["attn1.to_k", "attn1.to_out.0", "attn1.to_q", "attn1.to_v", "ff.net.2"], [0, 1, 2]),  # 2.5 of 5, up
        ({"gamma_layers": [4]}, ["attn1.to_k", "attn1.to_out.0", "attn1.to_q", "attn1.to_v", "ff.net.2"], [4]),
        ({"gamma_modules": ["to_q"]}, ["to_q"], None),
        ({"gamma_modules": []}, [], None),
        ({"target_modules": ["attn1.to_q", "proj_out_2"]}, ["attn1.to_q"], [0, 1, 2]),
        ({"target_modules": ["proj_out_2"]}, [], None),
        ({"exclude_modules": ["transformer_blocks.0.attn1.to_q", "to_k", "to_v", "ff.net.2", "1.attn1.to_out.0"]},
         ["transformer_blocks.0.attn1.to_out.0", "transformer_blocks.1.attn1.to_q",
          "transformer_blocks.2.attn1.to_out.0", "transformer_blocks.2.attn1.to_q"], None),
    ],
)  # fmt: skip
def test_an_attached_config_names_the_layers_that_get_gamma(fields, modules, blocks):
    model = get_peft_model(make_dit(num_layers=5), DiffFitConfig(**fields))
    config = model.peft_config["default"]
    assert (config.gamma_modules, config.gamma_layers) == (modules, blocks)
    again = get_peft_model(make_dit(num_layers=5), config)
    assert {*get_peft_model_state_dict(again, save_embedding_layers=False)} == {
        *get_peft_model_state_dict(model, save_embedding_layers=False)
    }


def test_an_attached_config_names_the_layers_that_get_a_change_of_low_rank(dit):
    assert get_peft_model(dit, DiffFitConfig(r=1)).peft_config["default"].low_rank_modules == [
        "attn1.to_out.0",
        "ff.net.2",
    ]
    part = get_peft_model(make_dit(), DiffFitConfig(r=1, exclude_modules=["transformer_blocks.0.ff.net.2"]))
    names = [f"transformer_blocks.{i}.{name}" for i in range(4) for name in ("attn1.to_out.0", "ff.net.2")]
    assert part.peft_config["default"].low_rank_modules == [name for name in names if "0.ff" not in name]


def test_rank_1_in_the_place_of_gamma_keeps_to_the_papers_budget():
    config = DiffFitConfig(num_classes=101, gamma_modules=[], exclude_modules=["to_k"], r=1)
    model = get_peft_model(dit_xl_2(), config)
    assert trained(model) == 607_136 - 28 * 1152 + 28 * ((1 + 1) + (4 + 1)) * 1152  # out and the second of feed-forward
    assert trained(model) <= 830_000


def test_saved_adapter_of_dit_xl_2_is_small(tmp_path):
    model = get_peft_model(dit_xl_2(), DiffFitConfig(num_classes=101))
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert sum(tensor.numel() for tensor in state.values()) == trained(model)
    save_file({name: torch.zeros(tensor.shape) for name, tensor in state.items()}, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size <= 3_400_000


@pytest.mark.parametrize("config", [{}, {"gamma_modules": []}, {"num_classes": 3}, {"target_modules": ".*"}])
def test_no_embedder_is_counted_twice(dit, config):
    model = get_peft_model(dit, DiffFitConfig(**config))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("timestep_embedder.linear_1" in name for name in names) == 1
    assert sum("class_embedder" in name for name in names) == 1
    assert not any("norm1.emb" in name for name in names)


# Identity


@pytest.mark.parametrize("config", [{}, {"r": 1}])
def test_identity_at_initialisation(dit, inputs, config):
    expected = outputs(dit, inputs)
    assert torch.equal(outputs(get_peft_model(dit, DiffFitConfig(**config)), inputs), expected)


def test_new_classes_start_as_the_null_class(dit, inputs):
    null = {**inputs, "class_labels": torch.full_like(inputs["class_labels"], NULL)}
    expected, expected_null = outputs(dit, inputs), outputs(dit, null)
    model = get_peft_model(dit, DiffFitConfig(num_classes=3))
    assert torch.equal(outputs(model, null), expected_null)
    given = outputs(model, inputs)  # labels 0, 2, null, 7, 1: 7 is none of the three classes
    assert torch.allclose(given[[0, 1, 4]], expected_null[[0, 1, 4]], atol=1e-5)
    assert torch.equal(given[2:4], expected[2:4])
    assert not torch.allclose(expected[0], expected_null[0], atol=1e-3)


def test_the_first_class_that_is_not_trained_is_the_bases(dit, inputs):
    labels = {**inputs, "class_labels": torch.full_like(inputs["class_labels"], 3)}
    expected = outputs(dit, labels)
    model = get_peft_model(dit, DiffFitConfig(num_classes=3, target_modules=["embedding_table"], gamma_modules=[]))
    randomise(model)
    assert torch.equal(outputs(model, labels), expected)


def test_a_merge_of_several_adapters_into_half_precision_rounds_once():
    table = torch.nn.Embedding(4, 2, dtype=torch.half)
    torch.nn.init.ones_(table.weight)
    layer = DiffFitEmbedding(table)
    for name in ("a", "b"):
        layer.update_layer(name, DiffFitConfig(init_weights=False), delta=True)
        layer.difffit_delta[name].data = torch.full((4, 2), 4e-4)  # each alone is less than half of a step at 1
    layer.set_adapter(["a", "b"])
    layer.merge()
    assert (layer.base_layer.weight == 1 + torch.finfo(torch.half).eps).all()


def test_classes_the_base_knows_start_as_they_are(dit, inputs):
    expected = outputs(dit, inputs)
    model = get_peft_model(dit, DiffFitConfig(num_classes=3, init_class_rows="base"))
    assert torch.equal(outputs(model, inputs), expected)


def test_new_classes_start_as_the_classes_they_are_like(dit, inputs):
    like = {**inputs, "class_labels": torch.tensor([9, 4, NULL, 7, 9])}
    expected = outputs(dit, like)
    model = get_peft_model(dit, DiffFitConfig(num_classes=3, init_class_rows=[9, 9, 4]))
    new = {**inputs, "class_labels": torch.tensor([0, 2, NULL, 7, 1])}
    assert torch.allclose(outputs(model, new), expected, atol=1e-5)
    model.add_adapter("other", DiffFitConfig(num_classes=4))
    model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "blend")  # of more classes than the list has
    model.set_adapter("blend")
    assert torch.allclose(
        outputs(model, {**inputs, "class_labels": torch.tensor([0, 2, NULL, 7, 1])}), expected, atol=1e-5
    )
    assert DiffFitConfig(**model.peft_config["blend"].to_dict()).num_classes == 4
    with pytest.raises(ValueError, match="names the class 1000, but the base has the classes 0 to 999"):
        get_peft_model(make_dit(), DiffFitConfig(num_classes=1, init_class_rows=[1000]))


def test_disabled_is_the_base_after_training(dit, inputs):
    expected = outputs(dit, inputs)
    before = {name: p.clone() for name, p in dit.state_dict().items()}
    embedder = dit.transformer_blocks[0].norm1.emb
    model = get_peft_model(dit, DiffFitConfig(num_classes=3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(outputs(model, inputs), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), expected)
    base = model.unload()
    unloaded = base.state_dict()
    assert list(unloaded) == list(before)
    assert all(torch.equal(unloaded[name], before[name]) for name in before)
    embedders = [block.norm1.emb for block in base.transformer_blocks]
    assert embedders[0] is embedder and len({*embedders}) == len(embedders)


# Gradients


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({}, {"gamma", "delta"}),
        (EVERYWHERE, {"gamma", "delta"}),
        ({"r": 2}, {"gamma", "delta", "A", "B"}),
        ({"new_biases": True}, {"gamma", "delta"}),
    ],
    ids=["preset", "gamma everywhere", "low rank", "new biases"],
)
def test_gradients_equal_those_of_plain_torch(inputs, config, kinds):
    dit = make_dit(attention_bias="new_biases" not in config)
    inputs["class_labels"] = torch.tensor([0, 2, NULL, 7, 2])
    base = {name: tensor.double() for name, tensor in dit.state_dict().items()}
    positions = dit.pos_embed.pos_embed.double()
    model = get_peft_model(dit, DiffFitConfig(num_classes=3, **config)).double()
    randomise(model)
    target = torch.randn(5, 8, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(3))

    ours = {reference.name(name): p for name, p in model.named_parameters() if p.requires_grad}
    adapter = {name: parameter.detach().clone().requires_grad_() for name, parameter in ours.items()}
    assert {name.rsplit(".", 1)[-1] for name in adapter} == kinds
    assert "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.delta" in adapter
    assert "transformer_blocks.3.attn1.to_v.delta" in adapter

    x, t, labels = inputs["hidden_states"].double(), inputs["timestep"], inputs["class_labels"]
    output = model(x, timestep=t, class_labels=labels).sample
    expected = reference.forward(x, t, labels, positions, base, adapter, heads=2, depth=4, patch=2)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    (output - target).square().mean().backward()
    (expected - target).square().mean().backward()
    for name, parameter in ours.items():
        # δ of keys has no effect but rounding (softmax ignores a shift): hence the absolute tolerance
        torch.testing.assert_close(parameter.grad, adapter[name].grad, rtol=1e-5, atol=1e-12, msg=name)
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert names == {name for name, _ in model.named_parameters() if ".difffit_" in name}


def test_gamma_has_second_derivatives_and_forward_ones():
    x = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    layer = DiffFitLayer(torch.nn.Linear(4, 5).requires_grad_(False))
    layer.update_layer("a", DiffFitConfig(init_weights=False), gamma=True, delta=True)
    layer.set_adapter("a")
    layer.double()
    names, values = zip(*[(n, p) for n, p in layer.named_parameters() if p.requires_grad], strict=True)

    def forward(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    options = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(
        forward, (x, *values), check_forward_ad=True, check_batched_forward_grad=True, **options
    )
    assert torch.autograd.gradgradcheck(forward, (x, *values), check_fwd_over_rev=True, **options)

    gamma, delta = (value.detach() for value in values)
    weight, bias = layer.base_layer.weight, layer.base_layer.bias

    def ours(gamma, x):
        return forward(x, gamma, delta).square().sum()

    def plain(gamma, x):
        return (gamma * (x @ weight.T + bias + delta)).square().sum()

    with torch.no_grad():  # what these functions compute does not depend on it
        x = x.clone()
        transforms = {
            "hessian": lambda f: hessian(f)(gamma, x),
            "jvp": lambda f: jvp(f, (gamma, x), (torch.ones_like(gamma), torch.ones_like(x)))[1],
            "gradients per sample": lambda f: vmap(grad(f), (None, 0))(gamma, x),
            "gradients per γ": lambda f: vmap(grad(f), (0, None))(torch.stack([gamma, 2 * gamma]), x),
        }
        for name, transform in transforms.items():
            torch.testing.assert_close(transform(ours), transform(plain), msg=name)

    def of_weight(weight):
        return functional_call(layer, {"base_layer.weight": weight}, (x,))

    _, found = jvp(of_weight, (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(found, (gamma * x.sum(-1, keepdim=True)).expand_as(found))


def test_gradient_penalties_and_gradients_per_sample(dit, inputs):
    dit, positions = dit.double(), dit.pos_embed.pos_embed.double()
    model = get_peft_model(dit, DiffFitConfig()).double()
    randomise(model)
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    x, t, labels = inputs["hidden_states"].double(), inputs["timestep"], inputs["class_labels"]

    def penalty(output):
        return torch.autograd.grad(output.square().mean(), x, create_graph=True)[0].square().sum()

    x.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        found = torch.autograd.grad(penalty(model(x, timestep=t, class_labels=labels).sample), [*weights.values()])
    base = {name: tensor.double() for name, tensor in make_dit().state_dict().items()}
    adapter = {reference.name(name): weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    output = reference.forward(x, t, labels, positions, base, adapter, heads=2, depth=4, patch=2)
    expected = torch.autograd.grad(penalty(output), [*adapter.values()])
    for name, ours, theirs in zip(adapter, found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-12, msg=name)

    def loss(weights, x, t, label):
        batch = {"timestep": t[None], "class_labels": label[None]}
        return functional_call(model, weights, (x[None],), batch).sample.square().mean()

    samples = vmap(grad(loss), (None, 0, 0, 0))({n: p.detach() for n, p in weights.items()}, x.detach(), t, labels)
    for i in range(len(x)):
        alone = torch.autograd.grad(loss(weights, x[i], t[i], labels[i]), [*weights.values()])
        for name, gradient in zip(weights, alone, strict=True):
            torch.testing.assert_close(samples[name][i], gradient, rtol=1e-5, atol=1e-9, msg=name)


def test_a_model_that_writes_into_what_gamma_gave():
    """docs/api.md says what to do: PyTorch keeps a copy of what is overwritten."""

    class InPlace(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 4)

        def forward(self, x):
            return self.layer(x).add_(1)

    torch.manual_seed(0)
    base, x = InPlace(), torch.randn(5, 3)
    model = get_peft_model(base, DiffFitConfig(gamma_modules=["layer"], init_weights=False))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).square().sum().backward()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        model(x).square().sum().backward()
    layer = base.layer
    gamma = layer.difffit_gamma["default"].detach().clone().requires_grad_()
    (gamma * (layer.base_layer(x) + layer.difffit_delta["default"]) + 1).square().sum().backward(inputs=[gamma])
    torch.testing.assert_close(layer.difffit_gamma["default"].grad, gamma.grad)


def test_gradient_checkpointing_gives_the_same_gradients(dit, inputs):
    model = get_peft_model(dit, DiffFitConfig())
    randomise(model)

    def gradients():
        losses = [model(**x).sample.square().mean() for x in (inputs, make_inputs(3))]  # two forwards, one backward
        sum(losses).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return grads

    plain = gradients()
    dit.enable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


# Label dropout


def test_labels_are_dropped_once_per_sample(dit):
    model = get_peft_model(dit, DiffFitConfig()).train()
    conditions = []
    layers = [block.norm1.linear for block in dit.transformer_blocks] + [dit.proj_out_1]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: conditions.append(args[0]))
    n = 10_000
    torch.manual_seed(0)
    with torch.no_grad():
        model(torch.zeros(n, 4, 2, 2), timestep=torch.full((n,), 10), class_labels=torch.full((n,), 3))
        dropped = [(condition - condition.mode(0).values).abs().amax(1) > 1e-6 for condition in conditions]
    assert len(dropped) == 5
    assert all(torch.equal(dropped[0], other) for other in dropped[1:])
    assert 0.09 < dropped[0].float().mean() < 0.11


# Merging


@pytest.mark.parametrize("config", [{}, EVERYWHERE, {"r": 1}], ids=["preset", "gamma everywhere", "low rank"])
def test_merge_equals_forward(dit, inputs, config):
    keys = list(dit.state_dict())
    model = get_peft_model(dit, DiffFitConfig(num_classes=3, **config))
    randomise(model)
    layer = model.base_model.model.transformer_blocks[0].attn1.to_v
    layer.difffit_gamma["default"].data[:3] = torch.tensor([0.0, -1.0, 2.0])
    expected = outputs(model, inputs)
    merged = model.merge_and_unload()
    assert type(merged) is DiTTransformer2DModel and list(merged.state_dict()) == keys
    torch.testing.assert_close(outputs(merged, inputs), expected, **CLOSE)
    first, *others = [block.norm1.emb.state_dict() for block in merged.transformer_blocks]
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_gives_the_base_back(dit, dtype):
    dit = dit.to(dtype)
    before = {name: p.clone() for name, p in dit.state_dict().items()}
    model = get_peft_model(dit, DiffFitConfig(r=1, **EVERYWHERE))
    randomise(model)
    for module in model.modules():
        if isinstance(module, DiffFitLayer) and "default" in module.difffit_gamma:
            module.difffit_gamma["default"].data[::2] = 0
    model.merge_adapter()
    assert model.base_model.model.transformer_blocks[0].attn1.to_q.base_layer.weight[0].abs().max() == 0
    model.unmerge_adapter()
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_adapters_compose_in_any_order(dit, inputs):
    model = get_peft_model(dit, DiffFitConfig(num_classes=3), adapter_name="a")
    model.add_adapter("b", DiffFitConfig(num_classes=5, gamma_layers=[0, 3]))
    randomise(model, "a")
    randomise(model, "b")
    model.base_model.set_adapter(["a", "b"])
    both = outputs(model, inputs)
    model.base_model.set_adapter(["b", "a"])
    torch.testing.assert_close(outputs(model, inputs), both, **CLOSE)
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    torch.testing.assert_close(outputs(model, inputs), both, **CLOSE)


def test_safe_merge_refuses_what_is_not_finite():
    layer = DiffFitLayer(torch.nn.Linear(4, 4))
    layer.update_layer("a", DiffFitConfig(), gamma=True, delta=True)
    layer.set_adapter("a")
    layer.difffit_gamma["a"].data[0] = float("nan")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


@pytest.mark.filterwarnings("ignore:The merge gives biases")
def test_a_merge_has_the_precision_of_the_base():
    layer = DiffFitLayer(torch.nn.Linear(4, 4, bias=False).half())
    layer.update_layer("a", DiffFitConfig(init_weights=False), gamma=True, delta=True)
    layer.set_adapter("a")
    layer.difffit_gamma.float(), layer.difffit_delta.float()
    layer.merge()
    assert layer.base_layer.bias.dtype == torch.half
    layer.unmerge()
    layer.difffit_delta["a"].data[0] = 1e6  # finite, but not in half precision
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert layer.base_layer.bias is None


@pytest.mark.filterwarnings("ignore:The merge gives biases")
@pytest.mark.parametrize(
    ("base", "x"),
    [
        (torch.nn.Linear(4, 6), torch.randn(2, 3, 4)),
        (torch.nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
        (torch.nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 9)),
        (torch.nn.Conv2d(4, 6, 3), torch.randn(4, 9, 9)),
        (Conv1D(6, 4), torch.randn(2, 3, 4)),
        (torch.nn.Conv3d(4, 6, 3), torch.randn(2, 4, 5, 5, 5)),
        (torch.nn.Linear(4, 6, bias=False), torch.randn(2, 3, 4)),
        (torch.nn.Conv1d(4, 6, 3, bias=False), torch.randn(2, 4, 9)),
        (torch.nn.Conv2d(4, 6, 3, bias=False), torch.randn(2, 4, 9, 9)),
        (torch.nn.Conv3d(4, 6, 3, bias=False), torch.randn(2, 4, 5, 5, 5)),
        (torch.nn.LayerNorm(4), torch.randn(2, 3, 4)),
        (torch.nn.GroupNorm(2, 4), torch.randn(2, 4, 5, 5)),
        (torch.nn.RMSNorm(4), torch.randn(2, 3, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_layer_follows_the_formula(base, x):
    layer = DiffFitLayer(base)
    had_bias = getattr(base, "bias", None) is not None
    layer.update_layer("a", DiffFitConfig(init_weights=False), gamma=True, delta=had_bias or takes_bias(base))
    layer.set_adapter("a")
    y = base(x)
    dim = y.shape.index(len(layer.difffit_gamma["a"]))
    y = y.movedim(dim, -1)
    delta = layer.difffit_delta.get("a", 0)
    expected = layer.difffit_gamma["a"] * (y + delta)
    torch.testing.assert_close(layer(x), expected.movedim(-1, dim))
    layer.merge()
    torch.testing.assert_close(layer.base_layer(x), expected.movedim(-1, dim), **CLOSE)
    assert had_bias or "a" not in layer.difffit_delta or not layer.base_layer.bias.requires_grad  # it is the base's now
    layer.unmerge()
    assert torch.equal(base(x).movedim(dim, -1), y) and (getattr(base, "bias", None) is not None) == had_bias


class Scaled(torch.nn.Linear):
    """Takes more than its input."""

    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


@pytest.mark.parametrize("state", ["adapted", "disabled", "merged"])
def test_a_layer_takes_what_its_base_takes(state):
    layer, x = DiffFitLayer(Scaled(4, 6)), torch.randn(2, 4)
    layer.update_layer("a", DiffFitConfig(init_weights=False), gamma=True, delta=True)
    layer.set_adapter("a")
    gamma, delta = layer.difffit_gamma["a"], layer.difffit_delta["a"]
    plain = layer.base_layer(x, 2.0)
    expected = {"adapted": gamma * (plain + delta), "disabled": plain, "merged": 2 * gamma * (plain / 2 + delta)}[state]
    layer.enable_adapters(state != "disabled")
    if state == "merged":
        layer.merge()
    for found in (layer(x, 2.0), layer(x, scale=2.0), layer(x=x, scale=2.0)):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_what_a_hook_saw_of_the_base_stays_as_it_was():
    layer, seen = DiffFitLayer(torch.nn.Linear(4, 6)), []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer.update_layer("a", DiffFitConfig(init_weights=False), gamma=True)
    layer.set_adapter("a")
    layer.requires_grad_(False)  # γ multiplies in place then, where it may
    x = torch.randn(2, 4)
    layer(x)
    assert torch.equal(seen[0], layer.base_layer(x))


def test_random_values_have_the_spread_that_is_promised():
    """γ within a half of 1; δ and B normal; A as in LoRA, and of the same spread where an adapter starts neutral."""
    torch.manual_seed(0)
    for neutral in (True, False):
        layer = DiffFitLayer(torch.nn.Linear(900, 400))
        layer.update_layer("a", DiffFitConfig(init_weights=neutral), gamma=True, delta=True, rank=8)
        A, B = layer.difffit_A["a"], layer.difffit_B["a"]
        assert A.abs().max() <= 900**-0.5 and abs(A.mean()) < 1e-3
        assert A.std().item() == pytest.approx((3 * 900) ** -0.5, rel=0.05)
        gamma, normal = layer.difffit_gamma["a"], torch.cat([layer.difffit_delta["a"], B.flatten()])
        if neutral:
            assert (gamma == 1).all() and not normal.any()
        else:
            assert gamma.min() >= 0.5 and gamma.max() <= 1.5 and gamma.mean().item() == pytest.approx(1, abs=0.05)
            assert gamma.std().item() == pytest.approx(12**-0.5, rel=0.1)
            assert abs(normal.mean()) < 0.1 and normal.std().item() == pytest.approx(1, rel=0.1)


# Layers without a bias


def flux2() -> tuple[torch.nn.Module, dict]:
    tiny = TINY["Flux.2"]
    return tiny.make(), tiny.inputs()


def test_new_biases_are_off_by_default_and_on_every_linear_layer_where_asked_for():
    base, inputs = flux2()
    expected = outputs(base, inputs)
    without = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    assert without and all(m.bias is None for m in without.values())
    default = get_peft_model(base, DiffFitConfig())
    assert not any("difffit_delta" in name for name, _ in default.named_parameters())
    count, base = trained(default), default.unload()
    model = get_peft_model(base, DiffFitConfig(new_biases=True))
    assert trained(model) == count + sum(m.out_features for m in without.values())
    assert torch.equal(outputs(model, inputs), expected)
    named = get_peft_model(flux2()[0], DiffFitConfig(new_biases=True, target_modules=["attn.to_q"], gamma_modules=[]))
    assert trained(named) == 2 * 16
    with pytest.raises(
        ValueError, match="leave no layer .* to train. Layers without a bias get δ with new_biases=True"
    ):
        get_peft_model(flux2()[0], DiffFitConfig(target_modules=["attn.to_q"], gamma_modules=[]))


@pytest.mark.filterwarnings("ignore:The merge gives biases")
def test_new_biases_through_every_verb(tmp_path):
    base, inputs = flux2()
    plain = outputs(base, inputs)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = {"new_biases": True}
    model = get_peft_model(base, DiffFitConfig(**config), "a").eval()
    model.add_adapter("b", DiffFitConfig(target_modules=["attn.to_q"], **config))
    alone = {}
    for name in "ab":
        randomise(model, name, seed=ord(name))
        model.set_adapter(name)
        alone[name] = outputs(model, inputs)
    mixed = outputs(model, inputs | {"adapter_names": ["b", "__base__"]})
    torch.testing.assert_close(mixed, torch.stack([alone["b"][0], plain[1]]), **CLOSE)

    model.base_model.set_adapter(["a", "b"])
    model.set_scale("a", 0.5)
    both = outputs(model, inputs)
    model.add_weighted_adapter(["a", "b"], [0.5, 1.0], "blend")
    model.set_adapter("blend")
    torch.testing.assert_close(outputs(model, inputs), both, **CLOSE)
    model.save_pretrained(tmp_path, save_embedding_layers=False, selected_adapters=["blend"])
    again = PeftModel.from_pretrained(flux2()[0], tmp_path / "blend")
    torch.testing.assert_close(outputs(again, inputs), both, **CLOSE)

    model.merge_adapter(["a"])
    model.merge_adapter(["b"])  # into what is merged
    torch.testing.assert_close(outputs(model, inputs), both, **CLOSE)
    merged = copy.deepcopy(model)
    torch.testing.assert_close(outputs(merged, inputs), both, **CLOSE)
    model.add_adapter("c", DiffFitConfig())  # while merged: the biases are none of the base's
    assert not any("difffit_delta.c" in name for name, _ in model.named_parameters())
    model.set_scale("a", 0.0)
    model.set_scale("b", 0.0)
    model.base_model.set_adapter(["a", "b"])
    assert torch.equal(outputs(model, inputs), plain)
    for adapted in (model, merged):
        unloaded = adapted.unload()
        assert [*unloaded.state_dict()] == [*state]
        assert all(torch.equal(tensor, state[name]) for name, tensor in unloaded.state_dict().items())
        assert torch.equal(outputs(unloaded, inputs), plain)


def test_a_merge_of_new_biases_says_that_diffusers_does_not_load_them(tmp_path):
    base, inputs = flux2()
    keys = {*base.state_dict()}
    without = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    model = get_peft_model(base, DiffFitConfig(new_biases=True))
    randomise(model)
    expected = outputs(model, inputs)
    with pytest.warns(UserWarning, match="from_pretrained makes its class without them"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, inputs), expected, **CLOSE)
    assert type(merged) is Flux2Transformer2DModel
    added = {*merged.state_dict()} - keys
    assert added == {f"{name}.bias" for name in without}

    merged.save_pretrained(tmp_path)
    loaded = Flux2Transformer2DModel.from_pretrained(tmp_path)
    assert {*loaded.state_dict()} == keys and not torch.allclose(outputs(loaded, inputs), expected, atol=1e-2)
    for name in without:  # what is saved is whole
        layer = loaded.get_submodule(name)
        layer.bias = torch.nn.Parameter(torch.empty(layer.out_features))
    loaded.load_state_dict(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert torch.equal(outputs(loaded, inputs), outputs(merged, inputs))


# Half precision, copies


def test_a_bf16_base_trains_and_keeps_its_dtype(dit, inputs):
    model = get_peft_model(dit.to(torch.bfloat16), DiffFitConfig(r=1))
    inputs["hidden_states"] = inputs["hidden_states"].to(torch.bfloat16)
    weights = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in weights} == {torch.float32} and model.dtype == torch.bfloat16
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(5):
        output = model(**inputs).sample
        assert output.dtype == torch.bfloat16
        loss = output.float().square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(dit, inputs, duplicate):
    base = outputs(dit, inputs)
    model = get_peft_model(dit, DiffFitConfig())
    randomise(model)
    expected = outputs(model, inputs)
    other = duplicate(model)
    assert torch.equal(outputs(other, inputs), expected)
    assert torch.equal(outputs(other.unload(), inputs), base)
    assert torch.equal(outputs(model, inputs), expected)


def test_positional_and_keyword_calls_agree(dit, inputs):
    model = get_peft_model(dit, DiffFitConfig())
    randomise(model)
    expected = outputs(model, inputs)
    with torch.no_grad():
        assert torch.equal(model(*inputs.values()).sample, expected)
        assert torch.equal(model(*inputs.values(), return_dict=False)[0], expected)


def test_the_graph_has_no_break(dit, inputs):
    model = get_peft_model(dit, DiffFitConfig(num_classes=3))
    randomise(model)
    expected = outputs(model, inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, inputs), expected, **CLOSE)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_embedders_that_differ_are_left_alone(dit, inputs, block):
    dit.transformer_blocks[block].norm1.emb.class_embedder.embedding_table.weight.data[3] += 1
    expected = outputs(dit, inputs)
    with pytest.warns(UserWarning, match="4 timestep and class embedders .* differ"):
        assert not share(dit)
        model = get_peft_model(dit, DiffFitConfig())
    assert torch.equal(outputs(model, inputs), expected)
    assert sum("embedding_table.difffit_delta" in name for name, _ in model.named_parameters()) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 8])
def test_embedders_are_compared_bit_by_bit(dtype, size):
    """Also where they lie at odd places of a mapped file, and the size is no multiple of eight bytes."""

    def module(values):
        linear = torch.nn.Linear(size, 1, bias=False)
        linear.weight = torch.nn.Parameter(values.view(1, size))
        return linear

    one = torch.randn(size).to(dtype)
    other = torch.cat([torch.zeros(1, dtype=dtype), one])[1:]
    assert _equal(module(one), module(other))
    other[-1] += 1
    assert not _equal(module(one), module(other))
    assert not _equal(module(one), module(one.double()))


def test_embedders_of_other_shapes_differ_and_those_without_values_do_not():
    assert not _equal(
        torch.nn.Embedding(2, 3, _weight=torch.zeros(2, 3)), torch.nn.Embedding(3, 2, _weight=torch.zeros(3, 2))
    )
    table = torch.nn.Embedding(3, 2)
    without = copy.deepcopy(table).to("meta")
    assert _equal(table, table) and _equal(table, without) and _equal(without, table)


def test_a_larger_grid_uses_positions_of_the_old_one():
    dit = make_dit()
    model = get_peft_model(dit, DiffFitConfig(sample_size=16))
    assert dit.config.sample_size == 16
    positions = dit.pos_embed.pos_embed.view(8, 8, -1)
    torch.testing.assert_close(positions[::2, ::2], make_dit().pos_embed.pos_embed.view(4, 4, -1))
    wide = make_inputs(side=16)
    assert torch.equal(outputs(model, wide), outputs(make_dit(), wide))  # Diffusers computes the same, every forward
    assert model.unload().config.sample_size == 8
    assert torch.equal(dit.pos_embed.pos_embed, make_dit().pos_embed.pos_embed)


def test_scale_factors_keep_no_activations_of_their_own():
    """γ ⊙ y is kept for the backward pass by what follows it, and y is not, but for the output of attention."""

    def kept(config: DiffFitConfig) -> int:
        model = get_peft_model(make_dit(), config).train()
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**{name: value.repeat(10, *[1] * (value.dim() - 1)) for name, value in make_inputs().items()})
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    activation = 50 * 16 * 16 * 4  # batch, tokens, channels, bytes
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    extra = kept(DiffFitConfig(gamma_modules=layers)) - kept(DiffFitConfig(gamma_modules=[]))
    assert extra < 4 * 1.5 * activation  # 4 blocks, where one y for each γ would be 9 activations in a block


@pytest.mark.parametrize("frozen", [False, True])  # in a frozen layer, γ is on the rows of the weight
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gamma_of_zero_gets_its_gradient(dtype, frozen):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 4)
    model = get_peft_model(torch.nn.Sequential(layer), DiffFitConfig(target_modules=["0"], gamma_modules=["0"]))
    layer.to(dtype).requires_grad_(not frozen)
    gamma = model.base_model.model[0].difffit_gamma["default"]
    gamma.data = torch.tensor([0.0, 0.125, -2.0, 1.0])
    x, grad = torch.randn(5, 3, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    output = model(x)
    output.backward(grad)
    plain = layer(x).float()
    rounding = {} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.05}
    torch.testing.assert_close(output.float(), gamma * plain, **(rounding or {"rtol": 1e-6, "atol": 1e-6}))
    torch.testing.assert_close(gamma.grad, (grad.float() * plain).sum(0).detach(), **rounding)


def test_gamma_is_on_the_rows_of_a_frozen_weight_that_is_smaller_than_its_input():
    """Otherwise on the outputs. The gradients are the same."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5)
    model = get_peft_model(torch.nn.Sequential(layer), DiffFitConfig(target_modules=["0"], gamma_modules=["0"]))
    randomise(model)
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def gradients(rows, frozen=True):
        layer.requires_grad_(frozen)
        layer.weight.requires_grad_(not frozen)
        x = torch.linspace(-1, 1, rows * 6).sin().view(rows, 6).requires_grad_()
        output = model(x)
        function = type(output.grad_fn).__name__
        return function, torch.autograd.grad(output.square().sum(), [x, *values.values()])

    (few, _), (many, ours), (trained, theirs) = gradients(6), gradients(7), gradients(7, frozen=False)
    assert (few, many, trained) == ("TimesGammaBackward", "LinearTimesGammaBackward", "TimesGammaBackward")
    torch.testing.assert_close(ours, theirs)
