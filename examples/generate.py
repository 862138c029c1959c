"""Samples a grid of classes, by name, from a DiT with adapters blended by scale.

    python examples/generate.py --pretrained_model_name_or_path me/dit-food101 --labels ramen "apple pie"
    python examples/generate.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 \
        --adapters me/dit-food101 me/dit-art --adapter_weights 0.8 0.2 --labels ramen

Writes one row of pictures per class, the same seeds in each row.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from difffit_peft import DiffFitDiTPipeline
from difffit_peft.training.arguments import add_sampling_arguments
from difffit_peft.training.scripts import (
    base_dtype,
    finite_float,
    launched_precision,
    positive_int,
    run_script,
    seed_int,
    user_path,
)
from difffit_peft.training.visualize import label_rows, sample_grid
from difffit_peft.writing import write


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Hub id or folder of a base, or of an adapter"
    )
    parser.add_argument("--revision", help="branch, tag or commit of it on the Hub")
    parser.add_argument("--adapters", nargs="*", default=[], help="Hub ids or folders of adapters to load onto it")
    parser.add_argument("--adapter_weights", nargs="*", type=finite_float, help="a scale for each; default: 1")
    parser.add_argument("--labels", nargs="+", help="classes, by name or index; default: the first eight")
    parser.add_argument("--num_images", type=positive_int, default=4, help="per class")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--guidance",
        choices=["class", "domain"],
        default="class",
        help="null class of the adapted model, or of the base",
    )
    parser.add_argument("--seed", type=seed_int, default=0)
    parser.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], default=launched_precision("no"), help="of the base too"
    )
    parser.add_argument("--output", type=user_path, default=Path("samples.png"))
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.adapter_weights and len(args.adapter_weights) != len(args.adapters):
        raise ValueError(f"{len(args.adapter_weights)} --adapter_weights for {len(args.adapters)} --adapters.")
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    pipe = DiffFitDiTPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        dtype={"transformer": base_dtype(accelerator), "default": torch.float32},  # VAEs overflow in fp16
    )
    if args.adapters and pipe.get_list_adapters():
        raise ValueError(
            f"{args.pretrained_model_name_or_path} comes with adapters of its own: name its base, and all adapters to "
            "blend as --adapters."
        )
    names = [f"adapter_{i}" for i in range(len(args.adapters))]
    for path, name in zip(args.adapters, names, strict=True):
        pipe.load_difffit_weights(path, name)
    if names:
        pipe.set_adapters(names, args.adapter_weights or 1.0)
    pipe.to(accelerator.device)
    # in mixed precision it now gives float32, as the scheduler and the VAE take it
    pipe.transformer = accelerator.prepare_model(pipe.transformer, evaluation_mode=True)
    pipe.set_progress_bar_config(leave=False)
    known = pipe.id2label
    classes = pipe.get_label_ids(args.labels) if args.labels else [*known][:8] or [0]
    grid = sample_grid(
        pipe,
        classes,
        args.num_images,
        seed=args.seed,
        guidance_scale=args.guidance_scale,
        guidance=args.guidance,
        num_inference_steps=args.num_inference_steps,
    )
    captions = [known.get(index, str(index)) for index in classes]
    write(args.output, lambda partial: label_rows(grid, captions).save(partial, format="PNG"))
    print(args.output)


if __name__ == "__main__":
    run_script(main, parse_args)
