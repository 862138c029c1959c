"""Says what DiffFit trains in a model of Diffusers, and what it leaves out and why, without its weights.

python examples/parameters.py --num_classes 101          # DiT-XL/2
python examples/parameters.py --config transformer/config.json
"""

import argparse
import json
from pathlib import Path

from difffit_peft import DiffFitConfig, explain
from difffit_peft.training.scripts import positive_int, run_script

XL_2 = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "num_embeds_ada_norm": 1000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="the config.json of a model; default: that of DiT-XL/2")
    parser.add_argument("--num_classes", type=positive_int, default=101, help="of the new domain, for DiT-XL/2")
    args = parser.parse_args()

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
