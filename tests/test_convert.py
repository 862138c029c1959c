"""DiffFit weights of the original DiT become an adapter that computes the same, and come back as they were."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import NULL, make_dit, make_pipeline, randomise
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from difffit_peft import DiffFitConfig, DiffFitDiTPipeline
from difffit_peft.families.dit.convert import convert_original_to_peft, convert_peft_to_original

PUBLISHED = ["bias", "norm", "gamma", "y_embed"]
GAMMAS = ["attn.gamma1", "attn.gamma2", "gamma1", "gamma2"]  # those of MinimaxDiffusion and Diffusion-Tuning
DEPTH, WIDTH, HEADS, PATCH, CHANNELS, SIDE = 4, 16, 2, 2, 4, 8


class Layers(nn.Module):
    """Layers by name, and two scale factors, parameters of these sizes, or the number 1."""

    def __init__(self, gamma1: int | None = None, gamma2: int | None = None, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.ones(size)) if size else 1.0 for size in (gamma1, gamma2))


class OriginalDiT(nn.Module):
    """The original DiT in its own names, with DiffFit's scale factors in the first half of the blocks.

    The function is that of the paper (Peebles & Xie 2023); `frequencies` and `eps` are what Diffusers has otherwise.
    """

    def __init__(self, classes: int = NULL, gammas: list[str] = GAMMAS, frequencies: int = 128, eps: float = 1e-6):
        super().__init__()
        self.frequencies, self.eps = frequencies, eps
        self.x_embedder = Layers(proj=nn.Conv2d(CHANNELS, WIDTH, PATCH, stride=PATCH))
        self.t_embedder = Layers(mlp=nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)))
        self.y_embedder = Layers(embedding_table=nn.Embedding(classes + 1, WIDTH))
        self.pos_embed = nn.Parameter(positions(SIDE // PATCH), requires_grad=False)  # (1, T, D)
        self.blocks = nn.ModuleList(self.block(gammas if i < DEPTH // 2 else []) for i in range(DEPTH))
        self.final_layer = Layers(linear=nn.Linear(WIDTH, PATCH**2 * 2 * CHANNELS), adaLN_modulation=modulation(2))

    @staticmethod
    def block(gammas: list[str]) -> nn.Module:
        def factors(prefix: str, **sizes: int) -> dict[str, int]:
            return {name: size for name, size in sizes.items() if prefix + name in gammas}

        qkv, proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        fc1, fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        return Layers(
            attn=Layers(qkv=qkv, proj=proj, **factors("attn.", gamma1=3 * WIDTH, gamma2=WIDTH)),
            mlp=Layers(fc1=fc1, fc2=fc2, **factors("mlp.", gamma1=4 * WIDTH, gamma2=WIDTH)),
            adaLN_modulation=modulation(6),
            **factors("", gamma1=WIDTH, gamma2=WIDTH),
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (N, C, H, W), t (N,), y (N,) to (N, 2C, H, W)."""
        angles = t[:, None] * 10000 ** (-torch.arange(128) / self.frequencies)
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], 1))  # (N, D)
        c = c + self.y_embedder.embedding_table(y)
        x = self.x_embedder.proj(x).flatten(2).mT + self.pos_embed  # (N, T, D)
        for block in self.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c)[:, None].chunk(6, -1)  # (N, 1, D)
            h = attention(block.attn, norm(x, 1e-6) * (1 + scale1) + shift1)
            x = x + block.gamma1 * gate1 * h
            h = block.mlp.gamma1 * block.mlp.fc1(norm(x, self.eps) * (1 + scale2) + shift2)  # (N, T, 4D)
            h = block.mlp.gamma2 * block.mlp.fc2(F.gelu(h, approximate="tanh"))
            x = x + block.gamma2 * gate2 * h
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        x = self.final_layer.linear(norm(x, 1e-6) * (1 + scale) + shift)  # (N, T, P²·2C)
        x = x.view(len(x), SIDE // PATCH, SIDE // PATCH, PATCH, PATCH, 2 * CHANNELS)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 2 * CHANNELS, SIDE, SIDE)


def attention(attn: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (attn.gamma1 * attn.qkv(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, D/heads)
    h = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return attn.gamma2 * attn.proj(h.transpose(1, 2).flatten(2))


def norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def modulation(parts: int) -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, parts * WIDTH))


def positions(side: int) -> Tensor:
    """Half of the channels for the column, half for the row: (1, side², D)."""
    angles = torch.arange(side)[:, None] * 10000 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4))
    table = torch.cat([angles.sin(), angles.cos()], 1)  # (side, D/2)
    return torch.cat([table.repeat(side, 1), table.repeat_interleave(side, 0)], 1)[None]


