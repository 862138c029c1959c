"""Adapts a class-conditional DiT to a folder of images, or a dataset on the Hub, with DiffFit.

    python examples/train_difffit.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 \
        --dataset_name ethz/food101 --output_dir food101 --mixed_precision bf16 --max_train_steps 20000

Writes the adapter (the average of its weights over training) to `--output_dir`, where `peft.PeftModel.from_pretrained`
finds it, and pictures of fixed classes and seeds to `--output_dir/validation`. The images are encoded once, to a cache.
"""

import argparse
import math
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, DiTPipeline
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from huggingface_hub import cached_assets_path
from peft import get_peft_model
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from difffit_peft import DiffFitConfig
from difffit_peft.training.data import LatentDataset, encode_latents, load_labelled_images, sample_latents
from difffit_peft.training.losses import diffusion_loss


@dataclass
class Result:
    """What a run gives back: where the adapter is, how large it is, and what the training took."""

    output_dir: Path
    adapter_bytes: int
    trained_parameters: int
    trained_share: float  # of the base's parameters
    steps: int
    seconds_per_step: float  # median, without the first two
    loss: float  # running mean
    grids: list[Path]


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction

    base = parser.add_argument_group("base and data")
    base.add_argument("--pretrained_model_name_or_path", required=True, help="a DiTPipeline: Hub id or folder")
    base.add_argument("--revision", help="branch, tag or commit of the base on the Hub")
    base.add_argument("--variant", help="variant of the base's files, such as fp16")
    base.add_argument("--dataset_name", help="a dataset on the Hub")
    base.add_argument("--dataset_config_name", help="its configuration")
    base.add_argument(
        "--train_data_dir", help="one folder of images per class, a folder of parquet, or a .parquet file"
    )
    base.add_argument("--split", default="train", help="the split to train on")
    base.add_argument("--image_column", default="image")
    base.add_argument("--label_column", default="label")
    base.add_argument("--max_train_samples", type=positive_int, help="train on so many images, drawn with --seed")
    base.add_argument("--resolution", type=positive_int, help="in pixels; only the base's own so far, the default")
    base.add_argument("--random_flip", action=switch, default=True, help="train on mirror images too")
    base.add_argument("--output_dir", type=Path, default=Path("difffit-adapter"))
    base.add_argument("--cache_dir", help="for downloads and encoded images; default: the Hugging Face cache")

    difffit = parser.add_argument_group("DiffFit")
    difffit.add_argument(
        "--gamma_modules", nargs="*", help="endings of the layers that get γ; nothing after it: none, which is BitFit"
    )
    difffit.add_argument("--gamma_layers", nargs="*", type=int, help="blocks that get γ; default: the first half")

    train = parser.add_argument_group("training")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--train_batch_size", type=positive_int, default=32, help="per process")
    train.add_argument("--gradient_accumulation_steps", type=positive_int, default=1)
    train.add_argument("--num_train_epochs", type=positive_int, default=100)
    train.add_argument("--max_train_steps", type=positive_int, help="overrides --num_train_epochs")
    train.add_argument("--dataloader_num_workers", type=int, default=0)
    train.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="of the base too")
    train.add_argument("--learning_rate", type=float, default=1e-3, help="DiffFit likes 10x that of pre-training")
    train.add_argument("--lr_scheduler", choices=[s.value for s in SchedulerType], default="constant")
    train.add_argument("--lr_warmup_steps", type=int, default=0, help="used by constant_with_warmup, cosine, ...")
    train.add_argument("--adam_beta1", type=float, default=0.9)
    train.add_argument("--adam_beta2", type=float, default=0.999)
    train.add_argument("--adam_weight_decay", type=float, default=0.0)
    train.add_argument("--adam_epsilon", type=float, default=1e-8)
    train.add_argument("--snr_gamma", type=float, help="min-SNR weighting of the loss; 5.0 is recommended")
    train.add_argument("--max_grad_norm", type=float, default=1.0)
    train.add_argument("--use_ema", action=switch, default=True, help="save and show averaged weights")
    train.add_argument("--ema_decay", type=float, default=0.9999, help="reached slowly: a short run averages less")

    show = parser.add_argument_group("validation")
    show.add_argument("--validation_labels", nargs="+", help="classes, by name or index; default: up to four of them")
    show.add_argument("--validation_steps", type=positive_int, default=1000)
    show.add_argument("--num_validation_images", type=int, default=4, help="per class; 0 turns validation off")
    show.add_argument("--guidance_scale", type=float, default=4.0)
    show.add_argument("--num_inference_steps", type=positive_int, default=50)
    return parser.parse_args(argv)


