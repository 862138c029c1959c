"""Families that differ from each other in names alone: the transformers of Diffusers, and its conditional UNet.

γ is where the published rule for DiT has it, carried over: on q, k, v and the output of attention and on the output of
the feed-forward, in the first half of each list of blocks. A block that computes both outputs in one layer (`proj_out`
of Flux.1's single blocks) has one γ for the two, and one that computes q, k, v and the feed-forward's input in one
(`to_qkv_mlp_proj` of Flux.2's) has it on all of them.

Where the text's branch is dropped after the last block, what lies in that block behind the text's k and v is unused.
"""

from __future__ import annotations

from .family import Family

_ATTN1 = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
_ATTN2 = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
_ATTN = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
_ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
_TEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")

_DOUBLE_AND_SINGLE = ("transformer_blocks", "single_transformer_blocks")
_REFINED = ("noise_refiner", "context_refiner", "layers")


def _last(blocks: str, *modules: str) -> tuple[str, ...]:
    """The names of these modules in the last block."""
    return tuple(f"{blocks}.-1.{module}" for module in modules)


PIXART = Family(("transformer_blocks",), (*_ATTN1, *_ATTN2, "ff.net.2"))  # alpha and Sigma
SD3 = Family(  # 3 and 3.5, whose first blocks have a second attention
    ("transformer_blocks",),
    (*_ATTN, *_TEXT, *_ATTN2, "ff.net.2", "ff_context.net.2"),
    unused=_last("transformer_blocks", "attn.add_q_proj", "attn.norm_added_q"),
)
FLUX = Family(_DOUBLE_AND_SINGLE, (*_ATTN, *_TEXT, "ff.net.2", "ff_context.net.2", "proj_out"))  # 1, and Chroma
FLUX2 = Family(
    _DOUBLE_AND_SINGLE,
    (*_ATTN, *_TEXT, "ff.linear_out", "ff_context.linear_out", "attn.to_qkv_mlp_proj", "attn.to_out"),
)
SANA = Family(("transformer_blocks",), (*_ATTN1, *_ATTN2, "ff.conv_point"))
QWEN_IMAGE = Family(
    ("transformer_blocks",),
    (*_ATTN, *_TEXT, "img_mlp.net.2", "txt_mlp.net.2"),
    unused=_last("transformer_blocks", "attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp"),
)
Z_IMAGE = Family((*_REFINED, "siglip_refiner"), (*_ATTENTION, "feed_forward.w2"))
LUMINA2 = Family(_REFINED, (*_ATTN, "feed_forward.linear_2"))
HUNYUAN_DIT = Family(("blocks",), (*_ATTN1, *_ATTN2, "ff.net.2"), closed=("time_extra_emb.pooler",))
AURA_FLOW = Family(
    ("joint_transformer_blocks", "single_transformer_blocks"),
    (*_ATTN, *_TEXT, "ff.out_projection", "ff_context.out_projection"),
)
COGVIEW4 = Family(("transformer_blocks",), (*_ATTN1, "ff.net.2"))
WAN = Family(("blocks",), (*_ATTN1, *_ATTN2, "attn2.add_k_proj", "attn2.add_v_proj", "ffn.net.2"))
LTX = Family(("transformer_blocks",), (*_ATTN1, *_ATTN2, "ff.net.2"))
UNET = Family(  # Stable Diffusion 1.5 and XL
    ("down_blocks", "mid_block.attentions", "mid_block.resnets", "up_blocks"), (*_ATTN1, *_ATTN2, "ff.net.2")
)

# these have the rule by their structure, and something to leave out or to add
_SINGLE = Family(gamma_modules=FLUX.gamma_modules)
_HUNYUAN_VIDEO15 = Family(
    unused=_last("transformer_blocks", "attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context")
)
_EASY_ANIMATE = Family(
    unused=_last("transformer_blocks", "attn1.add_q_proj", "attn1.norm_added_q", "attn1.to_add_out", "txt_ff")
)
_JOY_IMAGE = Family(unused=_last("double_blocks", "attn.txt_attn_q_norm", "attn.txt_attn_proj", "txt_mlp"))
_MOCHI = Family(unused=_last("transformer_blocks", "attn1.add_q_proj", "attn1.norm_added_q"))
_COSMOS3 = Family(  # of the text only k and v go into the last block's part of the output
    unused=(
        *("norm", "lm_head"),
        *_last("layers", "self_attn.to_q", "self_attn.norm_q", "self_attn.to_out", "post_attention_layernorm", "mlp"),
    )
)
_NUCLEUS = Family(unused=("transformer_blocks.*.attn.norm_added_q",))

RECORDS = {
    "PixArtTransformer2DModel": PIXART,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "ChromaTransformer2DModel": FLUX,
    "SanaTransformer2DModel": SANA,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "ZImageTransformer2DModel": Z_IMAGE,
    "Lumina2Transformer2DModel": LUMINA2,
    "HunyuanDiT2DModel": HUNYUAN_DIT,
    "HunyuanDiT2DControlNetModel": HUNYUAN_DIT,
    "AuraFlowTransformer2DModel": AURA_FLOW,
    "CogView4Transformer2DModel": COGVIEW4,
    "WanTransformer3DModel": WAN,
    "LTXVideoTransformer3DModel": LTX,
    "UNet2DConditionModel": UNET,
    "BriaTransformer2DModel": _SINGLE,
    "BriaFiboTransformer2DModel": _SINGLE,
    "HunyuanImageTransformer2DModel": _SINGLE,
    "HunyuanVideoTransformer3DModel": _SINGLE,
    "HunyuanVideoFramepackTransformer3DModel": _SINGLE,
    "LongCatImageTransformer2DModel": _SINGLE,
    "OvisImageTransformer2DModel": _SINGLE,
    "MotifVideoTransformer3DModel": _SINGLE,
    "HunyuanVideo15Transformer3DModel": _HUNYUAN_VIDEO15,
    "EasyAnimateTransformer3DModel": _EASY_ANIMATE,
    "JoyImageEditTransformer3DModel": _JOY_IMAGE,
    "JoyImageEditPlusTransformer3DModel": _JOY_IMAGE,
    "MochiTransformer3DModel": _MOCHI,
    "Cosmos3OmniTransformer": _COSMOS3,
    "NucleusMoEImageTransformer2DModel": _NUCLEUS,
}
