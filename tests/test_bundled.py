"""The bundled base and datasets are what examples/avatars/README.md says they are."""

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from peft import get_peft_model
from safetensors.torch import load_file

from difffit_peft import DiffFitConfig
from difffit_peft.families.dit.conditioning import is_shared

AVATARS = Path(__file__).resolve().parent.parent / "examples/avatars"


@pytest.fixture(scope="module")
def pipe() -> DiTPipeline:
    return DiTPipeline.from_pretrained(AVATARS / "base")


def test_the_base_is_a_small_stock_pipeline(pipe):
    assert sum(file.stat().st_size for file in (AVATARS / "base").rglob("*")) <= 30_000_000
    assert [type(part) for part in (pipe.transformer, pipe.vae, pipe.scheduler)] == [
        DiTTransformer2DModel,
        AutoencoderKL,
        DDIMScheduler,
    ]
    config = pipe.transformer.config
    assert config.out_channels == 2 * config.in_channels and config.num_embeds_ada_norm == 1000
    assert len(pipe.labels) == 42


def test_half_precision_on_disk():
    files = list((AVATARS / "base").glob("*/*.safetensors"))
    assert {file.parent.name for file in files} == {"transformer", "vae"}
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float16}


@pytest.mark.parametrize(
    ("path", "classes", "rows"),
    [
        ("inside/train", 4, 240),
        ("near/train", 6, 1200),
        ("middle/train", 4, 800),
        ("far/train", 98, 1706),
        ("far/test", 98, 200),
    ],
)
def test_the_domains(path, classes, rows, tmp_path):
    file = str(AVATARS / "data" / f"{path}.parquet")
    dataset = load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path))
    assert len(dataset) == rows and len(dataset.features["label"].names) == classes
    assert dataset[0]["image"].size == (64, 64) and dataset[0]["image"].mode == "RGB"


def test_held_out_emoji_are_not_trained_on(tmp_path):
    names = [
        set(load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path))["name"])
        for file in sorted((AVATARS / "data/far").glob("*.parquet"))
    ]
    assert len(names) == 2 and not names[0] & names[1]


def test_it_adapts_through_less_than_a_percent(pipe):
    base = sum(p.numel() for p in pipe.transformer.parameters())
    model = get_peft_model(pipe.transformer, DiffFitConfig(id2label={0: "micah", 1: "dylan"}))
    assert is_shared(pipe.transformer)
    assert 0 < sum(p.numel() for p in model.parameters() if p.requires_grad) < 0.01 * base
    model.unload()
