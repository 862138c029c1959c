"""Which layers get γ, δ and a change of low rank: a function of a config, names and a family. No model is built."""

import pytest

from difffit_peft import DiffFitConfig
from difffit_peft.families import Family
from difffit_peft.targets import Layer, Target, exactly, plan, spelled_out

LINEAR = Layer("Linear", bias=True, max_rank=8)
NO_BIAS = Layer("Linear", max_rank=8)
NORM = Layer("RMSNorm", norm=True)
BLOCK = {"norm": NORM, "q": NO_BIAS, "proj": LINEAR}
LAYERS = {
    "embed": Layer("Conv2d", bias=True),
    **{f"double.{i}.{name}": layer for i in range(2) for name, layer in BLOCK.items()},
    **{f"single.{i}.{name}": layer for i in range(3) for name, layer in BLOCK.items()},
    "proj": LINEAR,
    "labels.table": Layer("Embedding", num_classes=10),
}
FAMILY = Family(blocks=("double", "single"), gamma_modules=(), gamma_share=1.0, class_table="table")
HALF = Family(blocks=("double", "single"), gamma_modules=("q",), low_rank_modules=("proj",))


def planned(family: Family = FAMILY, layers: dict[str, Layer] = LAYERS, **fields) -> dict[str, Target]:
    return plan(DiffFitConfig(**fields), layers, family, "Model")


def having(kind: str, targets: dict[str, Target]) -> set[str]:
    return {name for name, target in targets.items() if getattr(target, kind)}


def inside(names: str, *blocks: str) -> set[str]:
    return {f"{block}.{name}" for block in blocks for name in names.split()}


DOUBLE, SINGLE = ("double.0", "double.1"), ("single.0", "single.1", "single.2")


def test_the_general_rule():
    targets = planned()
    assert having("gamma", targets) == inside("norm q proj", *DOUBLE, *SINGLE)  # not embed, proj
    assert having("delta", targets) == inside("proj", *DOUBLE, *SINGLE) | {"embed", "proj", "labels.table"}
    assert not having("rank", targets)
    assert planned(layers={"lone.norm": NORM}, gamma_modules=[]) == {"lone.norm": Target(gamma=True)}


def test_layers_without_a_bias():
    layers = {"without": Layer("Linear", takes_bias=True), "fused": Layer("Linear"), "with": LINEAR}
    assert having("delta", planned(layers=layers, gamma_modules=[])) == {"with"}
    assert having("delta", planned(layers=layers, gamma_modules=[], new_biases=True)) == {"with", "without"}
    del layers["with"]
    with pytest.raises(ValueError, match=r"no layer of Model to train\. Layers .* get δ with new_biases=True\.$"):
        planned(layers=layers, gamma_modules=[])
    for fields in ({}, {"new_biases": True}):
        with pytest.raises(ValueError, match=r"leave no layer of Model to train\.$"):
            planned(layers=layers, gamma_modules=[], target_modules=["fused"], **fields)


def test_parameters_get_no_gamma():
    layers = {"double.0.table": Layer("Parameter", bias=True, parameter=True), "double.0.proj": LINEAR}
    for fields in ({}, {"gamma_modules": ".*"}):
        targets = planned(layers=layers, **fields)
        assert having("gamma", targets) == {"double.0.proj"} and having("delta", targets) == {*layers}


def test_what_just_fits():
    assert having("rank", planned(r=8)) == inside("q proj", *DOUBLE, *SINGLE)
    for fields in ({"num_classes": 10}, {"num_classes": 1, "init_class_rows": [9]}):
        assert planned(**fields)["labels.table"] == Target(delta=True)


def test_a_familys_presets():
    targets = planned(HALF, r=2)
    assert having("gamma", targets) - inside("norm", *DOUBLE, *SINGLE) == inside(
        "q", "double.0", "single.0", "single.1"
    )
    assert targets["double.1.proj"] == Target(delta=True, rank=2)
    assert having("rank", targets) == inside("proj", *DOUBLE, *SINGLE)


