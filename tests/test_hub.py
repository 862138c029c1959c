"""Adapters pushed to a Hub and loaded from it, over HTTP: what comes back, what is said, what goes wrong."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import HUB, images, make_pipeline, randomise
from diffusers import DiTPipeline
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel, get_peft_model
from PIL import ImageChops, ImageStat

from difffit_peft import DiffFitConfig, DiffFitDiTPipeline
from difffit_peft.publishing import check_push, push_adapter
from difffit_peft.training.scripts import run_script

EXAMPLES = Path(__file__).parents[1] / "examples"
TOKEN = os.environ["HF_TOKEN"]
LABELS = {0: "fox", 1: "owl"}
OLD_CLIENT = int(version("huggingface_hub").split(".")[0]) < 2


@pytest.fixture(scope="module")
def api() -> HfApi:
    """Of the user `me`, with the base `me/base`."""
    api = HfApi()
    pipe = make_pipeline()
    pipe.register_to_config(id2label={0: "tench, Tinca tinca", 1: "goldfish"})
    pipe.push_to_hub("me/base")
    return api


@pytest.fixture(scope="module")
def trained(api, tmp_path_factory) -> DiffFitDiTPipeline:
    """The base from the Hub with an adapter, which is at `me/fox` too."""
    pipe = DiffFitDiTPipeline.from_pretrained("me/base", cache_dir=tmp_path_factory.mktemp("cache"))
    pipe.transformer = get_peft_model(pipe.transformer, DiffFitConfig(id2label=LABELS)).eval()
    randomise(pipe.transformer)
    picture = PIL.Image.new("RGB", (32, 16), "red")
    pipe.push_difffit_to_hub("me/fox", license="mit", dataset="me/foxes", training={"steps": 7}, picture=picture)
    return pipe


@pytest.fixture(autouse=True)
def healthy(monkeypatch):
    """The Hub works again after each test; the client does not wait before it tries again."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield
    HUB.recover()
    HUB.requests.clear()


def files(repo: str, revision: str | None = None) -> list[str]:
    return HfApi().list_repo_files(repo, revision=revision)


# There and back

LOAD = """
import sys, torch
from diffusers import DiTPipeline
from peft import PeftModel
from difffit_peft import DiffFitDiTPipeline
from difffit_peft.training.visualize import sample_grid

pipe = DiffFitDiTPipeline.from_pretrained("me/trained")
assert pipe.get_label_ids(["ant", "cow"]) == [0, 2]
sample_grid(pipe, [0, 1, 2], 2, num_inference_steps=2).save(f"{sys.argv[1]}/ours.png")
if sys.argv[2:] == ["stock"]:
    pipe = DiTPipeline.from_pretrained("me/base")
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "me/trained")
    sample_grid(pipe, [0, 1, 2], 2, num_inference_steps=2).save(f"{sys.argv[1]}/stock.png")
"""


