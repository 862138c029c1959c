"""The bundled base and datasets are what examples/emoji/README.md says they are."""

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from peft import get_peft_model
from safetensors.torch import load_file

from difffit_peft import DiffFitConfig
from difffit_peft.families.dit.conditioning import is_shared

EMOJI = Path(__file__).resolve().parent.parent / "examples/emoji"


@pytest.fixture(scope="module")
def pipe() -> DiTPipeline:
    return DiTPipeline.from_pretrained(EMOJI / "base")


def test_the_base_is_a_small_stock_pipeline(pipe):
    assert sum(file.stat().st_size for file in (EMOJI / "base").rglob("*")) <= 30_000_000
    assert [type(part) for part in (pipe.transformer, pipe.vae, pipe.scheduler)] == [
        DiTTransformer2DModel,
        AutoencoderKL,
        DDIMScheduler,
    ]
    config = pipe.transformer.config
    assert config.out_channels == 2 * config.in_channels and config.num_embeds_ada_norm == 1000
    assert len(pipe.labels) == 98


def test_half_precision_on_disk():
    files = list((EMOJI / "base").glob("*/*.safetensors"))
    assert {file.parent.name for file in files} == {"transformer", "vae"}
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("path", "rows", "side"),
    [
        ("noto/train", 3781, 64),
        ("twemoji/train", 1706, 64),
        ("twemoji/test", 200, 64),
        ("openmoji/train", 1706, 128),
        ("openmoji/test", 200, 128),
    ],
)
def test_the_datasets(pipe, path, rows, side, tmp_path):
    file = str(EMOJI / "data" / f"{path}.parquet")
    dataset = load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path))
    assert len(dataset) == rows
    assert {name: index for index, name in enumerate(dataset.features["label"].names)} == pipe.labels
    assert dataset[0]["image"].size == (side, side) and dataset[0]["image"].mode == "RGB"


@pytest.mark.parametrize("style", ["twemoji", "openmoji"])
def test_held_out_emoji_are_not_trained_on(style, tmp_path):
    names = [
        set(load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path))["name"])
        for file in sorted((EMOJI / "data" / style).glob("*.parquet"))
    ]
    assert len(names) == 2 and not names[0] & names[1]


def test_it_adapts_through_less_than_a_percent(pipe):
    base = sum(p.numel() for p in pipe.transformer.parameters())
    config = DiffFitConfig(id2label={index: name for name, index in pipe.labels.items()}, init_class_rows="base")
    model = get_peft_model(pipe.transformer, config)
    assert is_shared(pipe.transformer)
    assert 0 < sum(p.numel() for p in model.parameters() if p.requires_grad) < 0.01 * base
    model.unload()
