"""Why scale factors adapt fast: where the gradient on a new domain lies, and the loss after the first steps.

    python examples/benchmarks/scale_factors.py [--short]

`docs/method.md` has the argument, `docs/results/scale_factors.md` what this measures. The base is the bundled one,
which draws avatars; the new domain is Twemoji. All that is compared works on the same layers: the six linear ones of
attention and feed-forward, in every block. With the same number of threads, the figures are the same in every run.
"""

import copy
import json
import tempfile

import torch
from difffit_peft import DiffFitConfig
from difffit_peft.training.images import load_labelled_images
from difffit_peft.training.latents import encode_latents
from difffit_peft.training.losses import diffusion_loss
from difffit_peft.training.sampling import draw, sample_latents
from difffit_peft.training.scripts import run_script
from difffit_peft.writing import write
from diffusers import DDPMScheduler, DiTPipeline
from matplotlib.figure import Figure
from methods import LAYERS
from peft import LoraConfig, get_peft_model
from report import ROOT, header, machine, output_dir, parser, table, write_section
from torch import Tensor, nn
from tqdm import tqdm

AVATARS = ROOT / "examples/avatars"
NAME = "scale_factors"
NULL_CLASS = 1000
# What is trained: the parts of its parameters' names, and learning rates.
TRAINED = {
    "δ": (["difffit_delta"], (1e-2, 3e-2, 1e-1)),
    "γ": (["difffit_gamma"], (1e-2, 3e-2, 1e-1)),
    "γ and δ": (["difffit_gamma", "difffit_delta"], (1e-2, 3e-2, 1e-1)),
    "LoRA r=1": (["lora_A", "lora_B"], (3e-3, 1e-2, 3e-2)),
    "W and b": (LAYERS, (1e-4, 3e-4, 1e-3)),
}


