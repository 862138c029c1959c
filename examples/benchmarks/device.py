"""What the benchmarks measure with, on a CPU and on a GPU: clocks, peaks of memory, fresh processes, tables."""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from report import table
from tqdm import tqdm

BUDGETS = (24, 80)  # GB of memory that GPUs come with
WARM_UP = 3  # runs that are not timed, in which a compiled model is compiled

Measured = dict[str, Any]  # "seconds" of each run and "peak_bytes"


class Stopwatch:
    """Times marks: by events of the device, which the host does not wait for, or by the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def mark(self) -> None:
        if self.device.type == "cpu":
            self.marks.append(time.perf_counter())
        else:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        if self.device.type == "cpu":
            return [end - start for start, end in pairs]
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1000 for start, end in pairs]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    watch = Stopwatch(device)
    watch.mark()
    run()
    watch.mark()
    return watch.seconds()[0]


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1])


def measure(make: Callable[[], Callable[[], object]], device: torch.device, rounds: int) -> Measured | None:
    """Seconds and peak bytes of what `make` gives, for a fresh process; `None` where it does not fit into memory.

    The peak is that of what PyTorch allocated on the device, or of the process's resident memory on a CPU.
    """
    try:
        run = make()
        for _ in range(WARM_UP):
            run()
        if device.type != "cpu":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = [seconds_of(run, device) for _ in range(rounds)]
        peak = resident("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated(device)
    except torch.OutOfMemoryError:
        return None
    return {"seconds": seconds, "peak_bytes": peak}


def product_seconds(dtype: torch.dtype) -> float:
    """Of a product of matrices as in these models, on the CPU: whether it is slower in bfloat16 than in float32."""
    x, weight = torch.randn(1024, 1152).to(dtype), torch.randn(4608, 1152).to(dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def add_device_arguments(cli: argparse.ArgumentParser) -> None:
    cli.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    cli.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32, 64, 128], help="with cuda")
    cli.add_argument("--torch_compile", action="store_true", help="after torch.compile too, with cuda")


def measure_all(
    function: Callable[..., Measured | None], names: Iterable[str], batches: Iterable[int], *args: Any
) -> dict[int, dict[str, Measured | None]]:
    """`function(name, batch, *args)` of each name at each batch size, in a fresh process each, by batch and name."""
    found: dict[int, dict[str, Measured | None]] = {batch: {} for batch in batches}
    for batch, name in tqdm([(batch, name) for batch in found for name in names], desc="each alone"):
        found[batch][name] = in_fresh_process(function, name, batch, *args)
    return found


def about_device(device: str) -> str:
    """The GPU, and what it computes products of matrices in."""
    properties = torch.cuda.get_device_properties(device)
    tf32 = "TF32" if torch.backends.cuda.matmul.allow_tf32 else "no TF32"
    bf16 = "in hardware" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated"
    return (
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}; bf16 {bf16}, float32 "
        f"with {tf32}."
    )


def median_seconds(measured: Measured) -> float:
    return statistics.median(measured["seconds"])


def rate_within(budget: float, found: dict[int, dict[str, Measured | None]], name: str) -> float | None:
    """Images a second at the largest batch that takes so many GB; `None` where none does."""
    fits = [batch for batch, results in found.items() if (r := results.get(name)) and r["peak_bytes"] / 1e9 <= budget]
    return max(fits) / median_seconds(found[max(fits)][name]) if fits else None


def device_table(title: str, reference: str, found: dict[int, dict[str, Measured | None]]) -> str:
    """`found[batch][name]` as images a second, as a multiple of `reference`'s, and peaks; then at the largest batch
    that fits into each budget."""
    rates: dict[str, dict[int, float]] = {}
    peaks: dict[str, dict[int, float]] = {}
    for batch, results in found.items():
        for name, result in results.items():
            if result:
                rates.setdefault(name, {})[batch] = batch / median_seconds(result)
                peaks.setdefault(name, {})[batch] = result["peak_bytes"] / 1e9
    rows = []
    for name, of_name in rates.items():
        cells = [
            f"{of_name[batch]:.1f} ({of_name[batch] / rates.get(reference, {}).get(batch, float('nan')):.2f}x, "
            f"{peaks[name][batch]:.1f} GB)"
            if batch in of_name
            else "does not fit"
            for batch in found
        ]
        for budget in BUDGETS:
            fits = [batch for batch in of_name if peaks[name][batch] <= budget]
            cells.append(f"{of_name[max(fits)]:.1f} at {max(fits)}" if fits else "none fits")
        rows.append([name, *cells])
    return table([title, *(f"batch {batch}" for batch in found), *(f"within {b} GB" for b in BUDGETS)], rows)


def check_measured(found: dict[int, dict[str, Measured | None]], *names: str) -> list[Measured]:
    """The results of these at the smallest batch, which must have fitted."""
    batch = min(found)
    results = [found[batch].get(name) for name in names]
    if not all(results):
        raise SystemExit(f"A batch of {batch} does not fit: choose smaller --batch_sizes.")
    return [result for result in results if result]
