"""Several adaptations that belong together: a sweep of learning rates for each method, then runs of all of them.

What the benchmarks of quality and of resolution share: `Form` says how much is done, `Study` does it in order, and the
rest makes tables and plots of what is done so far.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import adaptation
import PIL.Image
import torch
from adaptation import Bench, Run
from difffit_peft.training.scripts import user_path
from diffusers import DiTTransformer2DModel
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from report import ROOT, output_dir, parser, spread, table
from torch import nn

MEASURES = {
    "fid": "Fréchet distance",
    "fid_classifier": "by the classifier",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "recognised": "recognised",
    "memorised": "memorised",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What models are adapted to, and for how long at most.

    Attributes:
        domain: of `examples/avatars/data`.
        images_per_class: to train on; `None`: all that there are.
        steps: of the longest run.
    """

    domain: str
    images_per_class: int | None
    steps: int

    @property
    def name(self) -> str:
        return self.domain + (f", {self.images_per_class} a class" if self.images_per_class else "")


Rows = dict[str, list[tuple[Run, dict]]]
"""For each method the runs that are made, one for each seed, and their results."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How much a long or a short form does.

    Attributes:
        rates: for each method, the learning rates that its sweep starts with; the most telling methods first.
        cells: the most telling first.
        sweep: where learning rates are chosen, and how many steps each run takes; 0: no sweep, the middle one of
            `rates`.
        extensions: how often a sweep whose best learning rate is at its edge goes on beyond it.
        variants: methods that are run at DiffFit's learning rate, with the first seed.
        num_images: samples that are measured.
        classifier_steps, held_out, max_samples: see `adaptation.Bench`.
        threads: the figures depend on them a little.
    """

    rates: dict[str, tuple[float, float, float]]
    cells: tuple[Cell, ...]
    sweep: Cell
    seeds: tuple[int, ...]
    num_images: int
    classifier_steps: int
    held_out: int
    max_samples: int | None = None
    resolution: int = 64
    batch_size: int = 16
    extensions: int = 2
    threads: int = 1
    variants: tuple[str, ...] = ()


class Study:
    """The runs of a form, and which of them depend on others."""

    def __init__(self, form: Form, bench: Bench, mixed_precision: str) -> None:
        self.form, self.bench, self.mixed_precision = form, bench, mixed_precision

    def run(self, cell: Cell, method: str, rate: float, seed: int = 0) -> Run:
        form = self.form
        return Run(
            cell.domain,
            method,
            rate,
            seed,
            cell.steps,
            form.num_images,
            images_per_class=cell.images_per_class,
            resolution=form.resolution,
            batch_size=form.batch_size,
            mixed_precision=self.mixed_precision,
        )

    def base(self, cell: Cell, seed: int = 0) -> Run:
        """Not trained: γ = 1 and δ = 0 change nothing."""
        return dataclasses.replace(self.run(cell, "DiffFit", 0.0, seed), steps=0)

    def sweep(self, method: str, make: bool) -> dict[float, float] | None:
        """The loss at each learning rate of a method, infinite where it diverged; `None` if not all is made.

        Args:
            make: make what is not.
        """
        losses: dict[float, float] = {}
        pending, extensions = list(self.form.rates[method]), self.form.extensions
        while pending:
            rate = pending.pop(0)
            run = dataclasses.replace(self.run(self.form.sweep, method, rate), num_images=0)
            result = self.bench.result(run) if make else self.bench.stored(run)
            if result is None:
                return None
            losses[rate] = result.get("loss", float("inf"))
            if not pending and extensions and (beyond := _beyond(losses)):
                pending, extensions = [beyond], extensions - 1
        return losses

    def best(self, cell: Cell, method: str, make: bool = False) -> Run | None:
        """A method's run at the best learning rate of its sweep, if that is made."""
        if method not in self.form.rates:  # a variant
            difffit = self.best(cell, "DiffFit", make)
            return difffit and dataclasses.replace(difffit, method=method)
        if not self.form.sweep.steps:
            return self.run(cell, method, self.form.rates[method][1])
        losses = self.sweep(method, make)
        return losses and self.run(cell, method, min(losses, key=losses.__getitem__))

    def runs(self, cells: Sequence[Cell], methods: Sequence[str], make: bool = False) -> Iterator[Run]:
        """All runs, the most telling first. Those whose learning rate is not known yet, with the middle one of `rates`.

        Args:
            methods: those to run, variants among them.
            make: make the sweeps that are needed, so that all rates are known.
        """
        for seed in self.form.seeds:
            for cell in cells:
                yield self.base(cell, seed)
            for method in [name for name in self.form.rates if name in methods]:
                for cell in cells:
                    run = self.best(cell, method, make) or self.run(cell, method, self.form.rates[method][1])
                    yield dataclasses.replace(run, seed=seed)
        for method in [name for name in self.form.variants if name in methods]:
            for cell in cells:
                yield self.best(cell, method, make) or self.run(cell, method, self.form.rates["DiffFit"][1])

    def outlook(self, cells: Sequence[Cell], methods: Sequence[str]) -> str:
        """How much is to be done, and how long it will take by what is done."""
        runs = list(self.runs(cells, methods))
        made = {run: result for run in runs if (result := self.bench.stored(run))}
        missing = [run for run in runs if run not in made]
        if not missing:
            return "All runs are made."
        steps, trained = (sum(run.steps for run in runs) for runs in (missing, made))
        seconds = sum(result.get("seconds", 0) for result in made.values())
        left = f"about {steps * seconds / trained / 3600:.1f} hours" if trained else "the first runs will tell how long"
        count = f"{len(missing)} runs of {steps:,} steps in all"
        return f"{count} are to be made, beside the sweeps of learning rates: {left}."

    def make(self, cells: Sequence[Cell], methods: Sequence[str]) -> None:
        for run in self.runs(cells, methods, make=True):
            self.bench.result(run)

    def tiles(self, run: Run) -> PIL.Image.Image:
        """Some of a run's samples at its last step, those of a place of one class and seed in every run."""
        return PIL.Image.open(self.bench.folder / f"{run.name}.webp")

    def real_tiles(self, cell: Cell) -> PIL.Image.Image:
        """Held-out pictures of the classes of `tiles`."""
        pictures = self.bench.held_out_pictures(cell.domain, self.form.resolution, self.form.num_images)
        return adaptation.tiles(pictures)


