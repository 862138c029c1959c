"""Sampling: what an adapter costs, merged and not; loading and switching; many adapters in one batch.

    python examples/benchmarks/inference.py [--short]

At the width of DiT-XL/2 with random weights and adapters of random values, in float32, without gradients.

- Sampling: one evaluation of the transformer for 2 images and their 2 unconditional twins, which with guidance is a
  sampling step but for the scheduler's few operations. The base, DiffFit with γ as published, with γ on adaLN and with
  rank 1 in its place, and LoRA, unmerged and merged, take turns on models of 8 blocks (4 with `--short`). The base is a
  plain Diffusers DiT, and so is what `merge_and_unload` makes.
- Loading and switching, by `DiffFitDiTPipeline`, of adapters for all 28 blocks and 101 classes, from files that were
  read before.
- One batch of 32 samples with an adapter per sample, 1, 8 or 32 different ones, `adapter_names=[...]`, against the same
  batch with one active adapter; 2 blocks.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from difffit_peft import DiffFitConfig, DiffFitDiTPipeline
from difffit_peft.training.scripts import run_script
from diffusers import AutoencoderKL, DDIMScheduler
from matplotlib.figure import Figure
from methods import DIFFFIT, LAYERS, dit_xl_2
from peft import LoraConfig, PeftConfig, get_peft_model
from report import output_dir, parser, publish, spread, table, target
from torch import nn
from tqdm import tqdm

BATCH, MIXED_BATCH, MIXED_BLOCKS, NUM_CLASSES = 4, 32, 2, 101

Seconds = dict[str, list[float]]


def config(method: str) -> PeftConfig:
    """Of an adapter whose values are random: an untrained one would be the base."""
    if method == "LoRA":
        return LoraConfig(target_modules=LAYERS, r=8, lora_alpha=8, init_lora_weights=False)
    return DiffFitConfig(num_classes=NUM_CLASSES, init_weights=False, **DIFFFIT[method])


def take_turns(ways: dict[str, Callable[[], object]], rounds: int, desc: str) -> Seconds:
    """Seconds of each way, which take turns; a round to warm up is left out."""
    seconds: Seconds = {name: [] for name in ways}
    for turn in tqdm(range(rounds + 1), desc=desc):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def evaluation(model: nn.Module, batch: int, **kwargs: object) -> Callable[[], object]:
    """One evaluation of a transformer at a batch of latents of 32 x 32."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(batch, 4, 32, 32, generator=generator)
    labels = torch.randint(NUM_CLASSES, (batch,), generator=generator)
    timestep = torch.full((batch,), 500)
    model.eval()
    return lambda: model(x_t, timestep=timestep, class_labels=labels, **kwargs)


def sampling(num_layers: int, rounds: int) -> Seconds:
    models = {"base": dit_xl_2(num_layers)}
    for method in (*DIFFFIT, "LoRA"):
        models[f"{method}, unmerged"] = get_peft_model(dit_xl_2(num_layers), config(method))
        models[f"{method}, merged"] = get_peft_model(dit_xl_2(num_layers), config(method)).merge_and_unload()
    return take_turns({name: evaluation(model, BATCH) for name, model in models.items()}, rounds, "sampling")


