"""Seconds and memory of a training step: full fine-tuning, PEFT's methods, DiffFit, and the floor under all of them.

    python examples/benchmarks/training_speed.py [--short]
    python examples/benchmarks/training_speed.py --device cuda [--torch_compile] [--batch_sizes 8 32 64 128]

A method " + int8 base" holds the frozen linear layers of the blocks in int8 and multiplies in it, as
`train_difffit.py --base_precision int8` does; fp8 likewise, where a GPU has it. " + compiled" is after `torch.compile`.

With `--device cuda`: the whole of DiT-XL/2 at 256 and at 512 pixels in bf16, each method at each batch size in a fresh
process: seconds a step by the device's events, and the peak of what PyTorch allocated. From these come images a second
at equal batches, and at the largest batch that fits into 24 and into 80 GB. A batch that does not fit is left out. It
is tested on the CPU, at a tiny size; its figures need a GPU. The rest of this text is about the CPU.

At the width of DiT-XL/2, on batches of 4 latents of 32 x 32: forward (the loss of published DiTs included), backward,
optimiser (AdamW) and EMA of the weights are timed apart.

- Time: all methods take turns, A B C A B C, at 2 and at 4 blocks, in one process. The difference of the two is the time
  of a block, which gives that of 28. Ratios are medians over rounds of the ratio within a round.
- Memory: each method in a fresh process, two steps; the process's peak of resident memory (Linux counts it anew when
  asked) less what it had after its imports. So it is what the machine must have, the allocator's waste included, and
  not a sum over tensors.
- At a batch of 16, too, at 4 blocks: the methods that the targets name, and DiffFit r=1, in turn.
- All 28 blocks, once, for the same methods: the second of two steps, each method in a fresh process.
- Where the time goes: torch's profile of three steps in fp32, by operator, each method in a fresh process.

fp32 is float32 throughout. bf16 is autocast with the frozen weights held in bfloat16 and what is trained in float32,
which is everything in full fine-tuning. On a processor that multiplies matrices faster in float32, bf16 is not timed:
its memory alone is measured, at 4 blocks and, for full fine-tuning and DiffFit (its base in int8, too), at 28. Needs
Linux; the long form needs 20 GB of memory.
"""

from __future__ import annotations

import argparse
import operator
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from device import (
    BUDGETS,
    Measured,
    Stopwatch,
    about_device,
    add_device_arguments,
    check_measured,
    device_table,
    in_fresh_process,
    measure,
    measure_all,
    median_seconds,
    product_seconds,
    rate_within,
    resident,
)
from difffit_peft.training.base_precision import check_base_precision, lower_blocks
from difffit_peft.training.losses import diffusion_loss
from difffit_peft.training.scripts import run_script
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from matplotlib.figure import Figure
from methods import METHODS, adapt, dit_xl_2, hold_frozen_in, trained
from report import output_dir, parser, publish, spread, table, target
from tqdm import tqdm

PHASES = ("forward", "backward", "optimiser", "EMA")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH, LARGER_BATCH, DEPTHS, FULL_DEPTH = 4, 16, (2, 4), 28
PROFILED, NUM_OPERATORS = ["full", "LoRA r=8", "DiffFit", "floor"], 9
OF_TARGETS = ["full", "BitFit", "LoRA r=8", "DiffFit", "DiffFit + int8 base", "DiffFit r=1", "floor"]
OF_MEMORY = ["full", "DiffFit", "DiffFit + int8 base"]  # where bf16 is not timed
_LEFT_OUT = ("LN tuning", "LoRA r=2", "LoRA r=16", "LoKr")  # trains nothing here; as r=8; as LoHa
ALL = [*(name for name in METHODS if name not in _LEFT_OUT), "DiffFit + int8 base", "floor"]

GPU_METHODS = [
    "full",
    "BitFit",
    "LoRA r=8",
    "LoRA r=16",
    "OFT",
    "IA³",
    "DiffFit",
    "DiffFit, adaLN",
    "DiffFit r=1",
    "DiffFit + int8 base",
    "DiffFit + fp8 base",
    "floor",
]
OF_A_GPU = {  # targets that need one
    "full ÷ DiffFit, seconds per step, DiT-XL/2 on a GPU, bf16": 1.8,
    "DiffFit ÷ full, images a second within 24 GB, each at its largest batch, DiT-XL/2 on a GPU, bf16": 3.0,
    "full ÷ DiffFit with its base in int8 or fp8, seconds per step, DiT-XL/2 on a GPU, bf16": 2.6,
}
Steps = list[list[float]]  # seconds of each phase, step by step