def checked_resolution(pipe: DiTPipeline, resolution: int | None) -> int:
    """The base's own resolution; another one is refused."""
    own = pipe.transformer.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    if resolution not in (None, own):
        raise ValueError(
            f"--resolution is {resolution}, but this script trains at the base's own, {own}: leave it out."
        )
    return own


@contextmanager
def averaged_weights(ema: EMAModel | None, parameters: list[torch.nn.Parameter]):
    """Puts the averaged weights in place for a while."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def sample_grid(pipe: DiTPipeline, classes: list[int], args: argparse.Namespace):
    """One row of images per class; the same seeds in every column, at every call."""
    training = pipe.transformer.training
    pipe.transformer.eval()
    images = []
    device = pipe.transformer.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # training goes on as without it
        torch.manual_seed(args.seed)
        for label in classes:
            images += pipe(
                [label] * args.num_validation_images,
                guidance_scale=args.guidance_scale,
                num_inference_steps=args.num_inference_steps,
                generator=[torch.Generator().manual_seed(args.seed + i) for i in range(args.num_validation_images)],
            ).images
    pipe.transformer.train(training)
    return make_image_grid(images, len(classes), args.num_validation_images)


def write_image(image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    image.save(partial, format="PNG")
    partial.rename(path)
    return path


def main(args: argparse.Namespace) -> Result:
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.mixed_precision]
    pipe = DiTPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype={"transformer": dtype, "default": torch.float32},  # VAEs overflow in fp16, and are used little here
    ).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.requires_grad_(False)
    resolution = checked_resolution(pipe, args.resolution)
    data = load_labelled_images(
        args.dataset_name,
        args.train_data_dir,
        dataset_config_name=args.dataset_config_name,
        split=args.split,
        image_column=args.image_column,
        label_column=args.label_column,
        max_classes=pipe.transformer.config.num_embeds_ada_norm,
        max_samples=args.max_train_samples,
        seed=args.seed,
        cache_dir=args.cache_dir,
    )
    if args.validation_labels:
        classes = [data.class_index(label) for label in args.validation_labels]
    else:
        classes = list(range(0, len(data.class_names), math.ceil(len(data.class_names) / 4)))
    accelerator.print(f"{len(data)} images in {len(data.class_names)} classes, at {resolution}x{resolution}")

    cache = Path(args.cache_dir) if args.cache_dir else cached_assets_path("difffit_peft", "latents")
    with accelerator.main_process_first():
        mean, std = encode_latents(
            pipe.vae, data.images, resolution, cache, args.random_flip, num_workers=args.dataloader_num_workers
        )

    # From here on random numbers count: a run that finds its latents in the cache goes like one that encodes them.
    set_seed(args.seed)
    same_classes = data.classes_agree(pipe.labels)
    accelerator.print(
        "Classes start from the base's own rows: it knows each of them by the same name and index."
        if same_classes
        else "Classes start from the base's null row: its classes are others."
    )
    config = DiffFitConfig(
        id2label=dict(enumerate(data.class_names)),
        init_class_rows="base" if same_classes else "null",
        gamma_modules=args.gamma_modules,
        gamma_layers=args.gamma_layers,
    )
    base_parameters = sum(p.numel() for p in pipe.transformer.parameters())
    model = get_peft_model(pipe.transformer, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained_parameters = sum(p.numel() for p in parameters)
    trained_share = trained_parameters / base_parameters
    accelerator.print(
        f"Training {trained_parameters:,} parameters, {trained_share:.3%} of the base's {base_parameters:,}"
    )

    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps
    total_steps = args.max_train_steps or math.ceil(
        args.num_train_epochs * len(data) / (samples_per_step * accelerator.num_processes)
    )
    dataset = LatentDataset(mean, std, data.labels)
    # One pass over the sampler is the whole run, a new order each epoch: every batch is full, however few the images.
    num_samples = total_steps * samples_per_step * accelerator.num_processes
    order = RandomSampler(dataset, num_samples=num_samples, generator=torch.Generator().manual_seed(args.seed))
    loader = DataLoader(dataset, args.train_batch_size, sampler=order, num_workers=args.dataloader_num_workers)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    schedule = get_scheduler(  # Accelerate steps it once per process
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=total_steps * accelerator.num_processes,
    )
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    ema = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=0.75) if args.use_ema else None
    pipe.transformer = accelerator.unwrap_model(model)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    grids: list[Path] = []

    def validate(step: int) -> None:
        if args.num_validation_images > 0 and accelerator.is_main_process:
            with averaged_weights(ema, parameters):
                grid = sample_grid(pipe, classes, args)
            grids.append(write_image(grid, args.output_dir / "validation" / f"step-{step:06d}.png"))

    validate(0)
    model.train()
    bar = tqdm(total=total_steps, desc="Training", disable=not accelerator.is_local_main_process)
    step, average, micro_losses, seconds = 0, None, [], []
    start = time.perf_counter()
    for mean, std, labels in loader:
        with accelerator.accumulate(model):
            x_0 = sample_latents(mean, std)
            noise = torch.randn_like(x_0)
            timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, labels.shape, device=x_0.device)
            x_t = noise_scheduler.add_noise(x_0, noise, timesteps)
            output = model(x_t, timestep=timesteps, class_labels=labels).sample
            loss = diffusion_loss(output, x_0, noise, timesteps, noise_scheduler, args.snr_gamma).mean()
            micro_losses.append(loss.item())
            if not math.isfinite(micro_losses[-1]):
                raise RuntimeError(
                    f"The loss is {micro_losses[-1]} at step {step + 1}, so the run stops and saves no adapter: "
                    "lower --learning_rate, or train with --mixed_precision no or bf16."
                )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        if ema is not None:
            ema.step(parameters)
        loss_of_step = statistics.fmean(micro_losses)
        average = loss_of_step if average is None else 0.99 * average + 0.01 * loss_of_step
        micro_losses.clear()
        seconds.append(time.perf_counter() - start)
        bar.set_postfix(loss=f"{average:.4f}", lr=f"{schedule.get_last_lr()[0]:.1e}")
        bar.update()
        if step % args.validation_steps == 0 and step < total_steps:
            validate(step)
        start = time.perf_counter()
    bar.close()
    validate(total_steps)

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with averaged_weights(ema, parameters), TemporaryDirectory(dir=args.output_dir) as partial:
            pipe.transformer.save_pretrained(partial, save_embedding_layers=False)
            for file in Path(partial).iterdir():  # each file appears whole or not at all
                file.replace(args.output_dir / file.name)
    accelerator.wait_for_everyone()
    adapter = args.output_dir / "adapter_model.safetensors"
    result = Result(
        output_dir=args.output_dir,
        adapter_bytes=adapter.stat().st_size,
        trained_parameters=trained_parameters,
        trained_share=trained_share,
        steps=step,
        seconds_per_step=statistics.median(seconds[2:] or seconds),
        loss=average,
        grids=grids,
    )
    accelerator.print(
        f"{adapter}: {result.adapter_bytes:,} bytes, {trained_parameters:,} parameters, "
        f"{trained_share:.3%} of the base's\n{step} steps at {result.seconds_per_step:.3f} s, loss {average:.4f}"
    )
    for path in grids:
        accelerator.print(path)
    accelerator.end_training()
    return result


if __name__ == "__main__":
    main(parse_args())
