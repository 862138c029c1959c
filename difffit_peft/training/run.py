"""A training run of the example scripts, from its accelerator to its adapter, card and pictures.

What scripts differ in is a `Task`: a base with a new adapter, its data, and how pictures of it are made.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from peft import PeftModel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..explanation import explain
from ..publishing import base_parameters, push_adapter, save_adapter
from ..writing import write
from .arguments import PRE_TRAINING_RATE, SETTINGS
from .checkpoint import checkpoints, load_checkpoint, remove_later, save_checkpoint
from .loop import Diverged, TrainingLoop
from .objective import Guidance, Objective
from .prepare import (
    check_installed,
    check_output_dir,
    checkpoint_to_resume,
    create_repository,
    make_loader,
    make_optimizer,
    start,
)
from .scripts import StopSignals
from .visualize import grid_over_time, label_rows, plot_losses


@dataclass
class Result:
    """What a run gives back, and writes to `summary.json`."""

    output_dir: Path
    adapter_bytes: int
    trained_parameters: int
    trained_share: float  # of the base's parameters, its timestep and class embedder counted once
    steps: int
    seconds_per_step: float  # median, without the first two
    loss: float | None  # running mean
    validation_loss: float | None  # of held-out images, averaged weights
    peak_memory_bytes: int  # of the accelerator, or of the process where there is none
    grids: list[Path]


@dataclass
class Task:
    """What a run trains, and on what.

    Attributes:
        model: the frozen base with a new adapter.
        objective: what it is trained for.
        train, held_out: data sets of latents.
        resolution: of the images in pixels.
        about: a few lines about the images, for the console.
        identity: all that must be the same for a run to be resumed, beside the adapter and the settings.
        shown: names of the rows of `sample`.
        sample: makes a grid of pictures.
        card: what the adapter's card says beside the settings of all scripts.
    """

    model: PeftModel
    objective: Objective
    train: Subset
    held_out: Subset
    resolution: int
    about: str
    identity: dict[str, Any]
    shown: list[str]
    sample: Callable[[], PIL.Image.Image]
    card: dict[str, Any]


@dataclass
class Run:
    """A run as it goes on."""

    args: argparse.Namespace
    accelerator: Accelerator
    task: Task
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


def build(args: argparse.Namespace, accelerator: Accelerator, task: Task) -> Run:
    """All that trains, before its first step."""
    model = task.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    counts = sum(p.numel() for p in parameters), base_parameters(model)
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    total_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(task.train) / samples_per_step)
    num_samples = total_steps * samples_per_step
    loader = make_loader(task.train, args.train_batch_size, num_samples, args.seed, args.dataloader_num_workers)
    optimizer = make_optimizer(parameters, args)
    lr_scheduler = get_scheduler(  # Accelerate steps it once per process
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=total_steps * accelerator.num_processes,
    )
    prepared, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    loop = TrainingLoop(
        accelerator,
        prepared,
        optimizer,
        lr_scheduler,
        task.objective,
        seed=args.seed,
        max_grad_norm=args.max_grad_norm,
        ema_decay=args.ema_decay if args.use_ema else None,
        guidance=Guidance(args.guidance_loss_scale, round(args.guidance_loss_start * total_steps)),
        compile=args.torch_compile,
    )
    config = model.peft_config["default"]
    depends_on_total = args.lr_scheduler not in ("constant", "constant_with_warmup") or args.guidance_loss_scale != 1
    identity = task.identity | {
        "gamma_modules": config.gamma_modules,  # written out by now
        "gamma_layers": config.gamma_layers,
        "total_steps": total_steps if depends_on_total else "any",
    }
    return Run(args, accelerator, task, loop, loader, *counts, total_steps, samples_per_step, identity)


def describe(run: Run) -> str:
    """What the run is about to do, in words."""
    args, task, low = run.args, run.task, run.args.base_precision
    return (
        f"{task.about}\n\n{explain(task.model).table()}\n\n"
        f"Training {run.trained_parameters:,} parameters, {run.trained_parameters / run.base_parameters:.3%} of the "
        f"base's {run.base_parameters:,}, in {args.mixed_precision.replace('no', 'fp32')}"
        f"{f', its blocks in {low}' if low else ''}: {run.total_steps} steps of {run.samples_per_step} images\n"
        f"AdamW at {args.learning_rate:g}, {args.learning_rate / PRE_TRAINING_RATE:g}x the rate that published DiTs "
        f"are pre-trained at (the paper recommends 10x); weight decay {args.adam_weight_decay:g}"
    )


def resume(run: Run) -> None:
    """Goes on from the checkpoint that is asked for."""
    path = checkpoint_to_resume(run.args)
    loaded: list[Any] = [None]  # read by the main process, which wrote it: other machines may not see its disk
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
        if len(run.task.held_out):
            loss = loop.validation_loss(run.task.held_out, args.train_batch_size)
            run.history["validation"].append((loop.step, loss))
            accelerator.log({"validation_loss": loss}, step=loop.step)
        if args.num_validation_images == 0:
            return
        grid = run.task.sample()
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
    adapter = partial(save_adapter, run.task.model, repo_id=f"checkpoint-{loop.step}", state_dict=weights)
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
    args = run.args
    training = {
        "steps": run.loop.step,
        "images per step": run.samples_per_step,
        "resolution": run.task.resolution,
        "background": args.background,
    } | {name: getattr(args, name) for name in SETTINGS}
    grids = grids_of(run)
    picture = label_rows(PIL.Image.open(grids[-1]), run.task.shown) if grids else None
    shown = next(iter(run.task.shown), None)
    return {"dataset": args.dataset_name, "training": training | run.task.card, "picture": picture, "prompt": shown}


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
        save_adapter(run.task.model, output, state_dict=weights, **card)
    accelerator.wait_for_everyone()
    adapter = output / "adapter_model.safetensors"
    result = measure(run, adapter)
    if accelerator.is_main_process:
        plot_losses({name: run.history[name] for name in ("training", "validation")}, output / "loss.png")
        if result.grids:
            picture = grid_over_time(result.grids, len(run.task.shown))
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
            accelerator.print(push_adapter(run.task.model, repo_id, state_dict=weights, **card).commit_url)
    return result


def run_training(args: argparse.Namespace, prepare: Callable[[argparse.Namespace, Accelerator], Task]) -> Result:
    """A whole run, from its arguments to what it leaves in `--output_dir`."""
    check_installed(args)
    check_output_dir(args)
    accelerator = start(args)
    repo_id = create_repository(args, accelerator)
    run = build(args, accelerator, prepare(args, accelerator))
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
