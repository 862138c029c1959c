"""Adapts a class-conditional DiT to a folder of images, or a dataset on the Hub, with DiffFit.

    python examples/train_difffit.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 \
        --dataset_name ethz/food101 --output_dir food101 --mixed_precision bf16 --max_train_steps 20000

Writes the adapter (the average of its weights over training) to `--output_dir`, where `peft.PeftModel.from_pretrained`
finds it, and pictures of fixed classes and seeds to `--output_dir/validation`. The images are encoded once, to a cache.
"""

import argparse
import gc
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    broadcast_object_list,
    is_bnb_available,
    set_seed,
)
from difffit_peft import DiffFitConfig, DiffFitDiTPipeline
from difffit_peft.files import write
from difffit_peft.publishing import base_parameters, check_push, push_adapter, save_adapter
from difffit_peft.training.arguments import (
    add_base_arguments,
    add_image_arguments,
    latent_factor,
    load_base,
    load_images,
    make_accelerator,
)
from difffit_peft.training.checkpoint import (
    check_checkpoint,
    checkpoints,
    fingerprint,
    load_checkpoint,
    remove_later,
    save_checkpoint,
)
from difffit_peft.training.images import LabelledImages
from difffit_peft.training.latents import LatentDataset, encode_latents
from difffit_peft.training.loop import Diverged, TrainingLoop
from difffit_peft.training.losses import training_scheduler
from difffit_peft.training.scripts import (
    StopSignals,
    fraction,
    launched_precision,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    run_script,
    seed_int,
)
from difffit_peft.training.visualize import grid_over_time, label_rows, plot_losses, sample_grid
from diffusers.optimization import SchedulerType, get_scheduler
from huggingface_hub import cached_assets_path, create_repo
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader, RandomSampler, Subset
from tqdm import tqdm

# What a run must keep to be resumed, beside its data and base.
SETTINGS = [
    *("seed", "train_batch_size", "gradient_accumulation_steps", "mixed_precision", "optimizer", "learning_rate"),
    *("lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
    *("snr_gamma", "max_grad_norm", "use_ema", "ema_decay"),
]


PRE_TRAINING_RATE = 1e-4  # of published DiTs (Peebles & Xie 2023)
SCHEDULES = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]  # it needs rules of its own


@dataclass
class Result:
    """What a run gives back, and writes to `summary.json`."""

    output_dir: Path
    adapter_bytes: int
    trained_parameters: int
    trained_share: float  # of the base's parameters, its timestep and class embedder counted once
    steps: int
    seconds_per_step: float  # median, without the first two
    loss: float  # running mean
    validation_loss: float | None  # of held-out images, averaged weights
    peak_memory_bytes: int  # of the accelerator, or of the process where there is none
    grids: list[Path]


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
    group.add_argument("--use_ema", action=switch, default=True, help="save and show averaged weights")
    group.add_argument("--ema_decay", type=fraction, default=0.9999, help="reached slowly: a short run averages less")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction

    base = parser.add_argument_group("base and data")
    add_base_arguments(base)
    add_image_arguments(base)
    base.add_argument("--resolution", type=positive_int, help="in pixels; default: the base's own")
    base.add_argument("--random_flip", action=switch, default=True, help="train on mirror images too")
    base.add_argument("--background", default="white", help="colour behind transparent images: a name or #rrggbb")
    base.add_argument(
        "--num_held_out_images",
        type=non_negative_int,
        help="kept from training for the validation loss; default: one in twenty, up to 200",
    )
    base.add_argument("--output_dir", type=lambda path: Path(path).expanduser(), default=Path("difffit-adapter"))

    add_difffit_arguments(parser.add_argument_group("DiffFit"))
    add_training_arguments(parser.add_argument_group("training"))

    keep = parser.add_argument_group("checkpoints and logs")
    keep.add_argument("--checkpointing_steps", type=positive_int, default=500)
    keep.add_argument("--checkpoints_total_limit", type=positive_int, default=2, help="keep so many, the newest")
    keep.add_argument("--resume_from_checkpoint", help='a checkpoint\'s folder, or "latest" of --output_dir')
    keep.add_argument(
        "--report_to", default="tensorboard", choices=["tensorboard", "wandb", "trackio", "none"], help="tracker"
    )

    hub = parser.add_argument_group("Hub")
    hub.add_argument("--push_to_hub", action=switch, default=False, help="upload the adapter when it is trained")
    hub.add_argument("--hub_model_id", help="repository, user/name; default: the name of --output_dir")
    hub.add_argument("--hub_private_repo", action=switch, help="make the repository private, if it is new")

    show = parser.add_argument_group("validation")
    show.add_argument("--validation_labels", nargs="+", help="classes, by name or index; default: up to four of them")
    show.add_argument("--validation_steps", type=positive_int, default=1000)
    show.add_argument(
        "--num_validation_images", type=non_negative_int, default=4, help="per class; 0: no pictures, the loss alone"
    )
    show.add_argument("--guidance_scale", type=float, default=4.0)
    show.add_argument("--num_inference_steps", type=positive_int, default=50)
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