class Trainer:
    """A model of random weights with all that a step needs."""

    def __init__(
        self,
        method: str,
        num_layers: int,
        precision: str,
        device: str = "cpu",
        batch: int = BATCH,
        side: int = 32,
    ) -> None:
        method, *options = method.split(" + ")
        self.dtype, self.device = DTYPES[precision], torch.device(device)
        base = dit_xl_2(num_layers, torch.float32 if method == "full" else self.dtype, side)
        self.model = hold_frozen_in(self.dtype, adapt(method, base)).train().to(self.device)
        self.parameters = list(trained(self.model).values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0)
        self.ema = EMAModel(self.parameters)
        self.scheduler = DDPMScheduler()
        generator = torch.Generator().manual_seed(0)
        self.x_0, self.noise = torch.randn(2, batch, 4, side, side, generator=generator).to(self.device)
        self.timesteps, self.labels = torch.randint(1000, (2, batch), generator=generator).to(self.device)
        for option in options:
            if option == "compiled":
                self.model.compile()
            else:
                lower_blocks(self.model, option.removesuffix(" base"))

    def step(self) -> list[float]:
        """One step; the seconds of each phase."""
        watch = Stopwatch(self.device)
        watch.mark()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            x_t = self.scheduler.add_noise(self.x_0, self.noise, self.timesteps)
            output = self.model(x_t, timestep=self.timesteps, class_labels=self.labels).sample
            loss = diffusion_loss(output, self.x_0, self.noise, self.timesteps, self.scheduler).mean()
        watch.mark()
        loss.backward()
        watch.mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        watch.mark()
        self.ema.step(self.parameters)
        watch.mark()
        return watch.seconds()


def take_turns(
    methods: list[str], precision: str, rounds: int, batch: int, depths: tuple[int, ...]
) -> dict[int, dict[str, Steps]]:
    """Steps of all methods at these depths in turn, by depth and method; a round to warm up is left out."""
    trainers = {(depth, name): Trainer(name, depth, precision, batch=batch) for depth in depths for name in methods}
    steps: dict[int, dict[str, Steps]] = {depth: {name: [] for name in methods} for depth in depths}
    for turn in tqdm(range(rounds + 1), desc=f"{precision}, batch {batch}, {len(methods)} methods in turn"):
        for (depth, name), trainer in trainers.items():
            seconds = trainer.step()
            if turn:
                steps[depth][name].append(seconds)
    return steps


def alone(method: str, num_layers: int, precision: str) -> dict[str, Any]:
    """The second of two steps and the peak of resident memory, in bytes; for a fresh process."""
    before = resident("VmRSS")
    trainer = Trainer(method, num_layers, precision)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew: building is not training
    return {"seconds": [trainer.step(), trainer.step()][1], "peak_bytes": resident("VmHWM") - before}


def on_device(
    method: str, batch: int, device: str, side: int, num_layers: int = FULL_DEPTH, rounds: int = 10
) -> Measured | None:
    """Seconds and peak bytes of a step of one method."""
    return measure(lambda: Trainer(method, num_layers, "bf16", device, batch, side).step, torch.device(device), rounds)


def multiplies_in(precision: str, device: str) -> bool:
    try:
        check_base_precision(precision, "bf16", torch.device(device), sharded=False)
    except ValueError:
        return False
    return True


