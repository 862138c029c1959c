"""DiffFit on a DiT written out in plain torch from the papers, with nothing of PEFT or Diffusers in it.

Peebles & Xie 2023 (DiT with adaLN-Zero) with, on every layer, y = γ ⊙ (W x + b + δ) of Xie et al. 2023, and
B A x added to W x where an adapter has A and B (Hu et al. 2021).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]


def layer(x: Tensor, name: str, base: Tensors, adapter: Tensors) -> Tensor:
    y = x @ base[f"{name}.weight"].flatten(1).T + base.get(f"{name}.bias", 0)
    if f"{name}.A" in adapter:
        y = y + x @ (adapter[f"{name}.B"] @ adapter[f"{name}.A"]).T
    y = y + adapter.get(f"{name}.delta", 0)
    return adapter.get(f"{name}.gamma", 1) * y


def embed(timestep: Tensor, labels: Tensor, base: Tensors, adapter: Tensors) -> Tensor:
    name = "transformer_blocks.0.norm1.emb"
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 127)
    angles = timestep[:, None] * frequencies
    t = torch.cat([angles.cos(), angles.sin()], 1).to(base[f"{name}.timestep_embedder.linear_1.weight"].dtype)
    t = layer(F.silu(layer(t, f"{name}.timestep_embedder.linear_1", base, adapter)),
              f"{name}.timestep_embedder.linear_2", base, adapter)  # fmt: skip
    table = base[f"{name}.class_embedder.embedding_table.weight"]
    rows = adapter.get(f"{name}.class_embedder.embedding_table.delta")
    if rows is not None:  # the new classes first, the null class last
        table = torch.cat([table[: len(rows) - 1] + rows[:-1], table[len(rows) - 1 : -1], table[-1:] + rows[-1:]])
    return t + table[labels]


def forward(x: Tensor, timestep: Tensor, labels: Tensor, positions: Tensor, base: Tensors, adapter: Tensors,
            heads: int, depth: int, patch: int) -> Tensor:  # fmt: skip
    """x (N, C, H, W) to (N, 2C, H, W)."""
    n, c, h, w = x.shape
    tokens = x.view(n, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * patch**2)
    z = layer(tokens, "pos_embed.proj", base, adapter) + positions  # (N, T, D)
    condition = F.silu(embed(timestep, labels, base, adapter))

    def norm(z: Tensor, eps: float) -> Tensor:
        return (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, unbiased=False) + eps).sqrt()

    for i in range(depth):
        block = f"transformer_blocks.{i}"
        modulation = layer(condition, f"{block}.norm1.linear", base, adapter)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, -1)
        y = norm(z, 1e-6) * (1 + scale1) + shift1
        q, k, v = (
            layer(y, f"{block}.attn1.to_{p}", base, adapter).view(n, -1, heads, y.shape[-1] // heads).transpose(1, 2)
            for p in "qkv"
        )
        attention = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        y = layer(attention.transpose(1, 2).flatten(2), f"{block}.attn1.to_out.0", base, adapter)
        z = z + gate1 * y
        y = norm(z, 1e-5) * (1 + scale2) + shift2
        y = F.gelu(layer(y, f"{block}.ff.net.0.proj", base, adapter), approximate="tanh")
        z = z + gate2 * layer(y, f"{block}.ff.net.2", base, adapter)

    shift, scale = layer(condition, "proj_out_1", base, adapter)[:, None].chunk(2, -1)
    z = layer(norm(z, 1e-6) * (1 + scale) + shift, "proj_out_2", base, adapter)
    z = z.view(n, h // patch, w // patch, patch, patch, -1)
    return z.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, h, w)


def name(parameter: str, adapter_name: str = "default") -> str:
    """What `forward` calls a parameter of an adapter."""
    parameter = parameter.removeprefix("base_model.model.").removesuffix(f".{adapter_name}").replace("difffit_", "")
    return parameter.replace("norm1_emb.", "transformer_blocks.0.norm1.emb.")
