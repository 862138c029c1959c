"""What DiffFit's adaptation is worth beside that of other methods: few pictures and many, near to the base and far.

    python examples/benchmarks/quality.py            # the long form; stop it and start it again as you like
    python examples/benchmarks/quality.py --report   # tables and plots of what is done so far
    python examples/benchmarks/quality.py --short

Adapts the bundled base to the domains of `examples/avatars`: *inside*, new combinations of what it knows; *near*,
styles of faces that it has never seen; *middle*, styles that are no faces; *far*, Twemoji. Every run is kept in a
folder beside the page, so that the script goes on where it was stopped, on another machine too. All methods train in
the same way on the same batches (`adaptation`), the rows of the new classes with them, each at its own learning rate:
the one of a sweep of short runs on *near*, half a decade apart, with the lowest loss on images that no run trains on. A
sweep whose best is at its edge goes on beyond it. Before it starts, the script says how long what is missing will take,
by the runs that are there.
"""

import dataclasses
from pathlib import Path

import methods
from difffit_peft import DiffFitConfig
from difffit_peft.training.scripts import run_script
from difffit_peft.writing import write
from diffusers import DiTTransformer2DModel
from matplotlib.figure import Figure
from peft import get_peft_model
from report import publish, target
from study import Cell, Form, Rows, Study, at_best, center, comparison_table, execute, plot, seeds, stored
from torch import nn

ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]

# Learning rates that the sweep of each method starts with, the methods of the picture first.
RATES = {
    "full": (3e-4, 1e-3, 3e-3),
    "DiffFit": (3e-3, 1e-2, 3e-2),
    "LoRA r=8": (1e-3, 3e-3, 1e-2),
    "DiffFit r=4": (3e-3, 1e-2, 3e-2),
    "BitFit": (3e-3, 1e-2, 3e-2),
    "DiffFit r=1": (3e-3, 1e-2, 3e-2),
    "LoRA r=2": (1e-3, 3e-3, 1e-2),
    "DiffFit r=16": (3e-3, 1e-2, 3e-2),  # about as many parameters as LoRA r=8
    "DiffFit, adaLN": (3e-3, 1e-2, 3e-2),
    "GLoRA, vectors": (3e-3, 1e-2, 3e-2),
    "IA³": (3e-3, 1e-2, 3e-2),
    "OFT": (1e-3, 3e-3, 1e-2),
}
IN_PICTURE = ("base", "DiffFit", "DiffFit r=4", "LoRA r=8", "full")

VARIANTS = {
    "DiffFit r=4": methods.RANK_1 | {"r": 4},
    "DiffFit r=16": methods.RANK_1 | {"r": 16},
    "class rows frozen": {"exclude_modules": ["embedding_table"]},
    "γ in all blocks": {"gamma_layers": list(range(6))},
    "γ on attention and feed-forward, all blocks": {"gamma_modules": methods.LAYERS, "gamma_layers": list(range(6))},
    "γ on attention": {"gamma_modules": ATTENTION},
    "γ on feed-forward": {"gamma_modules": FEED_FORWARD},
}

INSIDE, NEAR_FEW, NEAR = Cell("inside", None, 3000), Cell("near", 50, 3000), Cell("near", None, 3000)
MIDDLE, FAR, INSIDE_MANY = Cell("middle", None, 1000), Cell("far", None, 1000), Cell("inside", 500, 3000)

LONG = Form(
    rates=RATES,
    cells=(INSIDE, NEAR, NEAR_FEW, MIDDLE, FAR, INSIDE_MANY),
    sweep=Cell("near", None, 100),
    seeds=(0,),
    num_images=500,
    classifier_steps=600,
    held_out=350,
    batch_size=32,
    extensions=1,
    variants=tuple(name for name in VARIANTS if name not in RATES),
)
SHORT = dataclasses.replace(
    LONG,
    rates={method: RATES[method] for method in ("full", "DiffFit")},
    cells=(Cell("near", 20, 10),),
    sweep=Cell("near", None, 0),
    num_images=24,
    classifier_steps=50,
    held_out=20,
    max_samples=200,
    batch_size=16,
    threads=2,
    variants=(),
)


def attach(method: str, model: DiTTransformer2DModel, num_classes: int) -> nn.Module:
    """The model to train. Every method trains the rows of the new classes, which start from the null row."""
    if method in VARIANTS:
        config = VARIANTS[method]
        rows = {} if "embedding_table" in config.get("exclude_modules", []) else {"num_classes": num_classes}
        return get_peft_model(model, DiffFitConfig(**config, **rows))
    return methods.adapt(method, model, num_classes)


