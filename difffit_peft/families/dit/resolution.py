"""A transformer moved to latents of another side.

Sin-cos positions are rescaled, so that a grid twice as fine uses positions i/2 of the old one (Xie et al. 2023,
section 3.4). Diffusers' `PatchEmbed` does so by itself for latents larger than its own, but computes the table anew on
every forward, and `DiTPipeline` samples at `config.sample_size`. Here both follow.
"""

from __future__ import annotations

from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import nn


def base_sample_size(transformer: nn.Module) -> int:
    """The latent side the transformer was trained at, whatever it has been moved to."""
    embed = transformer.pos_embed
    moved = embed.height != embed.base_size
    return embed.base_size * transformer.config.patch_size if moved else transformer.config.sample_size


def set_sample_size(transformer: nn.Module, sample_size: int) -> None:
    """Moves a `DiTTransformer2DModel` to latents of `sample_size` x `sample_size`; its own side moves it back.

    Raises:
        ValueError: if `sample_size` is not a multiple of the patch size.
    """
    if sample_size == transformer.config.sample_size:
        return
    patch_size = transformer.config.patch_size
    if sample_size % patch_size:
        raise ValueError(f"sample_size={sample_size} is not a multiple of the patch size of this model, {patch_size}.")
    embed = transformer.pos_embed
    side = sample_size // patch_size
    table = get_2d_sincos_pos_embed(
        embed.pos_embed.shape[-1],
        side,
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        device=embed.pos_embed.device,
        output_type="pt",
    )
    embed.pos_embed = table.unsqueeze(0).to(embed.pos_embed.dtype)
    embed.height = embed.width = side
    transformer.register_to_config(sample_size=sample_size)
