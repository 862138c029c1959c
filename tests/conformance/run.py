"""Runs PEFT's own tests with DiffFit in the place of PEFT's methods.

    make conformance

Fetches the source distribution of the installed peft (it holds the tests), puts what is in `difffit_cases.py` in the
place of PEFT's cases and config classes, and runs the tests that this says something about. Nothing of PEFT is kept in
this repository. `test_torch_compile.py`, which takes configs too, is left out: all of it needs a model, a tokenizer and
a dataset from the Hub, and PEFT runs it by hand.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEAST_PASSED = 1300  # the suite cannot pass by running nothing

# In each file, what replaces the names on the left, put in before this line (where they are complete, or imported).
REPLACEMENTS = {
    "test_custom_models.py": {
        "class MLP(nn.Module):": "ALL_PEFT_CONFIG_CLASSES, MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES, TEST_CASES",
        "class TestMixedAdapterBatches:": "MIXED_ADAPTER_TEST_CASES",
    },
    "test_mixed.py": {"class SimpleNet(nn.Module):": "difffit_config as LoHaConfig"},
    "test_low_level_api.py": {"class DummyModel(torch.nn.Module):": "difffit_config as LoraConfig"},
    "test_tuners_utils.py": {"class MLP(nn.Module):": "difffit_config as LoraConfig"},
}

# Which tests of a file run, and why not the others.
SELECTED = {
    "test_custom_models.py": "DiffFit",  # the tests that got a case of ours
    "test_mixed.py": "not decoder_model",  # needs the Hub
    # the others need the Hub, or are about the names of LoRA's weights and shapes
    "test_low_level_api.py": "(get_and_set_peft or named_like_peft or preserves_input or succeeds_for_normal)"
    " and not name_same_as_module",  # we refuse such names of adapters: PEFT saves others without those weights
    "test_tuners_utils.py": "(TestTargetedModuleNames or TestExcludedModuleNames or TestModelAndLayerStatus"
    " or TestTunerStateDictKeyPrefixes)"
    " and not (realistic or bnb or transformer or prefix_tuning or adaption_prompt"  # need the Hub or a GPU
    " or large or irregular or with_injected_layers or trainable_tokens"  # train embeddings
    " or target_parameters or layers_to_transform"  # select what LoRA can select
    " or module_type_small or adapter_model_type or peft_types or nb_params or status_with_modules_to_save"
    " or prefixes_lora or select_correct or injected_layers_only or name_narrowing or inside_auxiliary"  # LoRA's names
    " or modules_excluded or modules_matched or only_modules_to_save)",  # expect the words of PEFT's refusals, not ours
}


def fetch(version: str, cache_dir: Path) -> Path:
    """The `tests` folder of PEFT's source distribution."""
    folder = cache_dir / f"peft-{version}"
    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", f"peft=={version}"]
        subprocess.run([*pip, "-d", str(cache_dir)], check=True)
        partial = cache_dir / f"peft-{version}.partial"
        with tarfile.open(cache_dir / f"peft-{version}.tar.gz") as archive:
            archive.extractall(partial, filter="data")
        (partial / f"peft-{version}").rename(folder)
    return folder / "tests"


def with_difffit(tests: Path) -> dict[str, Path]:
    """Copies of PEFT's test files whose cases are DiffFit's, by the names of the files."""
    (tests / "__init__.py").touch()
    paths = {}
    for name, imports in REPLACEMENTS.items():
        source = (tests / name).read_text()
        for line, names in imports.items():
            if source.count(f"\n{line}\n") != 1:
                sys.exit(f"{name} has no single line {line!r}: look at how this peft arranges its cases.")
            source = source.replace(line, f"from difffit_cases import {names}\n\n\n{line}")
        paths[name] = tests / name.replace(".py", "_with_our_cases.py")
        paths[name].write_text(source)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/conformance"))
    args = parser.parse_args()

    version = importlib.metadata.version("peft")
    paths = with_difffit(fetch(version, args.cache_dir.resolve()))
    environment = os.environ | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    total = Counter()
    for name, path in paths.items():
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(path.parent.parent), str(path)]
        options = ["-q", "-rs", "-k", SELECTED[name], "-p", "no:cacheprovider", "-W", "ignore"]
        run = subprocess.run([*command, *options], env=environment, stdout=subprocess.PIPE, text=True)
        print(f"{name}\n{run.stdout}", flush=True)
        if run.returncode:
            sys.exit(run.returncode)
        total.update({kind: int(n) for n, kind in re.findall(r"(\d+) (passed|skipped|deselected)", run.stdout)})
    if total["passed"] < LEAST_PASSED:
        sys.exit(f"Only {total['passed']} of PEFT's tests ran and passed: at least {LEAST_PASSED} must.")
    print(
        f"PEFT {version} conformance: {total['passed']} of its tests pass with DiffFit, none fails; {total['skipped']} "
        f"are skipped by PEFT's own rules (reasons above), {total['deselected']} take no config or say nothing of "
        "DiffFit (reasons in tests/conformance/run.py)."
    )


if __name__ == "__main__":
    main()