def original(dit: nn.Module, **kwargs) -> OriginalDiT:
    """The original DiT that Diffusers' is a conversion of, its class table cut to the classes asked for."""
    model = OriginalDiT(**kwargs).eval()
    state = dit.state_dict()
    embedder = "transformer_blocks.0.norm1.emb"

    def copy(layer: nn.Module, *names: str) -> None:
        for kind in ("weight", "bias"):
            getattr(layer, kind).data.copy_(torch.cat([state[f"{name}.{kind}"] for name in names]))

    table = state[f"{embedder}.class_embedder.embedding_table.weight"]
    rows = model.y_embedder.embedding_table.weight
    rows.data.copy_(torch.cat([table[: len(rows) - 1], table[-1:]]))
    copy(model.x_embedder.proj, "pos_embed.proj")
    copy(model.t_embedder.mlp[0], f"{embedder}.timestep_embedder.linear_1")
    copy(model.t_embedder.mlp[2], f"{embedder}.timestep_embedder.linear_2")
    for i, block in enumerate(model.blocks):
        name = f"transformer_blocks.{i}"
        copy(block.adaLN_modulation[1], f"{name}.norm1.linear")
        copy(block.attn.qkv, *(f"{name}.attn1.to_{p}" for p in "qkv"))
        copy(block.attn.proj, f"{name}.attn1.to_out.0")
        copy(block.mlp.fc1, f"{name}.ff.net.0.proj")
        copy(block.mlp.fc2, f"{name}.ff.net.2")
    copy(model.final_layer.adaLN_modulation[1], "proj_out_1")
    copy(model.final_layer.linear, "proj_out_2")
    return model


def published(model: nn.Module) -> dict[str, Tensor]:
    """What the published filter selects."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if any(word in n for word in PUBLISHED)}


def train(model: OriginalDiT) -> dict[str, Tensor]:
    """Stands for training: moves what DiffFit trains, and returns it."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if any(word in name for word in PUBLISHED):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return published(model)


def adapted(state_dict: dict, dit: nn.Module) -> PeftModel:
    config, weights = convert_original_to_peft(state_dict, dit)
    model = get_peft_model(dit, config)
    set_peft_model_state_dict(model, weights)
    return model.eval()


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(*inputs.values()) if isinstance(model, OriginalDiT) else model(**inputs).sample


def as_the_original(**overrides) -> nn.Module:
    """Diffusers' DiT with the original's timestep frequencies and ε."""
    dit = make_dit(norm_eps=1e-6, **overrides)
    for block in dit.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return dit


# The same function

CONVENTIONS = {"original": (as_the_original, {}), "Diffusers": (make_dit, {"frequencies": 127, "eps": 1e-5})}
ALL_GAMMAS = [*GAMMAS, "mlp.gamma1", "mlp.gamma2"]
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("gammas", [[], GAMMAS, ["mlp.gamma1", "mlp.gamma2"], ALL_GAMMAS])
def test_the_adapted_model_computes_what_the_original_does(convention, gammas, inputs):
    make, conventions = CONVENTIONS[convention]
    model = original(make(), gammas=gammas, **conventions)
    before = outputs(model, inputs)
    torch.testing.assert_close(outputs(make(), inputs), before, rtol=0, atol=1e-5)
    state_dict = train(model)
    assert (outputs(model, inputs) - before).abs().mean() > 0.1
    torch.testing.assert_close(outputs(adapted(state_dict, make()), inputs), outputs(model, inputs), rtol=0, atol=1e-5)


