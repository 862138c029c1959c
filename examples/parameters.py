"""Counts what DiffFit trains in a DiT-XL/2 (675 M parameters), without downloading it.

python examples/parameters.py --num_classes 101
"""

import argparse
from collections import Counter

import torch
from difffit_peft import DiffFitConfig
from difffit_peft.publishing import base_parameters
from difffit_peft.training.scripts import positive_int, run_script
from diffusers import DiTTransformer2DModel
from peft import get_peft_model, get_peft_model_state_dict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_classes", type=positive_int, default=101, help="classes of the new domain")
    args = parser.parse_args()

    with torch.device("meta"):  # shapes without values
        transformer = DiTTransformer2DModel(
            num_attention_heads=16, attention_head_dim=72, out_channels=8, num_layers=28, num_embeds_ada_norm=1000
        )
    model = get_peft_model(transformer, DiffFitConfig(num_classes=args.num_classes))
    counts: Counter[str] = Counter()
    for name, parameter in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        kind = "class rows" if "embedding_table" in name else "scale factors γ" if "gamma" in name else "biases δ"
        counts[kind] += parameter.numel()
    total, base = sum(counts.values()), base_parameters(model)  # the paper's model has one embedder too

    print("| trained | parameters | share |\n| --- | ---: | ---: |")
    for kind, count in counts.items():
        print(f"| {kind} | {count:,} | {count / base:.3%} |")
    print(f"| **all** | **{total:,}** | **{total / base:.3%}** of {base:,} |\n\n{4 * total:,} bytes in float32")

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
