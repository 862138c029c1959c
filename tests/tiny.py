"""Tiny models of the families, and of text encoders, with inputs for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

r = torch.randn


def grid(side: int, axes: int) -> Tensor:
    """Positions of the tokens of a picture, on the last two of these axes."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    zeros = [torch.zeros(side * side)] * (axes - 2)
    return torch.stack([*zeros, rows.flatten(), columns.flatten()], dim=1).float()


@dataclass(frozen=True)
class Tiny:
    """A model of a class of Diffusers or Transformers and its inputs, for a batch of two."""

    cls: str
    init: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]

    def make(self) -> nn.Module:
        """The model, without the zeros and ones that models of Diffusers start from. It is frozen, as in training:
        a convolution on the CPU computes other bits where its weight asks for gradients."""
        torch.manual_seed(0)
        if cls := getattr(diffusers, self.cls, None):
            model = cls(**self.init)
        else:
            cls = getattr(transformers, self.cls)
            model = cls(cls.config_class(**self.init))
        for name, parameter in model.named_parameters():
            if "pad_token" in name:  # Z-Image leaves them as the memory was
                parameter.data.zero_()
            parameter.data += 0.1 * torch.randn_like(parameter)
        if self.cls == "DiTTransformer2DModel":  # a published one has equal embedders
            for block in model.transformer_blocks[1:]:
                block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        return model.eval().requires_grad_(False)


def _text(tokens: int, channels: int, **more: Any) -> dict[str, Any]:
    return {"encoder_hidden_states": r(2, tokens, channels), "timestep": torch.tensor([300.0, 700.0])} | more


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 12} | _HEADS

_QWEN = inspect.signature(diffusers.QwenImageTransformer2DModel.forward).parameters
_TEXT_LENGTHS = {"txt_seq_lens": [5, 5]} if "txt_seq_lens" in _QWEN else {}  # diffusers 0.36 needs them


def _flux(axes: int, **more: Any) -> dict[str, Any]:
    ids = {"img_ids": grid(4, axes), "txt_ids": torch.zeros(5, axes)}
    return {"hidden_states": r(2, 16, 4)} | ids | _text(5, 12, timestep=torch.tensor([0.3, 0.7])) | more


