"""Latents as transformers are trained on them: what a VAE gives, normalised as its config says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKLQwenImage
from torch import Tensor


def moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the posterior of images, (batch, 3, height, width), normalised, in float32.

    Latents that the VAE normalises in patches of 2x2 (`AutoencoderKLFlux2`) come in such patches: (batch, 4 channels,
    height / 2, width / 2). `AutoencoderDC` has no posterior: its deviation is 0. To `AutoencoderKLQwenImage` images are
    videos of one frame.
    """
    config = vae.config
    if isinstance(vae, AutoencoderDC):
        latents = vae.encode(pixels).latent.float() * config.scaling_factor
        return latents, torch.zeros_like(latents)
    if isinstance(vae, AutoencoderKLQwenImage):
        posterior = vae.encode(pixels.unsqueeze(2)).latent_dist
        mean, std = posterior.mean.float().squeeze(2), posterior.std.float().squeeze(2)
        shift, scale = (mean.new_tensor(value).view(1, -1, 1, 1) for value in (config.latents_mean, config.latents_std))
        return (mean - shift) / scale, std / scale
    posterior = vae.encode(pixels).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    if hasattr(vae, "bn"):
        mean, std = F.pixel_unshuffle(mean, 2), F.pixel_unshuffle(std, 2)
        shift, scale = vae.bn.running_mean, (vae.bn.running_var + config.batch_norm_eps).rsqrt()
        shift, scale = (value.to(mean).view(1, -1, 1, 1) for value in (shift, scale))
        return (mean - shift) * scale, std * scale
    shift = config.get("shift_factor")
    return (mean if shift is None else mean - shift) * config.scaling_factor, std * config.scaling_factor
