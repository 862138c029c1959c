"""What docs/peft-comparison.md gives to PEFT's script, and the table of what the script writes."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from peft import PeftConfig, get_peft_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "peft-comparison.md").read_text()
SCRIPT = ROOT / "examples" / "benchmarks" / "peft_comparison.py"


@pytest.mark.skipif(not hasattr(diffusers, "Flux2KleinPipeline"), reason="needs Diffusers 0.37")
@pytest.mark.parametrize("experiment", ["default", "new-biases"])
def test_the_configs_of_the_page_train_what_it_says(tmp_path, experiment):
    """At full size, on the meta device, through PEFT's own reading of `adapter_config.json`."""
    files = dict(re.findall(r"cat > experiments/difffit/flux2-klein-(\S+) <<'END'\n(.+)\nEND", PAGE))
    shape = json.loads(re.search(r"```json\n(.+)\n```", PAGE)[1])
    (tmp_path / "adapter_config.json").write_text(files[f"{experiment}/adapter_config.json"])
    with torch.device("meta"):
        base = getattr(diffusers, shape.pop("_class_name"))(**shape)
        model = get_peft_model(base, PeftConfig.from_pretrained(tmp_path))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    assert f"| **difffit/flux2-klein-{experiment}** | {count:,} |" in PAGE
    assert (f"**{count:,}**" if experiment == "default" else f"{count:,} parameters in all") in PAGE
    torch.optim.AdamW(trained, **json.loads(files["$name/training_params.json"])["optimizer_kwargs"])


def result(name: str, similarity: float, drift: float, **train) -> dict:
    last = {"step": 2, "test dino_similarity": similarity, "drift": drift, "train loss": 0.5}
    info = {"status": "success", "num_trainable_params": 1234, "accelerator_memory_max": 3 * 2**29, "train_time": 61.4}
    info |= {"file_size": 5_000_000, "metrics": [{"step": 1}, last]} | train
    return {"run_info": {"experiment_name": name, "created_at": "2026-06-09T16:25:46+00:00"}, "train_info": info}


def run(folder: Path) -> subprocess.CompletedProcess:
    """Into a pipe of Windows, which lacks the arrows of the table's head."""
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    return subprocess.run(
        [sys.executable, SCRIPT, folder], capture_output=True, text=True, encoding="cp1252", env=environment
    )


def test_the_table(tmp_path):
    """The best first; runs that were cancelled have no result."""
    unmeasured = {"accelerator_memory_max": 0, "file_size": 99_999_999}
    results = [result("a/x", 0.25, math.nan, **unmeasured), result("b/x", 0.75, 0.125)]
    for i, each in enumerate([*results, result("c/x", 0.9, 0.1, status="canceled", metrics=[])]):
        (tmp_path / f"{i}.json").write_text(json.dumps(each))
    assert run(tmp_path).stdout.splitlines()[2:] == [
        "| b/x | 1,234 | 0.750 | 0.125 | 0.500 | 1.5 | 61 | 5.000 | 2026-06-09 |",
        "| a/x | 1,234 | 0.250 | – | 0.500 | – | 61 | – | 2026-06-09 |",
    ]


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_a_folder_without_results_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    process = run(tmp_path / folder)
    assert process.returncode == 2 and process.stdout == ""
    assert f"peft_comparison.py: error: {tmp_path / folder} holds no result of a finished run" in process.stderr