def test_trained_pushed_and_loaded_in_fresh_processes(api, tmp_path):
    """Also from the cache when the Hub is gone, and when the client is told to stay offline."""
    generator = np.random.default_rng(0)
    for name in ("ant", "bee", "cow"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")

    def python(*command: str, cache: str, **environment: str) -> str:
        environment = {"HF_HOME": str(tmp_path / cache), "OMP_NUM_THREADS": "1"} | environment
        process = subprocess.run(
            [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, timeout=600
        )
        assert process.returncode == 0, process.stderr[-3000:]
        assert TOKEN not in process.stdout + process.stderr
        return process.stdout

    train = ["--pretrained_model_name_or_path", "me/base", "--train_data_dir", str(tmp_path / "images")]
    train += ["--output_dir", str(tmp_path / "trained"), "--max_train_steps", "5", "--train_batch_size", "4"]
    train += ["--num_validation_images", "2", "--num_inference_steps", "2", "--mixed_precision", "no"]
    train += ["--validation_labels", "ant", "bee", "cow", "--learning_rate", "0.1", "--report_to", "none"]
    train += ["--push_to_hub", "--hub_model_id", "me/trained"]
    python(str(EXAMPLES / "train_difffit.py"), *train, cache="training")
    before, after = (tmp_path / "trained" / "validation" / f"step-00000{step}.png" for step in (0, 5))
    assert not np.array_equal(PIL.Image.open(before), PIL.Image.open(after))

    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there; peft 0.21 asks unless it is told not to
    ways = [({}, ["stock"]), (gone, []), (gone | {"HF_HUB_OFFLINE": "1"}, ["stock"])]
    for environment, stock in ways[:1] if OLD_CLIENT else ways:  # old diffusers asks for the base in any case
        python("-c", LOAD, str(tmp_path), *stock, cache="loading", **environment)
        for name in ("ours", *stock):
            assert np.array_equal(PIL.Image.open(tmp_path / f"{name}.png"), PIL.Image.open(after))
            (tmp_path / f"{name}.png").unlink()


def test_what_is_on_the_hub(api, trained, tmp_path):
    assert files("me/fox") == [
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "samples.png",
    ]
    config = json.loads(Path(api.hf_hub_download("me/fox", "adapter_config.json", cache_dir=tmp_path)).read_text())
    assert config["base_model_name_or_path"] == "me/base"
    assert config["revision"] == api.model_info("me/base").sha
    assert config["id2label"] == {"0": "fox", "1": "owl"}
    card = ModelCard.load("me/fox")
    assert card.data.to_dict() == {
        "base_model": "me/base",
        "datasets": ["me/foxes"],
        "library_name": "peft",
        "license": "mit",
        "tags": ["difffit", "diffusers", "peft"],
    }
    assert "`fox`, `owl`" in card.text and "- `steps`: `7`" in card.text and "![Samples](samples.png)" in card.text
    count = sum(p.numel() for name, p in trained.transformer.named_parameters() if ".difffit_" in name)
    assert f"{count:,} trained parameters" in card.text
    assert len(api.list_repo_commits("me/fox")) == 2  # the first is the empty repository
    if not OLD_CLIENT:  # which asks huggingface.co, whatever the endpoint
        assert card.validate() is None  # by the Hub


@pytest.mark.parametrize("base", ["on the Hub", "in a folder"])
def test_the_cards_lines_run_as_they_stand(trained, tmp_path, monkeypatch, base):
    """Also those of an adapter whose base is in a folder: its card does not send the reader to the Hub for it."""
    monkeypatch.chdir(tmp_path)
    if base == "on the Hub":
        text = ModelCard.load("me/fox").text
    else:
        make_pipeline().save_pretrained("my-base")
        pipe = DiffFitDiTPipeline.from_pretrained("my-base")
        pipe.transformer = get_peft_model(pipe.transformer, DiffFitConfig(id2label=LABELS)).eval()
        randomise(pipe.transformer)
        pipe.push_difffit_to_hub("me/of-a-folder")
        text = ModelCard.load("me/of-a-folder").text
    ours, pefts = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in ours.splitlines() if line]) <= 6
    names = {}
    exec(compile(ours, "README.md", "exec"), names)
    assert PIL.Image.open("sample.png").size == (16, 16)
    assert torch.equal(images(names["pipe"]), images(trained))
    exec(compile(pefts, "README.md", "exec"), names)
    assert torch.equal(images(names["pipe"]), images(trained)) and type(names["pipe"]) is DiTPipeline
    assert pefts.startswith("import difffit_peft\n") and "without it, PEFT stops with `KeyError: 'DIFFFIT'`" in text


