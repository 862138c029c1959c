import io
import itertools
import json
import os
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from hub_server import HubServer

# huggingface_hub reads these when it is imported: the tests' own Hub and an empty cache, whatever the machine has.
HUB = HubServer()
_HF_HOME = TemporaryDirectory(prefix="difffit-hf-home-")
os.environ |= {"HF_ENDPOINT": HUB.endpoint, "HF_HOME": _HF_HOME.name, "HF_HUB_DISABLE_XET": "1"}
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": HUB.add_user("me")}

import numpy as np  # noqa: E402
import PIL.Image  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset, Features, Image  # noqa: E402
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel  # noqa: E402
from peft import get_peft_model  # noqa: E402

from difffit_peft import DiffFitConfig  # noqa: E402
from difffit_peft.training.images import load_labelled_images  # noqa: E402

pytest.register_assert_rewrite("family_checks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make mutants`: a mutant meets the fastest tests first, and in the first round no others."""
    if "__mutmut_" in os.environ.get("MUTANT_UNDER_TEST", ""):
        seconds = json.loads(Path("mutmut-stats.json").read_text())["duration_by_test"]
        items.sort(key=lambda item: seconds[item.nodeid])
        starts = itertools.accumulate((seconds[item.nodeid] for item in items), initial=0)
        most = float(os.environ.get("DIFFFIT_MUTATION_SECONDS", "inf"))
        items[:] = [item for item, start in zip(items, starts, strict=False) if start <= most]


NULL = 1000
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # the same formula, summed in another order


def make_dit(**overrides) -> DiTTransformer2DModel:
    """A random DiT of 4 blocks and width 16 whose blocks hold equal copies of one embedder, as published ones do."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 4,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": NULL,
    }
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(**(config | overrides)).eval()
    embedder = dit.transformer_blocks[0].norm1.emb.state_dict()
    for block in dit.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(embedder)
    return dit


def make_pipeline(**overrides) -> DiTPipeline:
    dit = make_dit(**overrides)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.0,
    )
    return DiTPipeline(dit, vae, DDIMScheduler(clip_sample=False))


def make_inputs(batch: int = 5, side: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, side, side, generator=generator),
        "timestep": torch.randint(1000, (batch,), generator=generator),
        "class_labels": torch.tensor([0, 2, NULL, 7, 1])[:batch],
    }


def randomise(model: torch.nn.Module, adapter_name: str = "default", seed: int = 2) -> None:
    """Stands for training: every weight of the adapter moves."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(f".{adapter_name}"):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data += 0.2 * noise


def save_adapter(folder: str | os.PathLike, seed: int = 2, **fields) -> None:
    """Saves a trained adapter of `make_dit()` with these fields of its config."""
    model = get_peft_model(make_dit(), DiffFitConfig(**fields))
    randomise(model, seed=seed)
    model.save_pretrained(folder, save_embedding_layers=False)


@torch.no_grad()
def outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    return model(**inputs, **kwargs).sample


def images(pipe: DiTPipeline, labels=(0, 1), **options) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"} | options
    return torch.as_tensor(pipe([*labels], **options).images)


@pytest.fixture
def dit() -> DiTTransformer2DModel:
    return make_dit()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return make_inputs()


# Images


def picture(seed: int = 0, size: tuple[int, int] = (20, 24)) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def png(image: PIL.Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def write_folder(root, classes=("ant", "bee"), count: int = 2):
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(i).save(root / name / f"{i}.png")
    return root


def write_parquet(path, labels, feature, images=None):
    images = images or [png(picture(i)) for i in range(len(labels))]
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    Dataset.from_dict(rows, features=Features({"image": Image(), "label": feature})).to_parquet(path)
    return path


def write_zip(path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(name, png(picture(50 + i)))


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.fixture
def load(tmp_path):
    return lambda path, **options: load_labelled_images(train_data_dir=path, cache_dir=tmp_path / "cache", **options)