def measure_on_device(args: argparse.Namespace, folder: Path) -> None:
    pixels, batches = ((256,), args.batch_sizes[:1]) if args.short else ((256, 512), args.batch_sizes)
    low = {f"DiffFit + {precision} base": multiplies_in(precision, args.device) for precision in ("int8", "fp8")}
    methods = [name for name in (OF_TARGETS if args.short else GPU_METHODS) if low.get(name, True)]
    if args.torch_compile:
        methods += [f"{name} + compiled" for name in methods]
    found = {side: measure_all(on_device, methods, batches, args.device, side // 8) for side in pixels}
    full, difffit = check_measured(found[pixels[0]], "full", "DiffFit")
    about = (
        f"{about_device(args.device)} DiT-XL/2, 28 blocks, random weights, bf16 autocast, frozen "
        "weights in bf16. Images a second, median of 10 steps after 3, as a multiple of full fine-tuning's, and the "
        "peak of allocated memory. On the right: at the largest of these batches that fits."
    )
    tables = [device_table(f"{side} pixels", "full", of_side) for side, of_side in found.items()]
    smallest = found[pixels[0]][min(batches)]
    fastest = min((median_seconds(r) for name, r in smallest.items() if r and " base" in name), default=None)
    low_ratio = None if fastest is None else median_seconds(full) / fastest
    rates = [rate_within(BUDGETS[0], found[pixels[0]], name) for name in ("DiffFit", "full")]
    of_budget = rates[0] / rates[1] if all(rates) else None
    ratios = (median_seconds(full) / median_seconds(difffit), of_budget, low_ratio)
    targets = [target(what, "≥", limit, value) for (what, limit), value in zip(OF_A_GPU.items(), ratios, strict=True)]
    markdown = "\n\n".join([about, *tables])
    publish(folder, "training_speed_gpu", "Training on a GPU", markdown, {"found": found}, targets=targets)


def profile(method: str) -> dict[str, float]:
    """Seconds of a step by operator, without those of the operators it calls, at 4 blocks in fp32."""
    steps = 3
    trainer = Trainer(method, DEPTHS[1], "fp32")
    trainer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            trainer.step()
    return {event.key: event.self_cpu_time_total / 1e6 / steps for event in profiler.key_averages()}


def ratio(steps: dict[str, Steps], numerator: str, denominator: str) -> float:
    """Of seconds per step: the median over rounds of the ratio within a round."""
    pairs = zip(steps[numerator], steps[denominator], strict=True)
    return statistics.median(sum(a) / sum(b) for a, b in pairs)


def per_step(steps: Steps) -> float:
    return statistics.median(map(sum, steps))


def per_block(times: dict[int, dict[str, Steps]], name: str) -> float:
    low, high = DEPTHS
    return (per_step(times[high][name]) - per_step(times[low][name])) / (high - low)


def extrapolated(times: dict[int, dict[str, Steps]], name: str) -> float:
    return per_step(times[DEPTHS[1]][name]) + (FULL_DEPTH - DEPTHS[1]) * per_block(times, name)


def profile_table(profiles: dict[str, dict[str, float]]) -> str:
    """The operators that take most of any method's step, the rest, and the sum."""
    longest = {key: max(p.get(key, 0.0) for p in profiles.values()) for p in profiles.values() for key in p}
    shown = sorted(longest, key=longest.__getitem__, reverse=True)[:NUM_OPERATORS]
    rows = [[key.removeprefix("aten::"), *(f"{p.get(key, 0.0):.3f}" for p in profiles.values())] for key in shown]
    rows.append(["all others", *(f"{sum(v for k, v in p.items() if k not in shown):.3f}" for p in profiles.values())])
    rows.append(["sum", *(f"{sum(p.values()):.3f}" for p in profiles.values())])
    return table(["s per step", *profiles], rows)


def tables(times: dict, larger: dict, memory: dict, once: dict, profiles: dict, product: dict[str, float]) -> str:
    """`times[precision][depth][method]` are steps, and `larger` those of the larger batch, `memory` and `once` results
    of `alone` by precision and method, `profiles` those of `profile` by method.
    """
    depth = DEPTHS[1]
    rounds = " and ".join(f"{len(by_depth[depth]['floor'])} rounds in {p}" for p, by_depth in times.items())
    parts = [
        f"One training step at DiT-XL/2's width, batch {BATCH}; seconds, median (and range) of {rounds}, in "
        "which the methods take turns. The floor is one forward and one backward of the frozen model. LN tuning is "
        "left out: a DiT's norms have nothing to train. A product of matrices takes "
        f"{product['bf16'] / product['fp32']:.2g} times as long in bf16 as in fp32 on this processor"
        + ("." if "bf16" in times else ", so bf16 is not timed.")
    ]
    if "bf16" not in times:
        peaks = ", ".join(f"{name} {result['peak_bytes'] / 1e9:.2f} GB" for name, result in memory["bf16"].items())
        parts.append(f"Peak memory in bf16, {depth} blocks: {peaks}.")
    for precision, by_depth in times.items():
        steps = by_depth[depth]
        rows = []
        for name in steps:
            phases = [f"{statistics.median(column):.3f}" for column in zip(*steps[name], strict=True)]
            rows.append(
                [
                    name,
                    *phases,
                    spread([sum(step) for step in steps[name]]),
                    f"{ratio(steps, 'full', name):.2f}",
                    f"{ratio(steps, name, 'floor'):.3f}",
                    f"{per_block(by_depth, name):.3f}",
                    f"{extrapolated(by_depth, name):.1f}",
                    *([f"{memory[precision][name]['peak_bytes'] / 1e9:.2f}"] if name in memory[precision] else ["–"]),
                ]
            )
        columns = (
            f"{precision}, {depth} blocks",
            *PHASES,
            "a step",
            "full ÷ it",
            "it ÷ floor",
            "per block",
            f"{FULL_DEPTH} blocks, extrapolated",
            "peak memory, GB",
        )
        parts.append(table(columns, rows))
    rows = [
        [
            f"{name}, {precision}",
            spread([sum(step) for step in own]),
            f"{ratio(by_depth[depth], 'full', name):.2f}",
            f"{ratio(by_depth[depth], name, 'floor'):.3f}",
        ]
        for precision, by_depth in larger.items()
        for name, own in by_depth[depth].items()
    ]
    if rows:
        parts.append(f"A batch of {LARGER_BATCH}, {depth} blocks, in turn, fewer rounds:")
        parts.append(table(("", "a step, s", "full ÷ it", "it ÷ floor"), rows))
    rows = [
        [
            f"{name}, {precision}",
            f"{sum(result['seconds']):.1f}",
            f"{extrapolated(times[precision], name):.1f}" if precision in times else "–",
            f"{sum(results['full']['seconds']) / sum(result['seconds']):.2f}",
            f"{result['peak_bytes'] / 1e9:.2f}",
            f"{results['full']['peak_bytes'] / result['peak_bytes']:.2f}",
        ]
        for precision, results in once.items()
        for name, result in results.items()
    ]
    if rows:
        columns = ("", "a step, s", "extrapolated", "full ÷ it", "peak memory, GB", "full ÷ it")
        parts.append(f"All {FULL_DEPTH} blocks, batch {BATCH}, one step of each in a fresh process:")
        parts.append(table(columns, rows))
    if profiles:
        parts.append(f"Where the time goes, fp32, {depth} blocks, by torch's profiler:")
        parts.append(profile_table(profiles))
    return "\n\n".join(parts)


def plot(times: dict, memory: dict) -> Figure:
    """Phases of a step, and memory, of each precision in which they were measured, method by method."""
    memory = {precision: results for precision, results in memory.items() if results}
    count = len(times) + len(memory)
    figure = Figure(figsize=(5.5 * count, 3.5), layout="constrained")
    axes = iter(figure.subplots(1, count))
    for precision, by_depth in times.items():
        axis, steps = next(axes), by_depth[DEPTHS[1]]
        names = list(reversed(steps))
        left = [0.0] * len(names)
        for phase, label in enumerate(PHASES):
            width = [statistics.median(step[phase] for step in steps[name]) for name in names]
            axis.barh(names, width, left=left, label=label)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axis.axvline(per_step(steps["floor"]), color="black", linewidth=0.8, linestyle=":")
        axis.legend(fontsize=8)
        axis.set(title=f"{precision}, {DEPTHS[1]} blocks", xlabel="seconds per step")
    for precision, results in memory.items():
        axis, names = next(axes), list(reversed(results))
        axis.barh(names, [results[name]["peak_bytes"] / 1e9 for name in names], color="tab:gray")
        axis.set(title=f"{precision}, {DEPTHS[1]} blocks", xlabel="peak memory, GB")
    return figure


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--rounds", type=int, nargs=2, metavar=("FP32", "BF16"), help="rounds of turns (default: 7 7)")
    add_device_arguments(cli)
    args = cli.parse_args()
    if args.device != "cpu":
        measure_on_device(args, output_dir(args))
        return
    rounds = dict(zip(DTYPES, args.rounds or ((2, 1) if args.short else (7, 7)), strict=True))
    methods = OF_TARGETS if args.short else ALL
    folder = output_dir(args)
    os.environ["OMP_NUM_THREADS"] = "2"  # of the processes started here: the targets are for 2 cores
    torch.set_num_threads(2)

    product = {precision: in_fresh_process(product_seconds, dtype) for precision, dtype in DTYPES.items()}
    timed = [precision for precision in DTYPES if product[precision] <= product["fp32"]]
    depth = DEPTHS[1]
    times, larger = {}, {}
    for precision in timed:
        count = rounds[precision]
        times[precision] = in_fresh_process(take_turns, methods, precision, count, BATCH, DEPTHS)
        if not args.short:
            job = (OF_TARGETS, precision, count // 2, LARGER_BATCH, (depth,))
            larger[precision] = in_fresh_process(take_turns, *job)
    if args.short:
        jobs = [(name, depth, "bf16") for name in OF_MEMORY]
    else:
        jobs = [(name, depth, p) for p in DTYPES for name in methods]
        jobs += [(n, FULL_DEPTH, p) for p in DTYPES for n in (OF_TARGETS if p in timed else OF_MEMORY)]
    measured: dict[int, dict[str, dict[str, Any]]] = {d: {p: {} for p in DTYPES} for d in (depth, FULL_DEPTH)}
    for name, num_layers, precision in tqdm(jobs, desc="each alone"):
        measured[num_layers][precision][name] = in_fresh_process(alone, name, num_layers, precision)
    memory, once = measured[depth], {p: results for p, results in measured[FULL_DEPTH].items() if results}
    profiles = {} if args.short else {name: in_fresh_process(profile, name) for name in PROFILED}

    def ratios(precision: str, numerator: str, denominator: str) -> dict[str, float | None]:
        """At the batches of 4 and of 16, and of the one step of all blocks; None where it is not measured."""
        if precision not in timed:
            return {"": None}
        found = {"": ratio(times[precision][depth], numerator, denominator)}
        if larger:
            found[f", batch {LARGER_BATCH}"] = ratio(larger[precision][depth], numerator, denominator)
        if precision in once:
            steps = (sum(once[precision][name]["seconds"]) for name in (numerator, denominator))
            found[f", {FULL_DEPTH} blocks"] = operator.truediv(*steps)
        return found

    targets = []
    for precision, lora in (("fp32", 1.05), ("bf16", 1.02)):
        for what, numerator, denominator, bound, limit in (
            ("of what can be had, full ÷ DiffFit by full ÷ floor", "floor", "DiffFit", "≥", 0.98),
            ("DiffFit ÷ BitFit, seconds per step", "DiffFit", "BitFit", "≤", 1.02),
            ("LoRA r=8 ÷ DiffFit, seconds per step", "LoRA r=8", "DiffFit", "≥", lora),
            ("full ÷ DiffFit with its base in int8, seconds per step", "full", "DiffFit + int8 base", "≥", 2.6),
        ):
            for where, value in ratios(precision, numerator, denominator).items():
                targets.append(target(f"{what}, {precision}{where}", bound, limit, value))
    deepest = FULL_DEPTH if measured[FULL_DEPTH]["bf16"] else depth
    peak = {name: measured[deepest]["bf16"][name]["peak_bytes"] for name in ("full", "DiffFit")}
    what = f"full ÷ DiffFit, peak memory, bf16, {deepest} blocks"
    targets.append(target(what, "≥", 5.5, peak["full"] / peak["DiffFit"]))
    command = "`training_speed.py --device cuda`"
    targets += [target(what, "≥", limit, None, f"needs a GPU: {command}") for what, limit in OF_A_GPU.items()]

    publish(
        folder,
        "training_speed",
        "Training: seconds and memory per step",
        tables(times, larger, memory, once, profiles, product),
        {
            "phases": PHASES,
            "batch": BATCH,
            "steps": times,
            "larger_batch": larger,
            "alone": measured,
            "profiles": profiles,
            "product_seconds": product,
        },
        plot(times, memory),
        targets,
    )


if __name__ == "__main__":
    run_script(main)
