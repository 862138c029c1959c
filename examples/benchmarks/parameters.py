"""What each method trains in a DiT-XL/2 (675 M parameters), and the file it makes, without downloading the model.

    python examples/benchmarks/parameters.py [--short]

For the 101 classes of Food-101, as the paper counts. The model is on the meta device: shapes without values. Files
hold what is trained, in float32 as safetensors; they are written to a temporary folder and measured.
`examples/parameters.py` says what DiffFit's own parameters are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from difffit_peft.training.scripts import run_script
from matplotlib.figure import Figure
from methods import METHODS, adapt, dit_xl_2, trained
from report import output_dir, parser, publish, table, target
from safetensors.torch import save_file
from tqdm import tqdm

NUM_CLASSES = 101


def measure(method: str) -> dict[str, int]:
    """Trained parameters, and bytes of the file of them."""
    with torch.device("meta"):
        weights = trained(adapt(method, dit_xl_2(), NUM_CLASSES))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "adapter_model.safetensors")
        save_file({name: torch.zeros(weight.shape) for name, weight in weights.items()}, file)
        return {"parameters": sum(weight.numel() for weight in weights.values()), "bytes": file.stat().st_size}


def plot(results: dict[str, dict[str, int]]) -> Figure:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.add_subplot(xscale="log", xlabel="trained parameters")
    names = [name for name in reversed(results) if results[name]["parameters"]]
    bars = axis.barh(names, [results[name]["parameters"] for name in names])
    axis.bar_label(bars, [f"{results[name]['parameters'] / 1e6:.2f} M" for name in names], padding=3, fontsize=8)
    axis.margins(x=0.15)
    return figure


def main() -> None:
    args = parser(__doc__).parse_args()
    results = {name: measure(name) for name in tqdm(METHODS, desc="methods")}
    base = results["full"]["parameters"]
    rows = [
        [name, f"{r['parameters']:,}", f"{r['parameters'] / base:.3%}", f"{r['bytes'] / 1e6:,.2f}"]
        for name, r in results.items()
    ]
    publish(
        output_dir(args),
        "parameters",
        "Trained parameters and file size",
        f"DiT-XL/2 with one timestep and class embedder, {base:,} parameters; {NUM_CLASSES} classes, of which "
        "all methods but LN tuning train the rows and the null row. Files are float32.\n\n"
        + table(("", "trained parameters", "share", "file, MB"), rows),
        {"num_classes": NUM_CLASSES, "methods": results},
        plot(results),
        [target("DiffFit's trained parameters", "≤", 830_000, results["DiffFit"]["parameters"])],
    )


if __name__ == "__main__":
    run_script(main)
