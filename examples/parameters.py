"""Says what DiffFit trains in a model of Diffusers, and what it leaves out and why, without its weights.

python examples/parameters.py --num_classes 101          # DiT-XL/2
python examples/parameters.py --config transformer/config.json
"""

import argparse
import json
from collections import Counter

from difffit_peft import DiffFitConfig, explain
from difffit_peft.training.scripts import positive_int, run_script, user_path
from tqdm import tqdm

XL_2 = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "num_embeds_ada_norm": 1000,
}


# What the classes of Diffusers are without arguments, but where a published model differs from that.
FAMILIES = {
    "DiT-XL/2": XL_2,
    "PixArt-α": {"_class_name": "PixArtTransformer2DModel", "caption_channels": 4096},
    "PixArt-Σ": {
        "_class_name": "PixArtTransformer2DModel",
        "caption_channels": 4096,
        "use_additional_conditions": False,
    },
    "SD3-medium": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "Flux.1": {"_class_name": "FluxTransformer2DModel"},
    "Flux.2": {"_class_name": "Flux2Transformer2DModel"},
    "Chroma": {"_class_name": "ChromaTransformer2DModel"},
    "Sana": {"_class_name": "SanaTransformer2DModel"},
    "Qwen-Image": {"_class_name": "QwenImageTransformer2DModel"},
    "Z-Image": {"_class_name": "ZImageTransformer2DModel"},
    "Lumina2": {"_class_name": "Lumina2Transformer2DModel"},
    "HunyuanDiT, no published size": {
        "_class_name": "HunyuanDiT2DModel",
        "in_channels": 4,
        "sample_size": 128,
        "patch_size": 2,
        "hidden_size": 1408,
        "mlp_ratio": 4.3637,
    },
    "AuraFlow": {"_class_name": "AuraFlowTransformer2DModel"},
    "CogView4, no published size": {"_class_name": "CogView4Transformer2DModel"},
    "Wan": {"_class_name": "WanTransformer3DModel"},
    "LTX": {"_class_name": "LTXVideoTransformer3DModel"},
    "SD1.5": {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768},
    "SDXL": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def families() -> str:
    """`docs/families.md`: what is trained in a model of each family, as `explain` counts it."""
    kinds = ["scale factors γ", "biases δ", "norms' weights γ", "norms' biases δ", "class rows"]
    lines = [
        "# What is trained in each family",
        "",
        "`python examples/parameters.py --families` makes this table, by `difffit_peft.explain(config)`, without",
        "weights.",
        "The configs are the defaults of the classes of Diffusers, which are a published model's but where the script",
        "gives others, or the row says so. At tiny size the tests try each (`tests/test_families.py`), and the table",
        "below has every class, and why some could not be tried.",
        "",
        f"| | class | parameters | trained | share | {' | '.join(kinds)} |",
        "| --- | --- | ---: | ---: | ---: |" + " ---: |" * len(kinds),
    ]
    for name, config in tqdm(FAMILIES.items(), desc="Families"):
        found = explain(config)
        counts = Counter[str]()
        for row in found.trained:
            counts[row.kind] += row.parameters
        assert {*counts} <= {*kinds}, counts
        trained, total = found.trained_parameters, found.total
        cells = " | ".join(f"{counts[kind]:,}" for kind in kinds)
        lines.append(f"| {name} | `{found.model}` | {total:,} | {trained:,} | {trained / total:.3%} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=user_path, help="the config.json of a model; default: that of DiT-XL/2")
    parser.add_argument("--num_classes", type=positive_int, default=101, help="of the new domain, for DiT-XL/2")
    parser.add_argument("--families", action="store_true", help="a table over the families of models")
    args = parser.parse_args()
    if args.families:
        print(families())
        return

    classes = None if args.config else args.num_classes
    found = explain(json.loads(args.config.read_text()) if args.config else XL_2, DiffFitConfig(num_classes=classes))
    total, base = found.trained_parameters, found.total
    print(f"{found}\n\n{4 * total:,} bytes in float32")

    # docs/scaling.md. Full fine-tuning in mixed precision keeps float32 weights, as autocast does.
    print("\n| on each device, MB | DiffFit | full fine-tuning |\n| --- | ---: | ---: |")
    rows = {
        "frozen weights, bfloat16": (2 * base, 0),
        "trained weights, float32": (4 * total, 4 * base),
        "gradients": (4 * total, 4 * base),
        "AdamW's two moments": (8 * total, 8 * base),
    }
    for what, (difffit, full) in rows.items():
        print(f"| {what} | {difffit / 1e6:,.1f} | {full / 1e6:,.1f} |")
    difffit, full = (sum(column) for column in zip(*rows.values(), strict=True))
    print(f"| **all, without activations** | **{difffit / 1e6:,.1f}** | **{full / 1e6:,.1f}** |")
    print(f"| exchanged between devices per step | {4 * total / 1e6:,.1f} | {4 * base / 1e6:,.1f} |")


if __name__ == "__main__":
    run_script(main)
