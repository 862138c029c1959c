"""Samples images from a DiT, with or without an adapter, and compares them with real ones: FID, KID, precision, recall.

    accelerate launch examples/evaluate_images.py --pretrained_model_name_or_path facebook/DiT-XL-2-256 \
        --adapter food101 --dataset_name ethz/food101 --split validation --output_dir food101/evaluation

Writes `report.json` and a grid of samples, `samples.png`, to `--output_dir`. Classes are drawn as often as the real
images have them, and image i has the seed `--seed` + i: batch size and number of processes change nothing but rounding
(only a scheduler that draws noise of its own, as DDPM does, makes them matter). FID falls as the number of images
grows: compare runs with the same `--num_images`, the same real images and the same `--features`. Real images are seen
as in training: at the adapter's resolution, on its background.
"""

import argparse
import importlib
import importlib.util
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from difffit_peft import DiffFitDiTPipeline
from difffit_peft.class_names import classes_called
from difffit_peft.config import parse_colour
from difffit_peft.reading import adapter_folder
from difffit_peft.training.arguments import (
    add_base_arguments,
    add_image_arguments,
    add_sampling_arguments,
    latent_factor,
    load_base,
    load_images,
    make_accelerator,
)
from difffit_peft.training.images import LabelledImages, to_pixels
from difffit_peft.training.scripts import (
    launched_precision,
    positive_int,
    run_script,
    seed_int,
    user_path,
)
from difffit_peft.writing import write
from diffusers.utils import make_image_grid
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm import tqdm

NEIGHBOURS = 3  # k of precision and recall
KID_SUBSET = 1000
GRID = 64  # samples.png shows at most so many images


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    model = parser.add_argument_group("model")
    add_base_arguments(model)
    model.add_argument("--adapter", help="a DiffFit adapter: folder or Hub id; default: the base alone")
    model.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], default=launched_precision("no"), help="of the base too"
    )

    real = parser.add_argument_group("real images")
    add_image_arguments(real)
    real.add_argument(
        "--background",
        help="colour behind transparent images: a name or #rrggbb; default: as the adapter says that it was trained, "
        "else white",
    )

    sampling = parser.add_argument_group("sampling and comparison")
    sampling.add_argument("--num_images", type=positive_int, default=5000)
    sampling.add_argument("--batch_size", type=positive_int, default=32, help="per process")
    add_sampling_arguments(sampling)
    sampling.add_argument(
        "--guidance",
        choices=["class", "domain"],
        default="class",
        help="null class of the adapted model, or of the base",
    )
    sampling.add_argument("--seed", type=seed_int, default=0)
    sampling.add_argument(
        "--features",
        default="inception",
        help="inception, or module:callable or path/to/file.py:callable that returns an nn.Module from uint8 images "
        "(N, 3, H, W) to features (N, D)",
    )
    sampling.add_argument("--output_dir", type=user_path, default=Path("evaluation"))
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


