"""What DiffFit's adaptation is worth beside that of other methods, at equal steps, and what in DiffFit it is owed to.

    python examples/benchmarks/quality.py            # the long form; stop it and start it again as you like
    python examples/benchmarks/quality.py --report   # tables and plots of what is done so far
    python examples/benchmarks/quality.py --short

Adapts the bundled base, trained on Noto emoji, to Twemoji and to OpenMoji, in two processes of one thread each. Every
run is kept in `--work_dir`, so that the script goes on where it was stopped. All methods train in the same way on the
same batches (`adaptation`), each at its own learning rate: the one of a sweep of short runs, half a decade apart, with
the lowest loss on images that no run trains on. A sweep whose best is at its edge goes on beyond it, twice at most.
"""

import dataclasses
from pathlib import Path

import adaptation
import methods
from difffit_peft import DiffFitConfig
from difffit_peft.families.dit import conditioning
from difffit_peft.training.scripts import run_script
from diffusers import DiTTransformer2DModel
from features import FeatureNetwork
from peft import LoraConfig, get_peft_model
from report import publish, table, target
from study import MEASURES, Form, Rows, Study, cells, center, comparison_table, execute, plot, seeds, stored
from torch import nn

ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
LAYERS = ATTENTION + FEED_FORWARD
PER_TOKEN = "γ on attention and feed-forward, blocks 0-3"  # as published, and on the first layer of feed-forward too

# Learning rates that the sweep of each method starts with. OFT's are those of PEFT's examples and above.
RATES = {
    "full": (1e-4, 3e-4, 1e-3),
    "DiffFit": (3e-3, 1e-2, 3e-2),
    "DiffFit, adaLN": (3e-3, 1e-2, 3e-2),
    "DiffFit r=1": (3e-3, 1e-2, 3e-2),
    PER_TOKEN: (3e-3, 1e-2, 3e-2),
    "BitFit": (3e-3, 1e-2, 3e-2),
    "LoRA r=2": (1e-3, 3e-3, 1e-2),
    "LoRA r=8": (1e-3, 3e-3, 1e-2),
    "IA³": (1e-2, 3e-2, 1e-1),
    "LoRA r=16": (1e-3, 3e-3, 1e-2),
    "OFT": (1e-3, 3e-3, 1e-2),
}

# DiffFit's and BitFit's configs, and those of the ablation, the most telling first.
OF_TABLE = (*methods.DIFFFIT, "BitFit", PER_TOKEN)
CONFIGS = methods.DIFFFIT | {
    "BitFit": {"gamma_modules": []},
    PER_TOKEN: {"gamma_modules": LAYERS, "gamma_layers": [0, 1, 2, 3]},
    "class rows frozen": {"exclude_modules": ["embedding_table"]},
    "r=1, class rows frozen": methods.RANK_1 | {"exclude_modules": ["to_k", "embedding_table"]},
    "r=4": methods.RANK_1 | {"r": 4},
    "r=16": methods.RANK_1 | {"r": 16},
    "γ on attention and feed-forward, all blocks": {"gamma_modules": LAYERS},
    "γ on attention, blocks 0-3": {"gamma_modules": ATTENTION, "gamma_layers": [0, 1, 2, 3]},
    "γ on feed-forward, blocks 0-3": {"gamma_modules": FEED_FORWARD, "gamma_layers": [0, 1, 2, 3]},
    "γ on attention and feed-forward, blocks 4-7": {"gamma_modules": LAYERS, "gamma_layers": [4, 5, 6, 7]},
    "γ on q, blocks 0-3": {"gamma_modules": ["attn1.to_q"], "gamma_layers": [0, 1, 2, 3]},
    "γ on k, blocks 0-3": {"gamma_modules": ["attn1.to_k"], "gamma_layers": [0, 1, 2, 3]},
    "γ on v, blocks 0-3": {"gamma_modules": ["attn1.to_v"], "gamma_layers": [0, 1, 2, 3]},
    "γ on out, blocks 0-3": {"gamma_modules": ["attn1.to_out.0"], "gamma_layers": [0, 1, 2, 3]},
    "γ on attention and feed-forward, blocks 0-1": {"gamma_modules": LAYERS, "gamma_layers": [0, 1]},
    "γ on attention and feed-forward, blocks 0-5": {"gamma_modules": LAYERS, "gamma_layers": [0, 1, 2, 3, 4, 5]},
    "γ on attention and feed-forward, blocks 6-7": {"gamma_modules": LAYERS, "gamma_layers": [6, 7]},
}

