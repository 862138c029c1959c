"""Several adaptations that belong together: a sweep of learning rates for each method, then runs of all of them.

What the benchmarks of quality and of resolution share: `Form` says how much is done, `Study` does it in order, and the
rest makes tables and plots of what is done so far.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import adaptation
import PIL.Image
import torch
from adaptation import Bench, Run
from difffit_peft.training.scripts import user_path
from diffusers import DiTTransformer2DModel
from diffusers.utils import make_image_grid
from matplotlib.figure import Figure
from report import ROOT, output_dir, parser, spread, table
from torch import nn

MEASURES = {
    "loss": "loss",
    "fid": "Fréchet distance",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "recognised": "recognised",
}
NUM_SHOWN = 12  # samples of each method in the plot

Rows = dict[str, list[tuple[Run, dict]]]
"""For each method the runs that are made, one for each seed, and their results."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How much a long or a short form does.

    Attributes:
        rates: for each method, the learning rates that its sweep starts with.
        sweep_steps: of each run of a sweep; 0: no sweep, and the middle one of `rates`.
        extensions: how often a sweep whose best learning rate is at its edge goes on beyond it.
        variants: methods that are run at DiffFit's learning rate, with the first seed.
        factors: of DiffFit's learning rate, run with the first seed; the first two before `variants`.
        classifier_steps, held_out, max_samples: see `adaptation.Bench`.
        threads: of the process of each domain; the figures depend on them a little, so they are the same everywhere.
    """

    rates: dict[str, tuple[float, float, float]]
    domains: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    sweep_steps: int
    num_images: int
    classifier_steps: int
    held_out: int
    max_samples: int | None = None
    resolution: int = 64
    batch_size: int = 16
    extensions: int = 2
    threads: int = 1
    variants: tuple[str, ...] = ()
    factors: tuple[float, ...] = ()


class Study:
    """The runs of a form, and which of them depend on others."""

    def __init__(self, form: Form, bench: Bench, mixed_precision: str) -> None:
        self.form, self.bench, self.mixed_precision = form, bench, mixed_precision

    def run(self, domain: str, method: str, rate: float, seed: int = 0) -> Run:
        form = self.form
        return Run(
            domain,
            method,
            rate,
            seed,
            form.steps,
            form.num_images,
            resolution=form.resolution,
            batch_size=form.batch_size,
            mixed_precision=self.mixed_precision,
        )

    def base(self, domain: str, seed: int = 0) -> Run:
        """Not trained: γ = 1 and δ = 0 change nothing."""
        return dataclasses.replace(self.run(domain, "DiffFit", 0.0, seed), steps=0)

    def sweep(self, domain: str, method: str, make: bool) -> dict[float, float] | None:
        """The loss at each learning rate of a method, infinite where it diverged; `None` if not all is made.

        Args:
            make: make what is not.
        """
        losses: dict[float, float] = {}
        pending, extensions = list(self.form.rates[method]), self.form.extensions
        while pending:
            rate = pending.pop(0)
            run = dataclasses.replace(self.run(domain, method, rate), steps=self.form.sweep_steps, num_images=0)
            result = self.bench.result(run) if make else self.bench.stored(run)
            if result is None:
                return None
            losses[rate] = result.get("loss", float("inf"))
            if not pending and extensions and (beyond := _beyond(losses)):
                pending, extensions = [beyond], extensions - 1
        return losses

    def best(self, domain: str, method: str, make: bool = False) -> Run | None:
        """A method's run at the best learning rate of its sweep, if that is made."""
        if not self.form.sweep_steps:
            return self.run(domain, method, self.form.rates[method][1])
        losses = self.sweep(domain, method, make)
        return losses and self.run(domain, method, min(losses, key=losses.__getitem__))

    def comparison(self, domain: str, seed: int) -> Iterator[Run]:
        """Makes the sweeps that are needed, and yields the runs of the main table."""
        yield self.base(domain, seed)
        for method in self.form.rates:
            yield dataclasses.replace(self.best(domain, method, make=True), seed=seed)

    def variants(self, domain: str, make: bool = False) -> Iterator[tuple[str, Run]]:
        """Runs of the ablation and their names, all at DiffFit's learning rate but those that change it."""
        difffit = self.best(domain, "DiffFit", make)
        if difffit:
            for factor in self.form.factors[:2]:
                yield f"learning rate x{factor:.2g}", _at(difffit, factor)
            for method in self.form.variants:
                yield method, dataclasses.replace(difffit, method=method)
            for factor in self.form.factors[2:]:
                yield f"learning rate x{factor:.2g}", _at(difffit, factor)

    def tiles(self, run: Run, count: int) -> list[PIL.Image.Image]:
        """`count` of a run's samples, at the same places in every run: those of a place are of one class and seed."""
        grid = PIL.Image.open(self.bench.folder / "samples" / f"{run.name}.png")
        side = grid.width // adaptation.COLUMNS
        places = [divmod(i * run.num_images // count, adaptation.COLUMNS) for i in range(count)]
        return [grid.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y, x in places]

    def real_tiles(self, domain: str, count: int) -> list[PIL.Image.Image]:
        """`count` held-out pictures of the classes of `tiles`."""
        pictures = self.bench.held_out_pictures(domain, self.form.resolution, self.form.num_images)
        return [PIL.Image.fromarray(pictures[i * len(pictures) // count].numpy()) for i in range(count)]

    def make(self, domain: str) -> None:
        """Makes all that is not made of a domain, the most telling first."""
        for seed in self.form.seeds:
            for run in self.comparison(domain, seed):
                self.bench.result(run)
        for _, run in self.variants(domain, make=True):
            self.bench.result(run)


def _beyond(losses: dict[float, float]) -> float | None:
    """The learning rate half a decade beyond the edge at which the lowest loss is, if it is at one."""
    best = min(losses, key=losses.__getitem__)
    if best == max(losses):
        return float(f"{best * 10**0.5:.1g}")
    return float(f"{best / 10**0.5:.1g}") if best == min(losses) else None


def _at(run: Run, factor: float) -> Run:
    return dataclasses.replace(run, learning_rate=float(f"{run.learning_rate * factor:.2g}"))


def stored(study: Study, domain: str) -> Rows:
    """The rows of the main table: the methods that have a run with the first seed, and the seeds that all of them have.

    So methods are always compared at the same seeds, whatever is still to be made.
    """
    best = {"base": study.base(domain)} | {method: study.best(domain, method) for method in study.form.rates}
    made: Rows = {}
    for name, run in best.items():
        of_name = [dataclasses.replace(run, seed=seed) for seed in study.form.seeds] if run else []
        pairs = [(seeded, result) for seeded in of_name if (result := study.bench.stored(seeded))]
        if pairs and pairs[0][0].seed == study.form.seeds[0]:
            made[name] = pairs
    common = set.intersection(*({run.seed for run, _ in pairs} for pairs in made.values())) if made else set()
    return {name: [(run, r) for run, r in pairs if run.seed in common] for name, pairs in made.items()}


def seeds(rows: Rows) -> str:
    """Those that all methods have, for a sentence."""
    return ", ".join(str(run.seed) for run, _ in next(iter(rows.values())))


def center(pairs: list[tuple[Run, dict]], key: str) -> float | None:
    """The median over the seeds, as in the tables; `None` where a run has no such measure."""
    values = [result.get(key) for _, result in pairs]
    return statistics.median(values) if values and None not in values else None


def cells(results: list[dict], keys: Iterable[str]) -> list[str]:
    """Median and range over the results; nothing where they do not have a measure."""
    if any("diverged" in result for result in results):
        return ["diverged" for _ in keys]
    return [
        "" if results[0].get(key) is None else spread([r[key] for r in results], 4 if key == "loss" else 3)
        for key in keys
    ]


def comparison_table(study: Study, domain: str, rows: Rows) -> str:
    keys = [*MEASURES, "cpu_seconds_per_step"]
    lines = []
    for name, made in rows.items():
        run, result = made[0]
        count, rate = result.get("parameters", 0), f"{run.learning_rate:g}"
        if study.form.sweep_steps and run.steps and _beyond(study.sweep(domain, name, make=False)):
            rate += " (edge)"
        head = [name, f"{count:,}", f"{count * 4e-6:.2f}", rate] if run.steps else [name, "", "", ""]
        lines.append([*head, *cells([r for _, r in made], keys)])
    lines.append(["other real images", "", "", "", *cells([study.bench.floor(study.base(domain))], keys)])
    return table(["", "trained", "MB", "learning rate", *MEASURES.values(), "CPU s a step"], lines)


def plot(study: Study, rows: dict[str, Rows]) -> Figure:
    """For each domain: Fréchet distances, sweeps, and samples of the first seed, those of a column from one seed."""
    figure = Figure(figsize=(7 * len(rows), 11), layout="constrained")
    axes = figure.subplots(3, len(rows), squeeze=False, height_ratios=[2, 2, 3]).T
    for (domain, made), (bars, lines, pictures) in zip(rows.items(), axes, strict=True):
        made = {name: pairs for name, pairs in made.items() if not any("diverged" in r for _, r in pairs)}
        made = {textwrap.fill(name, 24): pairs for name, pairs in made.items()}
        for name, pairs in made.items():
            distances = [r["fid"] for _, r in pairs]
            bars.barh(name, statistics.median(distances), color="tab:red" if name == "DiffFit" else "tab:blue")
            bars.plot(distances, [name] * len(distances), "k.", markersize=5)
        bars.invert_yaxis()
        bars.set(title=f"{domain}: Fréchet distance; dots: each seed", xlim=0)
        for name, pairs in made.items():
            losses = name != "base" and study.form.sweep_steps and study.sweep(domain, pairs[0][0].method, make=False)
            if losses:
                points = sorted((rate, loss) for rate, loss in losses.items())
                lines.plot(*zip(*points, strict=True), ".-", label=name, linewidth=3 if name == "DiffFit" else 1)
        lines.set(xscale="log", xlabel="learning rate", ylabel="loss", title=f"after {study.form.sweep_steps} steps")
        if lines.lines:
            best = [min(line.get_ydata()) for line in lines.lines]
            lines.set(ylim=(0.98 * min(best), 1.3 * max(best)))  # a diverging run is not to flatten the others
            lines.legend(fontsize=7)
        strips = {}
        for name, pairs in made.items():
            strips[name] = make_image_grid(study.tiles(pairs[0][0], NUM_SHOWN), 1, NUM_SHOWN)
        if strips:
            pictures.imshow(make_image_grid(list(strips.values()), len(strips), 1))
            side = next(iter(strips.values())).height
            pictures.set_yticks([(i + 0.5) * side for i in range(len(strips))], strips)
        pictures.set_xticks([])
        pictures.spines[:].set_visible(False)
    return figure


def execute(
    description: str | None,
    long: Form,
    short: Form,
    attach: Callable[[str, DiTTransformer2DModel, int], nn.Module],
    report: Callable[[Study, Path], None],
) -> None:
    """What the command line of a benchmark does: makes the runs, those of each domain in a process, and reports.

    Args:
        attach: see `adaptation.Bench`.
        report: publishes a study's results to a folder.
    """
    arguments = parser(description)
    arguments.add_argument(
        "--work_dir", type=user_path, help="where runs are kept; default: runs/quality or quality-short"
    )
    arguments.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="bf16 where it is faster")
    arguments.add_argument("--report", action="store_true", help="make no runs: report those that are made")
    arguments.add_argument("--domain", choices=long.domains, help=argparse.SUPPRESS)  # make its runs, and no report
    args = arguments.parse_args()
    form = short if args.short else long
    torch.set_num_threads(form.threads)
    folder = args.work_dir or ROOT / ("runs/quality-short" if args.short else "runs/quality")
    bench = Bench(folder, attach, form.classifier_steps, form.held_out, form.max_samples)
    study = Study(form, bench, args.mixed_precision)
    if args.domain:
        study.make(args.domain)
        return
    if not args.report:
        for domain in form.domains:
            bench.prepare(domain, form.resolution)
        processes = [subprocess.Popen([sys.executable, *sys.argv, "--domain", domain]) for domain in form.domains]
        if any([process.wait() for process in processes]):
            raise SystemExit("A process failed (see above). What it had done is kept.")
    report(study, output_dir(args))
