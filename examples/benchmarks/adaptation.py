"""One adaptation of the bundled base to a domain of emoji: trained, measured, and kept as a JSON file.

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
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from difffit_peft.files import write
from difffit_peft.training.images import load_labelled_images
from difffit_peft.training.latents import LatentDataset, encode_latents
from difffit_peft.training.loop import Diverged, TrainingLoop
from difffit_peft.training.objective import class_conditional
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from diffusers.optimization import get_scheduler
from diffusers.utils import make_image_grid
from features import FeatureNetwork
from methods import trained
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Subset
from tqdm import tqdm

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))
import evaluate_images  # noqa: E402

EMOJI = EXAMPLES / "emoji"
STYLES = ("noto", "twemoji", "openmoji")
NUM_CLASSES = 98
COLUMNS = 10  # of a grid of samples
NUM_VALIDATION = 106  # images of the training split that no run trains on: learning rates are chosen by their loss
VALIDATION_SEED = 0


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides what comes out.

    Attributes:
        domain: "twemoji" or "openmoji".
        method: what is trained: a name that the benchmark's `attach` knows.
        learning_rate: the highest of the schedule.
        seed: of the initialisation, the order of images, all draws, and the samples.
        steps: optimiser steps; 0 measures the base as it is.
        num_images: how many to sample, in classes as frequent as among the held-out images; 0: the loss alone.
    """

    domain: str
    method: str
    learning_rate: float
    seed: int
    steps: int
    num_images: int
    resolution: int = 64
    batch_size: int = 16
    guidance_scale: float = 1.5  # as the paper samples; the base's own Noto emoji come out best at 1.5 to 2
    num_inference_steps: int = 10
    mixed_precision: str = "no"

    @property
    def name(self) -> str:
        method = self.method.replace(" ", "-").replace("/", "-")
        size = f"{self.resolution}px-{self.steps}steps-{self.num_images}images"
        return f"{self.domain}-{method}-lr{self.learning_rate:.2g}-seed{self.seed}-{size}"


