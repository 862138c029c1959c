"""DiffFit weights of the original DiT (facebookresearch/DiT, `models.py`) as an adapter, and an adapter as those.

Such weights are what the published filter `["bias", "norm", "gamma", "y_embed"]` selects. Their values are absolute
(the trained bias b', the trained class table) where an adapter holds differences from the base (δ = b' - b), so both
directions need the base. Each tensor has a place of its own:

| original layout | shape | adapter on a `DiTTransformer2DModel` |
| --- | --- | --- |
| `x_embedder.proj.bias` | (D,) | δ of `pos_embed.proj` |
| `t_embedder.mlp.{0,2}.bias` | (D,) | δ of `norm1_emb.timestep_embedder.linear_{1,2}` |
| `y_embedder.embedding_table.weight` | (K + 1, D), null row last | δ of rows 0 to K - 1 and of the table's last |
| `blocks.i.attn.qkv.bias`, `blocks.i.attn.gamma1` | (3D,) | δ and γ of `attn1.to_q`, `to_k`, `to_v`, in this order |
| `blocks.i.attn.proj.bias`, `blocks.i.attn.gamma2`, `blocks.i.gamma1` | (D,) | δ and γ of `attn1.to_out.0` |
| `blocks.i.mlp.fc1.bias`, `blocks.i.mlp.gamma1` | (4D,) | δ and γ of `ff.net.0.proj` |
| `blocks.i.mlp.fc2.bias`, `blocks.i.mlp.gamma2`, `blocks.i.gamma2` | (D,) | δ and γ of `ff.net.2` |
| `blocks.i.adaLN_modulation.1.bias` | (6D,) | δ of `norm1.linear` |
| `final_layer.adaLN_modulation.1.bias` | (2D,) | δ of `proj_out_1` |
| `final_layer.linear.bias` | (p²C,) | δ of `proj_out_2` |

The scale factors have the names of public DiffFit code for DiT: `blocks.i.attn.gamma{1,2}` and `blocks.i.gamma{1,2}`
are in `models.py` of vimar-gu/MinimaxDiffusion and thuml/Diffusion-Tuning, in the first 14 of 28 blocks: that is the
preset of `DiffFitConfig()`. `blocks.i.mlp.gamma{1,2}` are in `utils_vit.py` of DiT-3D/DiT-3D. A block's own multiply
what its two branches add, x + gate · γ1 · attention(x), and so the outputs of `attn.proj` and `mlp.fc2`. Two factors
of one vector are one in the adapter, their product. On the way back γ of `attn1.to_out.0` is `attn.gamma2`, beside a
`gamma1` of 1, and γ of `ff.net.2` is the block's `gamma2`. An adapter with γ on `ff.net.0.proj`, or on one of these two
alone, has no use for a block's own: there γ of `ff.net.2` is `mlp.gamma2`.

How exact it is: an adapter's γ comes back as it was, as does a factor that stands alone; of two, their product does.
So do biases and class rows where training left a value between half and twice the base's, as b' - b then has no
rounding error (Sterbenz), and where the base's is 0. For other values there may be no float32 δ with b + δ = b'; what
comes back then differs by at most 2⁻²³ |b' - b|.

Diffusers' DiT is not quite the original's function, with an adapter or without: its timestep frequencies are
10000^(-i/127) where the original has 10000^(-i/128), and ε is 1e-5 in the second norm of its blocks where the original
has 1e-6, unless `norm_eps` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from ...config import DiffFitConfig, nearest
from ...layer import DiffFitLayer
from . import conditioning, resolution

# Layers of the original, and the layers of Diffusers that hold their rows, in this order.
_TABLE = "y_embedder.embedding_table"
_LAYERS = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["norm1_emb.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["norm1_emb.timestep_embedder.linear_2"],
    _TABLE: ["norm1_emb.class_embedder.embedding_table"],
    "final_layer.adaLN_modulation.1": ["proj_out_1"],
    "final_layer.linear": ["proj_out_2"],
}
_BLOCK_LAYERS = {
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attn.proj": ["attn1.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
    "adaLN_modulation.1": ["norm1.linear"],
}
# Scale factors of a block, and the layer whose output they multiply.
_GAMMAS = {
    "attn.gamma1": "attn.qkv",
    "attn.gamma2": "attn.proj",
    "mlp.gamma1": "mlp.fc1",
    "mlp.gamma2": "mlp.fc2",
    "gamma1": "attn.proj",
    "gamma2": "mlp.fc2",
}
# What every original DiT has, and a `DiTTransformer2DModel` may have otherwise.
_CONFIG = {"attention_bias": True, "norm_elementwise_affine": False, "activation_fn": "gelu-approximate"}

_PREFIX = "base_model.model."
_WRAPPERS = {"module", "_orig_mod"}  # what DDP and torch.compile put into names
# A frozen weight may differ from the base's by this part of its norm: room for a base in bfloat16 (2e-3), and for an
# average of weights (EMA) in float32, which drifts where nothing is trained (5e-5 at a decay of 0.9999).
_TOLERANCE = 5e-3


@torch.no_grad()
def convert_original_to_peft(
    state_dict: Mapping[str, Any], transformer: DiTTransformer2DModel
) -> tuple[DiffFitConfig, dict[str, Tensor]]:
    """Converts DiffFit weights in the layout of the original DiT to an adapter.

        config, weights = convert_original_to_peft(state_dict, pipe.transformer)
        model = get_peft_model(pipe.transformer, config)
        set_peft_model_state_dict(model, weights)
        model.save_pretrained("my_adapter", save_embedding_layers=False)

    What becomes of which tensor, and how exactly, is in the docstring of this module. A class table of K + 1 rows
    gives `num_classes=K`; one as large as the base's trains all rows. Layers that the file leaves as the base has them
    get no adapter.

    Args:
        state_dict: floating point tensors, those of the whole model too: its frozen weights must then be the base's.
            Names may have the prefixes of DDP and `torch.compile`. Of a training checkpoint, `state_dict["ema"]` is
            taken if there is one, else `state_dict["model"]`.
        transformer: the base, unquantised and in the precision it is to be used in. It is left as it is.

    Returns:
        The config, and the weights in float32 by their names in `adapter_model.safetensors`.

    Raises:
        ValueError: if a tensor is unknown, missing, misshapen, not finite, or frozen but not the base's; if the base
            is not a DiT like the original.
    """
    base = _base(transformer)
    layers, places = _layers(transformer), _gamma_places(transformer)
    tensors = _unwrapped(state_dict)
    _check(tensors, base, places)

    gammas: dict[str, Tensor] = {}
    for name, layer in places.items():
        if name in tensors:
            gammas[layer] = gammas.get(layer, 1) * tensors[name].float().cpu()

    weights: dict[str, Tensor] = {}
    untouched: list[str] = []
    num_classes = None
    for layer, modules in layers.items():
        own, trained = base[_trained(layer)], tensors.get(_trained(layer))
        if trained is None:  # a class table; biases are never missing
            untouched += modules
            continue
        if layer == _TABLE and len(trained) < len(own[0]):
            num_classes = len(trained) - 1
            own = [_rows(own[0], num_classes)]
        sizes = [len(tensor) for tensor in own]
        for module, before, after in zip(modules, own, trained.split(sizes), strict=True):
            delta = after.to(before.device).float() - before.float()
            if layer in gammas or delta.any():
                weights[f"{_PREFIX}{module}.difffit_delta"] = delta
            else:
                untouched.append(module)
        if layer in gammas:
            for module, gamma in zip(modules, gammas[layer].split(sizes), strict=True):
                weights[f"{_PREFIX}{module}.difffit_gamma"] = gamma.clone()
    config = DiffFitConfig(
        exclude_modules=untouched or None,
        gamma_modules=[module.split(".", 2)[2] for layer in gammas for module in layers[layer]],
        gamma_layers=[int(layer.split(".")[1]) for layer in gammas] or None,
        num_classes=num_classes,
    )
    return config, weights


@torch.no_grad()
def convert_peft_to_original(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """Converts an adapter to DiffFit weights in the layout of the original DiT.

    What becomes of which tensor, and how exactly, is in the docstring of this module. Every bias and the class table
    are there, the base's own where the adapter trains none; with `num_classes=K` the table has K + 1 rows. All blocks
    with scale factors have the same ones, 1 where the adapter has none. Load them with `strict=False` into an original
    DiT that holds the base, and see that none are unexpected: not all code has all the scale factors. An adapter of
    `DiffFitConfig()` has those of MinimaxDiffusion and Diffusion-Tuning.

    Args:
        model: the base with the adapter. It is left as it is; scales play no part.
        adapter_name: which of its adapters.

    Returns:
        Tensors in float32.

    Raises:
        ValueError: if there is no such adapter; if it has what the original layout has no name for: γ on another
            layer, modules saved whole, rescaled positions; if the base is not a DiT like the original.
    """
    config = model.peft_config.get(adapter_name) if isinstance(model, PeftModel) else None
    if not isinstance(config, DiffFitConfig):
        names = sorted(getattr(model, "peft_config", {}))
        raise ValueError(f"{adapter_name!r} is not a DiffFit adapter of this {type(model).__name__}: it has {names}.")
    transformer = model.get_base_model()
    base = _base(transformer)
    layers = _layers(transformer)
    side = resolution.base_sample_size(transformer)
    if config.sample_size != side:
        raise ValueError(
            f"The adapter moves its base from latents of side {side} to side {config.sample_size}, with rescaled "
            "positions, which the weights of DiffFit do not hold."
        )
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    weights = {name.removeprefix(_PREFIX): tensor.float() for name, tensor in state.items()}

    state_dict: dict[str, Tensor] = {}
    gammas: dict[str, Tensor] = {}
    for layer, modules in layers.items():
        own = [tensor.float() for tensor in base[_trained(layer)]]
        if layer == _TABLE and config.num_classes is not None:
            own = [_rows(own[0], config.num_classes)]
        pairs = list(zip(modules, own, strict=True))
        deltas = [weights.pop(f"{module}.difffit_delta", torch.zeros_like(tensor)) for module, tensor in pairs]
        state_dict[_trained(layer)] = torch.cat(own) + torch.cat(deltas)
        if any(f"{module}.difffit_gamma" in weights for module in modules):
            factors = [weights.pop(f"{module}.difffit_gamma", torch.ones_like(tensor)) for module, tensor in pairs]
            gammas[layer] = torch.cat(factors)
    places = _gamma_places(transformer)
    split = [layer.split(".", 2) for layer in gammas if layer in places.values()]  # "blocks", index, layer
    kinds = _names({layer for _, _, layer in split})
    for name in _in_each_block(f"blocks.{i}.{kind}" for _, i, _ in split for kind in kinds):
        layer = places[name]
        state_dict[name] = gammas.pop(layer, torch.ones_like(state_dict[f"{layer}.bias"]))
    nameless = [*weights, *(f"{layers[layer][0]}.difffit_gamma" for layer in gammas)]
    if nameless:
        raise ValueError(
            f"The original layout has no name for {nameless[0]}: DiffFit's scale factors are on the layers of the "
            "attention and the feed-forward network there."
        )
    return state_dict


def _layers(transformer: DiTTransformer2DModel) -> dict[str, list[str]]:
    """Layers of the original, and those of Diffusers that hold their rows, by their names beneath an adapter."""
    blocks = {
        f"blocks.{i}.{layer}": [f"transformer_blocks.{i}.{module}" for module in modules]
        for i in range(transformer.config.num_layers)
        for layer, modules in _BLOCK_LAYERS.items()
    }
    return _LAYERS | blocks


def _gamma_places(transformer: DiTTransformer2DModel) -> dict[str, str]:
    """Scale factors of the original, and the layer whose output they multiply."""
    return {
        f"blocks.{i}.{name}": f"blocks.{i}.{layer}"
        for i in range(transformer.config.num_layers)
        for name, layer in _GAMMAS.items()
    }


def _names(layers: set[str]) -> set[str]:
    """What scale factors on these layers of a block are called. Public code has a block's own, or some on `mlp.fc1`."""
    names, own = {name for name, layer in _GAMMAS.items() if layer in layers}, {"gamma1", "gamma2"}
    return names - ({"mlp.gamma2"} if own <= names and "mlp.fc1" not in layers else own)