TINY = {
    "DiT": Tiny(
        "DiTTransformer2DModel",
        {"in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 10} | _HEADS,
        lambda: {"hidden_states": r(2, 4, 8, 8), "timestep": torch.tensor([3, 7]),
                 "class_labels": torch.tensor([1, 10])},
    ),
    "PixArt-alpha": Tiny(
        "PixArtTransformer2DModel",
        {"in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8, "cross_attention_dim": 24,
         "caption_channels": 12, "use_additional_conditions": True, "num_attention_heads": 3, "attention_head_dim": 8},
        lambda: _text(5, 12, hidden_states=r(2, 4, 8, 8), added_cond_kwargs={
            "resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.tensor([[1.0]] * 2)}),
    ),
    "PixArt-Sigma": Tiny(
        "PixArtTransformer2DModel",
        {"in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8, "cross_attention_dim": 16,
         "caption_channels": 12, "use_additional_conditions": False} | _HEADS,
        lambda: _text(5, 12, hidden_states=r(2, 4, 8, 8), added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "SD3": Tiny(
        "SD3Transformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 3, "sample_size": 8, "pos_embed_max_size": 8,
         "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 6} | _HEADS,
        lambda: _text(5, 12, hidden_states=r(2, 4, 8, 8), pooled_projections=r(2, 6)),
    ),
    "SD3.5": Tiny(
        "SD3Transformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 3, "sample_size": 8, "pos_embed_max_size": 8,
         "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 6,
         "dual_attention_layers": (0,), "qk_norm": "rms_norm"} | _HEADS,
        lambda: _text(5, 12, hidden_states=r(2, 4, 8, 8), pooled_projections=r(2, 6)),
    ),
    "Flux.1": Tiny(
        "FluxTransformer2DModel",
        _FLUX | {"pooled_projection_dim": 6, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True},
        lambda: _flux(3, pooled_projections=r(2, 6), guidance=torch.tensor([3.0, 4.0])),
    ),
    "Flux.2": Tiny(
        "Flux2Transformer2DModel",
        _FLUX | {"axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 16},
        lambda: _flux(4, guidance=torch.tensor([3.0, 4.0])),
    ),
    "Chroma": Tiny(
        "ChromaTransformer2DModel",
        _FLUX | {"axes_dims_rope": (2, 2, 4), "approximator_num_channels": 8, "approximator_hidden_dim": 16,
                 "approximator_layers": 2},
        lambda: _flux(3),
    ),
    "Sana": Tiny(
        "SanaTransformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": 2, "sample_size": 8,
         "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12} | _HEADS,
        lambda: _text(5, 12, hidden_states=r(2, 4, 8, 8)),
    ),
    "Qwen-Image": Tiny(
        "QwenImageTransformer2DModel",
        {"in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 12, "axes_dims_rope": (4, 2, 2)}
        | _HEADS,
        lambda: _text(5, 12, hidden_states=r(2, 16, 16), timestep=torch.tensor([0.3, 0.7]),
                      encoder_hidden_states_mask=torch.ones(2, 5).long(),
                      img_shapes=[[(1, 4, 4)]] * 2, **_TEXT_LENGTHS),
    ),
    "Z-Image": Tiny(
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 16, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
         "cap_feat_dim": 12, "axes_dims": [4, 2, 2], "axes_lens": [64, 16, 16]},
        lambda: {"x": [r(4, 1, 8, 8), r(4, 1, 8, 8)], "cap_feats": [r(5, 12), r(5, 12)], "t": torch.tensor([0.3, 0.7])},
    ),
    "Lumina2": Tiny(
        "Lumina2Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 3, "num_refiner_layers": 1,
         "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2),
         "axes_lens": (64, 16, 16), "cap_feat_dim": 12},
        lambda: _text(5, 12, hidden_states=r(2, 4, 8, 8), timestep=torch.tensor([0.3, 0.7]),
                      encoder_attention_mask=torch.ones(2, 5).bool()),
    ),
    "HunyuanDiT": Tiny(
        "HunyuanDiT2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 4, "cross_attention_dim": 8,
         "cross_attention_dim_t5": 16, "pooled_projection_dim": 4, "hidden_size": 16, "text_len": 5, "text_len_t5": 5,
         "activation_fn": "gelu-approximate"} | _HEADS,
        lambda: _text(
            5, 8, hidden_states=r(2, 4, 8, 8), text_embedding_mask=torch.ones(2, 5),
            encoder_hidden_states_t5=r(2, 5, 16), text_embedding_mask_t5=torch.ones(2, 5),
            image_meta_size=torch.tensor([[64.0, 64, 64, 64, 0, 0]] * 2),
            style=torch.zeros(2).long(), image_rotary_emb=[torch.ones(16, 8), torch.zeros(16, 8)]),
    ),
    "AuraFlow": Tiny(
        "AuraFlowTransformer2DModel",
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 3,
         "joint_attention_dim": 12, "caption_projection_dim": 16, "pos_embed_max_size": 16} | _HEADS,
        lambda: _text(5, 12, hidden_states=r(2, 4, 8, 8), timestep=torch.tensor([0.3, 0.7])),
    ),
    "CogView4": Tiny(
        "CogView4Transformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": 12, "time_embed_dim": 8,
         "condition_dim": 4, "sample_size": 8} | _HEADS,
        lambda: _text(5, 12, hidden_states=r(2, 4, 8, 8), original_size=torch.tensor([[64.0, 64.0]] * 2),
                      target_size=torch.tensor([[64.0, 64.0]] * 2), crop_coords=torch.zeros(2, 2)),
    ),
    "Wan": Tiny(
        "WanTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 3, "text_dim": 12, "freq_dim": 16, "ffn_dim": 24,
         "rope_max_seq_len": 16, "num_attention_heads": 2, "attention_head_dim": 12},
        lambda: _text(5, 12, hidden_states=r(2, 4, 2, 8, 8)),
    ),
    "Wan, from a picture": Tiny(
        "WanTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 3, "text_dim": 12, "freq_dim": 16, "ffn_dim": 24,
         "rope_max_seq_len": 16, "num_attention_heads": 2, "attention_head_dim": 12, "image_dim": 6,
         "added_kv_proj_dim": 24},
        lambda: _text(512, 12, hidden_states=r(2, 4, 2, 8, 8), encoder_hidden_states_image=r(2, 3, 6)),
    ),
    "LTX": Tiny(
        "LTXVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 3, "cross_attention_dim": 16, "caption_channels": 12}
        | _HEADS,
        lambda: _text(5, 12, hidden_states=r(2, 32, 4), encoder_attention_mask=torch.ones(2, 5).bool(), num_frames=2,
                      height=4, width=4),
    ),
    "SD1.5": Tiny(
        "UNet2DConditionModel",
        {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 12,
         "norm_num_groups": 4, "attention_head_dim": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        lambda: _text(5, 12, sample=r(2, 4, 8, 8)),
    ),
    "SDXL": Tiny(
        "UNet2DConditionModel",
        {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 12,
         "norm_num_groups": 4, "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2),
         "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
         "projection_class_embeddings_input_dim": 30, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        lambda: _text(5, 12, sample=r(2, 4, 8, 8), added_cond_kwargs={"text_embeds": r(2, 6), "time_ids": r(2, 6)}),
    ),
}  # fmt: skip
"""By the name of the family or of a model of it."""

MINIMAX_H3 = Tiny(  # diffusers 0.42: it packs the tokens of a text, a sound and a video, and takes a list of timesteps
    "MiniMaxH3Transformer3DModel",
    {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
     "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 6, "text_dim": 12, "freq_dim": 8,
     "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2},
    lambda: {"hidden_states": r(2, 4, 16), "audio_hidden_states": r(2, 3, 6), "encoder_hidden_states": r(2, 5, 12),
             "timestep": torch.tensor([0.7, 0.3]), "timestep_indices": torch.tensor([0] * 5 + [1] * 3 + [0] * 4),
             "token_tags": torch.tensor([1] * 5 + [2] * 3 + [0] * 4), "position_ids": r(12, 3),
             "text_indices": torch.arange(5), "audio_indices": torch.arange(5, 8),
             "video_indices": torch.arange(8, 12)},
)  # fmt: skip


def _tokens() -> dict[str, Any]:
    return {"input_ids": torch.tensor([[1, 7, 5, 9, 2], [3, 4, 8, 6, 2]]), "attention_mask": torch.ones(2, 5).long()}


_LLM = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "max_position_embeddings": 8, "use_cache": False}  # fmt: skip
_GROUPED = _LLM | {"num_key_value_heads": 1}

ENCODERS = {
    "CLIP": Tiny("CLIPTextModel", _LLM | {"eos_token_id": 2}, _tokens),
    "T5": Tiny(
        "T5EncoderModel",
        {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2, "dropout_rate": 0.0},
        _tokens,
    ),
    "Llama": Tiny("LlamaForCausalLM", _GROUPED, _tokens),
    "Qwen2": Tiny("Qwen2ForCausalLM", _GROUPED, _tokens),
    "Gemma2": Tiny("Gemma2ForCausalLM", _GROUPED | {"head_dim": 8}, _tokens),
    "GPT2": Tiny(
        "GPT2LMHeadModel",
        {"vocab_size": 16, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 8, "use_cache": False,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        _tokens,
    ),
}  # fmt: skip
"""Text encoders and language models of Transformers."""