def test_what_peft_says_without_the_package(trained):
    """As the card and the README say."""
    code = "import peft; peft.PeftModel.from_pretrained(peft.PeftModel.__new__(peft.PeftModel), 'me/fox')"
    process = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=120)
    assert process.stderr.splitlines()[-1] == "KeyError: 'DIFFFIT'"
    assert "KeyError: 'DIFFFIT'" in (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")


def test_loaded_adapters_are_those_that_were_pushed(trained, tmp_path):
    expected = images(trained)
    assert torch.equal(images(DiffFitDiTPipeline.from_pretrained("me/fox", cache_dir=tmp_path)), expected)
    stock = DiTPipeline.from_pretrained("me/base", cache_dir=tmp_path)
    stock.transformer = PeftModel.from_pretrained(stock.transformer, "me/fox", cache_dir=tmp_path)
    assert torch.equal(images(stock), expected)


def test_pefts_own_push_to_hub(trained, tmp_path):
    trained.transformer.push_to_hub("me/by-peft")
    loaded = DiffFitDiTPipeline.from_pretrained("me/by-peft", cache_dir=tmp_path)
    assert torch.equal(images(loaded), images(trained)) and loaded.get_label_ids("owl") == [1]


# Pipelines with adapters


@pytest.fixture(scope="module")
def blended(trained, tmp_path_factory) -> DiffFitDiTPipeline:
    """A pipeline with the adapters fox and owl, both active."""
    folder = tmp_path_factory.mktemp("owl")
    model = get_peft_model(make_pipeline().transformer, DiffFitConfig(gamma_modules=[]))
    randomise(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    pipe = DiffFitDiTPipeline.from_pretrained("me/base")
    pipe.load_difffit_weights("me/fox", "fox")
    pipe.load_difffit_weights(folder, "owl")
    return pipe


@pytest.mark.parametrize("state", ["active", "disabled", "fused"])
@pytest.mark.parametrize("way", ["push_to_hub", "upload_folder"])
def test_a_pipeline_comes_back_with_its_adapters(api, blended, tmp_path, way, state):
    """From the Hub, from its cache alone, and from a commit: what comes back from a folder comes back from there."""
    blended.set_adapters(["owl", "fox"], [0.3, 0.8])
    {"active": lambda: None, "disabled": blended.disable_difffit, "fused": blended.fuse_difffit}[state]()
    expected, labels, active = images(blended), blended.labels, blended.get_active_adapters()
    repo = f"me/{state}-{way}"
    if way == "push_to_hub":
        blended.push_to_hub(repo, "All of it", True)  # commit_message, private
        assert api.model_info(repo).private and api.list_repo_commits(repo)[0].title == "All of it"
    else:
        blended.save_pretrained(tmp_path / "folder")
        api.create_repo(repo)
        api.upload_folder(repo_id=repo, folder_path=tmp_path / "folder")
    if state == "fused":
        blended.unfuse_difffit()
    commit = api.model_info(repo).sha
    api.delete_file("model_index.json", repo)  # a later commit, which that one does not see
    with pytest.raises(EntryNotFoundError):
        DiffFitDiTPipeline.from_pretrained(repo, cache_dir=tmp_path / "cache")
    api.create_branch(repo, branch="whole", revision=commit)
    for options in (
        {"revision": "whole"},
        {"revision": commit},
        {"revision": "whole", "local_files_only": True},
    ):
        if OLD_CLIENT and "local_files_only" in options:
            continue  # old diffusers asks for the base in any case
        loaded = DiffFitDiTPipeline.from_pretrained(repo, cache_dir=tmp_path / "cache", **options)
        assert torch.equal(images(loaded), expected) and loaded.labels == labels
        assert loaded.get_list_adapters() == ([] if state == "fused" else ["fox", "owl"])
        assert loaded.get_active_adapters() == ([] if state == "fused" else active)
    plain = DiTPipeline.from_pretrained(repo, revision="whole", cache_dir=tmp_path / "cache")
    blended.disable_difffit()
    assert torch.equal(images(plain), expected if state == "fused" else images(blended))


def test_adapters_put_beside_a_pipeline_by_hand(api, trained, tmp_path):
    """As in a folder: all are loaded, and the last one is active."""
    make_pipeline().push_to_hub("me/by-hand")
    folder = snapshot_download("me/fox", cache_dir=tmp_path / "fox")
    for name in ("fox", "owl"):
        api.upload_folder(repo_id="me/by-hand", folder_path=folder, path_in_repo=f"adapters/{name}")
    pipe = DiffFitDiTPipeline.from_pretrained("me/by-hand", cache_dir=tmp_path)
    local = DiffFitDiTPipeline.from_pretrained(snapshot_download("me/by-hand", cache_dir=tmp_path))
    for loaded in (pipe, local):
        assert loaded.get_list_adapters() == ["fox", "owl"] and loaded.get_active_adapters() == ["owl"]
        assert torch.equal(images(loaded), images(trained))
    inside = DiffFitDiTPipeline.from_pretrained("me/by-hand", subfolder="adapters/fox", cache_dir=tmp_path)
    assert inside.get_active_adapters() == ["default_0"] and torch.equal(images(inside), images(trained))


def test_a_pipeline_is_not_pushed_beside_other_adapters(api, blended):
    """They would be loaded with it, fused ones a second time."""
    blended.set_adapters(["owl", "fox"])
    for _ in range(2):  # over itself
        blended.push_to_hub("me/both")
    before = api.model_info("me/both").sha
    blended.fuse_difffit()
    with pytest.raises(ValueError, match=r"me/both holds the adapters \['fox', 'owl'\]"):
        blended.push_to_hub("both")
    blended.unfuse_difffit()
    assert api.model_info("me/both").sha == before


# Local or Hub


@pytest.mark.parametrize("away", [False, True])
def test_a_folder_that_is_mistyped(trained, tmp_path, monkeypatch, away):
    """The first words say that there is no such folder, and not that the connection is to be checked."""
    monkeypatch.chdir(tmp_path)
    if away:
        HUB.fail("HEAD", "/resolve/", status=500, times=1000)
    pipe = DiffFitDiTPipeline.from_pipe(make_pipeline())
    for load in (pipe.load_difffit_weights, DiffFitDiTPipeline.from_pretrained, DiffFitConfig.from_pretrained):
        with pytest.raises((RepositoryNotFoundError, LocalEntryNotFoundError)) as error:
            load("my_adaptr")
        start = f"There is no folder {tmp_path}/my_adaptr, so the Hub was asked for the repository 'my_adaptr': "
        assert str(error.value).startswith(start)


def test_keywords_that_no_verb_knows(api, trained):
    """The same as for a folder, and before anything is made or changed on the Hub."""
    pipe = DiffFitDiTPipeline.from_pipe(make_pipeline())
    with pytest.raises(TypeError, match="adapter_weights"):
        pipe.load_difffit_weights("me/fox", adapter_weights=0.3)
    HUB.requests.clear()
    with pytest.raises(TypeError, match="licence"):
        trained.push_difffit_to_hub("me/never", licence="mit")
    with pytest.raises(ValueError, match="no adapter 'owl'"):
        push_adapter(trained.transformer, "me/never", "owl")
    assert not HUB.requests


def test_revisions_subfolders_private_repositories_and_pull_requests(api, trained, tmp_path):
    first = trained.push_difffit_to_hub("me/two", private=True)
    expected = images(trained)
    api.upload_folder(repo_id="me/two", folder_path=snapshot_download("me/two"), path_in_repo="inner")
    other = DiffFitDiTPipeline.from_pretrained("me/base")
    other.transformer = get_peft_model(other.transformer, DiffFitConfig(id2label=LABELS, gamma_modules=[])).eval()
    other.push_difffit_to_hub("two", revision="bitfit")  # without its owner: of the token's user
    request = other.push_difffit_to_hub("me/two", create_pr=True)
    assert request.pr_num == 1

    def loaded(**kwargs) -> torch.Tensor:
        pipe = DiffFitDiTPipeline.from_pretrained("me/base")
        pipe.load_difffit_weights("me/two", **{"cache_dir": tmp_path} | kwargs)
        return images(pipe)

    assert torch.equal(loaded(), expected) and torch.equal(loaded(subfolder="inner"), expected)
    assert torch.equal(loaded(revision=first.oid), expected)
    assert torch.equal(loaded(revision="bitfit"), images(other)) and not torch.equal(images(other), expected)
    assert torch.equal(images(DiffFitDiTPipeline.from_pretrained("me/two", revision="bitfit")), images(other))
    assert torch.equal(loaded(local_files_only=True), expected)
    with pytest.raises(RepositoryNotFoundError):
        loaded(token=HUB.add_user("you"), cache_dir=tmp_path / "empty")
    with pytest.raises(RevisionNotFoundError):
        loaded(revision="nowhere")
    with pytest.raises(EntryNotFoundError):
        loaded(subfolder="nowhere")


def test_a_pickle_on_the_hub_is_refused(api, trained, tmp_path):
    api.create_repo("me/pickle")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id="me/pickle")
    api.upload_file(path_or_fileobj=b"1", path_in_repo="adapter_model.bin", repo_id="me/pickle")
    pipe = DiffFitDiTPipeline.from_pretrained("me/base")
    with pytest.raises(ValueError, match="adapter_model.bin is never read, as a pickle can run any code"):
        pipe.load_difffit_weights("me/pickle", cache_dir=tmp_path)


def test_examples(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import generate
    import push_to_hub

    trained.save_difffit_weights(tmp_path / "fox")
    few = ["--num_images", "2", "--num_inference_steps", "2"]
    adapter = ["--adapter", str(tmp_path / "fox"), "--license", "mit"]
    push_to_hub.main(push_to_hub.parse_args([*adapter, "--repo_id", "me/example", *few]))
    assert "samples.png" in files("me/example")
    output = ["--output", str(tmp_path / "grid.png"), *few]
    blend = ["--adapters", "me/example", "me/fox", "--adapter_weights", "0.8", "0.2", "--labels", "fox", "1", "owl"]
    generate.main(generate.parse_args(["--pretrained_model_name_or_path", "me/base", *blend, *output]))
    assert PIL.Image.open(tmp_path / "grid.png").height == 3 * 16
    own = ["--pretrained_model_name_or_path", "me/example", *output]
    generate.main(generate.parse_args(own))
    whole = PIL.Image.open(tmp_path / "grid.png").copy()
    generate.main(generate.parse_args([*own, "--guidance", "domain"]))
    assert PIL.Image.open(tmp_path / "grid.png").tobytes() != whole.tobytes()
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps its precision for as long as the process lives
    generate.main(generate.parse_args([*own, "--mixed_precision", "bf16"]))
    AcceleratorState._reset_state(reset_partial_state=True)
    half = PIL.Image.open(tmp_path / "grid.png")
    assert half.size == whole.size and whole.height == 2 * 16
    difference = ImageChops.difference(half.convert("RGB"), whole.convert("RGB"))
    assert 0 < ImageStat.Stat(difference).mean[0] < 10  # rounded otherwise, and the same pictures
    with pytest.raises(ValueError, match="me/example comes with adapters of its own"):
        generate.main(generate.parse_args([*own, "--adapters", "me/fox"]))
    with pytest.raises(ValueError, match="1 --adapter_weights for 0 --adapters"):
        generate.main(generate.parse_args([*own, "--adapter_weights", "0.5"]))
    with pytest.raises(ValueError, match="5000"):
        generate.main(generate.parse_args([*own, "--labels", "5000"]))
    for number in ("--num_images", "--num_inference_steps"):
        with pytest.raises(SystemExit):
            generate.parse_args([*own, number, "0"])
        assert f"argument {number}: '0' is not a whole number from 1 up" in capsys.readouterr().err
    if not torch.cuda.is_available():
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(ValueError, match="fp16 needs a GPU, and this is a CPU"):
            generate.main(generate.parse_args([*own, "--mixed_precision", "fp16"]))
        AcceleratorState._reset_state(reset_partial_state=True)


# The card says nothing but what it is told

MARKUP = [
    "---\nlicense: mit\ntags:\n- evil\n---",
    "`code` ``` ```python\nimport os\n```",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "![x](https://evil.example/x.png) [y](javascript:alert(1)) https://evil.example www.evil.example",
    "# Heading\n\n- item\n\n| a | b |\n|---|---|",
    '"); import os; os.system("x") #',
    "{base} %s {0.__class__} \\",
    "\u202eright to left\u0000\u001b[31m",
    "a" * 10_000,
]


def test_class_names_and_settings_put_no_markup_into_the_card(trained, tmp_path):
    labels = dict(enumerate(MARKUP))
    model = get_peft_model(make_pipeline().transformer, DiffFitConfig(id2label=labels))
    pipe = DiffFitDiTPipeline.from_pipe(make_pipeline())
    pipe.transformer = model
    settings = {name: name for name in MARKUP}
    pipe.save_difffit_weights(tmp_path, "default", dataset=MARKUP[0], license=MARKUP[0], training=settings)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == MARKUP[0] and card.data.tags == ["difffit", "diffusers", "peft"]
    assert card.data.datasets is None
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"```\w*\n.*?\n```", "", card.text, flags=re.DOTALL))
    for marks in ("evil", "script", "alert", "Heading", "import os", "\u202e", "\0", "\033", "{", "`"):
        assert marks not in prose
    code, pefts = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert "os" not in code + pefts and "pipe([0])" in code
    assert len(card.text) < 20_000


