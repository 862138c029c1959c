"""What the scripts that read a base and images share: their arguments, and how those are read."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import SchedulerType

from .. import DiffFitDiTPipeline
from .images import LabelledImages, load_labelled_images
from .sampling import null_class
from .scripts import (
    base_dtype,
    finite_float,
    fraction,
    launched_precision,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed_int,
    user_path,
)

# What a run must keep to be resumed, beside its data and base.
SETTINGS = [
    *("seed", "train_batch_size", "gradient_accumulation_steps", "mixed_precision", "base_precision"),
    *("optimizer", "learning_rate"),
    *("lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
    *("snr_gamma", "max_grad_norm", "use_ema", "ema_decay", "guidance_loss_scale", "guidance_loss_start"),
]
PRE_TRAINING_RATE = 1e-4  # of published DiTs (Peebles & Xie 2023)
SCHEDULES = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]  # it needs rules of its own


def add_base_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pretrained_model_name_or_path", required=True, help="the pipeline of the base: Hub id or folder"
    )
    group.add_argument("--revision", help="branch, tag or commit of the base on the Hub")
    group.add_argument("--variant", help="variant of the base's files, such as fp16")


def add_image_arguments(group: argparse._ArgumentGroup, condition: tuple[str, str] = ("label", "label")) -> None:
    """`condition`: what images come with, and the column that it is in."""
    switch = argparse.BooleanOptionalAction
    group.add_argument("--dataset_name", help="a dataset on the Hub")
    group.add_argument("--dataset_config_name", help="its configuration")
    layout = "one folder of images per class" if condition[0] == "label" else "a folder of images with metadata.jsonl"
    group.add_argument("--train_data_dir", help=f"{layout}, a folder of parquet, or a .parquet file")
    group.add_argument("--split", default="train", help="the split to read")
    group.add_argument("--image_column", default="image")
    group.add_argument(f"--{condition[0]}_column", default=condition[1])
    group.add_argument("--max_train_samples", type=positive_int, help="take so many images, drawn with --seed")
    group.add_argument("--skip_broken_images", action=switch, default=False, help="leave them out, rather than stop")
    group.add_argument("--dataloader_num_workers", type=non_negative_int, default=0, help="processes that read images")
    group.add_argument(
        "--cache_dir", type=user_path, help="for downloads and encoded images; default: the Hugging Face cache"
    )


def add_sampling_arguments(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    group.add_argument("--guidance_scale", type=finite_float, help="default: 4, or 1 where guidance is trained in")
    group.add_argument("--num_inference_steps", type=positive_int, default=50)


def add_difffit_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--gamma_modules",
        nargs="*",
        help="endings of the layers that get scale factors; default: as published; nothing after it: none, as BitFit",
    )
    group.add_argument(
        "--gamma_layers",
        nargs="*",
        type=non_negative_int,
        help="blocks that get scale factors; default: the first half, or all of --gamma_modules",
    )
    group.add_argument(
        "--r",
        type=non_negative_int,
        default=0,
        help="rank of a change of the weights, which the paper does not have; 1, and --gamma_modules with nothing "
        "after it, is within the paper's number of parameters",
    )
    group.add_argument(
        "--new_biases",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also biases on layers that have none, which newer transformers have few of; the paper has no such biases",
    )


def add_training_arguments(group: argparse._ArgumentGroup) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--seed", type=seed_int, default=0)
    group.add_argument("--train_batch_size", type=positive_int, default=32, help="per process")
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1)
    group.add_argument("--num_train_epochs", type=positive_int, default=100)
    group.add_argument("--max_train_steps", type=positive_int, help="overrides --num_train_epochs")
    group.add_argument(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        default=launched_precision("bf16"),
        help="the frozen base is held in it too; default: what `accelerate launch` was told, if not no, else bf16",
    )
    group.add_argument(
        "--base_precision",
        choices=["bf16", "int8", "fp8"],
        help="hold the frozen linear layers of the blocks in it, and multiply in it; default: that of "
        "--mixed_precision. int8: a recent NVIDIA GPU, or a CPU; fp8: one with hardware for it (Ada, Hopper and later)",
    )
    group.add_argument("--gradient_checkpointing", action=switch, default=False, help="less memory, more time")
    group.add_argument("--torch_compile", action=switch, default=False, help="torch.compile the model")
    group.add_argument("--optimizer", choices=["adamw", "adamw_fused", "adamw_8bit"], default="adamw")
    group.add_argument(
        "--learning_rate",
        type=positive_float,
        default=10 * PRE_TRAINING_RATE,
        help="DiffFit works best at 10x pre-training's",
    )
    group.add_argument("--lr_scheduler", choices=SCHEDULES, default="constant")
    group.add_argument(
        "--lr_warmup_steps", type=non_negative_int, default=0, help="used by constant_with_warmup, cosine, ..."
    )
    group.add_argument("--adam_beta1", type=fraction, default=0.9)
    group.add_argument("--adam_beta2", type=fraction, default=0.999)
    group.add_argument("--adam_weight_decay", type=non_negative_float, default=0.0)
    group.add_argument("--adam_epsilon", type=non_negative_float, default=1e-8)
    group.add_argument("--snr_gamma", type=positive_float, help="min-SNR weighting of the loss; 5.0 is recommended")
    group.add_argument("--max_grad_norm", type=non_negative_float, default=1.0, help="0: gradients are not clipped")
    group.add_argument(
        "--guidance_loss_scale",
        type=positive_float,
        default=1.0,
        help="guidance by the base to train in, so that sampling takes one forward a step; 1: none",
    )
    group.add_argument(
        "--guidance_loss_start", type=fraction, default=0.5, help="share of the steps that are trained without it first"
    )
    group.add_argument("--use_ema", action=switch, default=True, help="save and show averaged weights")
    group.add_argument("--ema_decay", type=fraction, default=0.9999, help="reached slowly: a short run averages less")


def training_parser(
    description: str | None, condition: tuple[str, str] = ("label", "label")
) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup, argparse._ArgumentGroup]:
    """The arguments of all training scripts, and the groups about training and validation for those of one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction

    base = parser.add_argument_group("base and data")
    add_base_arguments(base)
    add_image_arguments(base, condition)
    base.add_argument("--resolution", type=positive_int, help="in pixels; default: the base's own")
    base.add_argument("--random_flip", action=switch, default=True, help="train on mirror images too")
    base.add_argument("--background", default="white", help="colour behind transparent images: a name or #rrggbb")
    base.add_argument(
        "--num_held_out_images",
        type=non_negative_int,
        help="kept from training for the validation loss; default: one in twenty, up to 200",
    )
    base.add_argument("--output_dir", type=user_path, default=Path("difffit-adapter"))

    add_difffit_arguments(parser.add_argument_group("DiffFit"))
    training = parser.add_argument_group("training")
    add_training_arguments(training)

    keep = parser.add_argument_group("checkpoints and logs")
    keep.add_argument("--checkpointing_steps", type=positive_int, default=500)
    keep.add_argument("--checkpoints_total_limit", type=positive_int, default=2, help="keep so many, the newest")
    keep.add_argument(
        "--resume_from_checkpoint",
        type=lambda text: text if text == "latest" else user_path(text),
        help='a checkpoint\'s folder, or "latest" of --output_dir',
    )
    keep.add_argument(
        "--report_to", default="tensorboard", choices=["tensorboard", "wandb", "trackio", "none"], help="tracker"
    )

    hub = parser.add_argument_group("Hub")
    hub.add_argument("--push_to_hub", action=switch, default=False, help="upload the adapter when it is trained")
    hub.add_argument("--hub_model_id", help="repository, user/name; default: the name of --output_dir")
    hub.add_argument("--hub_private_repo", action=switch, help="make the repository private, if it is new")

    show = parser.add_argument_group("validation")
    show.add_argument("--validation_steps", type=positive_int, default=1_000)
    show.add_argument(
        "--num_validation_images", type=non_negative_int, default=4, help="in each row; 0: no pictures, the loss alone"
    )
    add_sampling_arguments(show)
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser, training, show