def load_extractor(features: str) -> nn.Module:
    """The network whose features are compared, from what `--features` says."""
    if features == "inception":
        try:  # antialias=False resizes as the original FID does
            return FrechetInceptionDistance(2048, antialias=False).inception
        except (ImportError, OSError, RuntimeError) as error:
            raise RuntimeError(
                f"--features inception needs torch-fidelity and its Inception weights, which it downloads once: "
                f"{error} Or name another extractor, --features path/to/file.py:callable."
            ) from error
    source, _, name = features.rpartition(":")
    if not source or not name:
        raise ValueError(f"--features is {features!r}: give inception, module:callable or path/to/file.py:callable.")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        extractor = getattr(module, name)()
    except (ImportError, OSError, AttributeError) as error:
        raise ValueError(f"--features {features} cannot be loaded: {error}") from error
    if not isinstance(extractor, nn.Module):
        raise ValueError(f"--features {features} returns {type(extractor).__name__}: it must return an nn.Module.")
    return extractor


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991).

    Precision is the share of fakes that lie in the manifold of the real images: no farther from one of them than its
    k-th nearest neighbour among them. Recall is the share of real images that lie in the manifold of the fakes.
    """

    def share_inside(points: Tensor, manifold: Tensor) -> float:
        chunks = manifold.split(1000)
        radii = torch.cat([torch.cdist(c, manifold).kthvalue(k + 1).values for c in chunks])  # the 1st is itself
        inside = [(torch.cdist(c, manifold) <= radii).any(dim=1) for c in points.split(1000)]
        return torch.cat(inside).double().mean().item()

    return share_inside(fake, real), share_inside(real, fake)


def compare(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, float]:
    """The metrics of two sets of features, each of shape (N, D) with N > 3."""
    if real.device.type == "mps":  # it has no float64
        real, fake = real.cpu(), fake.cpu()
    real, fake = real.double(), fake.double()
    identity = nn.Identity()  # the features are computed already
    identity.num_features = real.shape[1]
    subset_size = min(KID_SUBSET, len(real), len(fake))
    # only the main process computes, on all features: nothing to synchronise
    fid = FrechetInceptionDistance(identity, sync_on_compute=False).to(real.device)
    kid = KernelInceptionDistance(identity, subset_size=subset_size, sync_on_compute=False).to(real.device)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of KID's subsets
        kid_mean, kid_std = kid.compute()
    precision, recall = precision_recall(real, fake)
    return {
        "fid": fid.compute().item(),
        "kid": kid_mean.item(),
        "kid_std": kid_std.item(),
        "kid_subset_size": subset_size,
        "precision": precision,
        "recall": recall,
    }


def active_configs(pipe: DiffFitDiTPipeline) -> list[PeftConfig]:
    return [pipe.transformer.peft_config[name] for name in pipe.get_active_adapters()]


def model_classes(names: list[str], pipe: DiffFitDiTPipeline) -> list[int] | None:
    """The model's index of each class of the real images, by name; `None` where the model knows other names, or none.

    Raises:
        ValueError: if the model has classes of its own, and not all of the real images'.
    """
    known = pipe.id2label
    called = [classes_called(name, known) for name in names]
    called = [[index] if index in found else found for index, found in enumerate(called)]
    if all(len(found) == 1 for found in called):
        return [index for (index,) in called]
    for config in active_configs(pipe):
        if getattr(config, "id2label", None):
            wrong = next(name for name, found in zip(names, called, strict=True) if len(found) != 1)
            raise ValueError(
                f"The adapter does not know the class {wrong!r} of the real images, only {list(known.values())[:10]}: "
                "compare with real images of the classes it was trained on."
            )
        count = getattr(config, "num_classes", None)
        if count and len(names) > count:
            raise ValueError(
                f"The real images have {len(names)} classes, but the adapter has {count}, without names: compare with "
                "real images of the classes it was trained on."
            )
    return None


def spread(labels: Tensor, count: int) -> list[int]:
    """`count` labels in ascending order, each as often as `labels` has it."""
    return labels.sort().values[torch.arange(count) * len(labels) // count].tolist()


class RealImages(Dataset):
    """The centres of images as uint8 (3, resolution, resolution), as training sees them."""

    def __init__(self, images: datasets.Dataset, resolution: int, background: str):
        self.images, self.resolution, self.background = images, resolution, background

    def __getitem__(self, row: int) -> Tensor:
        try:
            image = datasets.Image().decode_example(self.images[row]["image"])
            pixels = to_pixels(image, self.resolution, self.background)
        except Exception as error:  # Pillow raises a dozen types for broken files
            raise ValueError(
                f"The real image of row {row} cannot be read: {error}. Repair or remove it, or leave it out with "
                "--skip_broken_images."
            ) from error
        return ((pixels + 1) * 127.5).round().byte()

    def can_be_read(self, row: int) -> bool:
        try:
            return self[row] is not None
        except ValueError:
            return False


def own_share(accelerator: Accelerator, count: int) -> list[int]:
    """The rows of 0 to `count` - 1 of this process: as many in all, the last row repeated where they do not divide."""
    size = math.ceil(count / accelerator.num_processes)
    first = accelerator.process_index * size
    return [min(row, count - 1) for row in range(first, first + size)]


@torch.no_grad()
def gather_features(
    accelerator: Accelerator, extractor: nn.Module, batches: Iterable[Tensor], count: int, desc: str
) -> Tensor:
    """Features of all processes' images, in order: shape (count, D)."""
    share = math.ceil(count / accelerator.num_processes)
    features = []
    with tqdm(total=share, desc=desc, unit="image", disable=not accelerator.is_main_process) as bar:
        for images in batches:
            features.append(extractor(images.to(accelerator.device)).float())
            bar.update(len(images))
    return accelerator.gather(torch.cat(features))[:count]