# What goes wrong

CONFIG, WEIGHTS = "/resolve/.*adapter_config", "/resolve/.*adapter_model"
DOWNLOADS = {
    "401": (dict(method="HEAD", pattern=WEIGHTS, status=401), HfHubHTTPError, "401"),
    "403": (dict(method="HEAD", pattern=WEIGHTS, status=403), LocalEntryNotFoundError, "cannot find"),
    "404": (dict(method="HEAD", pattern=WEIGHTS, status=404), LocalEntryNotFoundError, "cannot find"),
    "409": (dict(method="HEAD", pattern=CONFIG, status=409), LocalEntryNotFoundError, "cannot find"),
    "429": (dict(method="HEAD", pattern=CONFIG, status=429), LocalEntryNotFoundError, "cannot find"),
    "500": (dict(method="HEAD", pattern=WEIGHTS, status=500), LocalEntryNotFoundError, "cannot find"),
    "503": (dict(method="HEAD", pattern=WEIGHTS, status=503), LocalEntryNotFoundError, "cannot find"),
    "gone": (
        dict(method="HEAD", pattern=CONFIG, status=404, headers={"X-Error-Code": "RepoNotFound"}),
        RepositoryNotFoundError,
        "authenticated",
    ),
    "gated": (
        dict(method="HEAD", pattern=CONFIG, status=403, headers={"X-Error-Code": "GatedRepo"}),
        GatedRepoError,
        "gated",
    ),
    "403 of the bytes": (dict(method="GET", pattern=WEIGHTS, status=403), HfHubHTTPError, "403"),
    "404 of the bytes": (dict(method="GET", pattern=WEIGHTS, status=404), HfHubHTTPError, "404"),
    "500 of the bytes": (dict(method="GET", pattern=WEIGHTS, status=500), HfHubHTTPError, "500"),
    "503 of the bytes": (dict(method="GET", pattern=WEIGHTS, status=503), HfHubHTTPError, "503"),
}


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_a_failed_download_leaves_the_pipeline_and_the_disk_as_they_were(trained, tmp_path, kind):
    failure, exception, message = DOWNLOADS[kind]
    pipe = DiffFitDiTPipeline.from_pretrained("me/base")
    before = images(pipe)
    HUB.fail(**failure, times=1000)
    with pytest.raises(exception, match=message) as error:
        pipe.load_difffit_weights("me/fox", cache_dir=tmp_path)
    assert TOKEN not in repr(error.value) + str(error.value)
    assert not list(tmp_path.rglob("snapshots/*/adapter_model.safetensors"))
    assert torch.equal(images(pipe), before) and pipe.get_list_adapters() == []
    HUB.recover()
    pipe.load_difffit_weights("me/fox", cache_dir=tmp_path)
    assert torch.equal(images(pipe), images(trained))


