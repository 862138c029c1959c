"""What DiffFit's adaptation is worth beside that of other methods, at equal steps, on domains near to the base and far.

    python examples/benchmarks/quality.py            # the long form; stop it and start it again as you like
    python examples/benchmarks/quality.py --report   # tables and plots of what is done so far
    python examples/benchmarks/quality.py --short

Adapts the bundled base to the domains of `examples/avatars`: *inside*, new combinations of what it knows; *near*,
styles of faces that it has never seen; *middle*, styles that are no faces; *far*, Twemoji. Every run is kept in
`--work_dir`, so that the script goes on where it was stopped. All methods train in the same way on the same
batches (`adaptation`), the rows of the new classes with them, each at its own learning rate: the one of a sweep of
short runs on *near*, half a decade apart, with the lowest loss on images that no run trains on. A sweep whose best is
at its edge goes on beyond it.
"""

import dataclasses
from pathlib import Path

import methods
from difffit_peft import DiffFitConfig
from difffit_peft.files import write
from difffit_peft.training.scripts import run_script
from diffusers import DiTTransformer2DModel
from diffusers.utils import make_image_grid
from matplotlib.figure import Figure
from peft import get_peft_model
from report import publish, table, target
from study import MEASURES, Form, Rows, Study, cells, center, comparison_table, execute, plot, seeds, stored
from torch import nn

ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]

OVERVIEW = 16  # pictures in each cell of domains.png

# Learning rates that the sweep of each method starts with, the methods of the picture first.
RATES = {
    "DiffFit": (3e-3, 1e-2, 3e-2),
    "DiffFit r=4": (3e-3, 1e-2, 3e-2),
    "LoRA r=8": (1e-3, 3e-3, 1e-2),
    "full": (3e-4, 1e-3, 3e-3),
    "DiffFit r=1": (3e-3, 1e-2, 3e-2),
    "DiffFit, adaLN": (3e-3, 1e-2, 3e-2),
    "BitFit": (3e-3, 1e-2, 3e-2),
    "LoRA r=2": (1e-3, 3e-3, 1e-2),
}

# Variants of DiffFit; those that have no rates above are run at DiffFit's, the most telling first.
VARIANTS = {
    "DiffFit r=4": methods.RANK_1 | {"r": 4},
    "class rows frozen": {"exclude_modules": ["embedding_table"]},
    "r=16": methods.RANK_1 | {"r": 16},
    "γ in all blocks": {"gamma_layers": list(range(6))},
    "γ on attention and feed-forward, all blocks": {"gamma_modules": methods.LAYERS, "gamma_layers": list(range(6))},
    "γ on attention": {"gamma_modules": ATTENTION},
    "γ on feed-forward": {"gamma_modules": FEED_FORWARD},
}

LONG = Form(
    rates=RATES,
    domains=("inside", "near", "middle", "far"),
    sweep_domain="near",
    seeds=(0,),
    steps=300,
    sweep_steps=50,
    num_images=200,
    classifier_steps=600,
    held_out=100,
    batch_size=32,
    extensions=1,
    variants=tuple(name for name in VARIANTS if name not in RATES),
    factors=(10**0.5, 10**-0.5),
)
SHORT = dataclasses.replace(
    LONG,
    rates={method: RATES[method] for method in ("full", "LoRA r=8", "DiffFit", "DiffFit r=1")},
    domains=("near",),
    steps=30,
    sweep_steps=0,
    num_images=40,
    classifier_steps=100,
    max_samples=400,
    batch_size=16,
    threads=2,
    variants=(),
    factors=(),
)


def attach(method: str, model: DiTTransformer2DModel, num_classes: int) -> nn.Module:
    """The model to train. Every method trains the rows of the new classes, which start from the null row."""
    if method in VARIANTS:
        config = VARIANTS[method]
        rows = {} if "embedding_table" in config.get("exclude_modules", []) else {"num_classes": num_classes}
        return get_peft_model(model, DiffFitConfig(**config, **rows))
    return methods.adapt(method, model, num_classes)


def ablation_table(study: Study, rows: dict[str, Rows]) -> str | None:
    """One run of each variant in each domain, with the first seed; `None` if there is none."""
    variants: dict[str, dict[str, dict]] = {}
    for domain, made in rows.items():
        for name in made:
            if name.startswith("DiffFit"):
                variants.setdefault(name, {})[domain] = made[name][0][1]
        for name, run in study.variants(domain):
            if result := study.bench.stored(run):
                variants.setdefault(name, {})[domain] = result
    if not set(variants) - {*study.form.rates}:
        return None
    keys = ("loss", "fid")
    lines = []
    for name, of_domain in variants.items():
        count = max(result.get("parameters", 0) for result in of_domain.values())
        lines.append([name, f"{count:,}"] + [c for d in rows for c in cells([of_domain.get(d, {})], keys)])
    return table(["", "trained", *(f"{d}: {MEASURES[key]}" for d in rows for key in keys)], lines)