def _in_each_block(names: Iterable[str]) -> list[str]:
    """For names `blocks.i.gamma`: each of these scale factors in each of these blocks."""
    split = [name.split(".", 2)[1:] for name in names]
    return [f"blocks.{i}.{kind}" for i in sorted({int(i) for i, _ in split}) for kind in sorted({k for _, k in split})]


def _trained(layer: str) -> str:
    """The name of the tensor that DiffFit trains in a layer of the original."""
    return f"{layer}.weight" if layer == _TABLE else f"{layer}.bias"


def _rows(table: Tensor, num_classes: int) -> Tensor:
    """The rows of the classes and the null row, the last one: (num_classes + 1, channels)."""
    return torch.cat([table[:num_classes], table[-1:]])


def _shape(parts: list[Tensor]) -> tuple[int, ...]:
    """The shape of tensors put one below the other."""
    return (sum(len(part) for part in parts), *parts[0].shape[1:])


def _base(transformer: DiTTransformer2DModel) -> dict[str, list[Tensor]]:
    """The base's own tensors by their names in the original layout, beneath adapters too; of qkv, Diffusers' three.

    Raises:
        ValueError: if this is not a DiT like the original, or has no values.
    """
    if not isinstance(transformer, DiTTransformer2DModel):
        raise ValueError(f"transformer is a {type(transformer).__name__}: must be a DiTTransformer2DModel.")
    for field, value in _CONFIG.items():
        if transformer.config[field] != value:
            raise ValueError(f"The base has {field}={transformer.config[field]!r}, the original DiT {value!r}.")
    embedder = "norm1_emb"
    if not conditioning.is_shared(transformer):
        embedder = "transformer_blocks.0.norm1.emb"
        first, *others = [block.norm1.emb for block in transformer.transformer_blocks]
        if not all(conditioning._equal(first, other) for other in others):
            raise ValueError("The timestep and class embedders of the base's blocks differ: the original DiT has one.")
    base = {"pos_embed": [transformer.pos_embed.pos_embed]}
    for layer, modules in _layers(transformer).items():
        for name in modules:
            module = transformer.get_submodule(name.replace("norm1_emb", embedder))
            own = module._base() if isinstance(module, DiffFitLayer) else dict(module.named_parameters(recurse=False))
            if not own:
                raise ValueError(f"{name} is a {type(module).__name__}: convert on a model without it.")
            for kind, tensor in own.items():
                base.setdefault(f"{layer}.{kind}", []).append(tensor)
    empty = next((name for name, parts in base.items() if any(part.is_meta for part in parts)), None)
    if empty:
        raise ValueError(f"{empty} of the base has no values, as it is on the meta device: load or onload it first.")
    return base


