"""Which guidance is best, and what it costs: by the class, by the base, or trained in, on three domains.

    python examples/benchmarks/guidance.py [--short]

For each domain of `examples/avatars` an adapter is trained for 700 steps, else as the demo trains it, and another with
guidance by the base trained in (`--guidance_loss_scale 1.5`), which samples in one forward a step in the place of two.
Samples at several guidance scales are compared with held-out pictures. Adapters and measures are kept in `--work_dir`:
what is there is not done again.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import adaptation
import torch
from difffit_peft import DiffFitDiTPipeline
from difffit_peft.training.scripts import run_script, user_path
from difffit_peft.writing import write
from diffusers import DPMSolverMultistepScheduler
from matplotlib.figure import Figure
from report import ROOT, output_dir, parser, publish, table
from torch import Tensor

sys.path.insert(0, str(adaptation.AVATARS))
from demo import LEARNING_RATE, SHOWN, draw, train_adapter  # noqa: E402
from judge import sample  # noqa: E402

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
STEPS, NUM_INFERENCE_STEPS = 700, 15
PLAIN, TRAINED_IN = "plain", "trained in"

Measures = dict[str, dict[float, dict[str, float]]]


def pipeline(domains: Sequence[str], folder: Path, steps: int, precision: str) -> DiffFitDiTPipeline:
    """The base with the adapters "near, plain", "near, trained in" and so on, which are trained if they were not.

    Args:
        steps: of the training of each adapter.
        precision: of that training, `--mixed_precision` of `examples/train_difffit.py`. Samples are made in float32.
    """
    base = adaptation.AVATARS / "base"
    pipe = DiffFitDiTPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    for domain in domains:
        for name, more in ((PLAIN, ()), (TRAINED_IN, ("--guidance_loss_scale", "1.5"))):
            adapter = folder / f"{domain}-{name.replace(' ', '-')}"
            if not (adapter / "adapter_model.safetensors").exists():
                more = ("--mixed_precision", precision, *more)
                train_adapter(base, domain, adapter, folder / "cache", steps, LEARNING_RATE, *more)
            pipe.load_difffit_weights(adapter, f"{domain}, {name}")
    return pipe


def measures(
    pipe: DiffFitDiTPipeline, domain: str, judge: adaptation.Judge, count: int, scales: tuple[float, ...]
) -> Measures:
    """For each kind of guidance and each scale: distances, recognised samples, seconds an image, of `count` images."""
    pipe.set_adapters(f"{domain}, {PLAIN}")
    labels = torch.arange(count) * len(pipe.id2label) // count

    def measured(name: str, guidance: str, scale: float) -> dict[str, float]:
        pipe.set_adapters(f"{domain}, {name}")
        start = time.perf_counter()
        what = f"{domain}, {name}, guidance by {guidance}, {scale:g}"
        images = sample(pipe, labels.tolist(), scale, NUM_INFERENCE_STEPS, what, guidance=guidance)
        return {"seconds": (time.perf_counter() - start) / count, **judge(images, labels)}

    found = {kind: {scale: measured(PLAIN, kind, scale) for scale in scales} for kind in ("class", "domain")}
    return found | {TRAINED_IN: {1.0: measured(TRAINED_IN, "class", 1.0)}}


def pictures(pipe: DiffFitDiTPipeline, domains: Sequence[str], folder: Path) -> None:
    """Samples of the first domain by each kind of guidance, and of all domains in one batch, an adapter per image.

    Those of a column are from one seed.
    """
    domain = domains[0]
    pipe.set_adapters(f"{domain}, {PLAIN}")
    names = [pipe.id2label[label] for label in sorted(pipe.id2label)]
    labels = [label for label in range(len(names)) for _ in range(SHOWN)]

    def row(name: str, guidance: str, scale: float) -> Tensor:
        pipe.set_adapters(f"{domain}, {name}")
        return sample(pipe, labels, scale, NUM_INFERENCE_STEPS, "Picture", guidance=guidance)

    kinds = {
        "none": row(PLAIN, "class", 1.0),
        "class, 2": row(PLAIN, "class", 2.0),
        "domain, 2": row(PLAIN, "domain", 2.0),
        TRAINED_IN: row(TRAINED_IN, "class", 1.0),
    }
    draw(kinds, names, folder / "guidance_samples.png")
    names, labels, adapters = [], [], []
    for domain in domains:
        pipe.set_adapters(f"{domain}, {PLAIN}")
        names += [f"{domain}: {pipe.id2label[label]}" for label in range(2)]
        labels += [label for label in range(2) for _ in range(SHOWN)]
        adapters += [f"{domain}, {PLAIN}"] * 2 * SHOWN
    images = sample(pipe, labels, 2.0, NUM_INFERENCE_STEPS, "One batch", guidance="domain", adapter_names=adapters)
    draw({"one batch": images}, names, folder / "one_batch.png")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--work_dir", type=user_path, default=ROOT / "runs/guidance", help="where adapters are kept")
    arguments.add_argument(
        "--mixed_precision", choices=["no", "bf16"], default="no", help="of training: bf16 where it is faster"
    )
    args = arguments.parse_args()
    torch.set_num_threads(1)  # so that other work on the machine changes the times little
    domains, steps, count = (("near",), 20, 24) if args.short else (("inside", "near", "middle"), STEPS, 200)
    folder = args.work_dir / ("short" if args.short else "long")
    bench = adaptation.Bench(folder, folder, lambda *_: None, classifier_steps=60 if args.short else 600, held_out=100)
    scales = (1.0, 1.5) if args.short else SCALES
    pipe = pipeline(domains, folder, steps, args.mixed_precision)
    pictures(pipe, domains, output_dir(args))
    results: dict[str, Measures] = {}
    for domain in domains:
        path = folder / f"{domain}.json"
        if not path.exists():
            text = json.dumps(measures(pipe, domain, bench.judge(domain, 64), count, scales))
            write(path, lambda partial, text=text: partial.write_text(text))
        kept = json.loads(path.read_text())
        results[domain] = {kind: {float(scale): m for scale, m in of.items()} for kind, of in kept.items()}

    sections = []
    figure = Figure(figsize=(4 * len(results), 3.2), layout="constrained")
    for axis, (domain, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        rows = [
            (name, f"{scale:g}", f"{m['fid']:.1f}", f"{m['recognised']:.0%}", f"{m['seconds']:.2f}")
            for name, of_scale in found.items()
            for scale, m in of_scale.items()
        ]
        columns = ("guidance", "scale", "Fréchet distance", "recognised", "s an image")
        sections.append(f"## {domain}\n\n{table(columns, rows)}")
        for name, of_scale in found.items():
            distances = [m["fid"] for m in of_scale.values()]
            axis.plot([*of_scale], distances, "*" if name == TRAINED_IN else ".-", label=name)
        axis.set(title=domain, xlabel="guidance scale", ylabel="Fréchet distance", ylim=(0, None))
        axis.legend()
    precision = "bf16" if args.mixed_precision == "bf16" else "fp32"
    about = (
        f"Adapters of the bundled base after {steps} steps of 32 in {precision}. {count} samples of "
        f"{NUM_INFERENCE_STEPS} steps, made in fp32 in one thread, against held-out pictures, by 64 components of "
        "EfficientNet-Lite0's features. At scale 1 there is no guidance, and one forward a step. Guidance trained in "
        "has one forward a step too."
    )
    shown = (
        f"Guidance of *{domains[0]}*, one seed a column: by the class at scale 2, by the base at scale 2, "
        "trained in.\n\n![By each kind of guidance](guidance_samples.png)\n\nOne batch, an adapter per image, guided "
        "by the base:\n\n![One batch](one_batch.png)"
    )
    publish(output_dir(args), "guidance", "Guidance", "\n\n".join([about, shown, *sections]), results, figure)


if __name__ == "__main__":
    run_script(main)
