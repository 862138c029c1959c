"""What the scripts that read a base and images share: their arguments, and how those are read."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from accelerate import Accelerator

from .. import DiffFitDiTPipeline
from .images import LabelledImages, load_labelled_images
from .sampling import null_class
from .scripts import base_dtype, non_negative_int, positive_int


def add_base_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pretrained_model_name_or_path", required=True, help="a class-conditional pipeline: Hub id or folder"
    )
    group.add_argument("--revision", help="branch, tag or commit of the base on the Hub")
    group.add_argument("--variant", help="variant of the base's files, such as fp16")


def add_image_arguments(group: argparse._ArgumentGroup) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--dataset_name", help="a dataset on the Hub")
    group.add_argument("--dataset_config_name", help="its configuration")
    group.add_argument(
        "--train_data_dir", help="one folder of images per class, a folder of parquet, or a .parquet file"
    )
    group.add_argument("--split", default="train", help="the split to read")
    group.add_argument("--image_column", default="image")
    group.add_argument("--label_column", default="label")
    group.add_argument("--max_train_samples", type=positive_int, help="take so many images, drawn with --seed")
    group.add_argument("--skip_broken_images", action=switch, default=False, help="leave them out, rather than stop")
    group.add_argument("--dataloader_num_workers", type=non_negative_int, default=0, help="processes that read images")
    group.add_argument("--cache_dir", help="for downloads and encoded images; default: the Hugging Face cache")


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