def load_adapted(args: argparse.Namespace, accelerator: Accelerator) -> DiffFitDiTPipeline:
    """The base, on the accelerator. It may have adapters of its own, but not beside `--adapter`."""
    pipe = load_base(args, accelerator).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    if args.adapter and pipe.get_list_adapters():
        raise ValueError(
            f"{args.pretrained_model_name_or_path} comes with adapters of its own: leave --adapter out, or name "
            "its base."
        )
    return pipe


def readable(data: LabelledImages, images: RealImages) -> LabelledImages:
    """Those of the images that can be read."""
    kept = [row for row in range(len(data)) if images.can_be_read(row)]
    return LabelledImages(data.images.select(kept), data.labels[kept], data.class_names)


def num_features(args: argparse.Namespace, extractor: nn.Module, accelerator: Accelerator, resolution: int) -> int:
    """How many features an image has. Refuses a network that gives something else than features."""
    images = torch.zeros(2, 3, resolution, resolution, dtype=torch.uint8, device=accelerator.device)
    with torch.no_grad():
        shape = extractor(images).shape
    if len(shape) != 2 or shape[0] != 2:
        raise ValueError(f"--features {args.features} gives {tuple(shape)} for two images: it must give (2, D).")
    return shape[1]


def sample(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipe: DiffFitDiTPipeline,
    classes: list[int],
    shown: dict[int, np.ndarray | None],
) -> Iterator[Tensor]:
    """Batches of this process's samples, uint8 (N, 3, resolution, resolution), one of each entry of `classes`.

    Sets those entries of `shown` whose rows are among them.
    """
    rows = own_share(accelerator, args.num_images)
    for batch in (rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)):
        torch.manual_seed(args.seed + batch[0])  # for schedulers that draw noise of their own
        images = pipe(
            [classes[row] for row in batch],
            guidance_scale=args.guidance_scale,
            guidance=args.guidance,
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(args.seed + row) for row in batch],
            output_type="np",
        ).images
        images = (images * 255).round().astype("uint8")
        shown.update((row, image) for row, image in zip(batch, images, strict=True) if row in shown)
        yield torch.from_numpy(images).permute(0, 3, 1, 2)


def write_report(output_dir: Path, report: dict[str, Any], images: list[np.ndarray]) -> None:
    side = math.isqrt(len(images))
    grid = make_image_grid([PIL.Image.fromarray(image) for image in images], side, side)
    write(output_dir / "samples.png", lambda partial: grid.save(partial, format="PNG"))
    text = json.dumps(report, indent=2) + "\n"
    write(output_dir / "report.json", lambda partial: partial.write_text(text))


