"""What is read of an adapter: its weights are opened once to check them, and once more where PEFT loads them itself."""

import json
import sys
from pathlib import Path

import pytest
import safetensors
from conftest import make_dit, make_pipeline
from peft import PeftModel, get_peft_model

from difffit_peft import DiffFitConfig, DiffFitDiTPipeline, hotswap_adapter


@pytest.fixture
def folder(tmp_path) -> Path:
    """An adapter of a base that is on the Hub."""
    make_pipeline().push_to_hub("me/base")
    pipe = DiffFitDiTPipeline.from_pretrained("me/base")
    pipe.transformer = get_peft_model(pipe.transformer, DiffFitConfig())
    pipe.save_difffit_weights(tmp_path)
    return tmp_path


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the adapters' files that are opened, whichever module opens them."""
    names, original = [], safetensors.safe_open

    def counting(path, *args, **kwargs):
        names.append(Path(path).name)
        return original(path, *args, **kwargs)

    for module in [*sys.modules.values()]:
        if vars(module).get("safe_open") is original:
            monkeypatch.setattr(module, "safe_open", counting)
    return names


def test_weights_are_opened_once_and_a_second_time_by_peft(folder, opened):
    def count(action) -> int:
        opened.clear()
        action()
        return opened.count("adapter_model.safetensors")

    pipe, model = DiffFitDiTPipeline.from_pipe(make_pipeline()), make_dit()
    assert count(lambda: pipe.load_difffit_weights(folder, "first")) == 1
    assert count(lambda: pipe.load_difffit_weights(folder, "second")) == 1
    assert count(lambda: pipe.load_difffit_weights(folder, "second", hotswap=True)) == 1
    assert count(lambda: hotswap_adapter(pipe.transformer, folder, "first")) == 1
    assert count(lambda: DiffFitDiTPipeline.from_pretrained(folder)) == 1
    assert count(lambda: DiffFitConfig.from_pretrained(folder)) == 1
    assert count(lambda: PeftModel.from_pretrained(model, folder)) == 2
    assert count(lambda: pipe.transformer.load_adapter(folder, "third")) == 2


def test_an_adapter_for_another_task_is_not_for_a_pipeline(folder):
    pipe = DiffFitDiTPipeline.from_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "CAUSAL_LM"}))
    with pytest.raises(ValueError, match="task_type is CAUSAL_LM there and None here"):
        pipe.load_difffit_weights(folder, "default_0", hotswap=True)
    with pytest.raises(ValueError, match="task_type=CAUSAL_LM: this adapter is for another task than a pipeline's"):
        pipe.load_difffit_weights(folder, "second")
    assert pipe.get_list_adapters() == ["default_0"]
