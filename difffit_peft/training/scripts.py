"""What the example scripts share: numbers on the command line, precision, and how a run ends."""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

_HUB_ERRORS = (HTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled)


def positive_int(text: str) -> int:
    return _int_from(1, text)


def non_negative_int(text: str) -> int:
    return _int_from(0, text)


def _int_from(least: int, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
    return int(text)


def seed_int(text: str) -> int:
    value = _int_from(0, text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: NumPy takes whole numbers up to {2**32 - 1}")
    return value


def positive_float(text: str) -> float:
    return _float(text, "above 0", lambda value: 0 < value < math.inf)


def non_negative_float(text: str) -> float:
    return _float(text, "from 0 up", lambda value: 0 <= value < math.inf)


def finite_float(text: str) -> float:
    return _float(text, "that is finite", math.isfinite)


def fraction(text: str) -> float:
    return _float(text, "from 0 to below 1", lambda value: 0 <= value < 1)


def user_path(text: str) -> Path:
    """A path in which `~` is the home folder: shells leave it in `--output_dir=~/adapter`."""
    return Path(text).expanduser()


def _float(text: str, which: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {which}")
    return value


def launched_precision(default: str) -> str:
    """The mixed precision that `accelerate launch`, or its config, was told; `default` if it was told none.

    Without it Accelerate would pass over its own setting wherever a script has one. It says "no" for none, too.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "")
    return told if told in ("fp16", "bf16") else default


def base_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen base under the accelerator's mixed precision.

    Raises:
        ValueError: for fp16 on a CPU, which Accelerate lets through without its casts.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU, and this is a CPU: use bf16, or no for float32.")
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]


class StopSignals:
    """Ctrl-C and SIGTERM call `stop`, which lets a run end after its step. A second Ctrl-C raises `KeyboardInterrupt`.

        with StopSignals(loop.stop) as signals:
            ...
        if loop.stopping:
            raise SystemExit(signals.exit_code)

    Args:
        stop: called once.
        show: say so on stderr.

    Attributes:
        exit_code: 130 or 143, which a shell expects of a process that such a signal ended. 130 if none came: another
            process may have told this one to stop.
    """

    def __init__(self, stop: Callable[[], None], show: bool = True) -> None:
        self.stop, self.show = stop, show
        self.exit_code = 128 + signal.SIGINT
        self._first: float | None = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self.exit_code = now, 128 + number
            self.stop()
            if self.show:  # print() must not be called while it may be running
                os.write(2, b"\nStopping after this step, with a checkpoint; Ctrl-C again to stop now.\n")
        elif number == signal.SIGINT and now - self._first > 1:  # torchrun passes on what the terminal sent to all
            raise KeyboardInterrupt


def run_script(main: Callable[..., Any], parse_args: Callable[[], argparse.Namespace] | None = None) -> None:
    """Runs the `main` of a script, with its arguments, and ends the process as a shell expects it.

    Characters that stdout's encoding lacks are written by name, `\\N{GREEK SMALL LETTER GAMMA}`. A refusal of this
    project or the Hub is one line on stderr and exit code 1, unless there are no arguments, or `--debug` is among them.
    Every other error keeps its traceback. Ctrl-C is exit code 130.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="namereplace")
    args = [] if parse_args is None else [parse_args()]
    try:
        main(*args)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except (ValueError, RuntimeError, OSError, HTTPError) as error:
        refusal = _refusal(error) if args and not args[0].debug else None
        if refusal is None:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {refusal} (--debug shows where.)", file=sys.stderr)
        raise SystemExit(1) from None


def _refusal(error: BaseException) -> str | None:
    """An error in one line, if the Hub is behind it or a `raise` of this project; `None` for any other."""
    chain = [error]
    while cause := chain[-1].__cause__ or (None if chain[-1].__suppress_context__ else chain[-1].__context__):
        chain.append(cause)
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised_in = Path(last.filename).resolve()
    own = raised_in == Path(sys.argv[0]).resolve() or Path(__file__).resolve().parents[1] in raised_in.parents
    behind = next((link for link in chain if isinstance(link, _HUB_ERRORS)), None)
    if behind is None:
        return _in_a_line(error) if own and (last.line or "").startswith("raise") else None
    reason = _in_a_line(behind)
    if isinstance(behind, HTTPError) and not hasattr(behind, "response"):  # no answer
        reason = f"The Hub at {constants.ENDPOINT} cannot be reached: {reason}."
    return reason if behind is error else f"{_in_a_line(error)} {reason}"


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())
