"""A thousand adapters on one base: memory, the first image of one that is not loaded, and batches drawn from all.

    python examples/benchmarks/pool.py [--short]

Writes adapters of random values for all 28 blocks and 101 classes of DiT-XL/2 (3 MB each) to a temporary folder, and
draws with them through `AdapterPool`, at random weights, in float32, without guidance, one step an image. The files
were written just before, so they are in the system's cache. A batch has 32 images of 32 adapters drawn from all; those
that are not loaded take the places of others. The base draws the same batch without adapters. `--short`: 100 adapters
and 2 blocks.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from difffit_peft import AdapterPool, DiffFitConfig, DiffFitDiTPipeline
from difffit_peft.training.scripts import run_script
from diffusers import AutoencoderKL, DDIMScheduler
from methods import dit_xl_2
from peft import get_peft_model
from report import output_dir, parser, publish, spread, table, target
from safetensors.torch import load_file, save_file
from tqdm import tqdm

BATCH, MAX_ADAPTERS, NUM_CLASSES = 32, 64, 101


def write_adapters(pipe: DiffFitDiTPipeline, folder: Path, count: int) -> None:
    """`count` folders of an adapter each, alike but for their values."""
    model = get_peft_model(pipe.transformer, DiffFitConfig(num_classes=NUM_CLASSES))
    model.save_pretrained(folder / "adapter-0", save_embedding_layers=False)
    model.unload()
    weights = load_file(folder / "adapter-0/adapter_model.safetensors")
    config = (folder / "adapter-0/adapter_config.json").read_text()
    for index in tqdm(range(count), desc="Writing adapters"):
        own = folder / f"adapter-{index}"
        own.mkdir(exist_ok=True)
        (own / "adapter_config.json").write_text(config)
        save_file({n: w + 0.01 * torch.randn_like(w) for n, w in weights.items()}, own / "adapter_model.safetensors")


def main() -> None:
    args = parser(__doc__).parse_args()
    num_layers, count, rounds = (2, 100, 2) if args.short else (28, 1000, 3)
    torch.set_num_threads(2)  # as in the other benchmarks
    torch.manual_seed(0)
    chosen = random.Random(0)
    process = psutil.Process()
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)  # next to nothing beside the transformer
    pipe = DiffFitDiTPipeline(dit_xl_2(num_layers), vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    how = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}

    def timed(draw: Callable[[], object]) -> float:
        start = time.perf_counter()
        draw()
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as temporary:
        write_adapters(pipe, Path(temporary), count)
        base = [timed(lambda: pipe([0] * BATCH, **how)) for _ in range(rounds + 1)][1:]
        pool = AdapterPool(pipe, temporary, MAX_ADAPTERS)
        names = list(pool.places)
        before = process.memory_info().rss
        first = timed(lambda: pool([0], [names[0]], **how))
        while len(pool.loaded) < MAX_ADAPTERS:
            pool([0] * BATCH, chosen.sample(names, BATCH), **how)
        batches = [
            timed(lambda: pool([0] * BATCH, chosen.sample(names, BATCH), **how))
            for _ in tqdm(range(rounds), desc="Batches drawn from all")
        ]
        after = process.memory_info().rss
        held = sum(p.nbytes for name, p in pipe.transformer.named_parameters() if ".difffit_" in name)
        same = pool.loaded[-BATCH:]
        warm_batches = [timed(lambda: pool([0] * BATCH, same, **how)) for _ in range(rounds + 1)][1:]
        cold, warm = [], []
        for _ in tqdm(range(2 * rounds), desc="Cold and warm"):
            name = chosen.choice([n for n in names if n not in pool.loaded])
            cold.append(timed(lambda name=name: pool([0], [name], **how)))
            warm.append(timed(lambda name=name: pool([0], [name], **how)))

    rate = {
        name: BATCH / statistics.median(s) for name, s in (("base", base), ("all", batches), ("loaded", warm_batches))
    }
    rows = [
        ("first image, adapter not loaded", spread(cold)),
        ("first image, adapter loaded", spread(warm)),
        ("first image of the first adapter, whose layers are put in", spread([first])),
        (f"batch of {BATCH}, the base", spread(base)),
        (f"batch of {BATCH} adapters that are loaded", spread(warm_batches)),
        (f"batch of {BATCH} adapters drawn from all {count}", spread(batches)),
    ]
    markdown = (
        f"{count} adapters of DiT-XL/2's width, {num_layers} blocks, of which at most {MAX_ADAPTERS} are in memory; "
        f"one step an image. Those hold {held / 1e6:.0f} MB. The process grew by {(after - before) / 1e6:.0f} MB until "
        f"the pool was full: what the base's batches had freed was used again.\n\n{table(('', 's'), rows)}\n\n"
        f"Images a second in batches of {BATCH}: the base {rate['base']:.3g}, adapters that are loaded "
        f"{rate['loaded']:.3g}, drawn from all {rate['all']:.3g}."
    )
    results = {"cold": cold, "warm": warm, "first": first, "base": base, "drawn": batches, "loaded": warm_batches}
    results["bytes"] = {"held": held, "grown": after - before}
    goals = [
        target(f"batch of {BATCH} different adapters ÷ the base", "≤", 1.10, rate["base"] / rate["loaded"]),
        target("load an adapter into a pool, s", "≤", 0.15, statistics.median(cold) - statistics.median(warm)),
    ]
    publish(output_dir(args), "pool", f"{count} adapters on one base", markdown, results, targets=goals)


if __name__ == "__main__":
    run_script(main)