def check_installed(args: argparse.Namespace) -> None:
    """Refuses what needs a package that is not there. Accelerate passes over such a tracker, and nothing is logged."""
    if args.report_to != "none" and LoggerType(args.report_to) not in get_available_trackers():
        raise ValueError(
            f"--report_to {args.report_to} needs {args.report_to}, which is not installed: pip install "
            f"{args.report_to}, or choose --report_to none."
        )
    if args.optimizer == "adamw_8bit" and not is_bnb_available():
        raise ValueError("--optimizer adamw_8bit needs bitsandbytes, which is not installed: pip install bitsandbytes")


def peak_memory(device: torch.device) -> int:
    """Bytes taken at the most: of the accelerator, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB elsewhere


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


def make_optimizer(parameters: list[torch.nn.Parameter], args: argparse.Namespace) -> torch.optim.Optimizer:
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options, fused=args.optimizer == "adamw_fused" or None)


def split(dataset: LatentDataset, held_out: int | None, seed: int) -> tuple[Subset, Subset]:
    """The images to train on, and those held out for the validation loss."""
    held_out = min(len(dataset) // 20, 200) if held_out is None else held_out
    if not 0 <= held_out < len(dataset):
        raise ValueError(f"--num_held_out_images is {held_out}: it must be 0 to {len(dataset) - 1}, to leave an image.")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(dataset, sorted(order[held_out:])), Subset(dataset, sorted(order[:held_out]))


@dataclass
class Data:
    """What a run learns from."""

    images: LabelledImages
    shown: list[int]  # the classes of the validation pictures
    resolution: int
    train: Subset
    held_out: Subset
    identity: dict[str, Any]  # the images, what shaped their latents, the base and the settings: see `identity_of`


@dataclass
class Run:
    """A run as it goes on."""

    args: argparse.Namespace
    accelerator: Accelerator
    pipe: DiffFitDiTPipeline
    data: Data
    model: PeftModel
    loop: TrainingLoop
    loader: DataLoader
    trained_parameters: int
    base_parameters: int  # its timestep and class embedder counted once
    total_steps: int
    samples_per_step: int
    identity: dict[str, Any]  # all that it must keep to be resumed
    history: dict[str, list] = field(default_factory=lambda: {"training": [], "validation": [], "grids": []})

    @property
    def pictures(self) -> Path:
        return self.args.output_dir / "validation"


def check_output_dir(args: argparse.Namespace) -> None:
    """Refuses a folder with the checkpoints of a run that is not resumed."""
    found, resume = checkpoints(args.output_dir), args.resume_from_checkpoint
    elsewhere = (
        resume not in (None, "latest")
        and Path(resume).is_dir()
        and Path(resume).resolve().parent != args.output_dir.resolve()
    )
    if found and (not resume or elsewhere):
        raise ValueError(
            f"{args.output_dir} has checkpoints of another run, up to {found[-1].name}: go on with "
            "--resume_from_checkpoint latest, choose another --output_dir, or remove them."
        )


def start(args: argparse.Namespace) -> Accelerator:
    """The accelerator. Refuses those that this script does not train under."""
    accelerator = make_accelerator(
        args,
        # a plugin, as the plain argument gives way to a variable of the environment
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.output_dir / "logs",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(days=1)),  # one process encodes and validates, the others wait
            DistributedDataParallelKwargs(broadcast_buffers=False),  # positions, which are the same everywhere
        ],
    )
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.DEEPSPEED or (sharded and not accelerator.is_fsdp2):
        raise ValueError(
            "This script trains under DDP or FSDP2 (examples/accelerate), not under FSDP1 or DeepSpeed: they share out "
            "what DiffFit has next to nothing of."
        )
    if sharded and args.mixed_precision == "fp16":
        raise ValueError(
            "--mixed_precision fp16 is not for FSDP2, whose gradients Accelerate scales back twice: use bf16."
        )
    return accelerator


def create_repository(args: argparse.Namespace, accelerator: Accelerator) -> str | None:
    """The repository to push to. It is made before the run, to learn now whether that is allowed."""
    if not (args.push_to_hub and accelerator.is_main_process):
        return None
    name = args.hub_model_id or args.output_dir.resolve().name
    check_push(name)
    return create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id


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


def load_data(args: argparse.Namespace, accelerator: Accelerator, pipe: DiffFitDiTPipeline) -> Data:
    """The images and their latents, and an adapter for them in the place of the transformer.

    Images are encoded when the adapter is known to fit the base, and a checkpoint to resume to be of this run.
    """
    resolution = resolution_for(pipe, args.resolution)
    images = load_images(args, accelerator, pipe)
    shown = list(range(0, len(images.class_names), math.ceil(len(images.class_names) / 4)))
    if args.validation_labels:
        shown = [images.class_index(label) for label in args.validation_labels]
    identity = {
        "classes": images.class_names,
        "base": fingerprint(pipe.transformer),
        "processes": accelerator.num_processes,
        "r": args.r,
    } | {name: getattr(args, name) for name in SETTINGS}

    attach(args, pipe, images, resolution)

    def check(about: dict[str, Any]) -> None:
        path = checkpoint_to_resume(args)
        if accelerator.is_main_process and path is not None:
            check_checkpoint(path, identity | about)

    cache = Path(args.cache_dir) if args.cache_dir else cached_assets_path("difffit_peft", "latents")
    with accelerator.local_main_process_first():  # each machine has a cache of its own
        latents = encode_latents(
            pipe.vae,
            images,
            resolution,
            cache,
            random_flip=args.random_flip,
            skip_broken_images=args.skip_broken_images,
            background=args.background,
            num_workers=args.dataloader_num_workers,
            check=check,
        )
    train, held_out = split(latents, args.num_held_out_images, args.seed)
    identity |= {"held_out_images": len(held_out)} | latents.about
    return Data(images, shown, resolution, train, held_out, identity)


def attach(args: argparse.Namespace, pipe: DiffFitDiTPipeline, images: LabelledImages, resolution: int) -> None:
    """Puts a new adapter on the transformer."""
    set_seed(args.seed)
    config = DiffFitConfig(
        id2label=dict(enumerate(images.class_names)),
        init_class_rows="base" if images.classes_agree(pipe.id2label) else "null",
        gamma_modules=args.gamma_modules,
        gamma_layers=args.gamma_layers,
        r=args.r,
        sample_size=resolution // latent_factor(pipe),
        background=args.background,
    )
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer = get_peft_model(pipe.transformer, config)


def build(args: argparse.Namespace, accelerator: Accelerator, pipe: DiffFitDiTPipeline, data: Data) -> Run:
    """All that trains, before its first step."""
    model = pipe.transformer
    parameters = [p for p in model.parameters() if p.requires_grad]
    counts = sum(p.numel() for p in parameters), base_parameters(model)
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    total_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(data.train) / samples_per_step)
    # One pass over the sampler is the whole run, a new order each epoch: every batch is full, however few the images.
    num_samples = total_steps * samples_per_step
    order = RandomSampler(data.train, num_samples=num_samples, generator=torch.Generator().manual_seed(args.seed))
    loader = DataLoader(data.train, args.train_batch_size, sampler=order, num_workers=args.dataloader_num_workers)
    optimizer = make_optimizer(parameters, args)
    lr_scheduler = get_scheduler(  # Accelerate steps it once per process
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=total_steps * accelerator.num_processes,
    )
    loop = TrainingLoop(
        accelerator,
        *accelerator.prepare(model, optimizer, lr_scheduler),
        training_scheduler(pipe.scheduler),
        seed=args.seed,
        snr_gamma=args.snr_gamma,
        max_grad_norm=args.max_grad_norm,
        ema_decay=args.ema_decay if args.use_ema else None,
        compile=args.torch_compile,
    )
    config = model.peft_config["default"]
    identity = data.identity | {
        "gamma_modules": config.gamma_modules,  # written out by now
        "gamma_layers": config.gamma_layers,
        "total_steps": total_steps if args.lr_scheduler not in ("constant", "constant_with_warmup") else "any",
    }
    return Run(args, accelerator, pipe, data, model, loop, loader, *counts, total_steps, samples_per_step, identity)


def describe(run: Run) -> str:
    """What the run is about to do, in words."""
    args, data = run.args, run.data
    same_classes = run.model.peft_config["default"].init_class_rows == "base"
    return (
        f"{len(data.train)} images in {len(data.images.class_names)} classes at {data.resolution}x{data.resolution}, "
        f"{len(data.held_out)} more held out for the validation loss\n"
        + (
            "Classes start from the base's own rows: it knows each of them by the same name and index.\n"
            if same_classes
            else "Classes start from the base's null row: its classes are others.\n"
        )
        + f"Training {run.trained_parameters:,} parameters, {run.trained_parameters / run.base_parameters:.3%} of the "
        f"base's {run.base_parameters:,}, in {args.mixed_precision.replace('no', 'fp32')}: {run.total_steps} steps of "
        f"{run.samples_per_step} images\n"
        f"AdamW at {args.learning_rate:g}, {args.learning_rate / PRE_TRAINING_RATE:g}x the rate that published DiTs "
        f"are pre-trained at (the paper recommends 10x); weight decay {args.adam_weight_decay:g}"
    )


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; `None` if it names none, or there is no latest one."""
    if args.resume_from_checkpoint == "latest":
        return next(reversed(checkpoints(args.output_dir)), None)
    return Path(args.resume_from_checkpoint) if args.resume_from_checkpoint else None


