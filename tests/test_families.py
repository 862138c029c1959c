"""What is known of families of models, that it is known in one place, and that it holds on a tiny model of each."""

import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import CLOSE
from peft import PeftModel, get_peft_model
from tiny import TINY
from torch import nn

import difffit_peft
from difffit_peft import DiffFitConfig
from difffit_peft.families import FAMILIES, family_of, lists_of_blocks
from difffit_peft.families.family import Family
from difffit_peft.layer import DiffFitLayer
from difffit_peft.norms import is_norm

PACKAGE = Path(difffit_peft.__file__).parent
OF_DIT = (
    r"\bDiT(Transformer2DModel|Pipeline|Block)\b|norm1|transformer_blocks|num_embeds_ada_norm|class_embedder|"
    r"embedding_table|timestep_embedder|pos_embed|patch_size|attn1|to_out|ff\.net|proj_out|facebook/DiT|\b100[01]\b"
)


def test_only_families_name_what_is_of_one():
    others = [file for file in PACKAGE.rglob("*.py") if PACKAGE / "families" not in file.parents]
    found = {
        f"{file.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for file in others
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(OF_DIT, line)
    }
    assert not found
    assert len(others) > 10 and re.search(OF_DIT, (PACKAGE / "families" / "dit" / "__init__.py").read_text())


