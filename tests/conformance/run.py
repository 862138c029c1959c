"""Runs PEFT's own tests with DiffFit in the place of PEFT's methods.

    make conformance

Fetches the source distribution of the installed peft (it holds the tests), puts the lists of `difffit_cases.py` in the
place of those in `test_custom_models.py`, and runs what takes them. Nothing of PEFT is kept in this repository.
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEAST_PASSED = 1000  # the suite cannot pass by running nothing

# Where the lists that parametrise PEFT's tests are complete, and what replaces them.
REPLACEMENTS = {
    "class MLP(nn.Module):": ["ALL_PEFT_CONFIG_CLASSES", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES", "TEST_CASES"],
    "class TestMixedAdapterBatches:": ["MIXED_ADAPTER_TEST_CASES"],
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


def with_difffit(tests: Path) -> Path:
    """A copy of `test_custom_models.py` whose cases are DiffFit's."""
    source = (tests / "test_custom_models.py").read_text()
    for line, names in REPLACEMENTS.items():
        if source.count(f"\n{line}\n") != 1:
            sys.exit(f"test_custom_models.py has no single line {line!r}: look at how this peft arranges its cases.")
        source = source.replace(line, f"from difffit_cases import {', '.join(names)}\n\n\n{line}")
    path = tests / "test_custom_models_with_cases.py"
    path.write_text(source)
    (tests / "__init__.py").touch()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/conformance"))
    args = parser.parse_args()

    version = importlib.metadata.version("peft")
    path = with_difffit(fetch(version, args.cache_dir.resolve()))
    # -k: the tests that got a case of ours; they never need the Hub, whose absence makes PEFT's helpers wait
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(path.parent.parent), str(path)]
    options = ["-q", "-rs", "-k", "DiffFit", "-p", "no:cacheprovider", "-W", "ignore"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([*command, *options], env=environment, stdout=subprocess.PIPE, text=True)
    print(run.stdout)
    passed = int((re.findall(r"(\d+) passed", run.stdout) or [0])[-1])
    if run.returncode:
        sys.exit(run.returncode)
    if passed < LEAST_PASSED:
        sys.exit(f"Only {passed} of PEFT's tests ran and passed: at least {LEAST_PASSED} must.")
    print(f"PEFT {version} conformance: {passed} of its tests pass with DiffFit, none fails.")


if __name__ == "__main__":
    main()
