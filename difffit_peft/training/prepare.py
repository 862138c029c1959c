"""What a training script does before its first step: what it refuses, its accelerator, its adapter, its latents."""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    is_bnb_available,
    set_seed,
)
from huggingface_hub import cached_assets_path, create_repo
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset

from ..config import DiffFitConfig
from ..publishing import check_push
from .arguments import SETTINGS, make_accelerator
from .base_precision import check_base_precision, lower_blocks
from .checkpoint import check_checkpoint, checkpoints, fingerprint
from .images import LabelledImages
from .latents import LatentDataset, encode_latents


def check_installed(args: argparse.Namespace) -> None:
    """Refuses what needs a package that is not there. Accelerate passes over such a tracker, and nothing is logged."""
    if args.report_to != "none" and LoggerType(args.report_to) not in get_available_trackers():
        raise ValueError(
            f"--report_to {args.report_to} needs {args.report_to}, which is not installed: pip install "
            f"{args.report_to}, or choose --report_to none."
        )
    if args.optimizer == "adamw_8bit" and not is_bnb_available():
        raise ValueError("--optimizer adamw_8bit needs bitsandbytes, which is not installed: pip install bitsandbytes")


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
    """The accelerator. Refuses those that the scripts do not train under."""
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
    check_base_precision(args.base_precision, args.mixed_precision, accelerator.device, sharded)
    return accelerator


def create_repository(args: argparse.Namespace, accelerator: Accelerator) -> str | None:
    """The repository to push to. It is made before the run, to learn now whether that is allowed."""
    if not (args.push_to_hub and accelerator.is_main_process):
        return None
    name = args.hub_model_id or args.output_dir.resolve().name
    check_push(name)
    return create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; `None` if it names none, or there is no latest one."""
    if args.resume_from_checkpoint == "latest":
        return next(reversed(checkpoints(args.output_dir)), None)
    return Path(args.resume_from_checkpoint) if args.resume_from_checkpoint else None


def split(dataset: LatentDataset, held_out: int | None, seed: int) -> tuple[Subset, Subset]:
    """The images to train on, and those held out for the validation loss."""
    held_out = min(len(dataset) // 20, 200) if held_out is None else held_out
    if not 0 <= held_out < len(dataset):
        raise ValueError(f"--num_held_out_images is {held_out}: it must be 0 to {len(dataset) - 1}, to leave an image.")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(dataset, sorted(order[held_out:])), Subset(dataset, sorted(order[:held_out]))


def make_loader(train: Dataset, batch_size: int, num_samples: int, seed: int, num_workers: int = 0) -> DataLoader:
    """Batches of a whole run, a new order each epoch: one pass, so that each is full, however few the images."""
    order = RandomSampler(train, num_samples=num_samples, generator=torch.Generator().manual_seed(seed))
    return DataLoader(train, batch_size, sampler=order, num_workers=num_workers)


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


def identity_of(args: argparse.Namespace, accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """What a run must keep to be resumed, whatever its data: the base, before it is adapted, and the settings."""
    of_run = {"base": fingerprint(model), "processes": accelerator.num_processes}
    return of_run | {name: getattr(args, name) for name in ("r", "new_biases", *SETTINGS)}


def attach(model: nn.Module, args: argparse.Namespace, **of_task: Any) -> PeftModel:
    """A `PeftModel` with a new adapter, the same one for the same seed.

    Its config is what `args` say of DiffFit, with `of_task`.
    """
    set_seed(args.seed)
    given = ("gamma_modules", "gamma_layers", "r", "new_biases", "background")
    config = DiffFitConfig(**{name: getattr(args, name) for name in given}, **of_task)
    if args.guidance_loss_scale != 1:
        config.trained_guidance_scale = args.guidance_loss_scale
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    adapted = get_peft_model(model, config)
    if args.base_precision in ("int8", "fp8"):
        lower_blocks(adapted, args.base_precision)
    return adapted


def cache_folder(args: argparse.Namespace, name: str) -> Path:
    return Path(args.cache_dir) if args.cache_dir else cached_assets_path("difffit_peft", name)


def encode_images(
    args: argparse.Namespace,
    accelerator: Accelerator,
    vae: nn.Module,
    images: LabelledImages,
    resolution: int,
    identity: dict[str, Any],
) -> tuple[Subset, Subset, dict[str, Any]]:
    """Latents to train on, latents that are held out, and `identity` with what is known of them.

    A checkpoint to resume that is of another run is refused before images are encoded.
    """

    def check(about: dict[str, Any]) -> None:
        path = checkpoint_to_resume(args)
        if accelerator.is_main_process and path is not None:
            check_checkpoint(path, identity | about)

    with accelerator.local_main_process_first():  # each machine has a cache of its own
        latents = encode_latents(
            vae,
            images,
            resolution,
            cache_folder(args, "latents"),
            random_flip=args.random_flip,
            skip_broken_images=args.skip_broken_images,
            background=args.background,
            num_workers=args.dataloader_num_workers,
            check=check,
        )
    train, held_out = split(latents, args.num_held_out_images, args.seed)
    return train, held_out, identity | {"held_out_images": len(held_out)} | latents.about