@pytest.mark.parametrize("times", [1, 1000])
def test_a_download_that_is_cut(trained, tmp_path, times):
    """Once: the client goes on by itself. Always: it gives up, and no half of a file is taken for one."""
    pipe = DiffFitDiTPipeline.from_pretrained("me/base")
    HUB.fail("GET", WEIGHTS, cut="response", times=times)
    if times > 1:
        with pytest.raises(Exception, match="(?i)peer closed|connection|incomplete"):
            pipe.load_difffit_weights("me/fox", cache_dir=tmp_path)
        assert not list(tmp_path.rglob("snapshots/*/adapter_model.safetensors")) and pipe.get_list_adapters() == []
        HUB.recover()
    pipe.load_difffit_weights("me/fox", cache_dir=tmp_path)
    assert torch.equal(images(pipe), images(trained))


def test_a_slow_answer_is_waited_for(trained, tmp_path):
    HUB.fail("GET", WEIGHTS, delay=0.3)
    pipe = DiffFitDiTPipeline.from_pretrained("me/base")
    pipe.load_difffit_weights("me/fox", cache_dir=tmp_path)
    assert torch.equal(images(pipe), images(trained))


STAGES = {
    "create": ("POST", "/api/repos/create"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/info/lfs/objects/batch"),
    "bytes": ("PUT", "/"),
    "commit": ("POST", "/commit/"),
}


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503, "cut"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failed_upload_can_be_tried_again(trained, tmp_path, stage, status):
    repo = f"me/upload-{stage}-{status}"
    method, pattern = STAGES[stage]
    HUB.fail(method, pattern, times=1000, **({"cut": "request"} if status == "cut" else {"status": status}))
    expected = images(trained)
    with pytest.raises(Exception) as error:
        trained.push_difffit_to_hub(repo)
    if status == "cut":
        assert re.search(
            "(?i)disconnected|connection|reset|closed|upload", f"{error.value!r} {error.value.__cause__!r}"
        )
    else:
        causes = [error.value, error.value.__cause__]
        assert any(isinstance(cause, HfHubHTTPError) for cause in causes)
        assert str(status) in str(causes)
    assert TOKEN not in repr(error.value) + str(error.value)
    HUB.recover()
    if HfApi().repo_exists(repo):
        assert files(repo) in ([".gitattributes"], [])
    trained.push_difffit_to_hub(repo)
    assert "adapter_model.safetensors" in files(repo)
    pipe = DiffFitDiTPipeline.from_pretrained(repo, cache_dir=tmp_path)
    assert torch.equal(images(pipe), expected) and torch.equal(images(trained), expected)


def test_an_upload_that_is_not_allowed(trained):
    reader = HUB.add_user("me", write=False)
    HfApi().create_repo("me/readonly")
    with pytest.raises(HfHubHTTPError, match="403"):
        trained.push_difffit_to_hub("me/readonly", token=reader)
    with pytest.raises(HfHubHTTPError, match="403"):
        trained.push_difffit_to_hub("you/fox")
    with pytest.raises(HfHubHTTPError, match="401"):
        trained.push_difffit_to_hub("me/fox", token="hf_nobody")
    with pytest.raises(HFValidationError):
        trained.push_difffit_to_hub("me/fox/../../x")
    with pytest.raises(ValueError, match="no adapter 'owl'"):
        trained.push_difffit_to_hub("me/fox", "owl")


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("me/fox cub", TOKEN, "alphanumeric.*'me/fox cub'"),
        ("you/fox", TOKEN, "you/fox belongs to you, and the token is of me, who may write to repositories of me alone"),
        ("me/fox", HUB.add_user("me", write=False), "The token of me may only read.*/settings/tokens"),
        ("me/fox", "hf_nobody", "Invalid user token"),
        ("me/fox", "", "no token found"),
    ],
    ids=["name", "other namespace", "read only", "unknown token", "no token"],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_computed(
    trained, tmp_path, monkeypatch, repo_id, token, message
):
    monkeypatch.syspath_prepend(EXAMPLES)
    import push_to_hub
    import train_difffit

    monkeypatch.setenv("HF_TOKEN", token)
    HUB.requests.clear()
    nothing = str(tmp_path / "nothing")
    push = push_to_hub.parse_args(["--adapter", nothing, "--repo_id", repo_id])
    train = ["--pretrained_model_name_or_path", nothing, "--train_data_dir", nothing, "--output_dir", nothing]
    train = train_difffit.parse_args([*train, "--push_to_hub", "--hub_model_id", repo_id, "--mixed_precision", "no"])
    for main in (lambda: push_to_hub.main(push), lambda: train_difffit.main(train)):
        with pytest.raises((ValueError, OSError), match=message):
            main()
    assert {request.path for request in HUB.requests} <= {"/api/whoami-v2"}
    assert not Path(nothing).exists()


