"""Sampling of batches: what a training step draws at random, as a function of the seed and the step alone.

Nothing is drawn from a generator that has a state, so a run that was killed goes on as if it had not been, and n
processes with b samples each draw what one draws with n·b.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn


@dataclass(frozen=True)
class Draws:
    """For each sample of a process's batch."""

    view: Tensor  # (batch,) which view of the image: itself or its mirror image
    posterior: Tensor  # (batch, channels, height, width) standard normal, for the VAE's posterior
    noise: Tensor  # (batch, channels, height, width) standard normal, for the diffusion
    timesteps: Tensor  # (batch,)
    dropped: Tensor  # (batch,) bool: trained as the null class, for classifier-free guidance


def draw(
    seed: int,
    step: int,
    shape: tuple[int, ...],
    num_train_timesteps: int,
    *,
    label_dropout: float = 0.1,
    process: int = 0,
    num_processes: int = 1,
    device: torch.device | str = "cpu",
) -> Draws:
    """The draws of one process for one batch.

    Args:
        seed: of the run.
        step: number of the batch, counted from the start of the run.
        shape: (batch, views, channels, height, width) of the process's latents, as `LatentDataset` gives them.
        num_train_timesteps: of the scheduler.
        label_dropout: share of samples trained without their class.
        process: this process's index below `num_processes`. All draw for all, and each takes its part.
        device: where the tensors go.
    """
    batch, views, *latent = shape
    mixed = np.random.SeedSequence([seed, step]).generate_state(1)  # torch's CPU generator takes 32 bits of a seed
    generator = torch.Generator().manual_seed(int(mixed[0]))
    total = batch * num_processes
    everyone = (
        torch.randint(views, (total,), generator=generator),
        torch.randn(total, *latent, generator=generator),
        torch.randn(total, *latent, generator=generator),
        torch.randint(num_train_timesteps, (total,), generator=generator),
        torch.rand(total, generator=generator) < label_dropout,
    )
    mine = slice(process * batch, (process + 1) * batch)
    return Draws(*(tensor[mine].to(device) for tensor in everyone))


def null_class(model: nn.Module) -> int | None:
    """The class that stands for any class, which guidance needs; `None` where a model has none."""
    return next((module.num_classes for module in _label_embeddings(model)), None)


def disable_label_dropout(model: nn.Module) -> None:
    """Turns off the label dropout of a model's own, which has a state and which every block may draw anew."""
    for module in _label_embeddings(model):
        module.dropout_prob = 0.0


def _label_embeddings(model: nn.Module) -> list[LabelEmbedding]:
    return [module for module in model.modules() if isinstance(module, LabelEmbedding)]


def sample_latents(mean: Tensor, std: Tensor, view: Tensor, noise: Tensor) -> Tensor:
    """A latent for every sample of a batch: a draw from the posterior of one of its views.

    Args:
        mean: shape (batch, views, channels, height, width), as `LatentDataset` gives it.
        std: the same.
        view: shape (batch,), which view to take: `Draws.view`.
        noise: shape (batch, channels, height, width), standard normal: `Draws.posterior`.

    Returns:
        float32 of shape (batch, channels, height, width).
    """
    rows = torch.arange(len(mean), device=mean.device)
    return mean[rows, view].float() + std[rows, view].float() * noise
