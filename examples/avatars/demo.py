"""Fine-tunes the bundled base of avatars to new classes, and shows what changed.

    make demo
    .venv/bin/python examples/avatars/demo.py --domain near  # styles of faces that the base has never seen

Trains an adapter with `examples/train_difffit.py`, loads it into a fresh pipeline, and writes `demo/before_after.png`:
for each new class the base's pictures of some seeds, the adapter's, and real ones. The base does not know the classes:
it draws the style that a class is a variant of, and from whose row the class starts; where there is none, "anything"
(the null class). The adapter is guided by the base (`guidance="domain"`). Also measured: the Fréchet distance of both
to pictures held out from training, and how many of the adapter's a classifier takes for their class.
"""

import argparse
import sys
from pathlib import Path

import torch
from difffit_peft import DiffFitDiTPipeline
from difffit_peft.training.scripts import finite_float, positive_float, positive_int, run_script, user_path
from difffit_peft.writing import write
from diffusers import DPMSolverMultistepScheduler
from judge import Classifier, ImageNetFeatures, by_vae, frechet_distance, real, sample
from matplotlib.figure import Figure
from render import BASE, DOMAINS
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train_difffit  # noqa: E402

STEPS, LEARNING_RATE = 600, 8e-3
HELD_OUT = 40  # of each class, and as many samples
CLASSIFIED = 100  # real pictures of each style, known and new, that the classifier learns from
SHOWN = 3  # seeds of each class


def train_adapter(base: Path, domain: str, output_dir: Path, cache: Path, steps: int, rate: float, *more: str):
    """Trains an adapter of a domain with `examples/train_difffit.py`; `more` are options of that script.

    Its classes start from those of the base that they are variants of, where there are such.
    """
    styles = [style for style, _ in DOMAINS[domain].values()]
    start = ["--init_classes", *styles] if {*styles} <= {*BASE} else []
    return train_difffit.main(
        train_difffit.parse_args(
            [
                *("--pretrained_model_name_or_path", str(base)),
                *("--train_data_dir", str(HERE / "data" / domain / "train.parquet")),
                *("--output_dir", str(output_dir)),
                *("--cache_dir", str(cache)),
                *("--train_batch_size", "32"),
                *("--max_train_steps", str(steps)),
                *("--learning_rate", str(rate)),
                *("--lr_scheduler", "cosine"),
                *("--lr_warmup_steps", "20"),
                *("--snr_gamma", "5"),  # as the base was trained
                *("--mixed_precision", "no"),  # so that figures depend on the machine as little as can be
                *("--num_validation_images", "0"),
                *("--num_held_out_images", "0"),
                *("--report_to", "none"),
                *("--checkpointing_steps", "1000000"),  # it takes minutes, and may be run again
                "--no-random_flip",
                *start,
                *more,
            ]
        )
    )