def make_accelerator(args: argparse.Namespace, **options: Any) -> Accelerator:
    """An accelerator in `--mixed_precision`, whose processes do not all give the same warnings.

    Raises as `base_dtype`.
    """
    accelerator = Accelerator(mixed_precision=args.mixed_precision, **options)
    base_dtype(accelerator)
    if not accelerator.is_local_main_process:
        logging.getLogger("difffit_peft").setLevel(logging.ERROR)
    return accelerator


def load_base(args: argparse.Namespace, accelerator: Accelerator) -> DiffFitDiTPipeline:
    """The pipeline of a base, in the memory of the CPU. Unlike the stock one it knows any base's null class."""
    return DiffFitDiTPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype={"transformer": base_dtype(accelerator), "default": torch.float32},  # VAEs overflow in fp16
    )


def load_images(args: argparse.Namespace, accelerator: Accelerator, pipe: DiffFitDiTPipeline) -> LabelledImages:
    """The images, in no more classes than the base holds. Prints how many there are of each."""
    given = ("dataset_name", "train_data_dir", "dataset_config_name", "split", "image_column", "label_column")
    data = load_labelled_images(
        **{name: getattr(args, name) for name in (*given, "seed", "cache_dir")},
        max_classes=null_class(pipe.transformer),
        max_samples=args.max_train_samples,
    )
    accelerator.print(data.summary())
    return data


def latent_factor(pipe: DiffFitDiTPipeline) -> int:
    """How many pixels a latent is wide."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)
