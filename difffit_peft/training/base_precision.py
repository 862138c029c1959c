"""`--base_precision`: the frozen layers of a base's blocks in a lower precision than the run's."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn

from ..families import family_of
from ..low_precision import MULTIPLE, LowPrecisionLinear

_CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}  # of NVIDIA's GPUs whose products these are


def check_base_precision(precision: str | None, mixed_precision: str, device: torch.device, sharded: bool) -> None:
    """Raises `ValueError` for a precision that the device cannot multiply in, or that does not go with the run's."""
    if precision == "bf16" and mixed_precision != "bf16":
        raise ValueError(
            f"--base_precision bf16 goes with --mixed_precision bf16, and that is {mixed_precision}: choose the same "
            "for both."
        )
    if precision not in _CAPABILITY:
        return
    if sharded:
        raise ValueError(f"--base_precision {precision} is not for FSDP2, which shards floating point weights alone.")
    needed, is_nvidia = _CAPABILITY[precision], device.type == "cuda" and torch.version.hip is None
    if is_nvidia and torch.cuda.get_device_capability(device) < needed:
        found = (
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
        )
    elif is_nvidia or (device.type == "cpu" and precision == "int8"):
        return
    else:
        found = f"this device is {device.type}"
    raise ValueError(
        f"--base_precision {precision} needs an NVIDIA GPU of compute capability {'.'.join(map(str, needed))} or above"
        f"{', or a CPU' * (precision == 'int8')}, and {found}. Leave it out: the base is then held in "
        "--mixed_precision."
    )


def lower_blocks(model: PeftModel, precision: str) -> None:
    """Puts the frozen linear layers of the model's blocks into "int8" or "fp8", in place.

    What is outside of the blocks, such as embedders and the output layer, stays as it is: it is small, and matters.

    Raises:
        ValueError: if the blocks have no layers that can be.
    """
    base = model.get_base_model()
    family = family_of(base)
    blocks = tuple(f"{name}." for name in family.blocks or ())
    layers = {
        name: layer
        for name, layer in base.named_modules()
        if type(layer) is nn.Linear
        and name.startswith(blocks)
        and not layer.weight.requires_grad
        and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
    }
    for name in family.left_out(layers):
        del layers[name]  # their weights are read by others
    if not layers:
        raise ValueError(
            f"--base_precision {precision}: the blocks of this {type(base).__name__} have no linear layers whose "
            f"numbers of channels are multiples of {MULTIPLE}. Leave it out."
        )
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, LowPrecisionLinear(layer, precision))
