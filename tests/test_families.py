"""What is known of families of models, that it is known in one place, and that it holds on a tiny model of each."""

import re
from pathlib import Path

import diffusers
import pytest
import torch
from family_checks import Checks, output, randomise
from peft import PeftModel, get_peft_model
from tiny import ENCODERS, MINIMAX_H3, TINY
from torch import nn

import difffit_peft
from difffit_peft import DiffFitConfig
from difffit_peft.families import FAMILIES, family_of, lists_of_blocks
from difffit_peft.families.family import Family
from difffit_peft.layer import DiffFitLayer
from difffit_peft.norms import is_norm, norm_of

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


@pytest.mark.parametrize("tiny", [*TINY.values(), *ENCODERS.values()], ids=[*TINY, *ENCODERS])
def test_a_tiny_model_of_each_family(tiny, tmp_path):
    checks = Checks(tiny, tmp_path)
    for name in Checks.NAMES:
        getattr(checks, name)()


@pytest.mark.parametrize("name", ENCODERS)
def test_norms_of_text_encoders_are_trained(name):
    model = ENCODERS[name].make()
    norms = {n: m for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    adapted = get_peft_model(model, DiffFitConfig())
    layers = {n.removeprefix("base_model.model."): m for n, m in adapted.named_modules() if isinstance(m, DiffFitLayer)}
    assert norms.keys() <= layers.keys() and all(layers[n].difffit_gamma for n in norms)
    assert {norm_of(norm).added for norm in norms.values()} == {1.0 if name == "Gemma2" else 0.0}
    assert {type(norm).__name__ for norm in norms.values()} == {
        "LayerNorm" if name in ("CLIP", "GPT2") else f"{name}LayerNorm" if name == "T5" else f"{name}RMSNorm"
    }


@pytest.mark.skipif(not hasattr(diffusers, MINIMAX_H3.cls), reason="this Diffusers has no such model")
def test_rows_that_are_no_samples_are_not_mixed():
    """Two timesteps and two samples: as many rows, which a mixed batch would take for each other."""
    model, inputs = get_peft_model(MINIMAX_H3.make(), DiffFitConfig()).eval(), MINIMAX_H3.inputs()
    randomise(model)
    adapted = output(model, inputs)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names`: MiniMaxH3Transformer3DModel .* are no samples"):
        output(model, inputs | {"adapter_names": ["default", "__base__"]})
    assert torch.equal(output(model, inputs), adapted)


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