def targets_of(cell: Cell, rows: Rows) -> list[dict]:
    """What is asked of DiffFit in a cell, by medians over the seeds."""
    best = {name: value for name, made in rows.items() if (value := at_best(made)) is not None}
    last = {name: value for name, made in rows.items() if (value := center(made, "fid")) is not None}

    def share(values: dict[str, float], name: str, other: str | None) -> float | None:
        return values[name] / values[other] if name in values and other in values else None

    limit = {"inside": 0.9, "far": 1.2}.get(cell.domain, 1.0)
    what = f"Fréchet distance, {cell.name}"
    targets = [target(f"{what}: DiffFit ÷ full, both at their best step", "≤", limit, share(best, "DiffFit", "full"))]
    if cell in (INSIDE, NEAR_FEW):
        targets.append(target(f"{what}: DiffFit ÷ full at the last step", "≤", 0.7, share(last, "DiffFit", "full")))
        memorised = {name: value for name, made in rows.items() if (value := center(made, "memorised")) is not None}
        enough = memorised.get("full", 0) > 0.02  # what nothing memorised gives is 0.01
        shown = share(memorised, "DiffFit", "full") if enough else None
        targets.append(target(f"memorised, {cell.name}: DiffFit ÷ full at the last step", "≤", 0.1, shown))
    parameters = {name: made[0][1]["parameters"] for name, made in rows.items() if name in best and name != "base"}
    theirs = [n for n in parameters if n not in VARIANTS and not n.startswith("DiffFit") and n != "full"]
    small = [n for n in theirs if parameters[n] <= 2 * parameters.get("DiffFit", 0)]
    other = min(small, key=best.__getitem__, default=None)
    called = f" ({other})" if other else ""
    targets.append(
        target(f"{what}: DiffFit ÷ the best of PEFT's as small{called}", "≤", 1.0, share(best, "DiffFit", other))
    )
    if cell.domain != "inside":
        ranked = share(best, "DiffFit r=16", "LoRA r=8")
        targets.append(target(f"{what}: DiffFit r=16 ÷ LoRA r=8, as large", "≤", 1.0, ranked))
    return targets


def overview(study: Study, rows: dict[Cell, Rows]) -> Figure:
    """Domains down, methods across: samples of the same classes and seeds in each square, and real pictures."""
    cells = [cell for cell in (INSIDE, NEAR_FEW, MIDDLE, FAR) if cell in rows] or list(rows)
    figure = Figure(figsize=(2.1 * (len(IN_PICTURE) + 1), 2.2 * len(cells)), dpi=130, layout="constrained")
    axes = figure.subplots(len(cells), len(IN_PICTURE) + 1, squeeze=False)
    for axis, name in zip(axes[0], [*IN_PICTURE, "real"], strict=True):
        axis.set_title(name)
    for line, cell in zip(axes, cells, strict=True):
        for axis, name in zip(line, [*IN_PICTURE, "real"], strict=True):
            made = rows[cell].get(name, [])
            if name == "real":
                axis.imshow(study.real_tiles(cell), interpolation="nearest")
            elif made and "diverged" not in made[0][1]:
                axis.imshow(study.tiles(made[0][0]), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(f"{cell.domain}\n{cell.steps:,} steps")
    return figure


def report(study: Study, folder: Path) -> None:
    form = study.form
    rows = {cell: made for cell in form.cells if (made := stored(study, cell))}
    if not rows:
        raise SystemExit(f"{study.bench.folder} has no runs yet: start this script without --report.")
    example = study.base(form.cells[0])
    about = (
        f"The bundled base, adapted in batches of {example.batch_size}. Fréchet distance, KID, precision and recall: "
        f"of {form.num_images} samples, guidance {example.guidance_scale:g}, to held-out images, by 64 components of "
        "EfficientNet-Lite0's features. The distance is given at the best of the steps that were measured, and all "
        "measures at the last one. By the classifier: the Fréchet distance by its features, by which the training "
        "images, from which it has learned, are farther from held-out ones than good samples are. Recognised: the "
        "share of samples that a classifier of the domain's classes takes for theirs. Memorised: the share of samples "
        "that have a training image nearer to them than 99 of 100 held-out images have. Distances of so few images "
        "compare methods, and mean nothing beside published ones. Every method trains the rows of the new classes. "
        "DiffFit with r has a change of rank r in the place of γ. Training images by the VAE: encoded and decoded, as "
        "a transformer that had learned everything would draw them. Of the way: how much of the distance between the "
        "base and those is gone at the best step. Runs of several machines may stand in one table; the file of each "
        "says which."
    )
    parts = [about, "![Domains](domains.png)"] + [
        f"## {cell.name}, {cell.steps:,} steps, seeds {seeds(made)}\n\n{comparison_table(study, cell, made)}"
        for cell, made in rows.items()
    ]
    results = {
        cell.name: {name: [{**dataclasses.asdict(run), **r} for run, r in pairs] for name, pairs in made.items()}
        for cell, made in rows.items()
    }
    results["sweeps"] = {method: study.sweep(method, make=False) for method in form.rates if form.sweep.steps}
    targets = [t for cell, made in rows.items() for t in targets_of(cell, made)]
    picture = overview(study, rows)
    write(folder / "domains.png", lambda partial: picture.savefig(partial, format="png"))
    publish(folder, "quality", "Quality over steps", "\n\n".join(parts), results, plot(study, rows), targets)


if __name__ == "__main__":
    run_script(lambda: execute(__doc__, "quality", LONG, SHORT, attach, report))
