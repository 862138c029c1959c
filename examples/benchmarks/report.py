"""What every benchmark does with its results, and the table of targets over all of them.

    python examples/benchmarks/report.py [--short]

A benchmark calls `parser` for its arguments and `publish` with its results. `publish` writes, to a folder,

- `<name>.json`: `{"name", "machine": {...}, "targets": [...], "results": {...}}`, the figures in full,
- `<name>.png`: the plot,
- `<name>.md`: title, machine, tables and plot, between two markers, in the place of what it wrote there before. What
  stands on the page outside of the markers is written by hand and left as it is.

The folder is `docs/results`; with `--short` it is `runs/benchmarks`, so that a short form never overwrites the figures
of a long one.

This script reads all JSON files in the folder and writes `targets.md` there: which are met and which not. It ends with
status 0 in either case.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import psutil
import torch
from difffit_peft.training.scripts import run_script, user_path
from difffit_peft.writing import write
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
_BOUNDS = {"≤": operator.le, "≥": operator.ge}


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with `--short` and `--output_dir`, to which a benchmark adds its own."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--short", action="store_true", help="a short form, for a first look: more noise, fewer cases")
    result.add_argument(
        "--output_dir",
        type=user_path,
        help="for JSON, plots and tables (default: docs/results, or runs/benchmarks with --short)",
    )
    return result


def output_dir(args: argparse.Namespace) -> Path:
    """The folder the results go to, made if need be."""
    folder = args.output_dir or ROOT / ("runs/benchmarks" if args.short else "docs/results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def machine() -> dict[str, Any]:
    """Processor, cores, threads, memory, versions and date, as they are now."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    of_bf16 = [name for name in ("avx512_bf16", "amx_bf16") if re.search(rf"\b{name}\b", text)]  # products in bf16
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "instructions": ", ".join([torch.backends.cpu.get_cpu_capability(), *of_bf16]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "peft", "diffusers", "difffit_peft")},
        "date": date.today().isoformat(),
    }


def header() -> str:
    """The machine in a line of markdown."""
    m = machine()
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "peft", "diffusers", "difffit_peft"))
    return (
        f"{m['cpu']} ({m['instructions']}), {m['cores']} cores, {m['threads']} threads, {m['memory_gb']} GB; "
        f"Python {m['python']}, {versions}; {m['date']}."
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table: the first column left, the others right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median and range, "1.25 (1.21–1.31)", to `digits` significant digits."""
    median, low, high = statistics.median(values), min(values), max(values)
    return (
        f"{median:#.{digits}g} ({low:#.{digits}g}–{high:#.{digits}g})" if len(values) > 1 else f"{median:#.{digits}g}"
    )


def target(
    what: str, bound: str, limit: float, measured: float | None, unmeasured: str = "not measured"
) -> dict[str, Any]:
    """A row of the table of targets; whether it is met is worked out here: `measured` `bound` `limit`.

    Args:
        what: what was measured, with its unit.
        bound: "≤" or "≥".
        measured: `None` where this form of the benchmark does not measure it: neither met nor missed.
        unmeasured: why that is, and what would measure it.

    Raises:
        ValueError: for another bound.
    """
    if bound not in _BOUNDS:
        raise ValueError(f"bound={bound!r}: must be one of {', '.join(_BOUNDS)}.")
    met = None if measured is None else _BOUNDS[bound](measured, limit)
    why = {"unmeasured": unmeasured} if measured is None else {}
    return {"what": what, "target": f"{bound} {limit:g}", "measured": measured, "met": met} | why


def publish(
    folder: Path,
    name: str,
    title: str,
    markdown: str,
    results: dict[str, Any],
    figure: Figure | None = None,
    targets: Sequence[dict[str, Any]] = (),
) -> None:
    """Writes a benchmark's results (see above) and prints its tables.

    Args:
        folder: what `output_dir` gave.
        name: of the files.
        title: heading of the page, without its mark.
        markdown: tables and the sentences that say what they measure; machine and plot are added here.
        results: anything JSON takes, the raw measurements among it.
        targets: rows that `target` made.
    """
    record = {"name": name, "machine": machine(), "targets": list(targets), "results": results}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write(folder / f"{name}.json", lambda partial: partial.write_text(text, encoding="utf-8"))
    parts = [f"# {title}", header(), markdown.strip()]
    if figure is not None:
        write(folder / f"{name}.png", lambda partial: figure.savefig(partial, dpi=130, format="png"))
        parts.append(f"![{title}]({name}.png)")
    section = "\n\n".join(parts)
    write_section(folder / f"{name}.md", name, section)
    print(f"\n{section}\n")
    if targets:
        print(targets_table(targets))


def write_section(page: Path, name: str, markdown: str) -> None:
    """Puts `markdown` between `<!-- name -->` and `<!-- /name -->` on the page, or these three at its end.

    Raises:
        ValueError: if the page has one of the markers alone, or one of them twice. It is then as it was.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{opening}\n{markdown.strip()}\n{closing}"
    found = re.findall(f"{re.escape(opening)}|{re.escape(closing)}", text)
    if not found:
        text = f"{text.rstrip()}\n\n{section}\n".lstrip()
    elif found == [opening, closing]:
        before, rest = text.split(opening)
        text = before + section + rest.split(closing)[1]
    else:
        raise ValueError(f"{page} has the markers {found}: it must have {opening} and after it {closing}, once each.")
    write(page, lambda partial: partial.write_text(text, encoding="utf-8"))


def targets_table(targets: Iterable[dict[str, Any]]) -> str:
    """What was measured against what was aimed at, met or not."""
    words = {True: "met", False: "**not met**"}
    rows = [
        (t["what"], t["target"], f"{t['measured']:.4g}", words[t["met"]])
        if t["measured"] is not None
        else (t["what"], t["target"], "", t.get("unmeasured", "not measured"))
        for t in targets
    ]
    return table(("", "target", "measured", ""), rows)


def main() -> None:
    args = parser(__doc__).parse_args()
    folder = output_dir(args)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    targets = [t for record in records for t in record["targets"]]
    if not targets:
        raise SystemExit(f"{folder} has no results yet: run the benchmarks first.")
    count = sum(t["met"] is True for t in targets)
    markdown = f"# Targets\n\n{count} of {len(targets)} targets are met.\n\n{targets_table(targets)}"
    write_section(folder / "targets.md", "targets", markdown)
    print(markdown)


if __name__ == "__main__":
    run_script(main)