def adapters(rounds: int) -> Seconds:
    """Loading adapters onto a pipeline, and switching between them."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)  # not used
    pipe = DiffFitDiTPipeline(dit_xl_2(), vae, DDIMScheduler())
    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(pipe.transformer, config("DiffFit"))
        for name in ("a", "b"):
            model.save_pretrained(f"{folder}/{name}", save_embedding_layers=False)
        model.unload()
        seconds: Seconds = {"load the first": [], "load a second": [], "switch": [], "unload both": []}

        def timed(what: str, function: Callable[..., object], *args: object) -> None:
            start = time.perf_counter()
            function(*args)
            seconds[what].append(time.perf_counter() - start)

        for _ in tqdm(range(rounds + 1), desc="loading"):
            timed("load the first", pipe.load_difffit_weights, Path(folder, "a"), "a")
            timed("load a second", pipe.load_difffit_weights, Path(folder, "b"), "b")
            timed("switch", pipe.set_adapters, "a")
            timed("unload both", pipe.unload_difffit_weights)
    return {what: values[1:] for what, values in seconds.items()}


def mixed(method: str, rounds: int) -> Seconds:
    """A batch with as many adapters as the keys say, `one active` by the ordinary forward."""
    names = [f"adapter_{i}" for i in range(MIXED_BATCH)]
    model = get_peft_model(dit_xl_2(MIXED_BLOCKS), config(method), names[0])
    for name in names[1:]:
        model.add_adapter(name, config(method))
    model.set_adapter(names[0])
    ways = {"one active": evaluation(model, MIXED_BATCH)}
    for count in (1, 8, MIXED_BATCH):
        ways[f"{count}"] = evaluation(model, MIXED_BATCH, adapter_names=(names[:count] * MIXED_BATCH)[:MIXED_BATCH])
    return take_turns(ways, rounds, f"mixed batch, {method}")


def ratio(seconds: Seconds, numerator: str, denominator: str) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))


def plot(steps: Seconds, batches: dict[str, Seconds]) -> Figure:
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.boxplot([steps[name] for name in reversed(steps)], orientation="horizontal", tick_labels=list(reversed(steps)))
    left.set(xlabel="seconds per evaluation", title="sampling")
    for method, seconds in batches.items():
        right.plot(list(seconds), [ratio(seconds, name, "one active") for name in seconds], marker="o", label=method)
    right.set(xlabel=f"different adapters in a batch of {MIXED_BATCH}", ylabel="÷ one active adapter", ylim=(0, None))
    right.legend()
    return figure


def main() -> None:
    args = parser(__doc__).parse_args()
    folder = output_dir(args)
    torch.set_num_threads(2)  # the targets are for 2 cores
    num_layers = 4 if args.short else 8
    with torch.no_grad():
        steps = sampling(num_layers, rounds=3 if args.short else 20)
        loading = adapters(rounds=3 if args.short else 10)
        methods = ("DiffFit",) if args.short else ("DiffFit", "LoRA")
        batches = {method: mixed(method, rounds=1 if args.short else 6) for method in methods}

    parts = [
        f"Random weights at DiT-XL/2's width, float32; medians (and ranges). One evaluation of {num_layers} blocks for "
        f"a batch of {BATCH} latents, {len(steps['base'])} rounds in turn:",
        table(
            ("", "s", "÷ base"),
            [[name, spread(values), f"{ratio(steps, name, 'base'):.3f}"] for name, values in steps.items()],
        ),
        f"Adapters of all 28 blocks and {NUM_CLASSES} classes on a pipeline, {len(loading['switch'])} times:",
        table(("", "s"), [[what, spread(values)] for what, values in loading.items()]),
        f"One batch of {MIXED_BATCH} through {MIXED_BLOCKS} blocks with several adapters:",
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
    difffit = batches["DiffFit"]
    publish(
        folder,
        "inference",
        "Sampling, loading, and many adapters in one batch",
        "\n\n".join(parts),
        {"blocks": num_layers, "sampling": steps, "adapters": loading, "mixed": batches},
        plot(steps, batches),
        [
            target("DiffFit merged ÷ base, sampling", "≤", 1.01, ratio(steps, "DiffFit, merged", "base")),
            target("DiffFit unmerged ÷ base, sampling", "≤", 1.03, ratio(steps, "DiffFit, unmerged", "base")),
            target("batch of 32: 32 adapters ÷ one", "≤", 1.10, ratio(difffit, f"{MIXED_BATCH}", "one active")),
            target("load a DiT-XL/2 adapter, s", "≤", 0.5, statistics.median(loading["load the first"])),
            target("switch between two adapters, s", "≤", 0.05, statistics.median(loading["switch"])),
        ],
    )


if __name__ == "__main__":
    run_script(main)