def resume(run: Run) -> None:
    """Goes on from the checkpoint that is asked for."""
    path = checkpoint_to_resume(run.args)
    loaded = [None]  # read by the main process, which wrote it: other machines may not see its disk
    if run.accelerator.is_main_process and path is not None:
        loaded = [load_checkpoint(path, run.identity)]
        remove_later(run.args.output_dir, loaded[0]["step"])
    state = broadcast_object_list(loaded)[0]
    if state is not None:
        run.history = state.pop("history")
        run.loop.load_state_dict(state)
        run.accelerator.print(f"Resuming from {path}, after step {run.loop.step}")
    elif run.args.resume_from_checkpoint:
        run.accelerator.print(f"There is no checkpoint in {run.args.output_dir}: starting from the beginning.")


def validate(run: Run) -> None:
    """The loss of held-out images, and pictures. In all processes: under FSDP none of them has a whole model."""
    args, loop, accelerator = run.args, run.loop, run.accelerator
    with loop.averaged_weights():
        if len(run.data.held_out):
            loss = loop.validation_loss(run.data.held_out, args.train_batch_size)
            run.history["validation"].append((loop.step, loss))
            accelerator.log({"validation_loss": loss}, step=loop.step)
        if args.num_validation_images == 0:
            return
        grid = sample_grid(
            run.pipe,
            run.data.shown,
            args.num_validation_images,
            seed=args.seed,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
        )
    path = run.pictures / f"step-{loop.step:06d}.png"
    if accelerator.is_main_process:
        write(path, lambda partial: grid.save(partial, format="PNG"))
    run.history["grids"].append(path.name)
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):  # not trackio's, in accelerate 1.15
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=loop.step, **layout)


