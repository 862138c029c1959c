"""`python -m difffit_peft SCRIPT ARGS...`: runs a Python script to which PEFT knows DiffFit, as `python SCRIPT` would.

Whatever the script reads an `adapter_config.json` or a `PeftConfig` with then takes DiffFit's too.
"""

import os
import runpy
import sys

import difffit_peft  # noqa: F401 (registers the method)


def main() -> None:
    if len(sys.argv) < 2 or not os.path.isfile(sys.argv[1]):
        given = f"There is no file {sys.argv[1]!r}. " if len(sys.argv) > 1 else ""
        sys.exit(f"{given}Usage: python -m difffit_peft SCRIPT ARGS...")
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as for `python SCRIPT`; it was the working directory
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
