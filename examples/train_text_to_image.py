"""Adapts a text-to-image pipeline to images with captions, with DiffFit: a folder, or a dataset on the Hub.

    python examples/train_text_to_image.py --pretrained_model_name_or_path PixArt-alpha/PixArt-Sigma-XL-2-512-MS \
        --train_data_dir my_images --output_dir my_style --mixed_precision bf16 --max_train_steps 2000

The folder has `metadata.jsonl` (or `.csv`) with `file_name` and `text`. Images and captions are encoded once, to a
cache. Writes the adapter (the average of its weights over training) to `--output_dir`, for
`difffit_peft.load_adapter(pipe, output_dir)`, and pictures of fixed prompts and seeds to `--output_dir/validation`.
"""

import argparse
import json
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from difffit_peft import get_list_adapters, load_pipeline
from difffit_peft.reading import pipeline_index
from difffit_peft.training.arguments import training_parser
from difffit_peft.training.images import load_captioned_images
from difffit_peft.training.objective import WEIGHTING_SCHEMES, noising
from difffit_peft.training.prepare import attach, cache_folder, encode_images, identity_of
from difffit_peft.training.prompts import encode_prompts
from difffit_peft.training.run import Result, Task, run_training
from difffit_peft.training.scripts import base_dtype, fraction, run_script
from difffit_peft.training.text_to_image import TextToImage, family_of_pipeline
from difffit_peft.training.visualize import grid_of_calls


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, training, show = training_parser(__doc__, condition=("caption", "text"))
    training.add_argument(
        "--weighting_scheme",
        choices=WEIGHTING_SCHEMES,
        help="of timesteps, where the base is trained by flow matching; default: logit_normal",
    )
    training.add_argument(
        "--caption_dropout", type=fraction, help="share of captions left empty; default: 0.1 where guidance needs it"
    )
    show.add_argument("--validation_prompts", nargs="+", help="default: up to four of the captions")
    parser.set_defaults(train_batch_size=4, random_flip=False)  # a caption may say left or right
    return parser.parse_args(argv)


def load_family(args: argparse.Namespace, accelerator: Accelerator) -> TextToImage:
    """The frozen base, on the device that uses it."""
    name = args.pretrained_model_name_or_path
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    index = pipeline_index(name, **where)
    if index is None:
        raise ValueError(f"{name} is not a pipeline: it holds no model_index.json. Name the pipeline of a base.")
    cls = family_of_pipeline(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    dtypes = {"vae": torch.float32, "default": base_dtype(accelerator)}  # VAEs overflow in fp16
    pipe = load_pipeline(name, variant=args.variant, dtype=dtypes, **where)
    if get_list_adapters(pipe):
        raise ValueError(f"{name} comes with adapters: name their base, or save it with them fused and name that.")
    family = cls(pipe)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
            if part is not family.model or accelerator.distributed_type != DistributedType.FSDP:
                part.to(accelerator.device)  # FSDP moves what it shares out, block by block
    pipe.set_progress_bar_config(desc="Validation pictures", leave=False, disable=not accelerator.is_local_main_process)
    return family


def prepare(args: argparse.Namespace, accelerator: Accelerator) -> Task:
    """The base with a new adapter, the images and captions, their latents and embeddings.

    They are encoded when the adapter is known to fit the base, and a checkpoint to resume to be of this run.
    """
    given = ("dataset_name", "train_data_dir", "dataset_config_name", "split", "image_column", "caption_column")
    images = load_captioned_images(
        **{name: getattr(args, name) for name in (*given, "seed", "cache_dir")}, max_samples=args.max_train_samples
    )
    captions = images.class_names
    family = load_family(args, accelerator)
    pipe = family.pipe
    resolution = family.resolution(args.resolution)
    target = noising(pipe.scheduler, args.snr_gamma, args.weighting_scheme)
    dropout = family.default_dropout if args.caption_dropout is None else args.caption_dropout
    key = family.encoding_key()
    of_text = {"weighting_scheme": args.weighting_scheme, "caption_dropout": dropout}
    identity = {"captions": captions, "prompts": key} | of_text | identity_of(args, accelerator, family.model)
    model = attach(family.model, args)
    setattr(pipe, family.part, model)
    train, held_out, identity = encode_images(args, accelerator, pipe.vae, images, resolution, identity)
    shown = args.validation_prompts or captions[:: -(-len(captions) // 4)]
    hidden = not accelerator.is_local_main_process
    with accelerator.local_main_process_first():
        texts = [*captions, "", *shown]
        prompts = encode_prompts(texts, family.encode, key, cache_folder(args, "prompts"), hidden=hidden)
    family.drop_text_encoders()
    null = len(captions)
    common = {"num_inference_steps": args.num_inference_steps}
    guidance = args.guidance_scale
    if guidance is None:
        guidance = 4.0 if args.guidance_loss_scale == 1 else 1.0
    call = partial(family.call, count=args.num_validation_images, resolution=resolution, guidance=guidance)
    return Task(
        model=model,
        objective=family.objective(target, prompts, null, dropout),
        train=train,
        held_out=held_out,
        resolution=resolution,
        about=f"{len(train)} images with {len(captions)} captions at {resolution}x{resolution}, {len(held_out)} more "
        f"held out for the validation loss\nCaptions are left empty for {dropout:.0%} of the samples.",
        identity=identity,
        shown=shown,
        sample=lambda: grid_of_calls(
            pipe,
            model,
            [call(prompts[i], prompts[null]) | common for i in range(null + 1, len(prompts))],
            args.num_validation_images,
            seed=args.seed,
        ),
        card=of_text,
    )


def main(args: argparse.Namespace) -> Result:
    return run_training(args, prepare)


if __name__ == "__main__":
    run_script(main, parse_args)
