"""What all example scripts do at a terminal: what they print where, what they refuse, how they end."""

import ast
import io
import logging
import os
import signal
import subprocess
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

import PIL.Image
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import make_pipeline
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from difffit_peft import DiffFitConfig
from difffit_peft.training import scripts, visualize

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def console(encoding: str, main) -> str:
    """What a script with this `main` writes to a stdout of that encoding."""
    before, sys.stdout = sys.stdout, io.TextIOWrapper(io.BytesIO(), encoding)
    try:
        scripts.run_script(main)
        sys.stdout.flush()
        return sys.stdout.buffer.getvalue().decode(encoding)
    finally:
        sys.stdout = before


# The console


def test_help_in_a_windows_pipe_and_nothing_beside_it():
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "train_difffit.py"), "--help"]
    process = subprocess.run(command, capture_output=True, env=environment, timeout=600)
    assert (process.returncode, process.stderr) == (0, b"")
    assert "--gamma_modules" in process.stdout.decode("cp1252")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_an_encoding_lacks_is_named(encoding):
    shown = console(encoding, lambda: print("γ, ±, 🍎"))
    if encoding == "utf-8":
        assert shown == "γ, ±, 🍎\n"
    else:
        plus_minus = "±" if encoding == "cp1252" else r"\N{PLUS-MINUS SIGN}"
        assert shown == rf"\N{{GREEK SMALL LETTER GAMMA}}, {plus_minus}, \N{{RED APPLE}}" + "\n"