def _unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the model in a checkpoint, without what wrappers put into their names."""
    nested = next((key for key in ("ema", "model") if isinstance(state_dict.get(key), Mapping)), None)
    tensors = {}
    for name, tensor in (state_dict[nested] if nested else state_dict).items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name!r} is {getattr(tensor, 'dtype', type(tensor).__name__)}: must be a float tensor.")
        tensors[".".join(part for part in name.split(".") if part not in _WRAPPERS)] = tensor
    return tensors


def _check(tensors: dict[str, Tensor], base: dict[str, list[Tensor]], places: dict[str, str]) -> None:
    """Refuses tensors that are not DiffFit's on this base."""
    shapes = {name: _shape(parts) for name, parts in base.items()}
    shapes |= {name: shapes[f"{layer}.bias"] for name, layer in places.items()}
    unknown = sorted(tensors.keys() - shapes.keys())
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors have no place in this base, a DiT of {len(places) // len(_GAMMAS)} blocks with "
            f"the scale factors {', '.join(_GAMMAS)} in each: for instance {unknown[0]}."
            + nearest(unknown[0], [*shapes])
        )
    biases, table = {name for name in shapes if name.endswith(".bias")}, _trained(_TABLE)
    missing = (biases | {*_in_each_block(tensors.keys() & places.keys())}) - tensors.keys()
    if missing:
        raise ValueError(
            f"{len(missing)} tensors are missing, for instance {min(missing)}: DiffFit trains every bias, and the same "
            "scale factors in each block that has any."
        )
    for name, tensor in tensors.items():
        fits = tuple(tensor.shape) == shapes[name]
        if name == table:
            fits = tensor.dim() == 2 and 2 <= len(tensor) <= shapes[name][0] and tensor.shape[1] == shapes[name][1]
        if not fits:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, but this base needs {shapes[name]}"
                + (", or fewer rows but two." if name == table else ".")
            )
    for name, tensor in tensors.items():
        if name in base.keys() - biases - {table}:
            parts = base[name]
            found = tensor.split([len(part) for part in parts])
            pairs = [(ours.float(), theirs.to(ours.device).float()) for ours, theirs in zip(parts, found, strict=True)]
            size = math.hypot(*(ours.norm() for ours, _ in pairs))
            distance = math.hypot(*((ours - theirs).norm() for ours, theirs in pairs))
            if not distance <= _TOLERANCE * size:  # NaN is not
                raise ValueError(
                    f"{name}, which DiffFit leaves frozen, is not the base's: they differ by {distance:.3g}, at a norm "
                    f"of {size:.3g}. The file belongs to another base, or more was trained."
                )
        elif not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite: the training run diverged.")