def draw(rows: dict[str, Tensor], names: list[str], path: Path) -> None:
    """A labelled grid: a row per entry, with `SHOWN` pictures of each name side by side."""
    figure = Figure(figsize=(0.8 * SHOWN * len(names), 0.95 * len(rows)), dpi=130)
    widths = [1, 1, 1, 0.15] * len(names)
    axes = figure.subplots(len(rows), len(widths) - 1, width_ratios=widths[:-1], squeeze=False)
    for row, (title, images) in enumerate(rows.items()):
        for column, axis in enumerate(axes[row]):
            axis.set_xticks([]), axis.set_yticks([])
            axis.spines[:].set_visible(False)
            group, place = divmod(column, SHOWN + 1)
            if place == SHOWN:  # a gap between names
                continue
            axis.imshow(images[group * SHOWN + place].permute(1, 2, 0), interpolation="nearest")
            if row == 0 and place == SHOWN // 2:
                axis.set_title(names[group], fontsize=9)
        axes[row, 0].set_ylabel(title, fontsize=9)
    header = 0.228 / figure.get_figheight()  # inches, for the names
    figure.subplots_adjust(left=0.03, right=0.999, top=1 - header, bottom=0.005, wspace=0.03, hspace=0.03)
    write(path, lambda partial: figure.savefig(partial, format="png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=user_path, default=Path("demo"))
    parser.add_argument("--base", type=user_path, default=HERE / "base")
    parser.add_argument("--domain", choices=list(DOMAINS), default="inside")
    parser.add_argument("--max_train_steps", type=positive_int, default=STEPS)
    parser.add_argument("--learning_rate", type=positive_float, default=LEARNING_RATE)
    parser.add_argument("--guidance_scale", type=finite_float, default=2.0)
    parser.add_argument("--guidance", choices=["class", "domain"], default="domain", help="of the adapted model")
    parser.add_argument("--num_inference_steps", type=positive_int, default=15)
    parser.add_argument("--base_precision", choices=["int8", "fp8"], help="of the frozen layers in training")
    args = parser.parse_args()

    adapter, cache = args.output_dir / "adapter", args.output_dir / "cache"
    steps, rate = args.max_train_steps, args.learning_rate
    lower = ["--base_precision", args.base_precision] if args.base_precision else []
    result = train_adapter(args.base, args.domain, adapter, cache, steps, rate, *lower)

    names, new = zip(*DOMAINS[args.domain].items(), strict=True)
    train = real(new, CLASSIFIED, "train", cache)
    known = real([(style, {}) for style in BASE], CLASSIFIED, "train", cache)
    held_out, other = (real(new, HELD_OUT, split, cache) for split in ("test", "other"))

    pipe = DiffFitDiTPipeline.from_pretrained(args.base, dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    labels = [label for label in range(len(new)) for _ in range(HELD_OUT)]
    how = (args.guidance_scale, args.num_inference_steps)
    null = pipe.transformer.config.num_embeds_ada_norm
    like = [BASE.index(style) if style in BASE else null for style, _ in new]
    before = sample(pipe, [like[label] for label in labels], *how, "Sampling the base")
    pipe.load_difffit_weights(adapter)
    after = sample(pipe, labels, *how, "Sampling the adapted model", guidance=args.guidance)

    picture = args.output_dir / "before_after.png"
    shown = [label * HELD_OUT + seed for label in range(len(new)) for seed in range(SHOWN)]
    draw({"base": before[shown], "DiffFit": after[shown], "real": held_out[shown]}, names, picture)

    torch.manual_seed(0)
    styles = torch.arange(len(new) + len(BASE)).repeat_interleave(CLASSIFIED)
    classifier = Classifier(len(new) + len(BASE)).fit(torch.cat([train, known]), styles, steps=600)
    recognised = {name: classifier.accuracy(x, torch.tensor(labels)) for name, x in (("after", after), ("real", other))}
    features = ImageNetFeatures(train)
    distance = {
        name: frechet_distance(features, held_out, images)
        for name, images in (("base", before), ("adapted", after), ("vae", by_vae(pipe.vae, other)), ("real", other))
    }
    print(
        f"\nFréchet distance to {len(held_out)} held-out pictures, on 64 components of EfficientNet-Lite0's features: "
        f"base {distance['base']:.1f}, adapted {distance['adapted']:.1f} (other real ones: {distance['real']:.1f}, and "
        f"{distance['vae']:.1f} when the base's VAE has encoded and decoded them)\n"
        f"Adapted samples that a classifier of {len(new) + len(BASE)} classes takes for theirs: "
        f"{recognised['after']:.0%} (other real ones: {recognised['real']:.0%})\n"
        f"Trained parameters: {result.trained_parameters:,}, {result.trained_share:.2%} of the base's\n"
        f"Adapter: {adapter}, {result.adapter_bytes:,} bytes\n"
        f"{result.steps} steps, {result.seconds_per_step:.2f} s each, in fp32"
        f"{f', base in {args.base_precision}' * bool(lower)}\n"
        f"Picture: {picture}"
    )


if __name__ == "__main__":
    run_script(main)