def in_words(args: argparse.Namespace, report: dict[str, Any], own: list[str]) -> str:
    """What was compared with what, and what came out. `own`: the adapters that the base came with."""
    adapters = f"the adapter {args.adapter}" if args.adapter else "its own adapters" if own else "no adapter"
    few = f" for lack of {KID_SUBSET} images" if report["kid_subset_size"] < KID_SUBSET else ""
    return (
        f"{args.num_images} images of {args.pretrained_model_name_or_path} with {adapters}, against "
        f"{report['num_real_images']} real images of {args.dataset_name or args.train_data_dir} (split {args.split}) "
        f"at {report['resolution']}x{report['resolution']}, transparency on {report['background']}, on "
        f"{report['num_features']} features of {args.features}, at guidance {report['guidance_scale']:g} "
        f"({args.guidance}) in {args.num_inference_steps} steps:\n"
        f"FID {report['fid']:.4g}, KID {report['kid']:.4g} ± {report['kid_std']:.2g} (subsets of "
        f"{report['kid_subset_size']}{few}), "
        f"precision {report['precision']:.3f}, recall {report['recall']:.3f}\nReport: {args.output_dir / 'report.json'}"
    )


def load_real_images(
    args: argparse.Namespace, accelerator: Accelerator, data: LabelledImages, resolution: int, background: str
) -> tuple[LabelledImages, RealImages]:
    """The real images, without those that cannot be read if they are to be skipped."""
    parse_colour(background)
    images = RealImages(data.images, resolution, background)
    if args.skip_broken_images:
        total, data = len(data), readable(data, images)
        accelerator.print(f"{total - len(data)} of {total} real images cannot be read, and are left out.")
        images = RealImages(data.images, resolution, background)
    if len(data) <= NEIGHBOURS:
        raise ValueError(f"There are {len(data)} real images: precision needs {NEIGHBOURS + 1} or more.")
    return data, images


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.num_images <= NEIGHBOURS:
        raise ValueError(f"--num_images is {args.num_images}: recall needs {NEIGHBOURS + 1} images or more.")
    accelerator = make_accelerator(args)
    with accelerator.local_main_process_first():  # it downloads for the others
        extractor = load_extractor(args.features).eval().requires_grad_(False).to(accelerator.device)
    pipe = load_adapted(args, accelerator)
    own = pipe.get_list_adapters()
    data = load_images(args, accelerator, pipe)
    if args.adapter:
        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, adapter_folder(args.adapter))
    if args.guidance_scale is None:
        args.guidance_scale = pipe.default_guidance_scale
    resolution = pipe.transformer.config.sample_size * latent_factor(pipe)
    trained_on = next((c.background for c in active_configs(pipe) if getattr(c, "background", None)), "white")
    background = args.background or trained_on
    data, real_images = load_real_images(args, accelerator, data, resolution, background)
    features = num_features(args, extractor, accelerator, resolution)
    classes = model_classes(data.class_names, pipe)
    if classes is None:
        accelerator.print("The model does not know the real images' classes by name: class i of theirs is its own i.")
    # in mixed precision it now gives float32, as the scheduler and the VAE take it
    pipe.transformer = accelerator.prepare_model(pipe.transformer.eval(), evaluation_mode=True)

    mine = own_share(accelerator, len(data))
    loader = DataLoader(Subset(real_images, mine), args.batch_size, num_workers=args.dataloader_num_workers)
    real = gather_features(accelerator, extractor, loader, len(data), "Real images")
    labels = spread(data.labels, args.num_images)
    side = math.isqrt(min(args.num_images, GRID))
    shown = dict.fromkeys(i * args.num_images // side**2 for i in range(side**2))
    samples = sample(args, accelerator, pipe, labels if classes is None else [classes[i] for i in labels], shown)
    fake = gather_features(accelerator, extractor, samples, args.num_images, "Sampling")
    images = dict(gather_object([(row, image) for row, image in shown.items() if image is not None]))
    report = broadcast_object_list([compare(real, fake, args.seed) if accelerator.is_main_process else {}])[0]
    report |= {
        "num_real_images": len(data),
        "num_features": features,
        "classes": "by index" if classes is None else "by name",
        "scheduler": type(pipe.scheduler).__name__,
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "resolution": resolution,
        "background": background,
    }
    if accelerator.is_main_process:
        write_report(args.output_dir, report, [images[row] for row in shown])
    accelerator.print(in_words(args, report, own))
    return report


if __name__ == "__main__":
    run_script(main, parse_args)
