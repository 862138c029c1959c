"""The results of PEFT's own comparison of methods on image generation, as a table, best first.

    python examples/benchmarks/peft_comparison.py peft/method_comparison/image-gen/results

Reads the JSON files that PEFT's `run.py` writes to `results` or `temporary_results`. docs/peft-comparison.md has the
published table, and says how to run the script with DiffFit.
"""

import argparse
import json
import math
from typing import Any

from difffit_peft.training.scripts import run_script, user_path

NOT_SAVED = 99_999_999  # what run.py writes for the size of a file that it could not save


def row(result: dict[str, Any]) -> list[str]:
    """The cells of one experiment; a dash for what was not measured."""
    run, train = result["run_info"], result["train_info"]
    last = train["metrics"][-1]
    drift, memory, size = last["drift"], train["accelerator_memory_max"], train["file_size"]
    return [
        run["experiment_name"],
        f"{train['num_trainable_params']:,}",
        f"{last['test dino_similarity']:.3f}",
        "–" if math.isnan(drift) else f"{drift:.3f}",
        f"{last['train loss']:.3f}",
        f"{memory / 2**30:.1f}" if memory else "–",
        f"{train['train_time']:,.0f}",
        "–" if size == NOT_SAVED else f"{size / 1e6:,.3f}",
        run["created_at"][:10],
    ]


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, the most similar first."""
    results = sorted(results, key=lambda result: -result["train_info"]["metrics"][-1]["test dino_similarity"])
    names = ["similarity ↑", "drift ↓", "loss", "memory, GiB", "training, s", "file, MB", "run on"]
    lines = [f"| experiment | trained parameters | {' | '.join(names)} |", "| --- |" + " ---: |" * 8]
    return "\n".join([*lines, *(f"| {' | '.join(row(result))} |" for result in results)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=user_path, help="a folder of JSON files of PEFT's method_comparison/image-gen")
    folder = parser.parse_args().results
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    finished = [result for result in results if result["train_info"]["status"] == "success"]
    if not finished:
        parser.error(f"{folder} holds no result of a finished run: give the folder that PEFT's run.py writes to.")
    print(table(finished))


if __name__ == "__main__":
    run_script(main)
