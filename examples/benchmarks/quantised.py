"""Sampling from a quantised base with an adapter: DiffFit merges into the scales of its rows, LoRA quantises anew.

    pip install -e ".[dev]"
    python examples/benchmarks/quantised.py [--short]

A DiT of random weights at the width of DiT-XL/2, quantised to int8 by torchao and by bitsandbytes, with
adapters of random values. One evaluation of the transformer for 2 images and their 2 unconditional twins, in float32.
All of a kind take turns. After a merge, two questions more: by how much does the output differ from the unmerged one,
and which of the base's int8 weights has the merge changed? LoRA is merged where PEFT does it. PEFT takes the int8
weights of the layer to float, adds, and quantises anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from device import seconds_of
from difffit_peft.training.scripts import run_script
from diffusers import DiTTransformer2DModel, TorchAoConfig
from inference import config, dit_xl_2, evaluation, ratio
from peft import get_peft_model
from report import output_dir, parser, publish, spread, table, target
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig
from tqdm import tqdm

LIBRARIES = ("torchao", "bitsandbytes")
METHODS = ("DiffFit", "LoRA")


def quantised(library: str, folder: Path) -> DiTTransformer2DModel:
    """The base in `folder`, with its linear layers in int8."""
    if library == "bitsandbytes":
        import bitsandbytes

        base = DiTTransformer2DModel.from_pretrained(folder)
        linears = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.Linear)]
        for name, linear in linears:
            int8 = bitsandbytes.nn.Linear8bitLt(
                linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
            )
            int8.load_state_dict(linear.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, int8.to("cpu"))
        base.is_loaded_in_8bit = True  # as Diffusers says it to PEFT
        return base
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return DiTTransformer2DModel.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def int8_of(model: nn.Module) -> dict[str, Tensor]:
    """The int8 numbers of the weights in the blocks, by the name of the layer without what PEFT puts around it."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        weight = getattr(weight, "qdata", getattr(weight, "data", None))  # torchao's, and others'
        if "transformer_blocks" in name and isinstance(weight, Tensor) and weight.dtype == torch.int8:
            found[name.removeprefix("base_model.model.").replace(".base_layer", "")] = weight.clone()
    return found


class Models:
    """The base of a library and, for each method, a model with an adapter, and one with it merged where that works."""

    def __init__(self, library: str, folder: Path) -> None:
        base = quantised(library, folder)
        self.ways: dict[str, Callable[[], Tensor]] = {"base": self._output(base)}
        self.deviation: dict[str, float] = {}
        self.changed: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        before = int8_of(base)
        for method in METHODS:
            torch.manual_seed(0)
            unmerged = get_peft_model(quantised(library, folder), config(method))
            self.ways[f"{method}, unmerged"] = self._output(unmerged)
            expected = self.ways[f"{method}, unmerged"]()
            torch.manual_seed(0)
            merged = get_peft_model(quantised(library, folder), config(method))
            try:
                merged.merge_adapter()
            except ValueError as error:
                self.refused[method] = str(error)
                continue
            way = f"{method}, merged"
            self.ways[way] = self._output(merged)
            self.deviation[way] = ((self.ways[way]() - expected).norm() / expected.norm()).item()
            after = {name: weight for name, weight in int8_of(merged).items() if name in before}
            differ = sum((before[name] != weight).sum().item() for name, weight in after.items())
            self.changed[way] = differ / sum(weight.numel() for weight in after.values())

    @staticmethod
    def _output(model: nn.Module) -> Callable[[], Tensor]:
        run = evaluation(model, 4)
        return lambda: run().sample


@torch.no_grad()
def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(2)  # as in the other benchmarks
    num_layers, rounds = (1, 2) if args.short else (4, 10)
    sections, results, targets = [], {}, []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        dit_xl_2(num_layers).save_pretrained(folder)
        for library in LIBRARIES:
            models = Models(library, Path(folder))
            seconds: dict[str, list[float]] = {way: [] for way in models.ways}
            for turn in tqdm(range(rounds + 1), desc=library):
                for way, run in models.ways.items():
                    measured = seconds_of(run, torch.device("cpu"))
                    if turn:  # the first warms up
                        seconds[way].append(measured)
            rows = [
                [
                    way,
                    spread(values),
                    f"{ratio(seconds, way, 'base'):.3f}",
                    f"{models.deviation[way]:.1e}" if way in models.deviation else "",
                    f"{models.changed[way]:.1%}" if way in models.changed else "",
                ]
                for way, values in seconds.items()
            ]
            rows += [
                [f"{method}, merged", f"refused: {why.split('. ')[0]}", "", "", ""]
                for method, why in models.refused.items()
            ]
            columns = ("", "s", "÷ base", "differs from unmerged by", "int8 weights changed")
            sections.append(f"## int8 by {library}\n\n{table(columns, rows)}")
            results[library] = {
                "seconds": seconds,
                "deviation": models.deviation,
                "changed": models.changed,
                "refused": models.refused,
            }
            share = ratio(seconds, "DiffFit, merged", "base")
            targets.append(target(f"DiffFit merged ÷ base, sampling, int8 by {library}", "≤", 1.01, share))
    about = (
        f"Random weights at DiT-XL/2's width, {num_layers} blocks, a batch of 4 latents, float32 beside int8, {rounds} "
        "rounds in turn; medians (and ranges). Differs: the norm of the difference of the outputs, as a share of the "
        "output's."
    )
    publish(output_dir(args), "quantised", "Quantised bases", "\n\n".join([about, *sections]), results, targets=targets)


if __name__ == "__main__":
    run_script(main)
