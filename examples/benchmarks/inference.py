"""Sampling: what an adapter costs, merged and not; loading and switching; many adapters in one batch.

    python examples/benchmarks/inference.py [--short]
    python examples/benchmarks/inference.py --device cuda [--torch_compile] [--batch_sizes 8 32 64 128]

With `--device cuda`: all 28 blocks in bfloat16, each way to sample at each batch size in a fresh process, as
`training_speed.py` does it; then loading and batches of several adapters as below, on the GPU. The rest of this text is
about the CPU.

At the width of DiT-XL/2 with random weights and adapters of random values, without gradients, in float32; sampling in
bfloat16 too, where the processor multiplies matrices as fast in it.

- Sampling: one evaluation of the transformer for 2 images and their 2 unconditional twins, which with guidance is a
  sampling step but for the scheduler's few operations. The base, DiffFit with γ as published, with γ on adaLN and with
  rank 1 in its place, and LoRA, unmerged and merged, take turns on models of 8 blocks (4 with `--short`). The base is a
  plain Diffusers DiT, and so is what `merge_and_unload` makes.
- Loading and switching, by `DiffFitDiTPipeline`, of adapters for all 28 blocks and 101 classes, from files that were
  read before.
- `import difffit_peft`, after Diffusers and PEFT, in fresh processes.
- One batch of 32 samples with an adapter per sample, 1, 8 or 32 different ones, `adapter_names=[...]`, against the same
  batch with one active adapter; 2 blocks.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from device import (
    Measured,
    about_device,
    add_device_arguments,
    check_measured,
    device_table,
    measure,
    measure_all,
    median_seconds,
    product_seconds,
    seconds_of,
)
from difffit_peft import DiffFitConfig, DiffFitDiTPipeline
from difffit_peft.training.scripts import run_script
from diffusers import AutoencoderKL, DDIMScheduler
from matplotlib.figure import Figure
from methods import DIFFFIT, LAYERS, dit_xl_2
from peft import LoraConfig, PeftConfig, get_peft_model
from report import output_dir, parser, publish, spread, table, target
from torch import nn
from tqdm import tqdm

BATCH, MIXED_BATCH, MIXED_BLOCKS, NUM_CLASSES, FULL_DEPTH, SEVERAL = 4, 32, 2, 101, 28, 10
WAYS = ["base", *(f"{method}, {state}" for method in (*DIFFFIT, "LoRA") for state in ("unmerged", "merged"))]

Seconds = dict[str, list[float]]


def config(method: str) -> PeftConfig:
    """Of an adapter whose values are random: an untrained one would be the base."""
    if method == "LoRA":
        return LoraConfig(target_modules=LAYERS, r=8, lora_alpha=8, init_lora_weights=False)
    return DiffFitConfig(num_classes=NUM_CLASSES, init_weights=False, **DIFFFIT[method])


def model_of(way: str, num_layers: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base, or a model with an adapter, unmerged or merged: one of `WAYS`."""
    base = dit_xl_2(num_layers, dtype)
    if way == "base":
        return base
    method, _, state = way.rpartition(", ")
    model = get_peft_model(base, config(method))
    return model.merge_and_unload() if state == "merged" else model


def take_turns(ways: dict[str, Callable[[], object]], rounds: int, desc: str, device: str = "cpu") -> Seconds:
    """Seconds of each way, which take turns; a round to warm up is left out."""
    seconds: Seconds = {name: [] for name in ways}
    for turn in tqdm(range(rounds + 1), desc=desc):
        for name, way in ways.items():
            measured = seconds_of(way, torch.device(device))
            if turn:
                seconds[name].append(measured)
    return seconds


def evaluation(model: nn.Module, batch: int, device: str = "cpu", **kwargs: object) -> Callable[[], object]:
    """One evaluation of a transformer at a batch of latents of 32 x 32."""
    generator = torch.Generator().manual_seed(0)
    model.eval().to(device)
    x_t = torch.randn(batch, 4, 32, 32, generator=generator).to(device, next(model.parameters()).dtype)
    labels = torch.randint(NUM_CLASSES, (batch,), generator=generator).to(device)
    timestep = torch.full((batch,), 500, device=device)
    return lambda: model(x_t, timestep=timestep, class_labels=labels, **kwargs)


def sampling(num_layers: int, rounds: int, dtype: torch.dtype = torch.float32) -> Seconds:
    ways = {way: evaluation(model_of(way, num_layers, dtype), BATCH) for way in WAYS}
    return take_turns(ways, rounds, f"sampling, {dtype}")


def import_seconds(rounds: int) -> list[float]:
    """What importing this package takes after Diffusers and PEFT, in fresh processes; the first warms up."""
    code = "import time, diffusers, peft; start = time.time(); import difffit_peft; print(time.time() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(rounds + 1)]
    return [float(run.stdout.split()[-1]) for run in runs[1:]]