class Bench:
    """Makes runs, and keeps what they gave: what was done once is not done again.

    Args:
        folder: for runs, samples, encoded images and the feature network.
        attach: puts a method, by its name, on a transformer of the base, and returns the model to train.
        feature_steps: for how long the feature network is trained.
        num_feature_images: images of each style that it is trained on.
        max_samples: of the domains' training and held-out images each, for a short form; `None`: all.
    """

    def __init__(
        self,
        folder: Path,
        attach: Callable[[str, DiTTransformer2DModel], nn.Module],
        feature_steps: int,
        num_feature_images: int,
        max_samples: int | None = None,
    ) -> None:
        self.folder, self.attach = folder, attach
        self.feature_steps, self.num_feature_images, self.max_samples = feature_steps, num_feature_images, max_samples
        self._networks: dict[int, FeatureNetwork] = {}
        self._reals: dict[tuple[str, int], Tensor] = {}
        self._datasets: dict[tuple[str, int], tuple[Subset, Subset, LatentDataset]] = {}

    def stored(self, run: Run) -> dict | None:
        """What the run gave, if it was made."""
        path = self.folder / "runs" / f"{run.name}.json"
        record = json.loads(path.read_text()) if path.exists() else None
        return record["result"] if record and record["run"] == dataclasses.asdict(run) else None

    def result(self, run: Run) -> dict:
        """What the run gives; it is made if it was not. Samples are kept beside, as one PNG of ten columns.

        Losses are those of the averaged weights at fixed noise; `fid`, `kid`, `precision` and `recall` as in
        `examples/evaluate_images.py`, against the held-out images after the VAE. `cpu_seconds_per_step` counts the work
        of all threads, which a busy machine changes less than it does `seconds_per_step`, the median. A run whose loss
        is not finite gives {"diverged": why}.
        """
        result = self.stored(run)
        if result is None:
            result = self._make(run)
            record = json.dumps({"run": dataclasses.asdict(run), "result": result}, indent=1)
            write(self.folder / "runs" / f"{run.name}.json", lambda path: path.write_text(record + "\n"))
        return result

    def prepare(self, resolution: int = 64) -> None:
        """Makes what runs share, so that processes that start together do not make it twice."""
        self._network(resolution)

    def floor(self, run: Run) -> dict:
        """What training images would get in the place of the run's samples."""
        train, _, _ = self._dataset(run.domain, run.resolution)
        rows = train.indices[:: len(train) // run.num_images][: run.num_images]
        images = decoded(base(), train.dataset.mean[0, rows])
        return evaluate_images.compare(self._real(run), self._network(run.resolution).features(images))

    def _make(self, run: Run) -> dict:
        train, validation, test = self._dataset(run.domain, run.resolution)
        accelerator = Accelerator(cpu=True, mixed_precision=run.mixed_precision)
        set_seed(run.seed)
        pipe = base()
        model = self.attach(run.method, pipe.transformer)
        parameters = trained(model)
        noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        optimizer = torch.optim.AdamW(parameters.values(), lr=run.learning_rate, weight_decay=0.0)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=run.steps // 20, num_training_steps=run.steps)
        count = run.steps * run.batch_size
        order = RandomSampler(train, num_samples=max(count, 1), generator=torch.Generator().manual_seed(run.seed))
        loader = DataLoader(train, run.batch_size, sampler=order)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        objective = class_conditional(model, noise_scheduler, snr_gamma=5)
        loop = TrainingLoop(accelerator, model, optimizer, schedule, objective, seed=run.seed, ema_decay=0.9999)
        cpu = time.process_time()
        if run.steps:
            try:
                for _ in tqdm(loop.steps(loader), desc=run.name, total=run.steps, mininterval=5):
                    pass
            except Diverged as error:
                return {"diverged": str(error)}
        cpu = time.process_time() - cpu

        result = {
            "parameters": sum(p.numel() for p in parameters.values()) if run.steps else 0,
            "seconds_per_step": statistics.median(loop.seconds) if run.steps else None,
            "cpu_seconds_per_step": cpu / run.steps if run.steps else None,
            "training_loss": loop.average,
        }
        loop.seed = VALIDATION_SEED  # the same noise in every run, whatever its seed
        with loop.averaged_weights():
            if run.num_images:
                result["loss"] = loop.validation_loss(ConcatDataset([test] * 2), 50)
                pipe.transformer = model.eval()
                images = sample(pipe, evaluate_images.spread(test.labels, run.num_images), run)
                result |= evaluate_images.compare(self._real(run), self._network(run.resolution).features(images))
                pictures = DiTPipeline.numpy_to_pil(images.permute(0, 2, 3, 1).numpy() / 255)
                grid = make_image_grid(pictures, len(pictures) // COLUMNS, COLUMNS)
                write(self.folder / "samples" / f"{run.name}.png", lambda path: grid.save(path, format="PNG"))
            else:
                result["loss"] = loop.validation_loss(ConcatDataset([validation] * 2), 53)
        accelerator.free_memory()
        return result

    def _encoded(self, file: str, resolution: int, max_samples: int | None) -> LatentDataset:
        """Latents of a parquet file of `examples/emoji/data`."""
        data = load_labelled_images(
            train_data_dir=EMOJI / "data" / f"{file}.parquet",
            max_samples=max_samples,
            seed=0,
            cache_dir=self.folder / "datasets",
        )
        return encode_latents(base().vae, data, resolution, self.folder / "latents", random_flip=False)

    def _dataset(self, domain: str, resolution: int) -> tuple[Subset, Subset, LatentDataset]:
        """The images to train on, those to choose learning rates by, and those to measure by."""
        if (domain, resolution) not in self._datasets:
            images = self._encoded(f"{domain}/train", resolution, self.max_samples)
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
            train, validation = Subset(images, order[NUM_VALIDATION:]), Subset(images, order[:NUM_VALIDATION])
            self._datasets[domain, resolution] = (
                train,
                validation,
                self._encoded(f"{domain}/test", resolution, self.max_samples),
            )
        return self._datasets[domain, resolution]

    def _real(self, run: Run) -> Tensor:
        """Features of the held-out images."""
        key = run.domain, run.resolution
        if key not in self._reals:
            images = decoded(base(), self._dataset(*key)[2].mean[0])
            self._reals[key] = self._network(run.resolution).features(images)
        return self._reals[key]

    def _network(self, resolution: int) -> FeatureNetwork:
        if resolution not in self._networks:
            network = FeatureNetwork(NUM_CLASSES, len(STYLES))
            path = self.folder / f"features-{resolution}px-{self.feature_steps}steps-{self.num_feature_images}.pt"
            if not path.exists():
                set_seed(0)
                latents = [self._encoded(f"{style}/train", resolution, self.num_feature_images) for style in STYLES]
                images = torch.cat([decoded(base(), encoded.mean[0]) for encoded in latents])
                classes = torch.cat([encoded.labels for encoded in latents])
                styles = torch.cat([torch.full_like(encoded.labels, i) for i, encoded in enumerate(latents)])
                network = FeatureNetwork(NUM_CLASSES, len(STYLES)).fit(images, classes, styles, self.feature_steps)
                write(path, lambda partial: torch.save(network.state_dict(), partial))
            network.load_state_dict(torch.load(path))
            self._networks[resolution] = network.eval().requires_grad_(False)
        return self._networks[resolution]


def base() -> DiTPipeline:
    """The bundled base in float32, which samples in few steps."""
    pipe = DiTPipeline.from_pretrained(EMOJI / "base", dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.requires_grad_(False)
    return pipe


def to_bytes(pixels: Tensor) -> Tensor:
    """uint8 of pixels in [-1, 1]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()


def decoded(pipe: DiTPipeline, latents: Tensor) -> Tensor:
    """uint8 images of the latents of a `LatentDataset`."""
    batches = tqdm((latents.float() / pipe.vae.config.scaling_factor).split(50), desc="Decoding")
    return torch.cat([to_bytes(pipe.vae.decode(batch).sample) for batch in batches])


def sample(pipe: DiTPipeline, labels: list[int], run: Run) -> Tensor:
    """An image for each label, uint8 (N, 3, resolution, resolution), each with a seed of its own."""
    batches = []
    for start in tqdm(range(0, len(labels), 50), desc="Sampling"):
        batch = labels[start : start + 50]
        images = pipe(
            batch,
            guidance_scale=run.guidance_scale,
            num_inference_steps=run.num_inference_steps,
            generator=[torch.Generator().manual_seed(1000 * run.seed + start + i) for i in range(len(batch))],
            output_type="pt",
        ).images
        batches.append(to_bytes(images * 2 - 1))
    return torch.cat(batches)