def _beyond(losses: dict[float, float]) -> float | None:
    """The learning rate half a decade beyond the edge at which the lowest loss is, if it is at one."""
    best = min(losses, key=losses.__getitem__)
    if best == max(losses):
        return float(f"{best * 10**0.5:.1g}")
    return float(f"{best / 10**0.5:.1g}") if best == min(losses) else None


def stored(study: Study, cell: Cell) -> Rows:
    """The rows of a table: the methods that have a run with the first seed, and the seeds that all of them have.

    So methods are always compared at the same seeds, whatever is still to be made. Variants are in no other seed.
    """
    methods = {"base": study.base(cell)} | {method: study.best(cell, method) for method in study.form.rates}
    made: Rows = {}
    for name, run in methods.items():
        of_name = [dataclasses.replace(run, seed=seed) for seed in study.form.seeds] if run else []
        pairs = [(seeded, result) for seeded in of_name if (result := study.bench.stored(seeded))]
        if pairs and pairs[0][0].seed == study.form.seeds[0]:
            made[name] = pairs
    common = set.intersection(*({run.seed for run, _ in pairs} for pairs in made.values())) if made else set()
    rows = {name: [(run, r) for run, r in pairs if run.seed in common] for name, pairs in made.items()}
    for name in study.form.variants:
        run = study.best(cell, name)
        if run and (result := study.bench.stored(run)):
            rows[name] = [(run, result)]
    return rows


def seeds(rows: Rows) -> str:
    """Those that all methods have, for a sentence."""
    return ", ".join(str(run.seed) for run, _ in next(iter(rows.values())))


def center(pairs: list[tuple[Run, dict]], key: str) -> float | None:
    """The median over the seeds, as in the tables; `None` where a run has no such measure."""
    values = [result.get(key) for _, result in pairs]
    return statistics.median(values) if values and None not in values else None


def best_step(result: dict) -> dict:
    """The measures at the step with the lowest Fréchet distance."""
    return min(result["curve"], key=lambda measures: measures["fid"])


def at_best(pairs: list[tuple[Run, dict]]) -> float | None:
    """The Fréchet distance at the best step of each run, the median over the seeds."""
    if not pairs or any("curve" not in result for _, result in pairs):
        return None
    return statistics.median(best_step(result)["fid"] for _, result in pairs)


def cells_of(results: list[dict], keys: Iterable[str]) -> list[str]:
    """Median and range over the results; nothing where they do not have a measure."""
    if any("diverged" in result for result in results):
        return ["diverged" for _ in keys]
    return ["" if results[0].get(key) is None else spread([r[key] for r in results], 3) for key in keys]


