"""How good the bundled base is, and how it became so: distances and recognised samples over the steps of its training.

    python examples/avatars/measure_base.py --steps runs/avatars/base/step-*  # the pipelines that train_base.py left

Samples of every class are compared with as many held-out pictures of it. Their Fréchet distance stands beside that of
other real pictures, by the features of EfficientNet-Lite0 and by those of a classifier of the base's styles and the
domains', which never saw a held-out picture. How well the VAE keeps pictures is told too, of the base's styles and of
those that neither it nor the DiT has seen. Writes `base.json` and `base.png` to `--output_dir`.
"""

import argparse
import json
from pathlib import Path

import torch
from difffit_peft.files import write
from difffit_peft.training.scripts import run_script
from diffusers import AutoencoderKL, DiTPipeline, DPMSolverMultistepScheduler
from judge import Classifier, ImageNetFeatures, frechet_distance, real, sample
from matplotlib.figure import Figure
from render import BASE, CACHE, DOMAINS
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path, nargs="+", required=True, help="pipelines, in their order")
    parser.add_argument("--output_dir", type=Path, default=HERE.parents[1] / "docs/results")
    parser.add_argument("--cache_dir", type=Path, default=CACHE, help="rendered pictures")
    parser.add_argument("--per_class", type=int, default=25, help="samples of each class")
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--num_inference_steps", type=int, default=15)
    parser.add_argument("--classifier_steps", type=int, default=1500)
    args = parser.parse_args()

    styles = [(style, {}) for style in BASE]
    domains = [new for name in ("near", "middle") for new in DOMAINS[name].values()]
    held_out, other = (real(styles, args.per_class, split, args.cache_dir) for split in ("test", "other"))
    train = real(styles + domains, 200, "train", args.cache_dir)
    labels = torch.arange(len(BASE)).repeat_interleave(args.per_class)
    torch.manual_seed(0)
    classifier = Classifier(len(styles + domains))
    classifier.fit(train, torch.arange(len(styles + domains)).repeat_interleave(200), args.classifier_steps)
    networks = {"EfficientNet-Lite0": ImageNetFeatures(train[: 200 * len(BASE) : 4]), "classifier": classifier}

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
    text = json.dumps({**about, "results": results}, indent=1)
    write(args.output_dir / "base.json", lambda partial: partial.write_text(text + "\n"))
    if len(args.steps) < 2:
        return
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, 3), results["real"], strict=True):
        steps = [int(folder.name.rpartition("-")[2]) for folder in args.steps]
        axis.plot(steps, [results[folder.name][name] for folder in args.steps], marker=".")
        axis.axhline(results["real"][name], color="gray", linestyle=":")
        title = "samples taken for their class" if name == "recognised" else f"Fréchet distance, {name}"
        axis.set(title=title, xlabel="steps", ylim=(0, None))
    write(args.output_dir / "base.png", lambda partial: figure.savefig(partial, format="png", dpi=120))


if __name__ == "__main__":
    run_script(main)
