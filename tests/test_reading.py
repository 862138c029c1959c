"""What is read of an adapter: its weights are opened once to check them, and once more where PEFT loads them itself."""

import json
import sys
from pathlib import Path

import pytest
import safetensors
from conftest import make_dit, make_pipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel, get_peft_model

from difffit_peft import DiffFitConfig, DiffFitDiTPipeline, hotswap_adapter, reading
from difffit_peft.reading import adapter_folder, cached_commit, pipeline_index


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


def test_a_file_of_the_cache_tells_its_commit():
    commit = "0123456789" * 4
    assert cached_commit(Path(f"cache/models--me--one/snapshots/{commit}/adapter_config.json")) == commit
    assert cached_commit(Path("me/one/adapter_config.json")) is None


def test_an_adapter_is_named_by_its_folder_or_by_a_file_in_it(folder):
    for path in (folder, folder / "adapter_config.json", folder / "adapter_model.safetensors"):
        assert adapter_folder(path) == folder
    (folder / "README.txt").write_text("")
    with pytest.raises(ValueError, match="README.txt is a file: pass the folder of the adapter"):
        adapter_folder(folder / "README.txt")


@pytest.mark.parametrize("of", [pipeline_index, adapter_folder])
def test_a_folder_has_no_revisions_and_the_cache_is_the_one_that_is_named(folder, tmp_path, of):
    with pytest.raises(ValueError, match="revision='main': .* is on this machine, where there are no revisions"):
        of(folder, revision="main")
    with pytest.raises(LocalEntryNotFoundError):
        of("me/base", local_files_only=True, cache_dir=tmp_path / "empty")


def test_what_is_no_place_of_an_adapter(folder):
    with pytest.raises(ValueError, match="is a URL. Pass the id of the repository, 'me/one'"):
        adapter_folder("https://hub.example/me/one")
    with pytest.raises(TypeError, match="no_such_option"):
        adapter_folder(folder, no_such_option=1)


def test_config_and_weights_are_of_one_commit(folder, monkeypatch):
    """Someone may push between the two."""
    pipe = DiffFitDiTPipeline.from_pretrained(folder)
    pipe.push_difffit_to_hub("me/one")
    revisions, original = [], reading.hub_file

    def watched(repo_id, filename, **hub):
        revisions.append(hub["revision"])
        return original(repo_id, filename, **hub)

    monkeypatch.setattr(reading, "hub_file", watched)
    for revision in (None, "main"):
        revisions.clear()
        commit = adapter_folder("me/one", revision=revision).name
        assert revisions == [revision, commit] and len(commit) == 40