def comparison_table(study: Study, cell: Cell, rows: Rows) -> str:
    lines, keys = [], [*MEASURES, "seconds_per_step"]
    by_vae, bundled = (study.bench.floor(study.base(cell), decoded) for decoded in (True, False))
    start = center(rows.get("base", []), "fid")
    for name, made in rows.items():
        run, results = made[0][0], [result for _, result in made]
        count, rate = results[0].get("parameters", 0), f"{run.learning_rate:g}"
        if name in study.form.rates and study.form.sweep.steps and _beyond(study.sweep(name, make=False)):
            rate += " (edge)"
        best = ["", "", ""]
        if run.steps and all("curve" in result for result in results):
            found = [best_step(result) for result in results]
            best = [spread([m["fid"] for m in found], 3), ", ".join(str(m["step"]) for m in found), ""]
            if start is not None:
                best[-1] = f"{(start - at_best(made)) / (start - by_vae['fid']):.0%}"
        head = [name, f"{count:,}", f"{count * 4e-6:.2f}", rate] if run.steps else [name, "", "", ""]
        lines.append([*head, *best, *cells_of(results, keys)])
    for name, measures in (("training images by the VAE", by_vae), ("training images", bundled)):
        lines.append([name, *[""] * 6, *cells_of([measures], keys)])
    columns = ["", "trained", "MB", "learning rate", "best", "at step", "of the way", *MEASURES.values(), "s a step"]
    return table(columns, lines)


def plot(study: Study, rows: dict[Cell, Rows]) -> Figure:
    """For each cell: Fréchet distances over steps, over seconds, and the best one over the size of the file."""
    figure = Figure(figsize=(4.5 * len(rows), 10), layout="constrained")
    axes = figure.subplots(3, len(rows), squeeze=False).T
    for (cell, made), (by_step, by_second, by_size) in zip(rows.items(), axes, strict=True):
        for name, pairs in made.items():
            run, result = pairs[0]
            if "diverged" in result:
                continue
            if not run.steps:
                for axis in (by_step, by_second, by_size):
                    axis.axhline(result["fid"], color="grey", linestyle=":", label=name)
                continue
            steps, distances = [m["step"] for m in result["curve"]], [m["fid"] for m in result["curve"]]
            style = {"label": name, "linewidth": 3 if name == "DiffFit" else 1}
            (line,) = by_step.plot(steps, distances, ".-", **style)
            by_second.plot([step * result["seconds_per_step"] for step in steps], distances, ".-", **style)
            by_size.plot(result["parameters"] * 4e-6, min(distances), "o", color=line.get_color(), label=name)
        by_step.set(title=cell.name, xlabel="steps", ylabel="Fréchet distance", xscale="log")
        by_second.set(xlabel="seconds of training", ylabel="Fréchet distance", xscale="log")
        by_size.set(xlabel="MB of the adapter", ylabel="best Fréchet distance", xscale="log")
        by_step.legend(fontsize=7)
        for axis in (by_step, by_second, by_size):
            axis.xaxis.set_minor_formatter(NullFormatter())  # where a decade is wide, their labels overlap
    return figure


def execute(
    description: str | None,
    name: str,
    long: Form,
    short: Form,
    attach: Callable[[str, DiTTransformer2DModel, int], nn.Module],
    report: Callable[[Study, Path], None],
) -> None:
    """What the command line of a benchmark does: makes the runs, and reports.

    Args:
        name: of the folder of the runs.
        attach: see `adaptation.Bench`.
        report: publishes a study's results to a folder.
    """
    arguments = parser(description)
    arguments.add_argument(
        "--cache_dir", type=user_path, default=ROOT / "runs/study", help="for images, latents, classifiers"
    )
    arguments.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="bf16 where it is faster")
    arguments.add_argument("--report", action="store_true", help="make no runs: report those that are made")
    arguments.add_argument(
        "--cells", nargs="+", type=int, help="make the runs of these alone, 0 for the first; several can go on at once"
    )
    everything = [*long.rates, *long.variants]
    arguments.add_argument("--methods", nargs="+", choices=everything, default=everything, help="and of these alone")
    args = arguments.parse_args()
    form = short if args.short else long
    torch.set_num_threads(form.threads)
    folder = output_dir(args)
    bench = Bench(folder / name, args.cache_dir, attach, form.classifier_steps, form.held_out, form.max_samples)
    study = Study(form, bench, args.mixed_precision)
    if not args.report:
        cells = [form.cells[index] for index in args.cells] if args.cells else form.cells
        print(study.outlook(cells, args.methods))
        study.make(cells, args.methods)
    report(study, folder)
