"""The methods that the benchmarks compare, made ready to train by one function: `adapt`.

All of them train the paper's model: one timestep and class embedder, evaluated once per forward, in the place of the
copies that Diffusers keeps in every block (`difffit_peft.families.dit.conditioning`). DiffFit does that by itself. The
others get it too, so that what is compared is the methods and not Diffusers' layout, which would cost them the
evaluation of a copy per block and draw label dropout anew in each, and would have full fine-tuning train 28 class
tables.

What each trains:

- "full": every parameter.
- "BitFit": every bias, and the rows of the class table that DiffFit trains. Biases are unfrozen where they are, which
  is the fastest way to do it; `DiffFitConfig(gamma_modules=[])` trains the same with layers of ours around each bias.
- LoRA, LoHa, LoKr, OFT, IA³ and GLoRA: PEFT's, on the six linear layers of attention and feed-forward in every block.
  With `num_classes` they train the rows of the class table that DiffFit trains; else it is frozen. Options are PEFT's
  defaults but for alpha = r, which scales the update by 1. IA³ scales the inputs of the feed-forward's second layer and
  the outputs of the others. GLoRA has vectors in the place of matrices; they can do what γ and δ do.
- "LN tuning": the affine parameters of every LayerNorm. A DiT's have none, as adaLN computes scale and shift from the
  timestep and class: it trains nothing, and PEFT's `LNTuningConfig` stops with an `AttributeError` (peft 0.21), so that
  the norms are unfrozen where they are.
- "DiffFit": `DiffFitConfig()`, γ as published: on queries, keys, values and the output layers of attention and
  feed-forward, in the first half of the blocks.
- "DiffFit, adaLN": γ on what adaLN computes, in all blocks. Ours, and no layout of the paper.
- "DiffFit r=1": a change of rank 1 of the output layers of attention and feed-forward in the place of γ, within the
  paper's number of parameters; biases of keys, which have no effect, are left out.
- "floor", for timing alone: the frozen model with one trainable scalar added to its input. No method that adapts the
  first block does less than its one forward and one backward without gradients of weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from difffit_peft import DiffFitConfig
from difffit_peft.families.dit import conditioning
from diffusers import DiTTransformer2DModel
from peft import (
    GloraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import Tensor, nn

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]

RANK_1: dict[str, Any] = {"gamma_modules": [], "r": 1, "exclude_modules": ["to_k"]}

DIFFFIT: dict[str, dict[str, Any]] = {
    "DiffFit": {},
    "DiffFit, adaLN": {"gamma_modules": ["norm1.linear"]},
    "DiffFit r=1": RANK_1,
}

_PEFT: dict[str, PeftConfig] = {
    "LoRA r=2": LoraConfig(target_modules=LAYERS, r=2, lora_alpha=2),
    "LoRA r=8": LoraConfig(target_modules=LAYERS, r=8, lora_alpha=8),
    "LoRA r=16": LoraConfig(target_modules=LAYERS, r=16, lora_alpha=16),
    "LoHa": LoHaConfig(target_modules=LAYERS, r=8, alpha=8),
    "LoKr": LoKrConfig(target_modules=LAYERS, r=8, alpha=8),
    "OFT": OFTConfig(target_modules=LAYERS),
    "IA³": IA3Config(target_modules=LAYERS, feedforward_modules=["ff.net.2"]),
    "GLoRA, vectors": GloraConfig(target_modules=LAYERS, config_A_B="vector", config_C="vector", config_D_E="vector"),
}

METHODS = ("full", "BitFit", *_PEFT, "LN tuning", *DIFFFIT)
"""In the order in which tables show them; `adapt` also takes "floor". "LN tuning" has nothing to train in a DiT."""


def dit_xl_2(num_layers: int = 28, dtype: torch.dtype = torch.float32, sample_size: int = 32) -> DiTTransformer2DModel:
    """A DiT-XL/2 with random weights, whose blocks hold equal copies of one embedder.

    Args:
        num_layers: number of blocks; other than 28 for something of the same width but less depth.
        dtype: of its weights, from the start: nothing is allocated twice.
        sample_size: side of its latents: 32 for 256 x 256 pixels.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            out_channels=8,
            num_layers=num_layers,
            sample_size=sample_size,
        )
    finally:
        torch.set_default_dtype(default)
    embedder = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(embedder)
    return model


class _Floor(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.scalar = nn.Parameter(torch.zeros(()))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return self.model(hidden_states + self.scalar.to(hidden_states.dtype), **kwargs)


def adapt(name: str, model: DiTTransformer2DModel, num_classes: int | None = None) -> nn.Module:
    """The model to train with method `name`: exactly what the method trains requires grad.

    `model` is changed in place, and called as before: `adapt(...)(x_t, timestep=t, class_labels=labels).sample`. It
    need not have values: on the meta device, parameters can be counted.

    Args:
        name: one of `METHODS`, or "floor".
        model: a DiT as Diffusers loads it, whose blocks hold equal copies of one embedder.
        num_classes: classes of the new domain: the rows of the class table that are trained, beside the null row, and
            that start from the null row, with every method alike. Full fine-tuning trains the other rows too. `None`:
            every row, from where it is; PEFT's methods then train none.

    Raises:
        ValueError: for a name that is none of these.
    """
    if name not in (*METHODS, "floor"):
        raise ValueError(f"{name!r} is not a method: use one of {', '.join(METHODS)} or floor.")
    if name in DIFFFIT:
        return get_peft_model(model, DiffFitConfig(num_classes=num_classes, **DIFFFIT[name]))
    if name == "BitFit" or (name in _PEFT and num_classes):
        rows = DiffFitConfig(target_modules=["embedding_table"], gamma_modules=[], num_classes=num_classes)
        adapted = get_peft_model(model, rows)
        if name in _PEFT:  # which leaves what other tuners train as it is
            inject_adapter_in_model(copy.deepcopy(_PEFT[name]), model)
            return adapted
        for parameter_name, parameter in adapted.named_parameters():
            if parameter_name.endswith(".bias"):
                parameter.requires_grad_(True)
        return adapted
    conditioning.share(model)
    if name == "full":
        if num_classes:
            table = model.norm1_emb.class_embedder.embedding_table.weight.data
            table[:num_classes] = table[-1]  # the null row is the last
        return model.requires_grad_(True)
    if name in _PEFT:
        return get_peft_model(model, copy.deepcopy(_PEFT[name]))  # peft fills in fields of the config
    model.requires_grad_(False)
    if name == "floor":
        return _Floor(model)
    for module in model.modules():  # LN tuning
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an adapted model trains, by name: what an optimiser is given and what has to be saved."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def hold_frozen_in(dtype: torch.dtype, model: nn.Module) -> nn.Module:
    """Keeps the frozen parameters of an adapted model in `dtype`, and those it trains in float32.

    For mixed precision: half the memory, and nothing to cast in each step. The model is returned, changed in place.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    return model
