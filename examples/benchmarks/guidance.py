"""Which guidance is best, and what it costs: by the class, by the base, or trained in, on three domains.

    python examples/benchmarks/guidance.py [--short]

For each domain of `examples/avatars` an adapter is trained as the demo trains it, and another with guidance by the base
trained in (`--guidance_loss_scale 1.5`), which samples in one forward a step in the place of two. Samples at several
guidance scales are compared with held-out pictures. Adapters are kept in `--work_dir`, and measured again from there.
"""

import sys
import time

import adaptation
import torch
from difffit_peft import DiffFitDiTPipeline
from difffit_peft.training.scripts import run_script, user_path
from diffusers import DPMSolverMultistepScheduler
from matplotlib.figure import Figure
from report import ROOT, output_dir, parser, publish, table

sys.path.insert(0, str(adaptation.AVATARS))
from demo import LEARNING_RATE, STEPS, fastest_precision, train_adapter  # noqa: E402
from judge import sample  # noqa: E402

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
TRAINED_IN = "trained in"

Measures = dict[str, dict[float, dict[str, float]]]


def measures(domain: str, bench: adaptation.Bench, steps: int, count: int, scales: tuple[float, ...]) -> Measures:
    """For each kind of guidance and each scale: distances, recognised samples, seconds an image."""
    base, precision = adaptation.AVATARS / "base", fastest_precision()
    pipe = DiffFitDiTPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    for name, more in (("plain", ()), ("guided", ("--guidance_loss_scale", "1.5"))):
        folder = bench.folder / f"{domain}-{name}"
        if not (folder / "adapter_model.safetensors").exists():
            train_adapter(base, domain, folder, bench.folder / "cache", precision, steps, LEARNING_RATE, *more)
        pipe.load_difffit_weights(folder, name)
    judge = bench.judge(domain, 64)
    labels = torch.arange(count) * len(pipe.id2label) // count

    def measured(adapter: str, guidance: str, scale: float) -> dict[str, float]:
        pipe.set_adapters(adapter)
        start = time.perf_counter()
        what = f"{domain}, {adapter}, guidance by {guidance}, {scale:g}"
        images = sample(pipe, labels.tolist(), scale, 15, what, guidance=guidance)
        return {"seconds": (time.perf_counter() - start) / count, **judge(images, labels)}

    found = {kind: {scale: measured("plain", kind, scale) for scale in scales} for kind in ("class", "domain")}
    return found | {TRAINED_IN: {1.0: measured("guided", "class", 1.0)}}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--work_dir", type=user_path, default=ROOT / "runs/guidance", help="where adapters are kept")
    args = arguments.parse_args()
    domains, steps, count = (("near",), 20, 24) if args.short else (("inside", "near", "middle"), STEPS, 200)
    folder = args.work_dir / ("short" if args.short else "long")
    bench = adaptation.Bench(folder, lambda *_: None, classifier_steps=60 if args.short else 600, held_out=100)
    results = {d: measures(d, bench, steps, count, (1.0, 1.5) if args.short else SCALES) for d in domains}

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
    about = (
        f"Adapters of the bundled base after {steps} steps of 32. {count} samples of 15 steps against held-out "
        "pictures, by 64 components of EfficientNet-Lite0's features. At scale 1 there is no guidance, and one forward "
        "a step. Guidance trained in has one forward a step too."
    )
    publish(output_dir(args), "guidance", "Guidance", "\n\n".join([about, *sections]), results, figure)


if __name__ == "__main__":
    run_script(main)
