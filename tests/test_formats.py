"""Adapters saved before configs had a format version load as they were; what is saved now names what it is.

The adapters in `data/adapters` are of commit df155b6, whose preset had γ on `norm1.linear` in all blocks, but the last
two of `CONFIGS`, which commit 48aa731 saved. The outputs beside them are what these computed, for `inputs` below.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_dit, make_pipeline, randomise
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from difffit_peft import DiffFitConfig, DiffFitDiTPipeline

ADAPTERS = Path(__file__).parent / "data" / "adapters"
DIMENSIONS = {"num_attention_heads": 1, "num_layers": 3, "sample_size": 4, "num_embeds_ada_norm": 10}

# What each of them trains, without a preset; its config on disk has null for both fields, "published" apart.
ADALN = {"gamma_modules": ["norm1.linear"]}
PUBLISHED = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.2"]
CONFIGS = {
    "default": ADALN | {"num_classes": 2},
    "layers": ADALN
    | {"gamma_layers": [1], "target_modules": ["norm1.linear", "attn1.to_q"], "exclude_modules": ["proj_out_1"]},
    "rank-1": ADALN | {"num_classes": 2, "r": 1, "low_rank_modules": ["attn1.to_out.0", "ff.net.2"]},
    "published": {"num_classes": 2, "gamma_modules": PUBLISHED, "gamma_layers": [0, 1]},
    "sample-size": ADALN | {"num_classes": 2, "sample_size": 8},
    "classes-rank-1": {"num_classes": 2, "r": 1, "low_rank_modules": ["attn1.to_out.0", "ff.net.2"]}
    | {"gamma_modules": PUBLISHED, "gamma_layers": [0, 1]},
    "preset-sample-size": {"num_classes": 2, "sample_size": 8, "gamma_modules": PUBLISHED, "gamma_layers": [0, 1]},
}


def inputs(config: dict) -> dict[str, torch.Tensor]:
    side = config.get("sample_size", 4)
    return {
        "hidden_states": torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([1, 500, 900]),
        "class_labels": torch.tensor([0, 1, 10]),
    }


def output(model, config: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(config)).sample


def loads_with_peft(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(make_dit(**DIMENSIONS), folder)


def loads_with_a_config_of_peft(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(make_dit(**DIMENSIONS), folder, config=PeftConfig.from_pretrained(folder))


def loads_beside_another(folder: Path) -> PeftModel:
    sample_size = json.loads((folder / "adapter_config.json").read_text())["sample_size"]
    model = get_peft_model(make_dit(**DIMENSIONS), DiffFitConfig(sample_size=sample_size), "another")
    model.load_adapter(folder, "default")
    model.set_adapter("default")
    return model


@pytest.mark.parametrize("load", [loads_with_peft, loads_with_a_config_of_peft, loads_beside_another])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_before_loads_as_it_was(name, load, tmp_path):
    config, weights = CONFIGS[name], load_file(ADAPTERS / name / "adapter_model.safetensors")
    explicit = get_peft_model(make_dit(**DIMENSIONS), DiffFitConfig(**config))
    assert not set_peft_model_state_dict(explicit, weights).unexpected_keys
    expected = output(explicit, config)
    model = load(ADAPTERS / name)
    assert torch.equal(output(model, config), expected)
    # the same arithmetic, but matrices may be multiplied in another order on another machine
    then = load_file(ADAPTERS / "outputs.safetensors")[name]
    torch.testing.assert_close(expected, then, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path, save_embedding_layers=False, selected_adapters=["default"])
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["format_version"] == 1
    assert saved["gamma_modules"] == sorted(config["gamma_modules"])
    assert saved["gamma_layers"] == config.get("gamma_layers")
    assert saved["low_rank_modules"] == config.get("low_rank_modules")
    again = load_file(tmp_path / "adapter_model.safetensors")
    assert again.keys() == weights.keys() and all(torch.equal(again[key], weights[key]) for key in weights)
    assert torch.equal(output(loads_with_peft(tmp_path), config), expected)


def test_a_pipeline_takes_an_adapter_of_before():
    pipe = DiffFitDiTPipeline.from_pipe(make_pipeline(**DIMENSIONS))
    pipe.load_difffit_weights(ADAPTERS / "default", "old")
    expected = output(loads_with_peft(ADAPTERS / "default"), {})
    assert torch.equal(output(pipe.transformer, {}), expected)
    pipe.load_difffit_weights(ADAPTERS / "default", "old", hotswap=True)
    assert torch.equal(output(pipe.transformer, {}), expected)


def test_a_config_says_its_format(tmp_path):
    config = DiffFitConfig()
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["format_version"] == 1
    assert (
        DiffFitConfig.from_pretrained(tmp_path).format_version
        == PeftConfig.from_pretrained(tmp_path).format_version
        == 1
    )
    assert PeftConfig.from_pretrained(ADAPTERS / "default").format_version == 0
    assert DiffFitConfig(peft_type="DIFFFIT").format_version == 1  # made by hand


def test_an_adapter_of_a_newer_format_is_refused(tmp_path):
    model = get_peft_model(make_dit(**DIMENSIONS), DiffFitConfig())
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2, "of_the_future": 1}))
    dit = make_dit(**DIMENSIONS)
    before = [name for name, _ in dit.named_modules()]
    with pytest.warns(UserWarning, match="of_the_future"), pytest.raises(ValueError, match="upgrade it"):
        PeftModel.from_pretrained(dit, tmp_path)
    assert [name for name, _ in dit.named_modules()] == before


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "gamma_modules", "low_rank_modules"])
@pytest.mark.parametrize("name", ["rank-1", "classes-rank-1"])
def test_a_file_with_a_regular_expression_is_refused(name, field, tmp_path):
    file = shutil.copytree(ADAPTERS / name, tmp_path / "adapter") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: "(a+)+$"}))
    dit = make_dit(**DIMENSIONS)
    before = [module for module, _ in dit.named_modules()]
    for load in (
        lambda: PeftModel.from_pretrained(dit, file.parent),
        lambda: DiffFitConfig.from_pretrained(file.parent),
        lambda: PeftConfig.from_pretrained(file.parent),
    ):
        with pytest.raises(ValueError, match=rf"{field}='\(a\+\)\+\$': a config in a file must list names"):
            load()
    assert [module for module, _ in dit.named_modules()] == before


def test_what_is_saved_holds_names_in_the_place_of_expressions(tmp_path):
    given = {
        "target_modules": r".*(attn1|pos_embed).*",
        "exclude_modules": r".*\.1\..*",
        "gamma_modules": r".*to_q",
        "low_rank_modules": r".*\.0\.attn1\.to_k",
    }
    model = get_peft_model(make_dit(**DIMENSIONS), replace(DiffFitConfig(**given, r=1)))
    randomise(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(isinstance(saved[field], list) and saved[field] for field in given)
    again = loads_with_peft(tmp_path)
    assert torch.equal(output(again, {}), output(model, {}))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not any(".1." in name for name in trained)
    copy = get_peft_model(make_dit(**DIMENSIONS), replace(model.peft_config["default"], init_weights=True))
    assert [name for name, p in copy.named_parameters() if p.requires_grad] == trained
