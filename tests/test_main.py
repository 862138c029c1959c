"""`python -m difffit_peft SCRIPT`: any script that uses PEFT knows DiffFit, and is run as Python runs it."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
heavy = [name for name in sys.modules if name.startswith(("diffusers.pipelines.", "diffusers.models.transformers."))]
from helper import layer  # a module beside the script
from peft import PeftConfig, get_peft_model

if __name__ == "__main__":
    model = get_peft_model(layer(), PeftConfig.from_pretrained(sys.argv[1]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    print(type(model.base_model).__name__, sys.argv[1:], len(trained), heavy)
    sys.exit(3)
"""
HELPER = "from torch import nn\ndef layer():\n    return nn.Sequential(nn.Linear(2, 2))\n"
CONFIG = '{"peft_type": "DIFFFIT", "gamma_modules": ["0"]}'


def run(*command, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "script.py").write_text(SCRIPT)
    (tmp_path / "code" / "helper.py").write_text(HELPER)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "adapter_config.json").write_text(CONFIG)
    return tmp_path / "code" / "script.py"


@pytest.mark.parametrize("launcher", [["-m"], ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m"]])
def test_a_script_that_does_not_know_difffit_trains_it(script, tmp_path, launcher):
    result = run(*launcher, "difffit_peft", script, tmp_path / "config", "--flag", cwd=tmp_path)
    assert f"DiffFitModel ['{tmp_path / 'config'}', '--flag'] 2 []" in result.stdout, result.stdout + result.stderr
    assert result.returncode == (3 if launcher == ["-m"] else 1)  # the launcher turns any failure to 1


def test_without_it_peft_does_not_know_the_method(script, tmp_path):
    result = run(script, tmp_path / "config", cwd=tmp_path)
    assert result.returncode == 1 and "DIFFFIT" in result.stderr


@pytest.mark.parametrize(("arguments", "message"), [([], "Usage: "), (["no.py"], "There is no file 'no.py'. Usage: ")])
def test_what_is_not_a_script_is_refused(tmp_path, arguments, message):
    result = run("-m", "difffit_peft", *arguments, cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.strip().startswith(message)