def first_import(path: Path) -> str | None:
    """Which a file imports first, itself or by a neighbour: this package, or one whose import it keeps quiet."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
        for root in (name.split(".")[0] for name in names):
            if root in ("difffit_peft", "diffusers", "peft", "transformers"):
                return root
            if root and (path.parent / f"{root}.py").is_file() and (found := first_import(path.parent / f"{root}.py")):
                return found
    return None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_script_is_quiet_and_prints_in_any_encoding(path):
    assert first_import(path) == "difffit_peft"
    assert ast.unparse(ast.parse(path.read_text(encoding="utf-8")).body[-1].body[0]).startswith("run_script(")


def test_paths_may_start_in_the_home_folder(monkeypatch):
    """Shells leave the `~` in `--output_dir=~/adapter`."""
    monkeypatch.setenv("HOME", "/home/of/someone")
    assert scripts.user_path("~/adapter") == Path("/home/of/someone/adapter")
    for path in EXAMPLES.rglob("*.py"):
        assert "type=Path" not in path.read_text(encoding="utf-8"), path


NOISE = [
    ("torchao", "Failed to load /x/torchao/_C_mxfp8.abi3.so: Could not load this library"),
    ("torch.utils._pytree", "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by torch"),
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: No module named"),
    (
        "diffusers.quantizers.torchao.torchao_quantizer",
        "Unable to import `torchao` Tensor objects. This may affect loading checkpoints serialized with `torchao`",
    ),
    (
        "diffusers.pipelines.pipeline_utils",
        "Expected types for id2label: (dict[int, str], <class 'NoneType'>), got typing.Dict[str, str].",
    ),
]
REAL = {
    "torchao": "Failed to load the config",
    "torch.utils._pytree": "<enum 'X'> is already registered as pytree node.",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_8bit",
    "diffusers.quantizers.torchao.torchao_quantizer": "torchao is too old",
    "diffusers.pipelines.pipeline_utils": "Expected types for vae: (AutoencoderKL,), got UNet2DModel.",
}


@pytest.mark.parametrize(("name", "noise"), NOISE)
def test_only_noise_is_kept_off_the_console(name, noise):
    def passes(message: str) -> bool:
        record = logging.LogRecord(name, logging.WARNING, "file.py", 1, message, None, None)
        return bool(logging.getLogger(name).filter(record))

    assert not passes(noise) and passes(REAL[name])


# Refusals


def refused(main, *flags: str) -> None:
    parser = ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    scripts.run_script(main, lambda: parser.parse_args(flags))


def test_a_refusal_is_one_line(capsys):
    def main(args: Namespace) -> None:
        DiffFitConfig(r=-1)

    with pytest.raises(SystemExit) as error:
        refused(main)
    assert error.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: r=-1" in line and line.endswith("(--debug shows where.)")
    with pytest.raises(ValueError, match="r=-1"):
        refused(main, "--debug")


def test_other_errors_keep_their_traceback():
    with pytest.raises(ValueError, match="invalid literal"):
        refused(lambda args: int("a mistake of ours"))
    with pytest.raises(ValueError, match="r=-1"):  # no arguments, and so no --debug
        scripts.run_script(lambda: DiffFitConfig(r=-1))


@pytest.mark.parametrize("least", [0, 1])
def test_numbers_on_the_command_line(least, capsys):
    parser = ArgumentParser()
    parser.add_argument("--number", type=scripts.positive_int if least else scripts.non_negative_int)
    assert parser.parse_args(["--number", "7"]).number == 7
    for wrong in (str(least - 1), "x", "1.5"):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--number={wrong}"])
        assert f"'{wrong}' is not a whole number from {least} up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "right", "wrong", "message"),
    [
        (
            scripts.seed_int,
            ["0", str(2**32 - 1)],
            ["-1", str(2**32), "1.5"],
            "is not a (seed: NumPy takes )?whole number",
        ),
        (scripts.positive_float, ["1e-3"], ["0", "-1", "nan", "inf", "x"], "is not a number above 0"),
        (scripts.non_negative_float, ["0", "1"], ["-1", "nan", "inf"], "is not a number from 0 up"),
        (scripts.finite_float, ["-1", "1.5"], ["nan", "inf", "x"], "is not a number that is finite"),
        (scripts.fraction, ["0", "0.999"], ["1", "-0.1", "nan"], "is not a number from 0 to below 1"),
    ],
)
def test_other_numbers_on_the_command_line(kind, right, wrong, message):
    assert [kind(text) for text in right] == [float(text) for text in right]
    for text in wrong:
        with pytest.raises(ArgumentTypeError, match=message):
            kind(text)


def test_precision_is_what_accelerate_launch_was_told(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert scripts.launched_precision("bf16") == "bf16"
    for told, expected in {"fp16": "fp16", "bf16": "bf16", "no": "bf16", "fp8": "bf16"}.items():
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
        assert scripts.launched_precision("bf16") == expected


def test_fp16_is_not_for_a_cpu():
    def dtype(precision: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        return str(scripts.base_dtype(Accelerator(cpu=True, mixed_precision=precision)))

    try:
        assert (dtype("no"), dtype("bf16")) == ("torch.float32", "torch.bfloat16")
        with pytest.raises(ValueError, match="fp16 needs a GPU.*use bf16, or no for float32"):
            dtype("fp16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# Ctrl-C


def test_a_second_ctrl_c_stops_now(capfd):
    stopped = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as error, scripts.StopSignals(lambda: stopped.append(True)) as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # at once: the same Ctrl-C, passed on by a launcher
        assert stopped == [True] and signals.exit_code == 130
        assert "Stopping after this step, with a checkpoint; Ctrl-C again to stop now." in capfd.readouterr().err
        signals._first -= 2  # stands for two seconds
        scripts.run_script(lambda: signal.raise_signal(signal.SIGINT))
    assert error.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_has_an_exit_code_of_its_own(capfd):
    with scripts.StopSignals(lambda: None, show=False) as signals:
        assert signals.exit_code == 130  # another process was told
        signal.raise_signal(signal.SIGTERM)
        signals._first -= 2
        signal.raise_signal(signal.SIGTERM)
    assert signals.exit_code == 143
    assert capfd.readouterr().err == ""


# Pictures


@pytest.mark.parametrize(("classes", "number"), [([0, 5000], 1), ([-1], 1), ([], 1), ([0], 0)])
def test_classes_that_the_model_does_not_have_are_not_sampled(classes, number):
    with pytest.raises(ValueError, match="cannot be sampled: give classes from 0 to 999, and at least one picture"):
        visualize.sample_grid(make_pipeline(num_layers=1), classes, number, num_inference_steps=1)


def only(monkeypatch, *names: str) -> None:
    """Stands for a machine that has these fonts and no others."""
    fonts = [font for font in font_manager.fontManager.ttflist if font.name in names]
    assert {font.name for font in fonts} == {*names}
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("🍎", "red apple"),
        ("fruit 🍎🍏", "fruit red apple green apple"),
        ("👩\u200d🚀", "woman rocket"),
        ("犬山", "U+72AC U+5C71"),
        ("two\nlines", "two lines"),
        ("café Ж ❤", "café Ж ❤"),
        ("", ""),
    ],
)
def test_captions_have_no_boxes(monkeypatch, name, words):
    """What no font here can draw is said in words."""
    only(monkeypatch, "DejaVu Sans")
    text, font = visualize._drawable(name)
    assert text == words
    assert {ord(c) for c in text} <= FT2Font(font).get_charmap().keys()
    grid = PIL.Image.new("RGB", (40, 40), "red")
    assert visualize.label_rows(grid, [name]).tobytes() == visualize.label_rows(grid, [words]).tobytes()


def test_an_installed_font_draws_what_the_first_lacks(monkeypatch):
    only(monkeypatch, "DejaVu Sans", "STIXNonUnicode")
    text, font = visualize._drawable("\ue000")
    assert text == "\ue000" and Path(font).name.startswith("STIX")
    monkeypatch.undo()
    only(monkeypatch, "DejaVu Sans", "Last Resort High-Efficiency")  # it has a box for every character
    assert visualize._drawable("\ue000")[0] == "U+E000"