LONG = Form(
    rates=RATES,
    domains=("twemoji", "openmoji"),
    seeds=(0, 1),
    steps=200,
    sweep_steps=60,
    num_images=200,
    feature_steps=800,
    num_feature_images=1706,
    variants=tuple(name for name in CONFIGS if name not in OF_TABLE),
    factors=(10**0.5, 10**-0.5, 10.0, 0.1),
)
SHORT = Form(
    rates={method: RATES[method] for method in ("full", "LoRA r=8", "DiffFit", "DiffFit r=1")},
    domains=("twemoji",),
    seeds=(0,),
    steps=30,
    sweep_steps=0,
    num_images=40,
    feature_steps=40,
    num_feature_images=200,
    max_samples=400,
    threads=2,
)


def attach(method: str, model: DiTTransformer2DModel) -> nn.Module:
    """The model to train. The domains have the base's own classes, so the rows of DiffFit and BitFit start from its."""
    if method in CONFIGS:
        config = CONFIGS[method]
        frozen = "embedding_table" in config.get("exclude_modules", [])
        rows = {} if frozen else {"num_classes": adaptation.NUM_CLASSES, "init_class_rows": "base"}
        return get_peft_model(model, DiffFitConfig(**config, **rows))
    if method == "LoRA r=2":  # of twice as many parameters as DiffFit at most, in a DiT-XL/2 too
        conditioning.share(model)
        return get_peft_model(model, LoraConfig(target_modules=methods.LAYERS, r=2, lora_alpha=2))
    return methods.adapt(method, model)


def ablation_table(study: Study, rows: dict[str, Rows]) -> str | None:
    """One run of each variant in each domain, with the first seed; `None` if there is none."""
    variants: dict[str, dict[str, dict]] = {}
    for domain, made in rows.items():
        for name in OF_TABLE:
            if name in made:
                variants.setdefault(name, {})[domain] = made[name][0][1]
        for name, run in study.variants(domain):
            if result := study.bench.stored(run):
                variants.setdefault(name, {})[domain] = result
    if not set(variants) - {*OF_TABLE}:
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
    for name in ("DiffFit", "DiffFit r=1"):
        limit = 2 * rows[name][0][1]["parameters"] if name in distance else 0
        others = [n for n in distance if n not in ("base", PER_TOKEN) and not n.startswith("DiffFit")]
        small = [n for n in others if rows[n][0][1]["parameters"] <= limit]
        best = min(small, key=distance.__getitem__, default=None)
        for other, called in (("full", "full"), (best, f"the best method of at most twice its parameters ({best})")):
            if other is None:
                continue
            share = distance[name] / distance[other] if {name, other} <= set(distance) else None
            targets.append(target(f"Fréchet distance, {domain}: {name} ÷ {called}", "≤", 1, share))
    return targets


def report(study: Study, folder: Path) -> None:
    form = study.form
    rows = {domain: made for domain in form.domains if (made := stored(study, domain))}
    if not rows:
        raise SystemExit(f"{study.bench.folder} has no runs yet: start this script without --report.")
    example = study.base(form.domains[0])
    parts = [
        f"The bundled base, adapted to {' and '.join(rows)} in {form.steps} steps of {example.batch_size} images. "
        f"Median (range) of the runs with seeds {'; '.join(f'{seeds(made)} ({d})' for d, made in rows.items())}. Loss: "
        "that of training, of the "
        "held-out images at fixed noise. Fréchet distance, KID, precision and recall: of "
        f"{form.num_images} samples, guidance {example.guidance_scale:g}, to the held-out images, by "
        f"{FeatureNetwork.num_features} features of a classifier of emoji (`features.py`), real images having been "
        "through the VAE. Distances of so few images compare methods, and mean nothing beside published ones. CPU "
        "seconds were counted on a machine that may have been busy: for times see the section on training speed. "
        "BitFit and DiffFit train the rows of the 98 classes, which start from the base's; PEFT's methods leave them "
        "alone."
    ]
    parts += [f"## {domain}\n\n{comparison_table(study, domain, made)}" for domain, made in rows.items()]
    if ablation := ablation_table(study, rows):
        parts.append(
            f"## Ablation\n\nSeed {form.seeds[0]}. DiffFit has γ as published, in blocks 0-3; with r there is no γ."
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
    title = "Quality at equal steps"
    publish(folder, "quality", title, "\n\n".join(parts), results, plot(study, rows), targets)


if __name__ == "__main__":
    run_script(lambda: execute(__doc__, LONG, SHORT, attach, report))
