"""One adaptation of the bundled base to a domain: trained, measured, and kept as a JSON file.

Every method is trained by the same loop (`difffit_peft.training.loop`) on the same images in the same order, with the
same noise and timesteps: AdamW at a constant rate after a short warm-up, min-SNR weights of 5 as the base was trained
with, and averaged weights, which are what is measured, on the way and at the end. All is a function of the `Run`: on
one machine, with the same number of threads, the same run gives the same figures to the last digit.
"""

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from difffit_peft.training.images import LabelledImages, load_labelled_images, to_pixels
from difffit_peft.training.latents import LatentDataset, encode_latents
from difffit_peft.training.loop import Diverged, TrainingLoop
from difffit_peft.training.objective import class_conditional
from difffit_peft.training.prepare import make_loader
from difffit_peft.writing import write
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from methods import trained
from report import machine
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset
from tqdm import tqdm

EXAMPLES = Path(__file__).resolve().parents[1]
AVATARS = EXAMPLES / "avatars"
sys.path[:0] = [str(EXAMPLES), str(AVATARS)]
from judge import Classifier, ImageNetFeatures, by_vae, sample  # noqa: E402
from render import BUNDLED, bundle  # noqa: E402

import evaluate_images  # noqa: E402

MARKS = (30, 100, 300, 1000, 3000, 10000)  # steps at which a run is measured
SHOWN = 4  # rows and columns of the samples that are kept
VALIDATION_SEED = 0


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides what comes out.

    Attributes:
        domain: of `examples/avatars/data`: "inside", "near", "middle" or "far".
        method: what is trained: a name that the benchmark's `attach` knows.
        learning_rate: the highest of the schedule.
        seed: of the initialisation, the order of images, all draws, and the samples.
        steps: optimiser steps; 0 measures the base as it is.
        num_images: how many to sample, in classes as frequent as among the held-out images; 0: the loss alone, on
            images that learning rates are chosen by, at the end.
        images_per_class: to train on, at most; `None`: all. More than are bundled are rendered. A tenth of all is kept
            apart, to choose learning rates by.
    """

    domain: str
    method: str
    learning_rate: float
    seed: int
    steps: int
    num_images: int
    resolution: int = 64
    batch_size: int = 16
    guidance_scale: float = 1.5  # as the paper samples
    num_inference_steps: int = 15
    mixed_precision: str = "no"
    images_per_class: int | None = None

    @property
    def name(self) -> str:
        method = self.method.replace(" ", "-").replace("/", "-")
        size = f"{self.resolution}px-{self.steps}steps-{self.num_images}images"
        size += f"-{self.images_per_class}per-class" * (self.images_per_class is not None)
        return f"{self.domain}-{method}-lr{self.learning_rate:.2g}-seed{self.seed}-{size}"


class Bench:
    """Makes runs, and keeps what they gave: what was done once is not done again.

    Args:
        folder: for what runs gave: a JSON and a few samples each.
        cache: for images, latents and what judges them, which can be made again.
        attach: puts a method, by its name, on a transformer of the base, for a number of new classes, and returns the
            model to train.
        classifier_steps: for how long the classifier of a domain's classes is trained.
        held_out: pictures of each class to measure by, where they are rendered.
        max_samples: of a domain's training and held-out images each, for a short form; `None`: all.
    """

    def __init__(
        self,
        folder: Path,
        cache: Path,
        attach: Callable[[str, DiTTransformer2DModel, int], nn.Module],
        classifier_steps: int,
        held_out: int,
        max_samples: int | None = None,
    ) -> None:
        self.folder, self.cache, self.attach = folder, cache, attach
        self.classifier_steps, self.held_out, self.max_samples = classifier_steps, held_out, max_samples
        self._judges: dict[tuple[str, int], Judge] = {}
        self._latents: dict[tuple, LatentDataset] = {}

    def stored(self, run: Run) -> dict | None:
        """What the run gave, if it was made."""
        path = self.folder / f"{run.name}.json"
        record = json.loads(path.read_text()) if path.exists() else None
        return record["result"] if record and record["run"] == dataclasses.asdict(run) else None

    def result(self, run: Run) -> dict:
        """What the run gives; it is made if it was not.

        `curve` has the measures at each of `MARKS` and at the last step, `step` among them; those of the last step
        stand beside it too. `loss` is that of the averaged weights at fixed noise; the other measures are those of
        `Judge`. `seconds_per_step` is a median, `seconds` those of all with the measuring. A run whose loss is not
        finite gives {"diverged": why}.
        """
        result = self.stored(run)
        if result is None:
            start = time.perf_counter()
            result = self._make(run)
            result["seconds"] = time.perf_counter() - start
            record = json.dumps({"run": dataclasses.asdict(run), "machine": machine(), "result": result}, indent=1)
            write(self.folder / f"{run.name}.json", lambda path: path.write_text(record + "\n"))
        return result

    def floor(self, run: Run, decoded: bool = False) -> dict:
        """What bundled images would get in the place of the run's samples.

        Args:
            decoded: as the base's VAE encodes and decodes them.
        """
        data = self._images(run.domain, "train", run.resolution)
        count = min(run.num_images, len(data))
        rows = data.labels.sort(stable=True).indices[torch.arange(count) * len(data) // count]  # of all classes
        images = pixels(data, rows.tolist(), run.resolution)
        images = by_vae(base().vae, images) if decoded else images
        return self.judge(run.domain, run.resolution)(images, data.labels[rows])

    def held_out_pictures(self, domain: str, resolution: int, count: int) -> Tensor:
        """(count, 3, side, side), uint8, of the classes that samples have."""
        data = self._images(domain, "test", resolution)
        rows = data.labels.sort(stable=True).indices[torch.arange(count) * len(data) // count]
        return pixels(data, rows.tolist(), resolution)

    def _make(self, run: Run) -> dict:
        accelerator = Accelerator(cpu=True, mixed_precision=run.mixed_precision)
        set_seed(run.seed)
        pipe = base()
        names = self._images(run.domain, "train", run.resolution).class_names
        model = self.attach(run.method, pipe.transformer, len(names))
        parameters = trained(model)
        noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        optimizer = torch.optim.AdamW(parameters.values(), lr=run.learning_rate, weight_decay=0.0)
        schedule = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=20)
        train, validation = self._split(run)
        loader = make_loader(train, run.batch_size, max(run.steps, 1) * run.batch_size, run.seed)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        objective = class_conditional(model, noise_scheduler, snr_gamma=5)
        loop = TrainingLoop(accelerator, model, optimizer, schedule, objective, seed=run.seed, ema_decay=0.9999)
        pipe.transformer = model
        result = {"parameters": sum(p.numel() for p in parameters.values()) if run.steps else 0, "curve": []}
        try:
            for _ in tqdm(loop.steps(loader) if run.steps else [], desc=run.name, total=run.steps, mininterval=5):
                if run.num_images and loop.step in MARKS and loop.step < run.steps:
                    result["curve"].append(self._measures(run, loop, pipe, train))
        except Diverged as error:
            return {"diverged": str(error)}
        if run.num_images:
            result["curve"].append(self._measures(run, loop, pipe, train))
            result |= result["curve"][-1]
        else:
            loop.seed = VALIDATION_SEED
            with loop.averaged_weights():
                result["loss"] = loop.validation_loss(ConcatDataset([validation] * 2), 50)
        accelerator.free_memory()
        if run.steps:
            result["seconds_per_step"] = statistics.median(loop.seconds)
        return result

    def _measures(self, run: Run, loop: TrainingLoop, pipe: DiTPipeline, train: Subset) -> dict:
        """Of the averaged weights as they are now; writes samples. Training goes on as if it had not been."""
        test = self._encoded(run.domain, "test", run.resolution)
        judge = self.judge(run.domain, run.resolution)
        loop.seed = VALIDATION_SEED  # the same noise in every run, whatever its seed
        with loop.averaged_weights():
            pipe.transformer.eval()
            loss = loop.validation_loss(ConcatDataset([test] * 2), 50)
            labels = evaluate_images.spread(test.labels, run.num_images)
            how = (run.guidance_scale, run.num_inference_steps)
            images = sample(pipe, labels, *how, run.name, first_seed=1000 * run.seed)
            pipe.transformer.train()
        loop.seed = run.seed
        write(self.folder / f"{run.name}.webp", lambda path: tiles(images).save(path, format="WEBP", quality=90))
        data = self._images(run.domain, "train", run.resolution, run.images_per_class)
        memorised = judge.memorised(images, pixels(data, train.indices, run.resolution))
        return {"step": loop.step, "loss": loss, **judge(images, torch.tensor(labels)), "memorised": memorised}

    def _images(self, domain: str, split: str, resolution: int, count: int | None = None) -> LabelledImages:
        """The bundled images of a domain; where there are none of this split and size, or too few, they are rendered.

        Args:
            count: of each class to train on.
        """
        path = AVATARS / "data" / domain / f"{split}.parquet"
        if resolution != 64 or not path.exists() or (count or 0) > BUNDLED.get(domain, math.inf):
            count = self.held_out if split == "test" else max(count or 0, BUNDLED[domain])
            path = self.cache / "rendered" / f"{domain}-{split}-{resolution}px-{count}.parquet"
            if not path.exists():
                bundle(path, domain, count, split, self.cache / "rendered", resolution)
        return load_labelled_images(
            train_data_dir=path, max_samples=self.max_samples, seed=0, cache_dir=self.cache / "datasets"
        )

    def _encoded(self, domain: str, split: str, resolution: int, count: int | None = None) -> LatentDataset:
        key = (domain, split, resolution, count)
        if key not in self._latents:
            images = self._images(*key)
            self._latents[key] = encode_latents(
                base().vae, images, resolution, self.cache / "latents", random_flip=False
            )
        return self._latents[key]

    def _split(self, run: Run) -> tuple[Subset, Subset]:
        """The images to train on, and a tenth of all to choose learning rates by, which no run of the domain sees."""
        latents = self._encoded(run.domain, "train", run.resolution, run.images_per_class)
        order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0)).tolist()
        held = len(order) // 10
        of_class: dict[int, list[int]] = {}
        for index in order[held:]:
            of_class.setdefault(int(latents.labels[index]), []).append(index)
        train = [index for own in of_class.values() for index in own[: run.images_per_class]]
        return Subset(latents, train), Subset(latents, order[:held])

    def judge(self, domain: str, resolution: int) -> "Judge":
        """What measures samples of a domain."""
        if (domain, resolution) not in self._judges:
            train, test = (self._images(domain, split, resolution) for split in ("train", "test"))
            path = self.cache / f"classifier-{domain}-{resolution}px-{self.classifier_steps}steps-{len(train)}.pt"
            self._judges[domain, resolution] = Judge(train, test, resolution, path, self.classifier_steps)
        return self._judges[domain, resolution]


class Judge:
    """Measures samples by the features of EfficientNet-Lite0 and by a classifier of the domain's classes.

    `fid`, `kid`, `precision` and `recall` are as in `examples/evaluate_images.py`, by EfficientNet-Lite0's features
    against the held-out images; `fid_classifier` by those of the classifier. `recognised` is the share of samples that
    the classifier takes for their class.

    Args:
        train: what the features' components and the classifier are of.
        test: what samples are compared with.
        resolution: in pixels, of both and of samples.
        path: where the classifier is kept.
        steps: for how long it is trained.
    """

    def __init__(self, train: LabelledImages, test: LabelledImages, resolution: int, path: Path, steps: int) -> None:
        pictures = pixels(train, range(len(train)), resolution)
        real = pixels(test, range(len(test)), resolution)
        self.network = ImageNetFeatures(pictures)
        self.real = self.network(real)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.classifier = Classifier(len(train.class_names))
            if not path.exists():
                self.classifier.fit(pictures, train.labels, steps)
                write(path, lambda partial: torch.save(self.classifier.state_dict(), partial))
        self.classifier.load_state_dict(torch.load(path))
        self.classifier.eval().requires_grad_(False)
        self.classified = self._classified(real)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        features = self.network(images)
        return {
            **evaluate_images.compare(self.real, features),
            "fid_classifier": evaluate_images.compare(self.classified, self._classified(images))["fid"],
            "recognised": self.classifier.accuracy(images, labels),
        }

    def memorised(self, images: Tensor, train: Tensor) -> float:
        """The share of images that have a training image nearer to them than 99 of 100 held-out images have.

        By EfficientNet-Lite0's features. Where nothing is memorised, it is about 0.01.

        Args:
            images, train: (N, 3, side, side) and (M, 3, side, side), uint8.
        """
        known = self.network(train)
        nearest, usual = (torch.cdist(features, known).amin(1) for features in (self.network(images), self.real))
        return (nearest < usual.quantile(0.01)).float().mean().item()

    def _classified(self, images: Tensor) -> Tensor:
        """The classifier's features, (N, 64)."""
        return torch.cat([self.classifier(batch) for batch in images.split(100)])


def pixels(data: LabelledImages, rows: Iterable[int], resolution: int) -> Tensor:
    """The images of these rows, uint8 (N, 3, resolution, resolution)."""
    decoding = data.images.cast_column("image", datasets.Image())
    return torch.stack([to_bytes(to_pixels(decoding[row]["image"], resolution)) for row in rows])


def tiles(images: Tensor) -> PIL.Image.Image:
    """A square of `SHOWN` x `SHOWN` of the images, (N, 3, side, side), uint8, taken at equal distances."""
    rows = torch.arange(SHOWN**2) * len(images) // SHOWN**2
    pictures = [PIL.Image.fromarray(images[row].permute(1, 2, 0).numpy()) for row in rows]
    return make_image_grid(pictures, SHOWN, SHOWN)


def base() -> DiTPipeline:
    """The bundled base in float32, which samples in few steps."""
    pipe = DiTPipeline.from_pretrained(AVATARS / "base", dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.requires_grad_(False)
    return pipe


def to_bytes(pixels: Tensor) -> Tensor:
    """uint8 of pixels in [-1, 1]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
