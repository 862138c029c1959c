"""`explain`: its counts are those of what is trained, and it says what is left out and why."""

from pathlib import Path

import pytest
import torch
from conftest import make_dit, make_pipeline
from peft import get_peft_model
from tiny import TINY

from difffit_peft import DiffFitConfig, explain

XL_2 = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}


@pytest.mark.parametrize("name", TINY)
def test_it_counts_what_is_trained(name):
    model = TINY[name].make()
    names, before = [n for n, _ in model.named_modules()], explain(model)
    assert [n for n, _ in model.named_modules()] == names
    adapted = get_peft_model(model, DiffFitConfig())
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert before.trained_parameters == trained > 0
    assert explain(adapted).table() == before.table()
    assert explain(adapted).trained_parameters == trained


def test_the_published_size_costs_no_memory():
    found = explain(XL_2, DiffFitConfig(num_classes=101))
    assert (found.trained_parameters, found.total) == (687_776, 674_834_720)
    kinds = {row.kind: row.parameters for row in found.trained}
    assert {"biases δ", "scale factors γ", "class rows"} == {*kinds}
    gammas = [row for row in found.trained if row.kind == "scale factors γ"]
    assert [row.place for row in gammas] == ["transformer_blocks 0-13"]
    assert explain(XL_2, DiffFitConfig(num_classes=101, gamma_modules=[])).trained_parameters == 607_136
    text = str(found)
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    assert found.table() in readme
    assert "| **all** | DiTTransformer2DModel | | **687,776** | **0.102%** of 674,834,720 |" in text
    assert "redundant: one for all blocks is trained" in text


def test_it_says_what_is_left_out_and_why():
    model = TINY["HunyuanDiT"].make()
    closed = [row for row in explain(model).left_out if "closed" in row.why]
    pooler = model.time_extra_emb.pooler.named_parameters()
    assert sum(row.parameters for row in closed) == sum(p.numel() for name, p in pooler if name.endswith("bias"))
    model = TINY["Flux.2"].make()
    without = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.bias is None]
    missing = sum(row.parameters for row in explain(model).left_out if "no bias" in row.why)
    assert missing == sum(m.out_features for m in without) > 0
    found = explain(model, DiffFitConfig(new_biases=True))
    assert sum(row.parameters for row in found.trained if row.kind == "new biases δ") == missing
    assert not any("no bias" in row.why for row in found.left_out)
    assert str(explain(get_peft_model(model, DiffFitConfig(new_biases=True)))) == str(found)
    reasons = {row.why for row in explain(make_dit(), DiffFitConfig(exclude_modules=["to_q"])).left_out}
    assert "the config leaves it out" in reasons


def test_of_several_adapters_it_takes_the_one_that_is_named():
    model = get_peft_model(make_dit(), DiffFitConfig(), "a")
    model.add_adapter("b", DiffFitConfig(gamma_modules=[], r=2))
    assert any(row.kind == "low rank A" for row in explain(model, adapter_name="b").trained)
    of_a, of_b = (explain(model, adapter_name=name).table() for name in "ab")
    assert explain(model).table() == of_a != of_b


def test_refusals():
    model = get_peft_model(make_dit(), DiffFitConfig())
    with pytest.raises(ValueError, match="adapter_name='x'"):
        explain(model, adapter_name="x")
    with pytest.raises(ValueError, match="leave the config out"):
        explain(model, DiffFitConfig())
    with pytest.raises(ValueError, match="has no adapter of DiffFit"):
        explain(make_dit(), adapter_name="x")
    with pytest.raises(
        ValueError, match="A DiTPipeline is not a model: pass one of its parts, such as pipe.transformer"
    ):
        explain(make_pipeline())
    with pytest.raises(ValueError, match="_class_name='Dit'"):
        explain({"_class_name": "Dit"})
