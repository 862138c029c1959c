"""Tiny random text-to-image pipelines, with real tokenizers that are made here."""

import string
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = string.ascii_lowercase + string.digits + ".,'-"
CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def t5_tokenizer() -> T5Tokenizer:
    """Letters, with the space before a word as a piece of its own."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=20)


def clip_tokenizer() -> CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """All bytes, and a chat template."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    special = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    return Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], chat_template=CHAT, **special)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))


def clip_encoder(tokenizer: CLIPTokenizer, cls: type = CLIPTextModelWithProjection) -> CLIPTextModel:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"projection_dim": 8, "max_position_embeddings": 16}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return cls(CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **tokens))


def qwen_encoder(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3ForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2}
    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=len(tokenizer), **sizes, num_key_value_heads=1, head_dim=4, pad_token_id=0)
    )


def kl_vae(channels: int = 4, **options) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        **options,
    )


def pixart() -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=128,  # whose pipeline tells the model the size of the picture
        caption_channels=16,
    )
    parts = {"text_encoder": t5_encoder(tokenizer), "vae": kl_vae(), "transformer": transformer}
    return diffusers.PixArtAlphaPipeline(tokenizer=tokenizer, scheduler=DDIMScheduler(clip_sample=False), **parts)


def stable_diffusion_3() -> DiffusionPipeline:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip),
        tokenizer_2=clip,
        text_encoder_3=t5_encoder(t5),
        tokenizer_3=t5,
    )


def flux2() -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.bn.running_mean += 0.1 * torch.randn(16)
    vae.bn.running_var *= 2
    return diffusers.Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=qwen_encoder(tokenizer, 28),  # the pipeline takes the outputs of layers 9, 18 and 27
        tokenizer=tokenizer,
        transformer=transformer,
    )


def stable_diffusion() -> DiffusionPipeline:
    tokenizer = clip_tokenizer()
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return diffusers.StableDiffusionPipeline(
        vae=kl_vae(),
        text_encoder=clip_encoder(tokenizer, CLIPTextModel),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sana() -> DiffusionPipeline:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    tokenizer = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    encoder = Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=32,
    )
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8, 8),
            "qkv_multiscales": ((), (), (5,)),
            "layers_per_block": (1, 1, 1),
        }.items()
    }
    vae = diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.4, **sides)
    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.SanaPipeline(tokenizer, encoder, vae, transformer, flow)


def qwen_image() -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "rope_parameters": rope, **sizes}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8}
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 2, 2),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.0, 1.5, 2.0],
    )
    return diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def z_image() -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 16, 16],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)  # Diffusers 0.36 leaves them unset
    return diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(shift_factor=0.1, scaling_factor=1.5),
        text_encoder=qwen_encoder(tokenizer, 2),
        tokenizer=tokenizer,
        transformer=transformer,
    )


PIPELINES = {
    "PixArt": pixart,
    "SD3": stable_diffusion_3,
    "FLUX.2": flux2,
    "SD1.5": stable_diffusion,
    "Sana": sana,
    "Qwen-Image": qwen_image,
    "Z-Image": z_image,
}
if not hasattr(diffusers, "Flux2KleinPipeline"):  # before Diffusers 0.37
    del PIPELINES["FLUX.2"], PIPELINES["Qwen-Image"]


def make_text_pipeline(family: str) -> DiffusionPipeline:
    torch.manual_seed(0)
    pipe = PIPELINES[family]()
    generator = torch.Generator().manual_seed(1)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            part.eval()
        if name in ("transformer", "unet"):  # fresh ones give zeros, or ignore the prompt
            for parameter in part.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_captioned_folder(folder: Path, captions: list[str]) -> None:
    """Random pictures, and their captions in `metadata.csv`."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows = ["file_name,text"]
    for i, caption in enumerate(captions):
        PIL.Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f'{i}.png,"{caption}"')
    (folder / "metadata.csv").write_text("\n".join(rows))
