"""One adaptation of the bundled base to a domain: trained, measured, and kept as a JSON file.

Every method is trained by the same loop (`difffit_peft.training.loop`) on the same images in the same order, with the
same noise and timesteps: AdamW, a cosine schedule with a short warm-up, min-SNR weights of 5 as the base was trained
with, and averaged weights. All is a function of the `Run`: on one machine, with the same number of threads, the same
run gives the same figures to the last digit.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from difffit_peft.files import write
from difffit_peft.training.images import LabelledImages, load_labelled_images, to_pixels
from difffit_peft.training.latents import LatentDataset, encode_latents
from difffit_peft.training.loop import Diverged, TrainingLoop
from difffit_peft.training.objective import class_conditional
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from methods import trained
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Subset
from tqdm import tqdm

EXAMPLES = Path(__file__).resolve().parents[1]
AVATARS = EXAMPLES / "avatars"
sys.path[:0] = [str(EXAMPLES), str(AVATARS)]
from judge import Classifier, ImageNetFeatures, sample  # noqa: E402
from render import BUNDLED, bundle  # noqa: E402

import evaluate_images  # noqa: E402

COLUMNS = 10  # of a grid of samples
CURVE = (100, 300, 1000, 3000, 10000)  # steps
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
        num_images: how many to sample, in classes as frequent as among the held-out images; 0: the loss alone.
        images_per_class: how many of each class to train on; `None`: all that there are.
        curve: measure at the steps of `CURVE` too. The learning rate is constant then, after its warm-up.
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
    curve: bool = False

    @property
    def name(self) -> str:
        method = self.method.replace(" ", "-").replace("/", "-")
        size = f"{self.resolution}px-{self.steps}steps-{self.num_images}images"
        size += f"-{self.images_per_class}per-class" * (self.images_per_class is not None) + "-curve" * self.curve
        return f"{self.domain}-{method}-lr{self.learning_rate:.2g}-seed{self.seed}-{size}"


class Bench:
    """Makes runs, and keeps what they gave: what was done once is not done again.

    Args:
        folder: for runs, samples, encoded images and what judges them.
        attach: puts a method, by its name, on a transformer of the base, for a number of new classes, and returns the
            model to train.
        classifier_steps: for how long the classifier of a domain's classes is trained.
        held_out: pictures of each class to measure by, where they are rendered.
        max_samples: of a domain's training and held-out images each, for a short form; `None`: all.
    """

    def __init__(
        self,
        folder: Path,
        attach: Callable[[str, DiTTransformer2DModel, int], nn.Module],
        classifier_steps: int,
        held_out: int,
        max_samples: int | None = None,
    ) -> None:
        self.folder, self.attach = folder, attach
        self.classifier_steps, self.held_out, self.max_samples = classifier_steps, held_out, max_samples
        self._judges: dict[tuple[str, int], Judge] = {}
        self._datasets: dict[tuple[str, int], tuple[Subset, Subset, LatentDataset]] = {}

    def stored(self, run: Run) -> dict | None:
        """What the run gave, if it was made."""
        path = self.folder / "runs" / f"{run.name}.json"
        record = json.loads(path.read_text()) if path.exists() else None
        return record["result"] if record and record["run"] == dataclasses.asdict(run) else None

    def result(self, run: Run) -> dict:
        """What the run gives; it is made if it was not.

        Losses are those of the averaged weights at fixed noise; the other measures are those of `Judge`. Samples are
        kept beside, as one PNG of ten columns. `cpu_seconds_per_step` counts the work of all threads, which a busy
        machine changes less than it does `seconds_per_step`, the median. Of a curve there is `curve`, the measures by
        step. A run whose loss is not finite gives {"diverged": why}.
        """
        result = self.stored(run)
        if result is None:
            result = self._make(run)
            record = json.dumps({"run": dataclasses.asdict(run), "result": result}, indent=1)
            write(self.folder / "runs" / f"{run.name}.json", lambda path: path.write_text(record + "\n"))
        return result

    def floor(self, run: Run) -> dict:
        """What training images would get in the place of the run's samples."""
        data = self._images(run.domain, "train", run.resolution)
        rows = torch.arange(len(data))[:: max(1, len(data) // run.num_images)][: run.num_images]
        judge = self.judge(run.domain, run.resolution)
        return judge(pixels(data, rows.tolist(), run.resolution), data.labels[rows])

    def held_out_pictures(self, domain: str, resolution: int, count: int) -> Tensor:
        """(count, side, side, 3), uint8, of the classes that samples have."""
        data = self._images(domain, "test", resolution)
        rows = data.labels.sort(stable=True).indices[torch.arange(count) * len(data) // count]
        return pixels(data, rows.tolist(), resolution).permute(0, 2, 3, 1)

    def _make(self, run: Run) -> dict:
        accelerator = Accelerator(cpu=True, mixed_precision=run.mixed_precision)
        set_seed(run.seed)
        pipe = base()
        names = self._images(run.domain, "train", run.resolution).class_names
        model = self.attach(run.method, pipe.transformer, len(names))
        parameters = trained(model)
        noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        optimizer = torch.optim.AdamW(parameters.values(), lr=run.learning_rate, weight_decay=0.0)
        schedule = get_scheduler(
            "constant_with_warmup" if run.curve else "cosine",
            optimizer,
            num_warmup_steps=min(run.steps // 20, CURVE[0] // 5),
            num_training_steps=run.steps,
        )
        train = self._training_images(run)
        count = run.steps * run.batch_size
        order = RandomSampler(train, num_samples=max(count, 1), generator=torch.Generator().manual_seed(run.seed))
        loader = DataLoader(train, run.batch_size, sampler=order)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        objective = class_conditional(model, noise_scheduler, snr_gamma=5)
        loop = TrainingLoop(accelerator, model, optimizer, schedule, objective, seed=run.seed, ema_decay=0.9999)
        pipe.transformer = model
        curve = {}
        cpu, start = 0.0, time.process_time()
        try:
            for _ in tqdm(loop.steps(loader) if run.steps else [], desc=run.name, total=run.steps, mininterval=5):
                cpu += time.process_time() - start
                if run.curve and loop.step in CURVE and loop.step < run.steps:
                    curve[loop.step] = self._measures(run, loop, pipe)
                start = time.process_time()
        except Diverged as error:
            return {"diverged": str(error)}
        result = {
            "parameters": sum(p.numel() for p in parameters.values()) if run.steps else 0,
            "seconds_per_step": statistics.median(loop.seconds) if run.steps else None,
            "cpu_seconds_per_step": cpu / run.steps if run.steps else None,
            "training_loss": loop.average,
            **self._measures(run, loop, pipe),
        }
        accelerator.free_memory()
        return result | ({"curve": curve} if run.curve else {})

    def _measures(self, run: Run, loop: TrainingLoop, pipe: DiTPipeline) -> dict:
        """Of the averaged weights as they are now; writes the samples. Training goes on as if it had not been."""
        _, validation, test = self._dataset(run.domain, run.resolution)
        loop.seed = VALIDATION_SEED  # the same noise in every run, whatever its seed
        with loop.averaged_weights():
            pipe.transformer.eval()
            result = {"loss": loop.validation_loss(ConcatDataset([test if run.num_images else validation] * 2), 50)}
            if run.num_images:
                labels = evaluate_images.spread(test.labels, run.num_images)
                how = (run.guidance_scale, run.num_inference_steps)
                images = sample(pipe, labels, *how, run.name, first_seed=1000 * run.seed)
                result |= self.judge(run.domain, run.resolution)(images, torch.tensor(labels))
                pictures = DiTPipeline.numpy_to_pil(images.permute(0, 2, 3, 1).numpy() / 255)
                grid = make_image_grid(pictures, len(pictures) // COLUMNS, COLUMNS)
                write(self.folder / "samples" / f"{run.name}.png", lambda path: grid.save(path, format="PNG"))
            pipe.transformer.train()
        loop.seed = run.seed
        return result

    def _training_images(self, run: Run) -> Subset:
        """Those of a run: the first so many of each class, or all; never one that learning rates are chosen by."""
        train, _, _ = self._dataset(run.domain, run.resolution)
        if run.images_per_class is None:
            return train
        left = Counter[int]()
        labels = train.dataset.labels
        chosen = []
        for index in train.indices:
            left[int(labels[index])] += 1
            if left[int(labels[index])] <= run.images_per_class:
                chosen.append(index)
        return Subset(train.dataset, chosen)

    def _images(self, domain: str, split: str, resolution: int) -> LabelledImages:
        """The bundled images of a domain; where there are none of this split and size, they are rendered."""
        path = AVATARS / "data" / domain / f"{split}.parquet"
        if resolution != 64 or not path.exists():
            count = self.held_out if split == "test" else BUNDLED[domain]
            path = self.folder / "rendered" / f"{domain}-{split}-{resolution}px-{count}.parquet"
            if not path.exists():
                bundle(path, domain, count, split, self.folder / "rendered", resolution)
        return load_labelled_images(
            train_data_dir=path, max_samples=self.max_samples, seed=0, cache_dir=self.folder / "datasets"
        )

    def _dataset(self, domain: str, resolution: int) -> tuple[Subset, Subset, LatentDataset]:
        """The images to train on, a tenth of them to choose learning rates by, and those to measure by."""
        if (domain, resolution) not in self._datasets:
            images, test = (
                encode_latents(
                    base().vae,
                    self._images(domain, split, resolution),
                    resolution,
                    self.folder / "latents",
                    random_flip=False,
                )
                for split in ("train", "test")
            )
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
            held = len(order) // 10
            self._datasets[domain, resolution] = Subset(images, order[held:]), Subset(images, order[:held]), test
        return self._datasets[domain, resolution]

    def judge(self, domain: str, resolution: int) -> "Judge":
        """What measures samples of a domain."""
        if (domain, resolution) not in self._judges:
            train, test = (self._images(domain, split, resolution) for split in ("train", "test"))
            path = self.folder / f"classifier-{domain}-{resolution}px-{self.classifier_steps}steps-{len(train)}.pt"
            self._judges[domain, resolution] = Judge(train, test, resolution, path, self.classifier_steps)
        return self._judges[domain, resolution]


class Judge:
    """Measures samples by the features of EfficientNet-Lite0 and by a classifier of the domain's classes.

    `fid`, `kid`, `precision` and `recall` are as in `examples/evaluate_images.py`, by EfficientNet-Lite0's features
    against the held-out images; `fid_classifier` by those of the classifier. `recognised` is the share of samples that
    the classifier takes for their class. `memorised` is the share that has a training image nearer to it, by
    EfficientNet-Lite0's features, than 99 of 100 held-out images have: where nothing is memorised, it is about 0.01.

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
        self.train, self.real = self.network(pictures), self.network(real)
        self.near = self._nearest(self.real).quantile(0.01)
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
            "memorised": (self._nearest(features) < self.near).float().mean().item(),
        }

    def _nearest(self, features: Tensor) -> Tensor:
        """The distance of each to the nearest training image, (N,)."""
        return torch.cdist(features, self.train).amin(1)

    def _classified(self, images: Tensor) -> Tensor:
        """The classifier's features, (N, 64)."""
        return torch.cat([self.classifier(batch) for batch in images.split(100)])


def pixels(data: LabelledImages, rows: Iterable[int], resolution: int) -> Tensor:
    """The images of these rows, uint8 (N, 3, resolution, resolution)."""
    decoding = data.images.cast_column("image", datasets.Image())
    return torch.stack([to_bytes(to_pixels(decoding[row]["image"], resolution)) for row in rows])


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