@torch.no_grad()
def on_device(way: str, batch: int, device: str, num_layers: int = FULL_DEPTH, rounds: int = 20) -> Measured | None:
    """Seconds and peak bytes of an evaluation in bfloat16, of one of `WAYS`, or with " + compiled" after it."""

    def make() -> Callable[[], object]:
        model = model_of(way.removesuffix(" + compiled"), num_layers, torch.bfloat16)
        if way.endswith(" + compiled"):
            model.compile()
        return evaluation(model, batch, device)

    return measure(make, torch.device(device), rounds)


def adapters(
    rounds: int, device: str = "cpu", dtype: torch.dtype = torch.float32, num_layers: int = FULL_DEPTH
) -> Seconds:
    """Loading adapters onto a pipeline, and switching between them."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)  # not used
    pipe = DiffFitDiTPipeline(dit_xl_2(num_layers, dtype).to(device), vae, DDIMScheduler())
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(pipe.transformer, config("DiffFit"))
        names = [f"adapter_{i}" for i in range(SEVERAL)]
        for name in names:
            model.save_pretrained(f"{folder}/{name}", save_embedding_layers=False)
        model.unload()

        def load(*some: str) -> None:
            for name in some:
                pipe.load_difffit_weights(Path(folder, name), name)

        steps: dict[str, Callable[[], object]] = {
            "load the first": lambda: load(names[0]),
            "load a second": lambda: load(names[1]),
            "switch": lambda: pipe.set_adapters(names[0]),
            "unload both": pipe.unload_difffit_weights,
            f"load {SEVERAL}, one by one": lambda: load(*names),
            f"unload {SEVERAL}": pipe.unload_difffit_weights,
        }
        return take_turns(steps, rounds, "loading", device)


def mixed(
    method: str,
    rounds: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_layers: int = MIXED_BLOCKS,
    batch: int = MIXED_BATCH,
) -> Seconds:
    """A batch with as many adapters as the keys say, `one active` by the ordinary forward."""
    names = [f"adapter_{i}" for i in range(batch)]
    model = get_peft_model(dit_xl_2(num_layers, dtype).to(device), config(method), names[0])
    for name in names[1:]:
        model.add_adapter(name, config(method))
    model.set_adapter(names[0])
    ways = {"one active": evaluation(model, batch, device)}
    for count in sorted({1, min(8, batch), batch}):
        ways[f"{count}"] = evaluation(model, batch, device, adapter_names=(names[:count] * batch)[:batch])
    return take_turns(ways, rounds, f"mixed batch, {method}", device)


def ratio(seconds: Seconds, numerator: str, denominator: str) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))


def plot(by_precision: dict[str, Seconds], batches: dict[str, Seconds]) -> Figure:
    count = len(by_precision)
    figure = Figure(figsize=(5.5 * (count + 1), 3.2), layout="constrained")
    *left, right = figure.subplots(1, count + 1)
    for axis, (precision, steps) in zip(left, by_precision.items(), strict=True):
        names = list(reversed(steps))
        axis.boxplot([steps[name] for name in names], orientation="horizontal", tick_labels=names)
        axis.set(xlabel="seconds per evaluation", title=f"sampling, {precision}")
    for method, seconds in batches.items():
        right.plot(list(seconds), [ratio(seconds, name, "one active") for name in seconds], marker="o", label=method)
    right.set(xlabel=f"different adapters in a batch of {MIXED_BATCH}", ylabel="÷ one active adapter", ylim=(0, 1.25))
    right.legend(loc="lower right")
    return figure


def adapter_tables(loading: Seconds, batches: dict[str, Seconds], num_layers: int) -> list[str]:
    return [
        f"Adapters of all 28 blocks and {NUM_CLASSES} classes on a pipeline, {len(loading['switch'])} times:",
        table(("", "s"), [[what, spread(values)] for what, values in loading.items()]),
        f"One batch of {MIXED_BATCH} through {num_layers} blocks with several adapters:",
        table(
            ("", "s", "÷ one active"),
            [
                [
                    f"{method}, {name}" + (" different" if name.isdigit() else ""),
                    spread(values),
                    f"{ratio(seconds, name, 'one active'):.3f}",
                ]
                for method, seconds in batches.items()
                for name, values in seconds.items()
            ],
        ),
    ]


def targets_of_sampling(merged: float, unmerged: float, where: str = "") -> list[dict]:
    return [
        target(f"DiffFit merged ÷ base, sampling{where}", "≤", 1.01, merged),
        target(f"DiffFit unmerged ÷ base, sampling{where}", "≤", 1.03, unmerged),
    ]


def targets_of_adapters(loading: Seconds, difffit: Seconds, where: str = "") -> list[dict]:
    return [
        target(f"batch of 32: 32 adapters ÷ one{where}", "≤", 1.10, ratio(difffit, f"{MIXED_BATCH}", "one active")),
        target(f"load a DiT-XL/2 adapter, s{where}", "≤", 0.15, statistics.median(loading["load the first"])),
        target(f"load ten, s{where}", "≤", 1.0, statistics.median(loading[f"load {SEVERAL}, one by one"])),
        target(f"switch between two adapters, s{where}", "≤", 0.05, statistics.median(loading["switch"])),
    ]


@torch.no_grad()
def measure_on_device(args: argparse.Namespace, folder: Path) -> None:
    batches = args.batch_sizes[:1] if args.short else args.batch_sizes
    ways = WAYS + [f"{way} + compiled" for way in WAYS if args.torch_compile]
    found = measure_all(on_device, ways, batches, args.device)
    base, unmerged, merged = map(median_seconds, check_measured(found, "base", "DiffFit, unmerged", "DiffFit, merged"))
    options = {"device": args.device, "dtype": torch.bfloat16, "num_layers": FULL_DEPTH}
    loading = adapters(rounds=3 if args.short else 10, **options)
    mixtures = {method: mixed(method, 3 if args.short else 10, **options) for method in ("DiffFit", "LoRA")}
    about = (
        f"{about_device(args.device)} DiT-XL/2, 28 blocks, random weights in bf16. Latents a "
        "second of one evaluation, median of 20 after 3, as a multiple of the base's, and the peak of allocated "
        "memory. On the right: at the largest of these batches that fits."
    )
    parts = [about, device_table("", "base", found), *adapter_tables(loading, mixtures, FULL_DEPTH)]
    publish(
        folder,
        "inference_gpu",
        "Sampling on a GPU",
        "\n\n".join(parts),
        {"sampling": found, "adapters": loading, "mixed": mixtures},
        targets=[
            *targets_of_sampling(merged / base, unmerged / base, ", on a GPU, bf16"),
            *targets_of_adapters(loading, mixtures["DiffFit"], ", on a GPU, bf16"),
        ],
    )


def main() -> None:
    cli = parser(__doc__)
    add_device_arguments(cli)
    args = cli.parse_args()
    folder = output_dir(args)
    if args.device != "cpu":
        measure_on_device(args, folder)
        return
    torch.set_num_threads(2)  # the targets are for 2 cores
    num_layers = 4 if args.short else 8
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    product = {precision: product_seconds(dtype) for precision, dtype in precisions.items()}
    timed = [precision for precision in precisions if product[precision] <= product["fp32"]]
    with torch.no_grad():
        steps = {name: sampling(num_layers, 3 if args.short else 20, precisions[name]) for name in timed}
        loading = adapters(rounds=3 if args.short else 10)
        methods = ("DiffFit",) if args.short else ("DiffFit", "LoRA")
        batches = {method: mixed(method, rounds=1 if args.short else 6) for method in methods}
    imports = import_seconds(1 if args.short else 5)

    tables = [
        table(
            (precision, "s", "÷ base"),
            [[name, spread(values), f"{ratio(seconds, name, 'base'):.3f}"] for name, values in seconds.items()],
        )
        for precision, seconds in steps.items()
    ]
    parts = [
        f"Random weights at DiT-XL/2's width, float32 but for sampling; medians (and ranges). One evaluation of "
        f"{num_layers} blocks for a batch of {BATCH} latents, {len(steps['fp32']['base'])} rounds in turn"
        + (":" if "bf16" in timed else ", in float32 alone, as bfloat16 is slower on this processor:"),
        *tables,
        *adapter_tables(loading, batches, MIXED_BLOCKS),
        f"`import difffit_peft` after Diffusers and PEFT takes {spread(imports)} s.",
    ]
    publish(
        folder,
        "inference",
        "Sampling, loading, and many adapters in one batch",
        "\n\n".join(parts),
        {"blocks": num_layers, "sampling": steps, "adapters": loading, "mixed": batches, "import": imports},
        plot(steps, batches),
        [
            *(
                made
                for precision, seconds in steps.items()
                for made in targets_of_sampling(
                    ratio(seconds, "DiffFit, merged", "base"),
                    ratio(seconds, "DiffFit, unmerged", "base"),
                    f", {precision}",
                )
            ),
            *targets_of_adapters(loading, batches["DiffFit"]),
            target("import difffit_peft after Diffusers and PEFT, s", "≤", 0.3, statistics.median(imports)),
        ],
    )


if __name__ == "__main__":
    run_script(main)
