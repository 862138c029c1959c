"""One timestep and class embedder for all blocks.

The paper's DiT has one; Diffusers' has a copy in every block (`AdaLayerNormZero.emb`), and calls block 0's once more
for the output layer. Training the copies apart is not DiffFit: it costs 28 times the parameters, lets the copies
drift, and draws label dropout anew in every block, so that no sample is ever unconditional in all of them.

While shared, the embedder is `transformer.norm1_emb` (a name that Diffusers' layer-wise casting skips, as it skips
`norm1.emb`). A forward pre-hook evaluates it once and hands the result on in the place of `timestep`; what stands in
each block returns what it is handed. Nothing is cached, so gradient checkpointing, `torch.compile` and FSDP see a plain
function of plain inputs.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

# The parameters of DiTTransformer2DModel.forward, in order (diffusers 0.42).
_FORWARD_PARAMETERS = ("hidden_states", "timestep", "class_labels", "cross_attention_kwargs", "return_dict")


class _Handed(nn.Module):
    """Stands in a block for its embedder: the conditioning, (batch, channels), arrives in the place of `timestep`."""

    def forward(self, timestep: torch.Tensor, class_labels: Any, hidden_dtype: Any = None) -> torch.Tensor:
        return timestep


def _evaluate_once(transformer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    inputs = dict(zip(_FORWARD_PARAMETERS, args, strict=False)) | kwargs
    if "hidden_states" in inputs:  # else the call fails as it would without us
        embedder, x = transformer.norm1_emb, inputs["hidden_states"]
        if any(p.device != x.device and not p.is_meta for p in embedder.parameters()):
            embedder.to(x.device)  # offloading moves weights in a wrapper of `forward`, which runs after this hook
        inputs["timestep"] = embedder(inputs.get("timestep"), inputs.get("class_labels"), hidden_dtype=x.dtype)
    return (), inputs


def is_shared(transformer: nn.Module) -> bool:
    return hasattr(transformer, "_difffit_hook")


def share(transformer: nn.Module) -> bool:
    """Moves block 0's embedder to `transformer.norm1_emb`, in the place of all blocks'. Returns whether it did.

    A transformer whose embedders differ is left alone, with a warning: sharing would change what it computes.
    """
    if is_shared(transformer):
        return False
    embedders = [block.norm1.emb for block in transformer.transformer_blocks]
    if not all(_equal(embedders[0], other) for other in embedders[1:]):
        warnings.warn(
            f"The {len(embedders)} timestep and class embedders of this {type(transformer).__name__} differ: each gets "
            f"adapter weights of its own. That is {len(embedders)} times the parameters, and each draws its own label "
            "dropout. A published DiT has equal copies.",
            stacklevel=2,
        )
        return False
    transformer.norm1_emb = embedders[0]
    for block in transformer.transformer_blocks:
        block.norm1.emb = _Handed()
    transformer._difffit_hook = transformer.register_forward_pre_hook(_evaluate_once, with_kwargs=True)
    return True


def unshare(transformer: nn.Module) -> None:
    """Gives every block its embedder back, a copy of the shared one, and removes the hook."""
    if not is_shared(transformer):
        return
    transformer._difffit_hook.remove()
    del transformer._difffit_hook
    embedder = transformer.norm1_emb
    del transformer.norm1_emb
    for index, block in enumerate(transformer.transformer_blocks):
        block.norm1.emb = embedder if index == 0 else _copied(embedder)


def _copied(module: nn.Module) -> nn.Module:
    """A deep copy, also of quantised weights whose tensors do not support one (optimum-quanto 0.2.7)."""
    copies: dict[int, Any] = {}
    for parameter in module.parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            names, about = parameter.__tensor_flatten__()
            parts = {name: getattr(parameter, name).clone() for name in names}
            tensor = type(parameter).__tensor_unflatten__(parts, about, parameter.size(), parameter.stride())
            copies[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
    return copy.deepcopy(module, copies)


def _equal(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules hold the same values. Tensors without values, on the meta device, count as equal."""
    if first is second:
        return True
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(name == other and _equal_values(a, b) for (name, a), (other, b) in pairs)


def _equal_values(a: Any, b: Any) -> bool:
    if hasattr(a, "__tensor_flatten__"):  # a quantised or sharded tensor is made of plain ones
        names, _ = a.__tensor_flatten__()
        return type(a) is type(b) and all(_equal_values(getattr(a, name), getattr(b, name)) for name in names)
    if not isinstance(a, torch.Tensor):  # what quantised layers keep beside their tensors
        return a == b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.is_meta or b.is_meta or _same_bits(a, b)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares eight bytes at a time where both lie so: halves are several times as fast as by their values."""
    bits = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    if all(part.numel() % 8 == part.storage_offset() % 8 == 0 for part in bits):
        bits = [part.view(torch.int64) for part in bits]
    return torch.equal(*bits)