def save(run: Run) -> None:
    """Writes a checkpoint, and with it the adapter of this step. In all processes."""
    loop, args = run.loop, run.args
    state = loop.state_dict() | {"history": run.history}
    with loop.averaged_weights():
        weights = loop.trained_weights()
    adapter = partial(save_adapter, run.model, repo_id=f"checkpoint-{loop.step}", state_dict=weights)
    if run.accelerator.is_main_process:
        save_checkpoint(args.output_dir, loop.step, state, run.identity, args.checkpoints_total_limit, adapter)


def train(run: Run) -> int:
    """Trains to the last step, or to the one at which a signal asks for an end: then the exit code is not 0."""
    args, loop, accelerator = run.args, run.loop, run.accelerator
    hidden = not accelerator.is_local_main_process
    with StopSignals(loop.stop, show=not hidden) as signals:
        if loop.step == 0:
            validate(run)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of the encoder
        with tqdm(total=run.total_steps, initial=loop.step, desc="Training", disable=hidden) as bar:
            try:
                for loss in loop.steps(accelerator.prepare(run.loader)):
                    lr = loop.lr_scheduler.get_last_lr()[0]
                    bar.set_postfix(loss=f"{loop.average:.4f}", lr=f"{lr:.1e}")
                    bar.update()
                    run.history["training"].append((loop.step, loop.average))
                    accelerator.log({"loss": loss, "lr": lr}, step=loop.step)
                    if loop.step % args.validation_steps == 0 or loop.step == run.total_steps:
                        validate(run)
                    if loop.step % args.checkpointing_steps == 0 or loop.stopping:
                        save(run)
            except Diverged as error:
                last = next((f" The last checkpoint is {path}." for path in reversed(checkpoints(args.output_dir))), "")
                raise Diverged(f"{error} No adapter is saved.{last}") from None
    if loop.stopping:
        accelerator.print(f"Stopped after step {loop.step}; go on with --resume_from_checkpoint latest")
        accelerator.wait_for_everyone()  # a launcher ends all when the first one ends with an error
        return signals.exit_code
    return 0