def test_what_a_family_leaves_out():
    family = Family(("double", "single"), ("q", "proj"), closed=("embed",), unused=("double.-1.proj", "single.0"))
    targets = planned(family)
    assert having("gamma", targets) - inside("norm", *DOUBLE, *SINGLE) == inside("q proj", "double.0", "single.1")
    assert {"embed", "double.1.proj", "single.0.norm"}.isdisjoint(targets) and "single.0.q" not in targets
    with pytest.raises(ValueError, match="'embed' matches no layer that DiffFit can train"):
        planned(family, target_modules=["embed"])
    config = DiffFitConfig(target_modules=r".*(embed|proj)", gamma_modules=r".*proj")
    fields = spelled_out(
        config, planned(family, target_modules=r".*(embed|proj)", gamma_modules=r".*proj"), LAYERS, family
    )
    assert plan(DiffFitConfig(**fields), LAYERS, family, "Model") == plan(config, LAYERS, family, "Model")


@pytest.mark.parametrize(
    ("fields", "gamma", "delta", "rank"),
    [
        ({"gamma_modules": []}, set(), None, set()),
        ({"gamma_modules": ["q"]}, inside("q", *DOUBLE, *SINGLE), None, set()),
        ({"gamma_modules": ["q"], "gamma_layers": [2]}, {"single.2.q"}, None, set()),
        ({"gamma_layers": [1]}, inside("q proj", "double.1", "single.1"), None, set()),
        ({"gamma_modules": [".proj"]}, {"proj"}, None, set()),
        ({"gamma_modules": "(embed|proj)"}, {"embed", "proj"}, None, set()),
        ({"gamma_modules": r"proj|single\.1\.proj"}, {"proj", "single.1.proj"}, None, set()),
        ({"gamma_modules": r"single.*q", "gamma_layers": [0, 2]}, {"single.0.q", "single.2.q"}, None, set()),
        ({"gamma_modules": ["single.0.q"], "exclude_modules": r"single.*"}, set(), None, set()),
        ({"gamma_modules": r"\w+\.0\.q"}, {"double.0.q", "single.0.q"}, None, set()),
        ({"target_modules": ["double.0.q", "embed"]}, {"double.0.q"}, {"embed"}, set()),
        ({"target_modules": "all-linear"}, inside("q proj", *DOUBLE, *SINGLE),
         inside("proj", *DOUBLE, *SINGLE) | {"proj"}, set()),
        ({"target_modules": r"single\.1\..*"}, inside("q proj", "single.1"), {"single.1.proj"}, set()),
        ({"target_modules": ["embed"], "num_classes": 2}, set(), {"embed", "labels.table"}, set()),
        ({"r": 1, "low_rank_modules": ["double.0.q"], "gamma_modules": []}, set(), None, {"double.0.q"}),
        ({"r": 1, "target_modules": ["double.0.proj"]}, {"double.0.proj"}, {"double.0.proj"}, {"double.0.proj"}),
        ({"r": 1, "gamma_modules": []}, set(), None, inside("q proj", *DOUBLE, *SINGLE)),
        ({"r": 1, "target_modules": r"\w+\.0\..*"}, inside("q proj", "double.0", "single.0"),
         inside("proj", "double.0", "single.0"), inside("q proj", "double.0", "single.0")),
        ({"gamma_modules": ["q"], "exclude_modules": "nothing.*"}, inside("q", *DOUBLE, *SINGLE), None, set()),
    ],
)  # fmt: skip
def test_what_configs_select(fields, gamma, delta, rank):
    config = DiffFitConfig(**fields)
    targets = plan(config, LAYERS, FAMILY, "Model")
    assert {name for name in having("gamma", targets) if not LAYERS[name].norm} == gamma
    if delta is not None:
        assert having("delta", targets) == delta
    assert having("rank", targets) == rank

    # names in the place of presets and expressions select the same, and know no expression
    names = spelled_out(config, targets, LAYERS, FAMILY)
    again = DiffFitConfig(**fields | names)
    assert plan(again, LAYERS, FAMILY, "Model") == targets
    assert not any(isinstance(value, str) for value in names.values())
    for field in ("target_modules", "exclude_modules", "gamma_modules", "low_rank_modules"):
        assert not isinstance(getattr(again, field), str)


