"""Norms are told by what they compute, and merged as they keep their weight."""

import copy
import importlib

import pytest
import torch
from peft import get_peft_model
from torch import nn

from difffit_peft import DiffFitConfig
from difffit_peft.norms import looks_like_a_norm, norm_of

DIFFUSERS = "diffusers.models.transformers."
TRANSFORMERS = "transformers.models."
NORMS = [  # module, class, the name of its weight, what is added to it
    (DIFFUSERS + "transformer_krea2", "Krea2RMSNorm", "weight", 1.0),
    (DIFFUSERS + "transformer_qwenimage21", "QwenImage21ZeroCenterRMSNorm", "weight", 1.0),
    (DIFFUSERS + "transformer_cosmos3", "Cosmos3NemotronRMSNorm", "weight", 0.0),
    (DIFFUSERS + "transformer_stable_audio3", "StableAudio3RMSNorm", "gamma", 0.0),
    (DIFFUSERS + "t5_film_transformer", "T5LayerNorm", "weight", 0.0),
    ("diffusers.models.normalization", "RMSNorm", "weight", 0.0),
    ("diffusers.models.normalization", "MochiRMSNorm", "weight", 0.0),
    (TRANSFORMERS + "t5.modeling_t5", "T5LayerNorm", "weight", 0.0),
    (TRANSFORMERS + "llama.modeling_llama", "LlamaRMSNorm", "weight", 0.0),
    (TRANSFORMERS + "qwen2.modeling_qwen2", "Qwen2RMSNorm", "weight", 0.0),
    (TRANSFORMERS + "gemma2.modeling_gemma2", "Gemma2RMSNorm", "weight", 1.0),
    ("torch.nn", "LayerNorm", "weight", 0.0),
]


def made(module: str, name: str, **options) -> nn.Module:
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        pytest.skip(f"{module} has no {name} in this version")
    return cls(6, **({"eps": 1e-6} | options))


def randomised(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


@pytest.mark.parametrize(("module", "name", "weight", "added"), NORMS)
def test_norms_of_diffusers_and_transformers(module, name, weight, added):
    layer = randomised(made(module, name))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    random_state = torch.get_rng_state()
    norm = norm_of(layer)
    assert (norm.weight, norm.added) == (weight, added)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    with torch.device("meta"):
        assert norm_of(made(module, name)) == norm

    x = torch.randn(2, 3, 6)
    plain = layer(x)
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), DiffFitConfig(target_modules=["0"], gamma_modules=[]))
    assert torch.equal(model(x), plain)
    model.base_model.model[0].difffit_gamma["default"].data = torch.linspace(-1, 2, 6)
    expected = model(x)
    assert torch.equal(expected, torch.linspace(-1, 2, 6) * plain)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    base = model.unload()[0]
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    merged = get_peft_model(nn.Sequential(base), DiffFitConfig(target_modules=["0"], gamma_modules=[]))
    merged.base_model.model[0].difffit_gamma["default"].data = torch.linspace(-1, 2, 6)
    merged = merged.merge_and_unload()
    assert type(merged[0]) is type(layer) and merged[0].state_dict().keys() == before.keys()
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.weight


class ResidualNorm(LayerScale):
    def forward(self, x):
        normalised = x / x.norm(dim=-1, keepdim=True)
        return normalised * self.weight + normalised


class GatedNorm(LayerScale):
    def forward(self, x, gate):
        return x / x.norm(dim=-1, keepdim=True) * self.weight * gate


class SquaredNorm(LayerScale):
    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True) * self.weight**2


class NoisyNorm(LayerScale):
    def forward(self, x):
        return torch.rand_like(x) * self.weight


@pytest.mark.parametrize("layer", [LayerScale(), GatedNorm(), SquaredNorm(), NoisyNorm(), nn.PReLU(6), nn.Linear(6, 6)])
def test_what_is_no_norm(layer):
    random_state = torch.get_rng_state()
    assert norm_of(layer) is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert looks_like_a_norm(layer) == ("Norm" in type(layer).__name__)


def test_one_plus_the_weight_may_be_written_in_any_way():
    norm = norm_of(ResidualNorm())
    assert norm.weight == "weight" and norm.added == 1


def test_hooks_do_not_see_the_trial():
    layer, calls = randomised(made(TRANSFORMERS + "llama.modeling_llama", "LlamaRMSNorm")), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer.forward = lambda x: calls.append(2)
    assert norm_of(layer) is not None and not calls


@pytest.mark.parametrize(
    "config", [{"gamma_modules": ["head"]}, {"gamma_modules": [], "low_rank_modules": ["head"], "r": 1}]
)
def test_a_tied_weight_is_not_merged(config):
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "norm": nn.LayerNorm(4)})
    model["head"].weight = model["embed"].weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = get_peft_model(model, DiffFitConfig(**config))
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match=r"Linear, whose weight is tied to embed\.weight: that would change too"):
            merge()
    plain = adapted.unload()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    get_peft_model(plain, DiffFitConfig(gamma_modules=[])).merge_and_unload()  # δ leaves the weight alone


class OfGamma(nn.Module):
    """A norm whose weight has another name, as the RMS norms of Wan's autoencoder have."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True) * self.gamma


@pytest.mark.parametrize(("norm", "tensor"), [(nn.LayerNorm, "weight"), (nn.LayerNorm, "bias"), (OfGamma, "gamma")])
def test_a_tied_norm_is_not_merged(norm, tensor):
    model = nn.ModuleDict({"first": norm(4), "second": norm(4), "third": norm(4)})
    setattr(model["second"], tensor, getattr(model["first"], tensor))
    adapted = get_peft_model(model, DiffFitConfig(gamma_modules=["second"]))
    with pytest.raises(ValueError, match=rf"{norm.__name__}, whose {tensor} is tied to (first|second)\.{tensor}"):
        adapted.merge_adapter()