def test_diffusers_base_is_not_quite_the_originals(inputs):
    assert (outputs(make_dit(), inputs) - outputs(original(make_dit()), inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("classes", [1, 3, NULL - 1])
def test_a_table_of_fewer_classes_has_its_null_row_last(classes, inputs):
    model = original(as_the_original(), classes=classes)
    state_dict = train(model)
    config, _ = convert_original_to_peft(state_dict, as_the_original())
    assert config.num_classes == classes
    labels = torch.tensor([0, classes, classes - 1, 0, classes])
    expected = outputs(model, {**inputs, "class_labels": labels})
    labels = labels.where(labels < classes, NULL)
    found = outputs(adapted(state_dict, as_the_original()), {**inputs, "class_labels": labels})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "gammas"),
    [
        ({}, GAMMAS),
        ({"gamma_modules": LAYERS, "gamma_layers": [0, 1]}, ["attn.gamma1", "attn.gamma2", "mlp.gamma1", "mlp.gamma2"]),
        ({"gamma_modules": LAYERS[:4], "gamma_layers": [0, 1]}, ["attn.gamma1", "attn.gamma2"]),
        ({"gamma_modules": LAYERS[5:], "gamma_layers": [0, 1]}, ["mlp.gamma2"]),
    ],
    ids=["preset", "attention and feed-forward", "attention", "fc2"],
)
def test_an_adapter_of_ours_becomes_an_original_that_computes_the_same(config, gammas, inputs):
    adapter = get_peft_model(as_the_original(), DiffFitConfig(num_classes=3, **config))
    randomise(adapter)
    adapter.eval()
    model = original(as_the_original(), classes=3, gammas=gammas)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    state_dict = convert_peft_to_original(adapter)
    assert not any(tensor.requires_grad for tensor in state_dict.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state_dict().items())
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    assert not unexpected and not {*missing} & {*published(model)}
    labels = torch.tensor([0, 2, 3, 1, 1])
    expected = outputs(adapter, {**inputs, "class_labels": labels.where(labels < 3, NULL)})
    torch.testing.assert_close(outputs(model, {**inputs, "class_labels": labels}), expected, rtol=0, atol=1e-5)


# There and back


def round_trip(state_dict: dict, dit: nn.Module) -> dict[str, Tensor]:
    return convert_peft_to_original(adapted(state_dict, dit))


