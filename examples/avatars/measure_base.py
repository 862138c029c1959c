"""How good the bundled base is, and how it became so: distances and recognised samples over the steps of its training.

    python examples/avatars/measure_base.py                                   # the bundled base
    python examples/avatars/measure_base.py --steps runs/avatars/base/step-*  # the pipelines that train_base.py left

Samples of every class are compared with as many held-out pictures of it. Their Fréchet distance stands beside that of
other real pictures, by the features of EfficientNet-Lite0 and by those of a classifier of the base's styles and the
domains', which never saw a held-out picture. How well the VAE keeps pictures is told too, of the base's styles and of
those that neither it nor the DiT has seen. Writes `base.md`, `base.json` and `base.png` to `--output_dir`.
"""

import sys
from pathlib import Path

import torch
from difffit_peft.training.scripts import finite_float, positive_int, run_script, user_path
from diffusers import AutoencoderKL, DiTPipeline, DPMSolverMultistepScheduler
from judge import Classifier, ImageNetFeatures, frechet_distance, real, sample
from matplotlib.figure import Figure
from render import BASE, CACHE, DOMAINS
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))
from report import output_dir, parser, publish, table, target  # noqa: E402

NETWORKS = ("EfficientNet-Lite0", "classifier")


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Mean over pictures, (N, 3, 64, 64), uint8, of the decibels at which the VAE gives them back."""
    decibels = []
    for batch in tqdm(pictures.split(20), desc="VAE", leave=False):
        x = batch.float() / 127.5 - 1
        decoded = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        decibels.append(-10 * torch.log10((decoded - x).square().mean((1, 2, 3)) / 4))
    return torch.cat(decibels).mean().item()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--steps", type=user_path, nargs="+", default=[HERE / "base"], help="pipelines, in their order"
    )
    arguments.add_argument("--cache_dir", type=user_path, default=CACHE, help="rendered pictures")
    arguments.add_argument("--per_class", type=positive_int, default=10, help="samples of each class")
    arguments.add_argument("--guidance_scale", type=finite_float, default=2.0)
    arguments.add_argument("--num_inference_steps", type=positive_int, default=15)
    arguments.add_argument("--classifier_steps", type=positive_int, default=1500)
    args = arguments.parse_args()
    args.per_class = 4 if args.short else args.per_class
    if len(args.steps) > 1 and not all(folder.name.rpartition("-")[2].isdecimal() for folder in args.steps):
        raise ValueError(
            f"--steps: the folders {[f.name for f in args.steps]} must end in a step, as step-001000 does."
        )

    styles = [(style, {}) for style in BASE]
    domains = [new for name in ("near", "middle") for new in DOMAINS[name].values()]
    held_out, other = (real(styles, args.per_class, split, args.cache_dir) for split in ("test", "other"))
    train = real(styles + domains, 200, "train", args.cache_dir)
    labels = torch.arange(len(BASE)).repeat_interleave(args.per_class)
    torch.manual_seed(0)
    classifier = Classifier(len(styles + domains))
    classifier.fit(train, torch.arange(len(styles + domains)).repeat_interleave(200), args.classifier_steps)
    networks = dict(zip(NETWORKS, (ImageNetFeatures(train[: 200 * len(BASE) : 4]), classifier), strict=True))

    def measures(images: torch.Tensor) -> dict[str, float]:
        distances = {name: frechet_distance(network, held_out, images) for name, network in networks.items()}
        return {**distances, "recognised": classifier.accuracy(images, labels)}

    results = {"real": measures(other)}
    for folder in tqdm(args.steps, desc="Pipelines"):
        pipe = DiTPipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        results[folder.name] = measures(
            sample(pipe, labels.tolist(), args.guidance_scale, args.num_inference_steps, folder.name)
        )
        print(folder.name, {name: round(value, 3) for name, value in results[folder.name].items()}, flush=True)
    print("real", {name: round(value, 3) for name, value in results["real"].items()})
    unseen = real(domains, 10, "test", args.cache_dir)
    decibels = {"base": psnr(pipe.vae, held_out[::3]), "unseen": psnr(pipe.vae, unseen)}
    print("VAE, dB:", {name: round(value, 1) for name, value in decibels.items()})
    about = {"vae_psnr": decibels, "per_class": args.per_class, "guidance_scale": args.guidance_scale}
    report(output_dir(args), about, results)


def report(folder: Path, about: dict, results: dict[str, dict[str, float]]) -> None:
    """Publishes what was measured: `results[pipeline]` and `results["real"]` by measure."""
    pipelines = {name: measured for name, measured in results.items() if name != "real"}
    real_ones, *_, best = results.values()  # the first and the last
    rows = [(name, *(f"{value:.3g}" for value in measured.values())) for name, measured in pipelines.items()]
    columns = ("pipeline", *(f"Fréchet distance, {name}" for name in NETWORKS), "recognised")
    markdown = (
        f"Samples of the {len(BASE)} classes, {about['per_class']} of each, guidance {about['guidance_scale']:g}, "
        "against as many held-out pictures, by 64 components of EfficientNet-Lite0's features and by the 64 features "
        "of a classifier of the styles, which also says how many samples it takes for their class.\n\n"
        f"{table(columns, [*rows, ('other real pictures', *(f'{value:.3g}' for value in real_ones.values()))])}\n\n"
        f"The VAE gives pictures of the base's styles back at {about['vae_psnr']['base']:.1f} dB, those of styles that "
        f"neither it nor the DiT has seen at {about['vae_psnr']['unseen']:.1f} dB."
    )
    targets = [target("samples of the base that a classifier takes for their class", "≥", 0.95, best["recognised"])]
    for name in NETWORKS:
        share = best[name] / real_ones[name]
        targets.append(target(f"Fréchet distance of the base ÷ of real pictures, {name}", "≤", 3, share))
    for kind, least in (("base", 30), ("unseen", 28)):
        targets.append(target(f"VAE, styles: {kind}, dB", "≥", least, about["vae_psnr"][kind]))
    figure = None
    if len(pipelines) > 1:
        steps = {int(name.rpartition("-")[2]): measured for name, measured in pipelines.items()}
        earlier = steps[min(step for step in steps if step >= 0.75 * max(steps))]
        what = f"Fréchet distance, {NETWORKS[0]}: better by the last quarter of the steps, %"
        targets.append(target(what, "≤", 3, 100 * (1 - best[NETWORKS[0]] / earlier[NETWORKS[0]])))
        figure = Figure(figsize=(9, 3), layout="constrained")
        for axis, name in zip(figure.subplots(1, 3), real_ones, strict=True):
            axis.plot([*steps], [measured[name] for measured in steps.values()], marker=".")
            axis.axhline(real_ones[name], color="gray", linestyle=":")
            title = "samples taken for their class" if name == "recognised" else f"Fréchet distance, {name}"
            axis.set(title=title, xlabel="steps", ylim=(0, None))
    publish(folder, "base", "The bundled base", markdown, {**about, "results": results}, figure, targets)


if __name__ == "__main__":
    run_script(main)
