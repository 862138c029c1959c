"""Fine-tunes the bundled Noto emoji base to Twemoji with DiffFit, and shows what changed.

    make demo

Trains an adapter with `examples/train_difffit.py`, loads it into a fresh stock `DiTPipeline`, and writes
`demo/before_after.png`: the same classes and seeds before and after, with real Twemoji below. It also measures the
Fréchet distance of both to the 200 Twemoji held out from training.
"""

import argparse
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from difffit_peft.files import write  # importing the package registers DiffFit with PEFT
from difffit_peft.training.scripts import positive_int, run_script
from diffusers import DiTPipeline
from peft import PeftModel
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train_difffit  # noqa: E402

SHOWN = [
    "face-smiling",
    "face-concerned",
    "cat-face",
    "country-flag",
    "heart",
    "person-role",
    "animal-mammal",
    "food-fruit",
    "transport-ground",
    "clothing",
]


def fastest_precision() -> str:
    """ "bf16" where this machine multiplies matrices faster in it, else "no"."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(1024, 1024, dtype=dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        return time.perf_counter() - start

    return "bf16" if seconds(torch.bfloat16) < seconds(torch.float32) else "no"


class Features(nn.Module):
    """A small classifier of Noto emoji, trained in seconds; images are compared by its 32 features.

    It has never seen a Twemoji, so it sees those trained on as it sees those held out.
    """

    num_features = 32

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 64)
        layers = []
        for i, o in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, self.num_features))
        self.classes = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, 64, 64) to features (N, 32)."""
        return self.body(images.float() / 127.5 - 1)

    def fit(self, images: Tensor, labels: Tensor, steps: int = 300) -> "Features":
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in tqdm(range(steps), desc="Features"):
            rows = torch.randint(len(images), (128,))
            F.cross_entropy(self.classes(self(images[rows])), labels[rows]).backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()
        return self.eval().requires_grad_(False)


def load(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Images as uint8 (N, 3, 64, 64), labels (N,) and class names of a parquet file."""
    dataset = load_dataset("parquet", data_files=str(path), split="train")
    columns = dataset.with_format("torch")
    return torch.stack(list(columns["image"])), torch.stack(list(columns["label"])), dataset.features["label"].names


def sample(pipe: DiTPipeline, labels: list[int], args: argparse.Namespace, desc: str) -> Tensor:
    """One image per label as uint8 (N, 3, 64, 64), from seeds 0, 1, 2..."""
    batches = []
    for start in tqdm(range(0, len(labels), 50), desc=desc):
        batch = labels[start : start + 50]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images = pipe(
            batch,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            generator=generators,
            output_type="np",
        ).images
        batches.append(torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2))
    return torch.cat(batches)


def frechet_distance(features: Features, real: Tensor, images: Tensor) -> float:
    metric = FrechetInceptionDistance(feature=features)
    metric.update(real, real=True)
    metric.update(images, real=False)
    return metric.compute().item()


def draw(rows: dict[str, Tensor], names: list[str], path: Path) -> None:
    """A labelled grid of pictures, one row per entry."""
    figure, axes = plt.subplots(len(rows), len(names), figsize=(1.1 * len(names), 1.25 * len(rows)), dpi=130)
    for row, (title, images) in enumerate(rows.items()):
        for image, name, axis in zip(images, names, axes[row], strict=True):
            axis.imshow(image.permute(1, 2, 0), interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(name, fontsize=7)
        axes[row, 0].set_ylabel(title, fontsize=8)
    figure.tight_layout(pad=0.3)
    write(path, lambda partial: figure.savefig(partial, format="png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--max_train_steps", type=positive_int, default=600)
    parser.add_argument("--learning_rate", type=float, default=8e-3)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--num_inference_steps", type=positive_int, default=25)
    args = parser.parse_args()

    base, data, adapter = HERE / "base", HERE / "data", args.output_dir / "adapter"
    precision = fastest_precision()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    result = train_difffit.main(
        train_difffit.parse_args(
            [
                *("--pretrained_model_name_or_path", str(base)),
                *("--train_data_dir", str(data / "twemoji/train.parquet")),
                *("--output_dir", str(adapter)),
                *("--cache_dir", str(args.output_dir / "cache")),
                *("--train_batch_size", "64"),
                *("--max_train_steps", str(args.max_train_steps)),
                *("--learning_rate", str(args.learning_rate)),
                *("--lr_scheduler", "cosine"),
                *("--lr_warmup_steps", "20"),
                *("--snr_gamma", "5"),  # as the base was trained
                *("--mixed_precision", precision),
                *("--num_validation_images", "0"),
                *("--num_held_out_images", "0"),
                *("--report_to", "none"),
                *("--checkpointing_steps", "1000000"),  # it takes minutes, and may be run again
                "--no-random_flip",
            ]
        )
    )

    noto, noto_labels, names = load(data / "noto/train.parquet")
    train, train_labels, _ = load(data / "twemoji/train.parquet")
    held_out, held_out_labels, _ = load(data / "twemoji/test.parquet")

    pipe = DiTPipeline.from_pretrained(base, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    shown = [names.index(name) for name in SHOWN]
    labels = shown + held_out_labels.tolist()
    before = sample(pipe, labels, args, "Sampling the base")
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, adapter)
    after = sample(pipe, labels, args, "Sampling the adapted model")

    picture = args.output_dir / "before_after.png"
    real = torch.stack([train[train_labels == label][0] for label in shown])
    draw({"base": before[: len(shown)], "DiffFit": after[: len(shown)], "real Twemoji": real}, SHOWN, picture)

    torch.manual_seed(0)
    features = Features(len(names)).fit(noto, noto_labels)
    others = train[torch.randperm(len(train))[: len(held_out)]]
    distance = {
        name: frechet_distance(features, held_out, images)
        for name, images in (("base", before[len(shown) :]), ("adapted", after[len(shown) :]), ("real", others))
    }
    print(
        f"\nFréchet distance to {len(held_out)} held-out Twemoji, on 32 features of a small classifier of Noto emoji: "
        f"base {distance['base']:.2f}, adapted {distance['adapted']:.2f} "
        f"(other real Twemoji: {distance['real']:.2f})\n"
        f"Trained parameters: {result.trained_parameters:,}, {result.trained_share:.2%} of the base's\n"
        f"Adapter: {adapter}, {result.adapter_bytes:,} bytes\n"
        f"{result.steps} steps, {result.seconds_per_step:.2f} s each, in {precision.replace('no', 'fp32')}\n"
        f"Picture: {picture}"
    )


if __name__ == "__main__":
    run_script(main)