def grids_of(run: Run) -> list[Path]:
    """The grids of validations that are still there."""
    # by their names, as checkpoints hold them: the folder may have moved since, or be another run's that had pictures
    return [path for name in run.history["grids"] if (path := run.pictures / Path(name).name).is_file()]


def card_of(run: Run) -> dict[str, Any]:
    """What the adapter's card says of its training."""
    args, data = run.args, run.data
    training = {
        "steps": run.loop.step,
        "images per step": run.samples_per_step,
        "resolution": data.resolution,
        "background": args.background,
    } | {name: getattr(args, name) for name in SETTINGS}
    grids, names = grids_of(run), [data.images.class_names[i] for i in data.shown]
    picture = label_rows(PIL.Image.open(grids[-1]), names) if grids else None
    return {"dataset": args.dataset_name, "training": training, "picture": picture}


def measure(run: Run, adapter: Path) -> Result:
    loop, history = run.loop, run.history
    size = [adapter.stat().st_size if run.accelerator.is_main_process else None]
    return Result(
        output_dir=run.args.output_dir,
        adapter_bytes=broadcast_object_list(size)[0],
        trained_parameters=run.trained_parameters,
        trained_share=run.trained_parameters / run.base_parameters,
        steps=loop.step,
        seconds_per_step=statistics.median(loop.seconds[2:] or loop.seconds or [0.0]),
        loss=loop.average,
        validation_loss=history["validation"][-1][1] if history["validation"] else None,
        peak_memory_bytes=peak_memory(run.accelerator.device),
        grids=grids_of(run),
    )


def finish(run: Run, repo_id: str | None) -> Result:
    """Writes the adapter and what there is to see of the run, and pushes the adapter."""
    output, accelerator = run.args.output_dir, run.accelerator
    with run.loop.averaged_weights():
        weights = run.loop.trained_weights()
    if accelerator.is_main_process:
        card = card_of(run)
        save_adapter(run.model, output, state_dict=weights, **card)
    accelerator.wait_for_everyone()
    adapter = output / "adapter_model.safetensors"
    result = measure(run, adapter)
    if accelerator.is_main_process:
        plot_losses({name: run.history[name] for name in ("training", "validation")}, output / "loss.png")
        if result.grids:
            picture = grid_over_time(result.grids, len(run.data.shown))
            write(output / "validation.png", lambda partial: picture.save(partial, format="PNG"))
        summary = json.dumps(asdict(result), indent=2, default=str)
        write(output / "summary.json", lambda partial: partial.write_text(summary))
        shown = "" if result.validation_loss is None else f", validation loss {result.validation_loss:.4f}"
        accelerator.print(
            f"{adapter}: {result.adapter_bytes:,} bytes, {result.trained_parameters:,} parameters, "
            f"{result.trained_share:.3%} of the base's\n{result.steps} steps at {result.seconds_per_step:.3f} s, loss "
            f"{result.loss:.4f}{shown}, peak memory {result.peak_memory_bytes / 2**30:.1f} GiB\n"
            f"Pictures: {output}/loss.png" + (f", {output}/validation.png" if result.grids else "")
        )
        if repo_id is not None:  # last: whatever the Hub does, all is on disk
            accelerator.print(push_adapter(run.model, repo_id, state_dict=weights, **card).commit_url)
    return result


def main(args: argparse.Namespace) -> Result:
    check_installed(args)
    check_output_dir(args)
    accelerator = start(args)
    repo_id = create_repository(args, accelerator)
    pipe = load_pipeline(args, accelerator)
    data = load_data(args, accelerator, pipe)
    run = build(args, accelerator, pipe, data)
    accelerator.print(describe(run))
    resume(run)
    if args.report_to != "none":
        settings = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str, bool))}
        accelerator.init_trackers("difffit", config=settings)
    exit_code = train(run)
    result = None if exit_code else finish(run, repo_id)
    # The model goes before its process group. DDP's reducer, if it is the last to hold the group, waits for a thread of
    # Gloo's without letting go of Python's lock, which that thread may be waiting for (torch 2.13).
    del run
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    if result is None:
        raise SystemExit(exit_code)
    return result


if __name__ == "__main__":
    run_script(main, parse_args)