def frechet_targets(domain: str, rows: Rows) -> list[dict]:
    """Fréchet distances, medians over the seeds, as DiffFit's share of the others'."""
    distance = {name: value for name, made in rows.items() if (value := center(made, "fid")) is not None}
    targets = []
    for name in ("DiffFit", "DiffFit r=1", "DiffFit r=4"):
        limit = 2 * rows[name][0][1]["parameters"] if name in distance else 0
        others = [n for n in distance if n != "base" and not n.startswith("DiffFit")]
        small = [n for n in others if rows[n][0][1]["parameters"] <= limit]
        best = min(small, key=distance.__getitem__, default=None)
        for other, called in (("full", "full"), (best, f"the best method of at most twice its parameters ({best})")):
            if other is None:
                continue
            share = distance[name] / distance[other] if {name, other} <= set(distance) else None
            targets.append(target(f"Fréchet distance, {domain}: {name} ÷ {called}", "≤", 1, share))
    return targets


def overview(study: Study, rows: dict[str, Rows]) -> Figure:
    """Domains down, methods across: samples of the same classes and seeds in each cell, and real pictures."""
    shown = [name for name in ("base", *list(RATES)[:4]) if any(name in made for made in rows.values())]
    figure = Figure(figsize=(2.1 * (len(shown) + 1), 2.2 * len(rows)), dpi=130, layout="constrained")
    axes = figure.subplots(len(rows), len(shown) + 1, squeeze=False)
    for axis, name in zip(axes[0], [*shown, "real"], strict=True):
        axis.set_title(name)
    for line, (domain, made) in zip(axes, rows.items(), strict=True):
        for axis, name in zip(line, [*shown, "real"], strict=True):
            tiles = study.real_tiles(domain, OVERVIEW) if name == "real" else None
            if name in made:
                tiles = study.tiles(made[name][0][0], OVERVIEW)
            if tiles:
                axis.imshow(make_image_grid(tiles, 4, 4), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(domain)
    return figure


def report(study: Study, folder: Path) -> None:
    form = study.form
    rows = {domain: made for domain in form.domains if (made := stored(study, domain))}
    if not rows:
        raise SystemExit(f"{study.bench.folder} has no runs yet: start this script without --report.")
    example = study.base(form.domains[0])
    parts = [
        f"The bundled base, adapted to {', '.join(rows)} in {form.steps} steps of {example.batch_size} images. "
        f"Seeds {'; '.join(f'{seeds(made)} ({d})' for d, made in rows.items())}. Loss: of the held-out images at fixed "
        f"noise. Fréchet distance, KID, precision and recall: of {form.num_images} samples, guidance "
        f"{example.guidance_scale:g}, to the held-out images, by 64 components of EfficientNet-Lite0's features. "
        "Recognised: the share of samples that a classifier of the domain's classes takes for theirs. Distances of so "
        "few images compare methods, and mean nothing beside published ones. CPU seconds were counted on a machine "
        "that may have been busy: for times see the section on training speed. Every method trains the rows of the new "
        "classes."
    ]
    parts += [f"## {domain}\n\n{comparison_table(study, domain, made)}" for domain, made in rows.items()]
    if ablation := ablation_table(study, rows):
        parts.append(
            f"## Ablation\n\nSeed {form.seeds[0]}. DiffFit has γ as published, in blocks 0-2; with r there is no γ."
            f"\n\n{ablation}"
        )
    results = {
        domain: {
            "methods": {name: [{**dataclasses.asdict(run), **r} for run, r in pairs] for name, pairs in made.items()},
            "ablation": {name: study.bench.stored(run) for name, run in study.variants(domain)},
            "sweeps": {m: study.sweep(domain, m, make=False) for m in form.rates if form.sweep_steps},
        }
        for domain, made in rows.items()
    }
    targets = [t for domain, made in rows.items() for t in frechet_targets(domain, made)]
    picture = overview(study, rows)
    write(folder / "domains.png", lambda partial: picture.savefig(partial, format="png"))
    title = "Quality at equal steps"
    publish(folder, "quality", title, "\n\n".join(parts), results, plot(study, rows), targets)


if __name__ == "__main__":
    run_script(lambda: execute(__doc__, LONG, SHORT, attach, report))