def output(model: nn.Module, inputs: dict) -> torch.Tensor:
    """What the model computes of a copy of the inputs, as one tensor."""
    found = model(**copy.deepcopy(inputs), return_dict=False)[0]
    return torch.stack([*found]) if isinstance(found, list) else found


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".difffit_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def having_gamma(model: nn.Module) -> set[str]:
    """The names of the layers, but for norms, that an adapter of the model puts γ on."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, DiffFitLayer) and module.difffit_gamma and not is_norm(module.get_base_layer())
    }


@pytest.fixture(params=TINY)
def tiny(request):
    return TINY[request.param]


def test_a_tiny_model_of_each_family(tiny, tmp_path):
    base, plain = tiny.make(), tiny.make()
    inputs, expected = tiny.inputs(), base.state_dict()
    keys, values = [*expected], [tensor.clone() for tensor in expected.values()]
    before = output(base, inputs)
    model = get_peft_model(base, DiffFitConfig()).eval()
    assert torch.equal(output(model, inputs), before)

    # every parameter that is trained has a part in the output: no zeros and no `None`
    randomise(model)
    model.train()
    with torch.random.fork_rng():
        y = output(model, inputs)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".difffit_" in name for name in trained)
    assert {name for name, p in trained.items() if p.grad is None or not p.grad.any()} == set()

    model.eval()
    adapted = output(model, inputs)
    assert not torch.allclose(adapted, before, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = PeftModel.from_pretrained(tiny.make(), tmp_path / "adapter").eval()
    assert torch.equal(output(again, inputs), adapted)

    merged = again.merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), adapted, **CLOSE)
    assert type(merged) is type(plain) and [*merged.state_dict()] == keys
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(plain).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(output(loaded, inputs), output(merged, inputs))

    unloaded = model.unload()
    assert unloaded is base and [*unloaded.state_dict()] == keys
    assert all(torch.equal(a, b) for a, b in zip(unloaded.state_dict().values(), values, strict=True))
    assert torch.equal(output(unloaded, inputs), before)


def test_where_gamma_is(tiny):
    """On q, k, v and the output of attention and the output of the feed-forward, in the first half of each list."""
    model = tiny.make()
    family, layers = FAMILIES[tiny.cls], dict(model.named_modules())
    lists = {name: len(layers[name]) for name in family.blocks if name in layers}
    assert {*lists} <= {*lists_of_blocks(model)} and all(lists.values())
    found = having_gamma(get_peft_model(model, DiffFitConfig()))
    of = {name: next(blocks for blocks in lists if name.startswith(f"{blocks}.")) for name in found}
    for name, blocks in of.items():
        assert int(name.removeprefix(f"{blocks}.").split(".")[0]) < (lists[blocks] + 1) // 2
    # each list has γ, but those without attention
    assert {*lists} - {*of.values()} <= {"mid_block.resnets", "up_blocks", "down_blocks"}


def test_the_rule_by_structure_is_that_of_the_records(tiny, monkeypatch):
    recorded = having_gamma(get_peft_model(tiny.make(), DiffFitConfig()))
    known = FAMILIES[tiny.cls]
    monkeypatch.setitem(FAMILIES, tiny.cls, Family(closed=known.closed, unused=known.unused))
    by_structure = having_gamma(get_peft_model(tiny.make(), DiffFitConfig()))
    assert {name for name in recorded if not re.fullmatch(r"single_.*\.proj_out", name)} == by_structure


def test_every_name_in_a_record_is_in_a_model():
    names: dict[str, set[str]] = {}
    for tiny in TINY.values():
        names.setdefault(tiny.cls, set()).update(name for name, _ in tiny.make().named_modules())
    assert {*names} <= {*FAMILIES}
    unknown = []
    for cls, family in FAMILIES.items():
        for ending in family.gamma_modules if cls in names else ():
            unknown += [] if any(name.endswith(f".{ending}") for name in names[cls]) else [(cls, ending)]
        for module in (*family.closed, *family.unused) if cls in names else ():
            one = Family(closed=(module,))
            unknown += [] if one.left_out(names[cls]) else [(cls, module)]
    assert unknown == []


def test_what_is_left_out():
    names = ["a", "a.b", "ab", "blocks.0.x", "blocks.2.x.y", "blocks.10.x", "blocks.10.xy", "blocks.10.z"]

    def found(*modules: str) -> set[str]:
        return {*Family(unused=modules).left_out(names)}

    assert found("a") == {"a", "a.b"}
    assert found("blocks.-1.x") == {"blocks.10.x"}
    assert found("blocks.*.x") == {"blocks.0.x", "blocks.2.x.y", "blocks.10.x"}
    assert found("blocks.-1") == {"blocks.10.x", "blocks.10.xy", "blocks.10.z"}
    assert found("blocks.*.x.-1", "others.-1.x") == set()
    assert (
        "unused" in Family(unused=("a",)).left_out(names)["a"]
        and "closed" in Family(closed=("a",)).left_out(["a"])["a"]
    )


@pytest.mark.parametrize("name", ["HunyuanDiT", "Qwen-Image", "SD3.5"])
def test_who_names_a_layer_that_cannot_be_trained_is_told(name):
    model = TINY[name].make()
    left_out = family_of(model).left_out(name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    assert left_out
    for name in left_out:
        with pytest.raises(ValueError, match="matches no layer that DiffFit can train"):
            get_peft_model(model, DiffFitConfig(target_modules=[f".{name}"]))
    adapted = get_peft_model(model, DiffFitConfig(gamma_modules=".*", r=1))
    assert not {
        n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if isinstance(m, DiffFitLayer)
    } & {*left_out}


def of_few_blocks() -> nn.Module:
    """One block, whose own list of layers is the longer one."""
    model, block = nn.Module(), nn.Module()
    block.net = nn.ModuleList([nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)])
    model.blocks, model.heads = nn.ModuleList([block]), nn.ModuleList([nn.Linear(2, 2)] * 3)
    mlp = nn.Module()
    mlp.net = nn.ModuleList([block, nn.GELU(), nn.Linear(2, 2)])  # a layer is in it: one computation, no blocks
    model.mlp = mlp
    model.forward = lambda x: model.heads[0](model.blocks[0].net[0](x))
    return model


def flux() -> nn.Module:
    return TINY["Flux.1"].make()


@pytest.mark.parametrize(
    ("make", "lists"),
    [
        (flux, ("transformer_blocks", "single_transformer_blocks")),
        (TINY["SD1.5"].make, ("down_blocks", "up_blocks", "mid_block.attentions", "mid_block.resnets")),
        (TINY["Wan, from a picture"].make, ("blocks",)),
        (TINY["Z-Image"].make, ("noise_refiner", "context_refiner", "layers")),
        (of_few_blocks, ("blocks",)),
        (lambda: nn.Sequential(nn.Linear(2, 2)), ()),
    ],
)
def test_lists_of_blocks(make, lists):
    assert lists_of_blocks(make()) == lists


class Unknown(nn.Module):
    """Two lists of blocks of attention and feed-forward, by the names that Transformers has, or by others."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleList(map(self._block, [names] * count)) for count in (3, 2))
        self.q_proj = nn.Linear(2, 2)

    @staticmethod
    def _block(names: tuple[str, ...]) -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(2, 2) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.first, *self.second]:
            for layer in block.values():
                x = layer(x)
        return self.q_proj(x)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("q_proj", "up_proj", "down_proj"), ("q_proj", "down_proj")), (("one", "two"), ("one", "two"))],
)
def test_an_unknown_model_has_the_rule_by_its_structure(names, expected, tmp_path):
    model = get_peft_model(Unknown(*names), DiffFitConfig())
    blocks = ("first.0", "first.1", "second.0")
    assert having_gamma(model) == {f"{block}.{name}" for block in blocks for name in expected}
    config = model.peft_config["default"]
    assert isinstance(config.gamma_modules, list) and config.base_config == {"model_class": "Unknown"}
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = get_peft_model(Unknown(*names), DiffFitConfig.from_pretrained(tmp_path))
    assert model.state_dict().keys() == again.state_dict().keys()


@pytest.mark.parametrize(("one", "other"), [("SD3", "Flux.1"), ("Flux.1", "Chroma"), ("DiT", "PixArt-Sigma")])
def test_an_adapter_of_another_family_is_refused(one, other, tmp_path):
    get_peft_model(TINY[one].make(), DiffFitConfig()).save_pretrained(tmp_path, save_embedding_layers=False)
    model = TINY[other].make()
    before = [*model.state_dict()]
    with pytest.raises(ValueError, match=f"belongs to a '{TINY[one].cls}', and the model is a {TINY[other].cls}"):
        PeftModel.from_pretrained(model, tmp_path)
    assert [*model.state_dict()] == before

    class Derived(type(TINY[one].make())):
        pass

    derived = TINY[one].make()
    derived.__class__ = Derived
    PeftModel.from_pretrained(derived, tmp_path)


def test_a_model_without_lists_of_blocks_is_told_what_to_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match="Sequential has no list of blocks.*Names end in '0', '1'"):
        get_peft_model(model, DiffFitConfig())
    assert type(model[0]) is nn.Linear
    x = torch.randn(3, 2)
    assert torch.equal(get_peft_model(model, DiffFitConfig(gamma_modules=["0"]))(x), model(x))
