"""What it takes to move the bundled base from 64 to 128 pixels: DiffFit, full fine-tuning, and rescaled positions.

    python examples/benchmarks/resolution.py            # the long form; stop it and start it again as you like
    python examples/benchmarks/resolution.py --report   # tables and plots of what is done so far
    python examples/benchmarks/resolution.py --short

The target are styles of faces that the base has never seen, drawn at 128 pixels: latents of 32 x 32, four times the
tokens. Rescaled positions put the finer grid where the old one was, patch i at i / 2. Without,
patch i is at i, and three quarters of the picture lie where the base has never been. Training and measures are those of
`quality.py`.
"""

import dataclasses
import math
from pathlib import Path

import methods
import numpy as np
from adaptation import Run
from difffit_peft import DiffFitConfig
from difffit_peft.families.dit.resolution import set_sample_size
from difffit_peft.training.scripts import run_script
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from peft import get_peft_model
from report import publish, target
from study import Cell, Form, Study, comparison_table, execute, plot, seeds, stored
from torch import nn

SAMPLE_SIZE = 32
NOT_RESCALED = ", positions not rescaled"

LONG = Form(
    rates={
        "full": (1e-4, 3e-4, 1e-3),
        "DiffFit": (3e-3, 1e-2, 3e-2),
        "DiffFit" + NOT_RESCALED: (3e-3, 1e-2, 3e-2),
        "DiffFit r=1": (3e-3, 1e-2, 3e-2),
    },
    cells=(Cell("near", None, 1000),),
    sweep=Cell("near", None, 30),
    seeds=(0,),
    extensions=1,
    num_images=200,
    classifier_steps=300,
    held_out=50,
    resolution=128,
    batch_size=8,
)
SHORT = dataclasses.replace(
    LONG,
    rates={name: LONG.rates[name] for name in ("full", "DiffFit")},
    cells=(Cell("near", None, 10),),
    sweep=Cell("near", None, 0),
    num_images=16,
    classifier_steps=15,
    held_out=20,
    max_samples=130,
    threads=2,
)


def attach(method: str, model: DiTTransformer2DModel, num_classes: int) -> nn.Module:
    """The model to train, for latents of side `SAMPLE_SIZE`."""
    if method.startswith("DiffFit"):
        config = DiffFitConfig(
            num_classes=num_classes,
            sample_size=SAMPLE_SIZE,
            **methods.DIFFFIT[method.removesuffix(NOT_RESCALED)],
        )
        adapted = get_peft_model(model, config)
    else:
        adapted = methods.adapt("full", model, num_classes)
        set_sample_size(model, SAMPLE_SIZE)
    if method.endswith(NOT_RESCALED):
        embed = model.pos_embed
        table = get_2d_sincos_pos_embed(
            embed.pos_embed.shape[-1], embed.height, base_size=embed.height, output_type="pt"
        )
        embed.pos_embed = table.unsqueeze(0).to(embed.pos_embed.dtype)
    return adapted


def report(study: Study, folder: Path) -> None:
    form = study.form
    (cell,) = form.cells
    rows = stored(study, cell)
    if not rows:
        raise SystemExit(f"{study.bench.folder} has no runs yet: start this script without --report.")
    example = study.base(cell)
    markdown = (
        f"The bundled base, adapted to {cell.name} at {form.resolution} pixels in {cell.steps} steps of "
        f"{example.batch_size} images. Median (range) of the runs with seeds {seeds(rows)}. "
        f"{form.num_images} samples are compared with held-out images of this resolution; the rest is as on the page "
        "on quality. The base moved without training has its positions rescaled.\n\n"
        + comparison_table(study, cell, rows)
    )
    results = {name: [{**dataclasses.asdict(run), **r} for run, r in pairs] for name, pairs in rows.items()}
    shown = at_equal_seconds(rows.get("DiffFit", []), rows.get("full", []))
    limit = f"{form.resolution} pixels, DiffFit ÷ full: Fréchet distance at equal seconds"
    figure = plot(study, {cell: rows})
    publish(folder, "resolution", "From 64 to 128 pixels", markdown, results, figure, [target(limit, "≤", 1, shown)])


def at_equal_seconds(ours: list[tuple[Run, dict]], theirs: list[tuple[Run, dict]]) -> float | None:
    """The ratio of the Fréchet distances after the seconds that the faster of two methods takes, by first seeds.

    Between the steps that were measured, distances are taken to be straight over the logarithm of the time.
    """
    if not ours or not theirs or "diverged" in ours[0][1] or "diverged" in theirs[0][1]:
        return None
    curves = []
    for _, result in (ours[0], theirs[0]):
        seconds = [m["step"] * result["seconds_per_step"] for m in result["curve"]]
        curves.append(([math.log(s) for s in seconds], [m["fid"] for m in result["curve"]]))
    end = min(times[-1] for times, _ in curves)
    difffit, full = (float(np.interp(end, *curve)) for curve in curves)
    return difffit / full


if __name__ == "__main__":
    run_script(lambda: execute(__doc__, "resolution", LONG, SHORT, attach, report))
