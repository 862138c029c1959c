"""The network whose features the quality benchmarks compare images by: a small classifier of emoji.

Inception is trained on photographs and says little about images of 64 pixels. This network learns to tell the class (of
98) and the style (Noto, Twemoji or OpenMoji) of the emoji that a target domain trains on, so its features see both what
is drawn and how. It never sees a held-out image. All its images have been through the base's VAE, as samples have: it
cannot tell a sample from a real image by what the VAE does to both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


class FeatureNetwork(nn.Module):
    """Features of images.

    Args:
        num_classes: classes, and styles, to tell apart in training.
    """

    num_features = 64

    def __init__(self, num_classes: int, num_styles: int) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for i, o in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.SiLU()]
        self.body = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], self.num_features)
        )
        self.classes = nn.Linear(self.num_features, num_classes)
        self.styles = nn.Linear(self.num_features, num_styles)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, side, side) to features (N, 64)."""
        return self.body(images.float() / 127.5 - 1)

    def fit(self, images: Tensor, classes: Tensor, styles: Tensor, steps: int) -> "FeatureNetwork":
        """Trains on images (N, 3, side, side), uint8, shifted by up to a sixteenth of their side; labels are (N,)."""
        side = images.shape[-1]
        shift = side // 16
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in tqdm(range(steps), desc="Feature network"):
            rows = torch.randint(len(images), (128,))
            x, y = torch.randint(2 * shift + 1, (2,)).tolist()
            batch = F.pad(images[rows], (shift,) * 4, value=255)[:, :, y : y + side, x : x + side]
            features = self(batch)
            loss = F.cross_entropy(self.classes(features), classes[rows])
            (loss + F.cross_entropy(self.styles(features), styles[rows])).backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()
        return self.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """As `forward`, in batches."""
        return torch.cat([self(batch) for batch in images.split(100)])
