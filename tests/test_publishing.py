"""Adapters of models other than a DiT: the verbs of the mixin, and a card that speaks of the base at hand."""

import re
from pathlib import Path

import pytest
import torch
from conftest import randomise
from diffusers import AutoencoderKL, DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel, UNet2DConditionModel
from peft import get_peft_model
from transformers import BertConfig, BertModel

from difffit_peft import DiffFitConfig, DiffFitLoaderMixin
from difffit_peft.publishing import base_model_id, save_adapter


class Pipeline(DiffFitLoaderMixin, PixArtSigmaPipeline):
    """A pipeline without class names."""


def make_pixart() -> Pipeline:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2},
        **{"sample_size": 8, "patch_size": 2, "cross_attention_dim": 16, "caption_channels": 16},
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    return Pipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=DDIMScheduler())


def images(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    prompt = {"prompt_embeds": torch.ones(1, 3, 16), "prompt_attention_mask": torch.ones(1, 3)}
    negative = {f"negative_{name}": torch.zeros_like(tensor) for name, tensor in prompt.items()}
    options = {"num_inference_steps": 2, "height": 8, "width": 8, "use_resolution_binning": False}
    generator = torch.Generator().manual_seed(0)
    pipe = pipe(None, negative_prompt=None, **prompt, **negative, **options, generator=generator, output_type="np")
    return torch.as_tensor(pipe.images)


def run_card(folder: Path, monkeypatch) -> dict:
    """The names that the card's code for PEFT leaves behind, run beside the base."""
    monkeypatch.chdir(folder)
    *_, code = re.findall(r"```python\n(.*?)```", Path("adapter/README.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(code.replace('"adapter"', '"./adapter"'), "README.md", "exec"), names)
    return names


def test_a_pipeline_without_class_names(tmp_path, monkeypatch):
    stock = PixArtSigmaPipeline(**make_pixart().components)
    stock.save_pretrained(tmp_path / "my-base")
    pipe = Pipeline.from_pretrained(tmp_path / "my-base")
    base = images(pipe)
    pipe.transformer = get_peft_model(pipe.transformer, DiffFitConfig()).eval()
    randomise(pipe.transformer)
    trained = images(pipe)
    assert not torch.equal(trained, base)
    pipe.save_difffit_weights(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "adapter of `my-base`: " in text and "Classes" not in text
    assert torch.equal(images(run_card(tmp_path, monkeypatch)["pipe"]), trained)
    pipe.unload_difffit_weights()
    pipe.load_difffit_weights(tmp_path / "adapter", "mine")
    assert torch.equal(images(pipe), trained)
    pipe.set_adapters("mine", 0.0)
    torch.testing.assert_close(images(pipe), base, rtol=0, atol=1e-5)
    pipe.set_adapters("mine", 1.0)
    pipe.fuse_difffit()
    torch.testing.assert_close(images(pipe), trained, rtol=0, atol=1e-4)
    pipe.unload_difffit_weights()
    assert torch.equal(images(pipe), base)


def test_a_card_for_a_model_by_itself(tmp_path, monkeypatch):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path / "my-bert")
    model = get_peft_model(BertModel.from_pretrained(tmp_path / "my-bert"), DiffFitConfig()).eval()
    randomise(model)
    model.peft_config["default"].base_model_name_or_path = "my-bert"
    save_adapter(model, tmp_path / "adapter")
    tokens = {"input_ids": torch.arange(5)[None]}
    loaded = run_card(tmp_path, monkeypatch)["model"]
    assert torch.equal(loaded(**tokens).last_hidden_state, model(**tokens).last_hidden_state)


@pytest.mark.parametrize(
    ("loaded_from", "part"), [("base/transformer_2", "transformer_2"), ("base", "unet"), (None, "unet")]
)
def test_a_card_names_the_part_of_the_pipeline(tmp_path, loaded_from, part):
    unet = UNet2DConditionModel(
        **{"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 8},
        **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 4},
        **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 8},
    )
    unet.register_to_config(_name_or_path=loaded_from)
    save_adapter(get_peft_model(unet, DiffFitConfig()), tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"pipe.{part} = PeftModel.from_pretrained(pipe.{part}, " in text
    assert loaded_from or "adapter of a `UNet2DConditionModel`: " in text


def test_the_name_of_a_base_is_its_pipelines(tmp_path):
    """Whatever the part is called, where its folder is beside the pipeline's index."""
    for name in ("transformer", "transformer_2", "unet"):
        assert base_model_id(str(tmp_path / "my-base" / name)) == ("my-base", None)
    part = tmp_path / "my-base" / "prior"
    part.mkdir(parents=True)
    assert base_model_id(str(part)) == ("prior", None)
    (tmp_path / "my-base" / "model_index.json").touch()
    assert base_model_id(str(part)) == ("my-base", None)
