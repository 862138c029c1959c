"""Adapts a class-conditional DiT to a folder of images, or a dataset on the Hub, with DiffFit.

    python examples/train_difffit.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 \
        --dataset_name ethz/food101 --output_dir food101 --mixed_precision bf16 --max_train_steps 20000

Writes the adapter (the average of its weights over training) to `--output_dir`, where `peft.PeftModel.from_pretrained`
finds it, and pictures of fixed classes and seeds to `--output_dir/validation`. The images are encoded once, to a cache.
"""

import argparse
import math

import PIL.Image
from accelerate import Accelerator
from accelerate.utils import DistributedType
from difffit_peft import DiffFitDiTPipeline
from difffit_peft.class_names import class_indices
from difffit_peft.training.arguments import latent_factor, load_base, load_images, training_parser
from difffit_peft.training.losses import training_scheduler
from difffit_peft.training.objective import class_conditional
from difffit_peft.training.prepare import attach, encode_images, identity_of
from difffit_peft.training.run import Result, Task, run_training
from difffit_peft.training.scripts import run_script
from difffit_peft.training.visualize import sample_grid


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, model, show = training_parser(__doc__)
    model.add_argument(
        "--init_classes",
        nargs="+",
        help="classes of the base, by name or index, that the new classes are like and start from, one for each in "
        "their order; default: the null class, or the base's own where it knows all of them",
    )
    show.add_argument("--validation_labels", nargs="+", help="classes, by name or index; default: up to four of them")
    return parser.parse_args(argv)


def resolution_for(pipe: DiffFitDiTPipeline, resolution: int | None) -> int:
    """The resolution to train at, the base's own by default."""
    factor = latent_factor(pipe)
    step = factor * pipe.transformer.config.patch_size
    resolution = resolution or pipe.transformer.config.sample_size * factor
    if resolution % step:
        raise ValueError(
            f"--resolution is {resolution}, but this base takes multiples of {step}: "
            f"{resolution // step * step or step} or {(resolution // step + 1) * step}, for instance."
        )
    return resolution


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator) -> DiffFitDiTPipeline:
    """The frozen base, on the device that uses it."""
    pipe = load_base(args, accelerator)
    if pipe.get_list_adapters():
        raise ValueError(
            f"{args.pretrained_model_name_or_path} comes with adapters: name their base, or save it with them fused "
            "and name that."
        )
    training_scheduler(pipe.scheduler)  # refuses what cannot be trained, before images are encoded
    pipe.vae.requires_grad_(False).to(accelerator.device)
    if accelerator.distributed_type != DistributedType.FSDP:  # which moves what it shares out, block by block
        pipe.transformer.to(accelerator.device)
    pipe.set_progress_bar_config(desc="Validation pictures", leave=False, disable=not accelerator.is_local_main_process)
    return pipe


def prepare(args: argparse.Namespace, accelerator: Accelerator) -> Task:
    """The base with a new adapter, the images and their latents.

    Images are encoded when the adapter is known to fit the base, and a checkpoint to resume to be of this run.
    """
    pipe = load_pipeline(args, accelerator)
    resolution = resolution_for(pipe, args.resolution)
    images = load_images(args, accelerator, pipe)
    names = images.class_names
    shown = list(range(0, len(names), math.ceil(len(names) / 4)))
    if args.validation_labels:
        shown = [images.class_index(label) for label in args.validation_labels]
    start: str | list[int] = "base" if images.classes_agree(pipe.id2label) else "null"
    if args.init_classes:
        if len(args.init_classes) != len(names):
            raise ValueError(
                f"--init_classes has {len(args.init_classes)} classes, but the images have {len(names)}: "
                f"{', '.join(names[:12])}. Give one class of the base for each, in this order."
            )
        start = class_indices(args.init_classes, pipe.id2label, pipe.transformer.config.num_embeds_ada_norm)
    identity = {"classes": names, "init_class_rows": start} | identity_of(args, accelerator, pipe.transformer)
    pipe.transformer = attach(
        pipe.transformer,
        args,
        id2label=dict(enumerate(names)),
        init_class_rows=start,
        sample_size=resolution // latent_factor(pipe),
    )
    train, held_out, identity = encode_images(args, accelerator, pipe.vae, images, resolution, identity)

    def sample() -> PIL.Image.Image:
        return sample_grid(
            pipe,
            shown,
            args.num_validation_images,
            seed=args.seed,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
        )

    return Task(
        model=pipe.transformer,
        objective=class_conditional(pipe.transformer, training_scheduler(pipe.scheduler), args.snr_gamma),
        train=train,
        held_out=held_out,
        resolution=resolution,
        about=f"{len(train)} images in {len(names)} classes at {resolution}x{resolution}, {len(held_out)} more held "
        "out for the validation loss\n"
        + {
            "base": "Classes start from the base's own rows: it knows each of them by the same name and index.",
            "null": "Classes start from the base's null row: its classes are others.",
        }.get(str(start), "Classes start from the rows of these of the base: " + ", ".join(args.init_classes or [])),
        identity=identity,
        shown=[names[i] for i in shown],
        sample=sample,
        card={},
    )


def main(args: argparse.Namespace) -> Result:
    return run_training(args, prepare)


if __name__ == "__main__":
    run_script(main, parse_args)