def test_a_pull_request_to_a_repository_of_others(trained):
    you = HfApi(token=HUB.add_user("you"))
    you.create_repo("you/shared")
    check_push("you/shared", create_pr=True)
    check_push("fox")
    check_push("Me/fox")  # the Hub takes no notice of capitals
    with pytest.raises(RepositoryNotFoundError):
        check_push("you/absent", create_pr=True)


def test_a_hub_that_is_not_there_is_one_line(tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "push_to_hub.py"), "--adapter", str(tmp_path), "--repo_id", "me/fox"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (process.returncode, process.stdout) == (1, "")
    (line,) = process.stderr.splitlines()
    assert line.startswith("push_to_hub.py: error: The Hub at http://127.0.0.1:9 cannot be reached: ")
    assert line.endswith("(--debug shows where.)")


def test_what_the_hub_refuses_is_one_line(trained, tmp_path, monkeypatch, capsys):
    """Also where Diffusers or another library in between raises an error of its own."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import generate

    def run(main, *flags: str) -> str:
        with pytest.raises(SystemExit) as error:
            run_script(main, lambda: generate.parse_args(["--pretrained_model_name_or_path", "me/fox", *flags]))
        assert error.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    HUB.fail("GET", "/me/base/", times=1000, status=403)
    assert "403" in run(lambda args: DiTPipeline.from_pretrained("me/base", cache_dir=tmp_path))
    HUB.recover()
    assert "404" in run(lambda args: DiTPipeline.from_pretrained("me/absent", cache_dir=tmp_path))
    assert "'me/ab sent'" in run(lambda args: HfApi().model_info("me/ab sent"))
    with pytest.raises(RepositoryNotFoundError):
        debug = generate.parse_args(["--pretrained_model_name_or_path", "me/fox", "--debug"])
        run_script(lambda args: HfApi().model_info("me/absent"), lambda: debug)


def test_a_trained_adapter_is_whole_when_its_upload_fails(api, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_difffit

    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        PIL.Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / name / "0.png")
    argv = ["--pretrained_model_name_or_path", "me/base", "--train_data_dir", str(tmp_path / "images")]
    argv += ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--max_train_steps", "1"]
    argv += ["--train_batch_size", "2", "--num_validation_images", "0", "--mixed_precision", "no"]
    argv += ["--report_to", "none", "--push_to_hub", "--hub_model_id", "me/whole"]
    HUB.fail("POST", "/commit/", times=1000, status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        train_difffit.main(train_difffit.parse_args(argv))
    for name in ("adapter_model.safetensors", "loss.png", "summary.json"):
        assert (tmp_path / "out" / name).is_file()


def test_the_token_appears_nowhere(trained, tmp_path, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        trained.push_difffit_to_hub("me/secret", token=TOKEN)
        pipe = DiffFitDiTPipeline.from_pretrained("me/secret", token=TOKEN, cache_dir=tmp_path)
        pipe.save_pretrained(tmp_path / "saved")
    said = caplog.text + "".join(capfd.readouterr()) + repr(pipe)
    assert caplog.records and TOKEN not in said
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(TOKEN in request.path for request in HUB.requests)


@pytest.mark.parametrize("revision", ["../../..", "main\n", "x" * 10_000, "", " ", "/etc", 3, ["main"]])
def test_hostile_revisions_of_the_base(trained, tmp_path, revision):
    trained.save_difffit_weights(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"revision": revision}))
    with pytest.raises(ValueError, match="of its base, which is not a valid revision"):
        DiffFitDiTPipeline.from_pretrained(tmp_path)