def test_names_are_spelled_out_by_endings_where_these_do():
    def written(family: Family = HALF, **fields) -> dict:
        config = DiffFitConfig(**fields)
        return spelled_out(config, plan(config, LAYERS, family, "Model"), LAYERS, family)

    assert written() == {"gamma_modules": ["double.0.q", "single.0.q", "single.1.q"], "gamma_layers": None}
    assert written(gamma_layers=[0, 1]) == {"gamma_modules": ["q"], "gamma_layers": [0, 1]}
    # "proj" would select the last layer too, which lies in no block
    assert written(FAMILY)["gamma_modules"] == sorted(
        [f"{block}.{name}" for block in (*DOUBLE, *SINGLE) for name in ("proj", "q")]
    )
    assert written(gamma_modules=["q"]) == {}
    # there are no low_rank_layers, so that those of some blocks have their whole names
    ranked = Family(blocks=("double", "single"), gamma_modules=("proj",), low_rank_modules=("q",))
    assert written(ranked, r=1)["low_rank_modules"] == ["q"]
    without_first = written(ranked, r=1, exclude_modules=["double.0.q", "single.0.q"])["low_rank_modules"]
    assert without_first == ["double.1.q", "single.1.q", "single.2.q"]


def test_exactly():
    assert exactly({"a", "b.a"}, ["a", "b.a"]) == ["a", "b.a"]
    assert exactly({"a"}, ["a", "b.a"]) == [".a"]
    assert exactly({"b.a"}, ["a", "b.a", "ab.a"]) == ["b.a"]
    assert exactly([], ["a"]) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gamma_modules": ["qq"]}, r"gamma_modules=\['qq'\]: 'qq' matches no layer .* Did you mean 'q'\?"),
        ({"gamma_modules": "q"}, r"did you mean the list \['q'\]\?"),
        ({"gamma_layers": [3]}, r"this model has 3 blocks, so indices go from 0 to 2"),
        ({"gamma_modules": ["single.2.q"], "gamma_layers": [0]}, r"of the blocks \[2\], but gamma_layers=\[0\]"),
        ({"r": 9}, "r=9: the rank of double.0.q is at most 8"),
        ({"r": 1, "low_rank_modules": ["embed"]}, "embed is of type Conv2d, but a change of low rank goes on linear"),
        ({"target_modules": ["qq"]}, r"target_modules=\['qq'\]: 'qq' matches no layer"),
        ({"r": 1, "low_rank_modules": ["qq"]}, r"low_rank_modules=\['qq'\]: 'qq' matches no layer"),
        ({"num_classes": 1, "init_class_rows": [10]}, r"the class 10, but the base has the classes 0 to 9\."),
        ({"num_classes": 11}, "num_classes=11, but the class table of this model has rows for 10 classes"),
        ({"target_modules": [], "gamma_modules": []}, "leave no layer of Model to train"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        planned(**fields)


def test_where_there_is_no_list_of_blocks():
    layers = {"first": LINEAR, "second.norm": NORM, "second.proj": LINEAR}
    message = r"Model has no list of blocks.* Name the layers in gamma_modules.*Names end in 'first', 'second.norm', 's"
    with pytest.raises(ValueError, match=message):
        planned(Family(), layers)
    assert having("gamma", planned(Family(), layers, gamma_modules=[])) == {"second.norm"}
    assert having("gamma", planned(Family(), layers, target_modules=["first"])) == {"first"}  # the layers are named
    with pytest.raises(ValueError, match="this model has 0 blocks: leave gamma_layers out"):
        planned(Family(), layers, gamma_layers=[0])
    with pytest.raises(ValueError, match="num_classes=3, but Model has no class table"):
        planned(Family(), layers, num_classes=3)