def vectors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with the product of the scale factors of one vector in the place of each of them."""
    result = dict(state_dict)
    for i in range(DEPTH):
        for layer, own in (("attn.gamma2", "gamma1"), ("mlp.gamma2", "gamma2")):
            factors = [result.pop(f"blocks.{i}.{name}", None) for name in (layer, own)]
            if found := [factor.float() for factor in factors if factor is not None]:
                result[f"blocks.{i}.{layer}"] = math.prod(found)
    return result


def base_values(dit: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    classes = len(state_dict["y_embedder.embedding_table.weight"]) - 1
    return published(original(dit, classes=classes, gammas=ALL_GAMMAS))


@pytest.mark.parametrize("classes", [3, NULL])
@pytest.mark.parametrize("gammas", [[], GAMMAS, ALL_GAMMAS])
def test_what_moved_by_less_than_half_comes_back_exactly(classes, gammas):
    state_dict = published(original(make_dit(), classes=classes, gammas=gammas))
    generator = torch.Generator().manual_seed(4)
    for name, tensor in state_dict.items():
        if "gamma" in name:  # any value
            tensor += torch.randn(tensor.shape, generator=generator)
        else:  # from half the base's value to twice
            tensor *= 0.5 + 1.5 * torch.rand(tensor.shape, generator=generator)
    found = round_trip(state_dict, make_dit())
    if gammas != ALL_GAMMAS:  # which no public code has
        assert found.keys() == state_dict.keys()
    found, expected = vectors(found), vectors(state_dict)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_preset_is_the_published_layout_and_comes_back_exactly():
    model = get_peft_model(make_dit(), DiffFitConfig(num_classes=3))
    randomise(model)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    state_dict = convert_peft_to_original(model)
    assert {*state_dict} == {*published(original(make_dit(), classes=3, gammas=GAMMAS))}
    config, weights = convert_original_to_peft(state_dict, make_dit())
    assert (config.gamma_layers, config.num_classes) == ([0, 1], 3)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        if "gamma" in name:
            assert torch.equal(tensor, expected[name])
        else:  # what was rounded is b + δ
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_what_moved_further_comes_back_within_the_bound_and_no_delta_does_better():
    state_dict = {name: torch.randn_like(tensor) for name, tensor in published(original(make_dit())).items()}
    found, base = vectors(round_trip(state_dict, make_dit())), base_values(make_dit(), state_dict)
    state_dict = vectors(state_dict)
    inexact = 0
    for name, tensor in state_dict.items():
        error = (found[name].double() - tensor.double()).abs()
        bound = 2**-23 * (tensor.double() - base[name].double()).abs()
        assert (error <= (0 if "gamma" in name else bound)).all()
        wrong = found[name] != tensor
        inexact += int(wrong.sum())
        # b + δ grows with δ, so between neighbouring δ that give less and more than b' there is none that gives b'
        b, after = base[name][wrong], tensor[wrong]
        delta = after - b
        below, above = (b + torch.nextafter(delta, torch.full_like(delta, side)) for side in (-math.inf, math.inf))
        assert ((below < after) & (after < above)).all()
    assert inexact > 0


def test_a_base_of_zero_gives_any_value_back_exactly():
    dit = make_dit()
    for block in dit.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.bias)
    state_dict = train(original(dit))
    found = round_trip(state_dict, dit)
    assert all(torch.equal(found[n], state_dict[n]) for n in state_dict if "adaLN" in n and n.startswith("blocks"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_come_back_exactly_in_their_precision(dtype):
    state_dict = {name: tensor.to(dtype) for name, tensor in train(original(make_dit())).items()}
    config, weights = convert_original_to_peft(state_dict, make_dit())
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    found, expected = vectors(round_trip(state_dict, make_dit())), vectors(state_dict)
    assert all(torch.equal(found[name].to(tensor.dtype), tensor) for name, tensor in expected.items())


def test_a_half_precision_base():
    state_dict = train(original(make_dit()))
    dit = make_dit().to(torch.bfloat16)
    found, state_dict = vectors(round_trip(state_dict, dit)), vectors(state_dict)
    for name, before in base_values(make_dit().to(torch.bfloat16), state_dict).items():
        if name in state_dict:
            assert ((found[name] - state_dict[name]).abs() <= 2**-23 * (state_dict[name] - before).abs()).all()


def test_a_scale_factor_of_1_stays():
    state_dict = train(original(make_dit()))
    for name in ("blocks.0.gamma1", "blocks.0.gamma2", "blocks.1.attn.gamma1"):
        state_dict[name].fill_(1)
    found = round_trip(state_dict, make_dit())
    assert found.keys() == state_dict.keys()
    assert all((found[name] == 1).all() for name in ("blocks.0.gamma1", "blocks.0.gamma2", "blocks.1.attn.gamma1"))


def test_a_merged_adapter_and_one_of_several():
    state_dict = train(original(make_dit()))
    model = adapted(state_dict, make_dit())
    expected = convert_peft_to_original(model)
    model.add_adapter("other", DiffFitConfig(num_classes=2, gamma_modules=["to_q"]))
    randomise(model, "other")
    model.base_model.set_scale("default", 0.3)
    model.merge_adapter(["default", "other"])
    found = convert_peft_to_original(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
    assert len(convert_peft_to_original(model, "other")["y_embedder.embedding_table.weight"]) == 3


# Which tensors


def test_the_published_filter_selects_what_is_read_and_written():
    model = original(make_dit())
    state_dict = train(model)
    assert {*round_trip(state_dict, make_dit())} == {*published(model)}
    config, weights = convert_original_to_peft(state_dict, make_dit())
    default = get_peft_model_state_dict(get_peft_model(make_dit(), config), save_embedding_layers=False)
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in default.items()}
    assert config.target_modules is None and config.exclude_modules is None and config.gamma_layers == [0, 1]


def test_only_what_was_trained_gets_an_adapter():
    state_dict = published(original(make_dit()))
    for name in [name for name in state_dict if "gamma" in name]:
        del state_dict[name]
    state_dict["blocks.2.attn.qkv.bias"][WIDTH : 2 * WIDTH] += 1
    state_dict["final_layer.linear.bias"] += 1
    config, weights = convert_original_to_peft(state_dict, make_dit())
    names = ["transformer_blocks.2.attn1.to_k", "proj_out_2"]
    assert {*weights} == {f"base_model.model.{name}.difffit_delta" for name in names}
    model = adapted(state_dict, make_dit())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == WIDTH + 32
    found = convert_peft_to_original(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in state_dict.items())


def test_bitfit_without_the_class_table():
    state_dict = {name: tensor for name, tensor in train(original(make_dit())).items() if name.endswith("bias")}
    config, _ = convert_original_to_peft(state_dict, make_dit())
    assert config.exclude_modules == ["norm1_emb.class_embedder.embedding_table"] and config.gamma_modules == []
    found = round_trip(state_dict, make_dit())
    table = make_dit().transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    assert torch.equal(found.pop("y_embedder.embedding_table.weight"), table)
    assert found.keys() == state_dict.keys()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("nesting", ["", "model", "ema"])
def test_checkpoints_of_training_scripts(prefix, nesting):
    model = original(make_dit())
    expected = convert_original_to_peft(train(model), make_dit())
    checkpoint = {prefix + name: tensor for name, tensor in model.state_dict().items()}  # the frozen weights too
    if nesting:
        other = dict.fromkeys(checkpoint, torch.tensor(0.0))
        checkpoint = {"model": other, "opt": {}, "args": None, nesting: checkpoint}
    config, weights = convert_original_to_peft(checkpoint, make_dit())
    assert config == expected[0]
    assert weights.keys() == expected[1].keys() and all(torch.equal(weights[n], expected[1][n]) for n in weights)


def test_frozen_weights_may_have_drifted_in_an_average():
    model = original(make_dit())
    train(model)
    average = model.state_dict()
    frozen = average["blocks.0.mlp.fc1.weight"]
    frozen *= 1 + 1e-4 * torch.randn(frozen.shape)
    convert_original_to_peft({"ema": average}, make_dit())
    convert_original_to_peft({"ema": average}, make_dit().to(torch.bfloat16))
    convert_original_to_peft({name: tensor.to(torch.bfloat16) for name, tensor in average.items()}, make_dit())


# What is refused


def refused(change, match: str, dit: nn.Module | None = None) -> None:
    state_dict = {name: tensor.clone() for name, tensor in original(make_dit()).state_dict().items()}
    change(state_dict)
    with pytest.raises(ValueError, match=match):
        convert_original_to_peft(state_dict, dit or make_dit())


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (
            "blocks.0.gamma_attn1",
            torch.ones(WIDTH),
            "1 tensors have no place.* 4 blocks .*instance blocks.0.gamma_attn1",
        ),
        ("blocks.4.attn.qkv.bias", torch.ones(3 * WIDTH), "instance blocks.4.attn.qkv.bias"),
        ("blocks.0.attn.qkv.biass", torch.ones(48), "Did you mean 'blocks.0.attn.qkv.bias'"),
        ("blocks.3.mlp.fc1.bias", None, r"1 tensors are missing, for instance blocks.3.mlp.fc1.bias"),
        ("blocks.1.attn.gamma2", None, "instance blocks.1.attn.gamma2"),
        ("blocks.3.gamma1", torch.ones(WIDTH), "3 tensors are missing, for instance blocks.3.attn.gamma1"),
        ("blocks.0.attn.gamma1", torch.ones(WIDTH), r"attn.gamma1 has the shape \(16,\), but this base needs \(48,\)"),
        ("blocks.0.gamma1", torch.ones(1), r"gamma1 has the shape \(1,\), but this base needs \(16,\)"),
        ("x_embedder.proj.bias", torch.tensor(0.0), r"x_embedder.proj.bias has the shape \(\)"),
        ("pos_embed", torch.ones(1, 64, WIDTH), r"pos_embed has the shape \(1, 64, 16\)"),
        ("y_embedder.embedding_table.weight", torch.ones(1, WIDTH), r"needs \(1001, 16\), or fewer rows but two"),
        ("y_embedder.embedding_table.weight", torch.ones(1002, WIDTH), r"shape \(1002, 16\)"),
        ("y_embedder.embedding_table.weight", torch.ones(5, 8), r"shape \(5, 8\)"),
        ("final_layer.linear.bias", torch.full((32,), torch.nan), "final_layer.linear.bias holds values .* not finite"),
        ("blocks.0.attn.proj.bias", torch.ones(WIDTH, dtype=torch.int8), "proj.bias' is torch.int8: must be a float"),
        ("blocks.0.attn.proj.bias", [0.0], "'blocks.0.attn.proj.bias' is list"),
        ("blocks.2.mlp.fc2.weight", torch.ones(WIDTH, 4 * WIDTH), "blocks.2.mlp.fc2.weight.* is not the base's"),
    ],
)
def test_tensors_are_refused_by_name(name, value, match):
    def change(state_dict):
        state_dict.pop(name, None)
        if value is not None:
            state_dict[name] = value

    refused(change, match)


def test_an_empty_dict_is_refused():
    refused(dict.clear, "25 tensors are missing, for instance blocks.0.adaLN_modulation.1.bias")


def test_weights_of_another_base_are_refused():
    other = make_dit()
    with torch.no_grad():
        other.proj_out_2.weight *= 1.1
    refused(lambda state_dict: None, "final_layer.linear.weight, which DiffFit leaves frozen, is not the base's", other)


def test_bases_that_are_no_original_dit_are_refused():
    refused(lambda state_dict: None, "is a PeftModel: must be a DiT", get_peft_model(make_dit(), DiffFitConfig()))
    refused(lambda state_dict: None, "norm_elementwise_affine=True", make_dit(norm_elementwise_affine=True))
    refused(lambda state_dict: None, "attention_bias=False", make_dit(attention_bias=False))
    refused(lambda state_dict: None, "has no values, as it is on the meta device", make_dit().to("meta"))
    apart = make_dit()
    nn.init.zeros_(apart.transformer_blocks[2].norm1.emb.timestep_embedder.linear_1.bias)
    refused(lambda state_dict: None, "embedders of the base's blocks differ", apart)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"gamma_modules": ["proj_out_2"]}, "no name for proj_out_2.difffit_gamma"),
        ({"gamma_modules": ["norm1.linear"]}, "no name for transformer_blocks.0.norm1.linear.difffit_gamma"),
        ({"modules_to_save": ["proj_out_2"]}, "proj_out_2 is a ModulesToSaveWrapper: convert on a model without it"),
        ({"sample_size": 16}, "from latents of side 8 to side 16, with rescaled positions"),
    ],
)
def test_adapters_that_the_original_has_no_name_for_are_refused(config, match):
    model = get_peft_model(make_dit(), DiffFitConfig(**config))
    randomise(model)
    with pytest.raises(ValueError, match=match):
        convert_peft_to_original(model)


def test_what_is_no_adapter_is_refused():
    model = get_peft_model(make_dit(), DiffFitConfig())
    with pytest.raises(ValueError, match=r"'other' is not a DiffFit adapter of this PeftModel: it has \['default'\]"):
        convert_peft_to_original(model, "other")
    with pytest.raises(ValueError, match="is not a DiffFit adapter of this DiTTransformer2DModel"):
        convert_peft_to_original(make_dit())
    with pytest.raises(ValueError, match="'default' is not a DiffFit adapter"):
        convert_peft_to_original(get_peft_model(make_dit(), LoraConfig(target_modules=["to_q"])))


# Files


def test_the_base_is_left_as_it_is():
    dit = make_dit()
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    convert_original_to_peft(train(original(dit)), dit)
    assert dit.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items())


def test_the_saved_adapter_loads_with_peft_and_the_pipeline(tmp_path, inputs):
    state_dict = train(original(make_dit(), classes=3))
    model = adapted(state_dict, make_dit())
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make_dit(), tmp_path)
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    pipe = DiffFitDiTPipeline.from_pipe(make_pipeline())
    pipe.load_difffit_weights(tmp_path)
    assert torch.equal(outputs(pipe.transformer, inputs), outputs(model, inputs))
    found, expected = convert_peft_to_original(loaded), convert_peft_to_original(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_second_adapter_beside_the_first(inputs):
    state_dict = train(original(make_dit()))
    model = get_peft_model(make_dit(), DiffFitConfig())
    randomise(model)
    config, weights = convert_original_to_peft(state_dict, model.get_base_model())
    model.add_adapter("converted", config)
    set_peft_model_state_dict(model, weights, adapter_name="converted")
    model.set_adapter("converted")
    assert torch.equal(outputs(model.eval(), inputs), outputs(adapted(state_dict, make_dit()), inputs))