class Denoising:
    """The loss of some images of Twemoji; noise and timesteps are a function of `seed` and the step."""

    def __init__(self, pipe: DiTPipeline, file: str, count: int, seed: int) -> None:
        images = load_labelled_images(train_data_dir=AVATARS / f"data/far/{file}.parquet", max_samples=count, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            data = encode_latents(pipe.vae, images, pipe.vae.config.sample_size, folder, random_flip=False)
            self.mean, self.std = (latents.transpose(0, 1).clone() for latents in (data.mean, data.std))
        self.labels = torch.full_like(images.labels, NULL_CLASS)  # the base knows none of the classes
        self.seed = seed
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def __call__(self, model: nn.Module, rows: Tensor, step: int) -> Tensor:
        draws = draw(self.seed, step, self.mean[rows].shape, self.scheduler.config.num_train_timesteps)
        x_0 = sample_latents(self.mean[rows], self.std[rows], draws.view, draws.posterior)
        x_t = self.scheduler.add_noise(x_0, draws.noise, draws.timesteps)
        output = model(x_t, timestep=draws.timesteps, class_labels=self.labels[rows]).sample
        return diffusion_loss(output, x_0, draws.noise, draws.timesteps, self.scheduler, snr_gamma=5).mean()


def attach(trained: str, model: nn.Module) -> nn.Module:
    """`model` with what is named, and nothing else, to be trained."""
    model.requires_grad_(False)
    if trained.startswith("LoRA"):
        model = get_peft_model(model, LoraConfig(target_modules=LAYERS, r=1, lora_alpha=1))
    elif trained != "W and b":
        model = get_peft_model(model, DiffFitConfig(target_modules=LAYERS, gamma_modules=LAYERS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f".{part}." in name for part in TRAINED[trained][0]))
    return model.eval()  # no label dropout


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """W of the six layers of every block."""
    return {name: p for name, p in model.named_parameters() if name.endswith(tuple(f".{n}.weight" for n in LAYERS))}


def shares(change: dict[str, Tensor], base: dict[str, nn.Parameter], layer: str) -> tuple[float, float, float]:
    """How much of the squares of a change of W lies along its own rows, another row of W, a random direction."""
    own = other = total = 0.0
    for name in (name for name in change if name.endswith(f".{layer}.weight")):
        rows = nn.functional.normalize(base[name].detach())
        squares = (change[name] @ rows.T).square()  # (out, out): the change of row i along row j
        own += squares.trace().item()
        other += (squares.sum() - squares.trace()).item() / (len(rows) - 1)
        total += change[name].square().sum().item()
    return own / total, other / total, 1 / rows.shape[1]


def main() -> None:
    args = parser(__doc__).parse_args()
    count, batch, points = (32, 4, (1, 2)) if args.short else (192, 8, (1, 4, 16))
    folder = output_dir(args)
    pipe = DiTPipeline.from_pretrained(AVATARS / "base", dtype=torch.float32)
    train, held_out = Denoising(pipe, "train", count, seed=0), Denoising(pipe, "test", count // 4, seed=1)

    @torch.no_grad()
    def held_out_loss(model: nn.Module) -> float:
        return held_out(model, torch.arange(count // 4), 0).item()

    def fit(trained: str, rate: float) -> tuple[nn.Module, list[float]]:
        """A trained copy of the base, and its held-out losses at the start and after `points` steps."""
        torch.manual_seed(0)  # LoRA's A is random
        model = attach(trained, copy.deepcopy(base))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
        curve = [start]
        for step in tqdm(range(1, points[-1] + 1), desc=f"{trained}, {rate:g}"):
            train(model, torch.arange(step * batch, (step + 1) * batch) % count, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in points:
                curve.append(held_out_loss(model))
        return model, curve

    base = attach("W and b", pipe.transformer)
    for step, rows in enumerate(tqdm(torch.arange(count).split(32), desc="gradient")):
        train(base, rows, step).backward()
    gradient = {name: weight.grad for name, weight in weights(base).items()}
    base.zero_grad()
    start = held_out_loss(base)
    found = {layer: shares(gradient, weights(base), layer) for layer in LAYERS}

    losses, best, parameters = {}, {}, {}
    for trained, (_, rates) in TRAINED.items():
        fits = {rate: fit(trained, rate) for rate in rates}
        best[trained] = min(fits, key=lambda rate: fits[rate][1][-1])
        losses[trained] = {rate: curve for rate, (_, curve) in fits.items()}
        model = fits[best[trained]][0]
        parameters[trained] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # the last model has W and b trained
    update = {name: weight.detach() - weights(base)[name].detach() for name, weight in weights(model).items()}
    updated = {layer: shares(update, weights(base), layer) for layer in LAYERS}

    where = table(
        ("layer", "own row (γ)", "another row", "random direction", "own ÷ random", "update of W, own row"),
        (
            (f"`{layer}`", *(f"{share:.2%}" for share in found[layer]), f"{found[layer][0] / found[layer][2]:.1f}")
            + (f"{updated[layer][0]:.2%}",)
            for layer in LAYERS
        ),
    )
    fast = table(
        ("trained", "numbers", "learning rate", *(f"after {step}" for step in (0, *points))),
        (
            (trained, f"{parameters[trained]:,}", f"{rate:g} of {', '.join(f'{r:g}' for r in losses[trained])}")
            + tuple(f"{loss:.4f}" for loss in losses[trained][rate])
            for trained, rate in best.items()
        ),
    )
    section = f"""# Why scale factors adapt fast

{header()}

Where the squares of the gradient of W on {count} training images lie: along the row of W itself, along another row of
it, along a random direction; and for comparison the change of W after {points[-1]} steps of AdamW on W and b.

{where}

Loss on {count // 4} held-out images at fixed noise, after so many AdamW steps of {batch} images; of three learning
rates the one with the lowest loss in the end.

{fast}

![Shares of the gradient, and loss over steps]({NAME}.png)"""

    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for column, label, height in ((0, "its own row (γ)", 0.8), (1, "another row", 0.3)):
        ratios = [found[layer][column] / found[layer][2] for layer in LAYERS]
        left.barh(LAYERS, ratios, height, label=label)
    left.axvline(1, color="black", linestyle="--", label="random direction")
    left.set(xlabel="share of the gradient ÷ that of a random direction")
    left.invert_yaxis()
    for trained, rate in best.items():
        right.plot((0, *points), losses[trained][rate], marker="o", label=f"{trained} ({parameters[trained]:,})")
    right.set_xscale("symlog")
    right.set(xlabel="steps", ylabel="held-out loss", xticks=(0, *points), xticklabels=(0, *points))
    left.legend()
    right.legend()
    write(folder / f"{NAME}.png", lambda path: figure.savefig(path, dpi=130, format="png"))
    results = {"gradient": found, "update": updated, "losses": losses, "best": best, "parameters": parameters}
    record = {"name": NAME, "machine": machine(), "targets": [], "results": results}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write(folder / f"{NAME}.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_section(folder / f"{NAME}.md", NAME, section)
    print(section)


if __name__ == "__main__":
    run_script(main)
