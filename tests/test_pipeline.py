"""`DiffFitDiTPipeline`: the verbs of Diffusers' LoRA loader, on real pipelines and folders."""

import gc
import json
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import HUB, images, make_dit, make_pipeline, randomise, save_adapter
from diffusers import DiTPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from difffit_peft import DiffFitConfig, DiffFitDiTPipeline, hotswap_adapter

LABELS = {"fox": ["fox", "owl", "hare"], "art": ["oil", "ink"], "plain": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`base`, a pipeline whose classes are named, and adapters of it: `fox`, `art`, and `plain` without names."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = make_pipeline()
    pipe.register_to_config(id2label={0: "tench, Tinca tinca", 1: "goldfish"})
    pipe.save_pretrained(folder / "base")
    for seed, (name, labels) in enumerate(LABELS.items()):
        save_adapter(folder / name, seed, id2label=labels and dict(enumerate(labels)))
    return folder


@pytest.fixture
def pipe(folder) -> DiffFitDiTPipeline:
    return DiffFitDiTPipeline.from_pretrained(folder / "base")


def stock(folder, name) -> torch.Tensor:
    """Images the stock pipeline makes with an adapter."""
    pipe = DiTPipeline.from_pretrained(folder / "base")
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, folder / name)
    return images(pipe)


def test_loading_is_what_peft_loads_and_unloading_the_base(folder, pipe):
    base, labels, state = images(pipe), dict(pipe.labels), dict(make_dit().state_dict())
    pipe.load_difffit_weights(folder / "fox", adapter_name="fox")
    assert torch.equal(images(pipe), stock(folder, "fox"))
    assert pipe.labels == {"fox": 0, "hare": 2, "owl": 1} and pipe.get_label_ids("owl") == [1]
    assert pipe.get_active_adapters() == pipe.get_list_adapters() == ["fox"]
    pipe.unload_difffit_weights()
    assert torch.equal(images(pipe), base) and pipe.labels == labels
    assert type(pipe.transformer).__name__ == "DiTTransformer2DModel"
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert pipe.get_list_adapters() == pipe.get_active_adapters() == []


def test_blending_and_switching(folder, pipe):
    base = images(pipe)
    pipe.load_difffit_weights(folder / "fox", "fox")
    pipe.load_difffit_weights(folder / "art", "art")
    assert torch.equal(images(pipe), stock(folder, "art")) and pipe.get_label_ids(["ink", "oil"]) == [1, 0]
    pipe.set_adapters("fox")
    assert torch.equal(images(pipe), stock(folder, "fox")) and "fox" in pipe.labels
    pipe.set_adapters(["fox", "art"], [0.8, 0.2])
    blended = images(pipe)
    pipe.transformer.add_weighted_adapter(["fox", "art"], [0.8, 0.2], "blend")
    pipe.set_adapters("blend")
    torch.testing.assert_close(images(pipe), blended, rtol=0, atol=1e-4)
    pipe.set_adapters(["fox", "art"], 0.0)
    torch.testing.assert_close(images(pipe), base, rtol=0, atol=1e-5)
    pipe.disable_difffit()
    assert torch.equal(images(pipe), base) and pipe.get_active_adapters() == [] and "goldfish" in pipe.labels
    pipe.enable_difffit()
    assert pipe.get_active_adapters() == ["fox", "art"] and "fox" in pipe.labels


def test_scales_are_numbers_of_any_kind(folder, pipe):
    for name in ("fox", "art"):
        pipe.load_difffit_weights(folder / name, name)
    pipe.set_adapters(["fox", "art"], [0.5, 0.25])
    expected = images(pipe)
    halves = (np.float32(0.5), torch.tensor(0.25)), np.array([0.5, 0.25]), torch.tensor([0.5, 0.25])
    for scales in halves:
        pipe.set_adapters(["fox", "art"], 1.0)
        pipe.set_adapters(["fox", "art"], scales)
        assert torch.equal(images(pipe), expected)
    pipe.set_adapters(["fox", "art"], torch.tensor(0.5))
    assert not torch.equal(images(pipe), expected)
    for wrong in (np.float32("nan"), torch.tensor([0.5]), np.array(["a", "b"])):
        with pytest.raises(ValueError, match="must be one finite number for each"):
            pipe.set_adapters(["fox", "art"], wrong)


def test_fusing(folder, pipe):
    base = images(pipe)
    pipe.load_difffit_weights(folder / "fox", "fox")
    expected = images(pipe)
    pipe.fuse_difffit(safe_fusing=True)
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-4)
    for refused in (
        lambda: pipe.set_adapters("fox"),
        lambda: pipe.load_difffit_weights(folder / "art"),
        lambda: pipe.delete_adapters("fox"),
    ):
        with pytest.raises(ValueError, match="unfuse_difffit"):
            refused()
    pipe.unfuse_difffit()
    assert torch.equal(images(pipe), expected)
    pipe.unload_difffit_weights()
    assert torch.equal(images(pipe), base)


def test_fusing_some(folder, pipe, tmp_path):
    """What is fused is what is listed, named and saved; the others come back after it."""
    pipe.load_difffit_weights(folder / "fox", "fox")
    pipe.load_difffit_weights(folder / "art", "art")
    pipe.set_adapters(["art", "fox"])
    both = images(pipe)
    pipe.fuse_difffit("fox")
    assert pipe.get_active_adapters() == ["fox"] and pipe.get_label_ids("hare") == [2]
    torch.testing.assert_close(images(pipe), stock(folder, "fox"), rtol=0, atol=1e-4)
    pipe.save_pretrained(tmp_path)
    loaded = DiffFitDiTPipeline.from_pretrained(tmp_path)
    assert torch.equal(images(loaded), images(pipe)) and loaded.labels == pipe.labels
    pipe.fuse_difffit(["art"])
    assert pipe.get_active_adapters() == ["fox", "art"]
    torch.testing.assert_close(images(pipe), both, rtol=0, atol=1e-4)
    pipe.unfuse_difffit()
    assert pipe.get_active_adapters() == ["art", "fox"] and pipe.get_label_ids("ink") == [1]
    assert torch.equal(images(pipe), both)


def test_fusing_and_taking_over_say_nothing(folder, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = DiffFitDiTPipeline.from_pipe(DiTPipeline.from_pretrained(folder / "base"))
        pipe.load_difffit_weights(folder / "fox")
        for _ in range(2):
            pipe.fuse_difffit()
            pipe.save_pretrained(tmp_path)
        for _ in range(2):
            pipe.unfuse_difffit()
        pipe.fuse_difffit()
        pipe.transformer.merge_and_unload()
    assert "float32" not in "".join(capfd.readouterr())


def test_taking_over_leaves_the_parts_as_they_are(folder):
    stock = DiTPipeline.from_pretrained(folder / "base")
    stock.transformer.to(torch.bfloat16)
    pipe = DiffFitDiTPipeline.from_pipe(stock)
    assert pipe.transformer is stock.transformer and pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32 and pipe.config._name_or_path == stock.config._name_or_path
    assert DiffFitDiTPipeline.from_pipe(stock, dtype=torch.float32).transformer.dtype == torch.float32


def test_hotswap(folder, pipe, tmp_path):
    pipe.load_difffit_weights(folder / "fox", "one")
    model = get_peft_model(make_dit(), DiffFitConfig(id2label={0: "cat", 1: "dog", 2: "cow"}))
    model.save_pretrained(tmp_path / "pets", save_embedding_layers=False)
    transformer = pipe.transformer
    pipe.load_difffit_weights(tmp_path / "pets", "one", hotswap=True)
    assert pipe.transformer is transformer and pipe.get_label_ids("dog") == [1]
    assert not torch.equal(images(pipe), stock(folder, "fox"))


def test_a_hotswap_of_fused_adapters_changes_nothing(folder, pipe):
    pipe.load_difffit_weights(folder / "fox", "fox")
    pipe.fuse_difffit()
    fused = images(pipe)
    pipe.unfuse_difffit()
    pipe.load_difffit_weights(folder / "art", "art")
    pipe.set_adapters("fox")
    pipe.fuse_difffit(["fox"])
    with pytest.raises(ValueError, match="Adapters are fused"):
        pipe.load_difffit_weights(folder / "plain", "art", hotswap=True)
    assert torch.equal(images(pipe), fused) and pipe.get_label_ids("hare") == [2]
    pipe.unfuse_difffit()
    pipe.set_adapters("art")
    assert torch.equal(images(pipe), stock(folder, "art"))


def test_loading_and_switching_enable_what_was_disabled(folder, pipe):
    """Class names and images always belong together."""
    base = images(pipe)
    pipe.load_difffit_weights(folder / "fox", "fox")
    pipe.disable_difffit()
    assert torch.equal(images(pipe), base) and pipe.get_active_adapters() == [] and "hare" not in pipe.labels
    pipe.load_difffit_weights(folder / "art", "art")
    assert torch.equal(images(pipe), stock(folder, "art")) and pipe.get_label_ids("ink") == [1]
    assert not any(p.requires_grad for n, p in pipe.transformer.named_parameters() if "difffit" in n)
    pipe.disable_difffit()
    pipe.set_adapters("fox")
    assert torch.equal(images(pipe), stock(folder, "fox")) and pipe.get_label_ids("hare") == [2]
    pipe.disable_difffit()
    pipe.delete_adapters("fox")  # disabled stays disabled
    assert torch.equal(images(pipe), base) and pipe.get_active_adapters() == [] and "ink" not in pipe.labels
    pipe.enable_difffit()
    assert torch.equal(images(pipe), stock(folder, "art")) and pipe.get_label_ids("ink") == [1]
    assert not any(p.requires_grad for n, p in pipe.transformer.named_parameters() if "difffit" in n)


def live_bytes() -> int:
    """Of all tensors that can be reached."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gc finds deprecated proxies too
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_adapters_in_any_order_and_then_none(folder, pipe):
    """Neither the images nor the memory tell that there were any."""
    base = images(pipe)
    before = live_bytes()
    order = random.Random(0)
    for _ in range(2):
        for i in range(10):
            pipe.load_difffit_weights(folder / order.choice(list(LABELS)))
            if i % 3 == 0:
                pipe.fuse_difffit(), pipe.unfuse_difffit()
        names = pipe.get_list_adapters()
        assert names == [f"default_{i}" for i in range(10)]
        pipe.set_adapters(names[:3], [0.5, -0.5, 0.1])
        order.shuffle(names)
        pipe.delete_adapters(names[:4])
        assert set(pipe.get_list_adapters()) == set(names[4:])
        images(pipe)
        for name in names[4:]:
            pipe.delete_adapters(name)
        assert torch.equal(images(pipe), base)
        assert abs(live_bytes() - before) < 10_000


@pytest.mark.parametrize("fused", [False, True])
def test_a_saved_pipeline_loads_again(folder, pipe, tmp_path, fused):
    pipe.load_difffit_weights(folder / "fox", "fox")
    pipe.load_difffit_weights(folder / "art", "art")
    pipe.set_adapters(["art", "fox"], [0.7, 0.2])
    base = images(DiTPipeline.from_pretrained(folder / "base"))
    if fused:
        pipe.fuse_difffit()
    expected, labels = images(pipe), pipe.labels
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(images(pipe), expected)  # saving leaves it as it was
    loaded = DiffFitDiTPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.get_active_adapters() == ([] if fused else ["art", "fox"])
    assert torch.equal(images(loaded), expected) and loaded.labels == labels
    plain = DiTPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(images(plain), expected if fused else base)
    assert plain.labels == (labels if fused else {"Tinca tinca": 0, "goldfish": 1, "tench": 0})
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == "DiTPipeline"


def test_a_folder_with_other_adapters_is_not_saved_to(folder, pipe, tmp_path):
    """They would be loaded with what is saved: fused ones a second time."""
    pipe.load_difffit_weights(folder / "fox", "fox")
    for _ in range(2):  # over itself
        pipe.save_pretrained(tmp_path / "saved")
    before = {path: path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    pipe.fuse_difffit()
    with pytest.raises(ValueError, match=r"holds the adapters \['fox'\]"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.unload_difffit_weights()
    plain = images(pipe)
    with pytest.raises(ValueError, match=r"holds the adapters \['fox'\]"):
        pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="push_to_hub=True: call push_to_hub"):
        pipe.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert {path: path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()
    shutil.rmtree(tmp_path / "saved" / "adapters" / "fox")
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(images(DiffFitDiTPipeline.from_pretrained(tmp_path / "saved")), plain)


def test_disabled_adapters_are_saved_as_such(folder, pipe, tmp_path):
    pipe.load_difffit_weights(folder / "fox", "fox")
    pipe.disable_difffit()
    pipe.save_pretrained(tmp_path / "saved")
    loaded = DiffFitDiTPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(images(loaded), images(pipe)) and loaded.labels == pipe.labels
    loaded.enable_difffit()
    assert torch.equal(images(loaded), stock(folder, "fox")) and loaded.get_label_ids("hare") == [2]


def test_adapters_from_elsewhere_are_saved_and_unloaded(folder, pipe, tmp_path):
    """Attached by PEFT, or taken over from another pipeline: class names are the base's again without them."""
    base = dict(pipe.labels)
    pipe.load_difffit_weights(folder / "fox", "fox")
    taken = DiffFitDiTPipeline.from_pipe(pipe)
    taken.save_pretrained(tmp_path / "taken")
    assert DiTPipeline.from_pretrained(tmp_path / "taken").labels == base
    taken.unload_difffit_weights()
    assert taken.labels == base
    attached = DiffFitDiTPipeline.from_pretrained(folder / "base")
    attached.transformer = PeftModel.from_pretrained(attached.transformer, folder / "fox", "fox")
    attached.save_pretrained(tmp_path / "attached")
    assert DiTPipeline.from_pretrained(tmp_path / "attached").labels == base
    loaded = DiffFitDiTPipeline.from_pretrained(tmp_path / "attached")
    assert loaded.get_active_adapters() == ["fox"] and torch.equal(images(loaded), stock(folder, "fox"))


def test_saved_weights_load_again(folder, pipe, tmp_path):
    pipe.load_difffit_weights(folder / "fox", "fox")
    pipe.load_difffit_weights(folder / "art", "art")
    pipe.save_difffit_weights(tmp_path / "fox", "fox")
    assert sorted(path.name for path in (tmp_path / "fox").iterdir()) == sorted(
        path.name for path in (folder / "fox").iterdir()
    )
    ours, theirs = (load_file(path / "fox" / "adapter_model.safetensors") for path in (tmp_path, folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in tmp_path.iterdir()] == ["fox"]


def test_from_pipe(folder):
    pipe = DiffFitDiTPipeline.from_pipe(DiTPipeline.from_pretrained(folder / "base"))
    assert pipe.get_label_ids("Tinca tinca") == [0]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "names no base: load the base with from_pretrained"),
        (
            "base",
            "the base 'base', which is not the id of a repository on the Hub.* Load the base with from_pretrained",
        ),
    ],
)
def test_an_adapter_of_a_base_that_is_not_on_the_hub(folder, tmp_path, monkeypatch, base, message):
    """Neither the Hub nor the working directory is searched for the folder that the base was in."""
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "fox", tmp_path / "fox")
    config = tmp_path / "fox" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
    requests = len(HUB.requests)
    with pytest.raises(ValueError, match=message):
        DiffFitDiTPipeline.from_pretrained(tmp_path / "fox")
    assert len(HUB.requests) == requests


# Where an adapter is


def test_the_home_folder(folder, pipe, tmp_path, monkeypatch):
    """`~` is the same when something is saved as when it is loaded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe.load_difffit_weights(folder / "fox", "fox")
    pipe.save_difffit_weights("~/fox")
    pipe.save_pretrained("~/pipeline")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox", "pipeline"]
    loaded = DiffFitDiTPipeline.from_pretrained("~/pipeline")
    assert loaded.get_active_adapters() == ["fox"]
    loaded.load_difffit_weights("~/fox", "again")
    hotswap_adapter(loaded.transformer, "~/fox", "again")
    assert DiffFitConfig.from_pretrained("~/fox").id2label[0] == "fox"


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_of_an_adapter_stands_for_its_folder(folder, pipe, file):
    pipe.load_difffit_weights(folder / "art", "one")
    pipe.load_difffit_weights(folder / "fox" / file, "two")
    assert torch.equal(images(pipe), stock(folder, "fox"))
    assert DiffFitConfig.from_pretrained(str(folder / "fox" / file)).id2label[0] == "fox"


@pytest.fixture(scope="module")
def places(folder, tmp_path_factory):
    """Folders that are no adapter, by what is said of them."""
    places = tmp_path_factory.mktemp("places")
    pipe = DiffFitDiTPipeline.from_pretrained(folder / "base")
    pipe.load_difffit_weights(folder / "fox", "fox")
    pipe.save_pretrained(places / "pipeline")
    pipe.transformer.save_pretrained(places / "named", save_embedding_layers=False)  # peft: into the folder fox
    (places / "empty").mkdir()
    (places / "file.txt").touch()
    return places


WHERE = {
    "empty": r"empty is neither an adapter nor a pipeline: it holds no adapter_config.json and no model_index.json.$",
    "named": "named is neither an adapter nor a pipeline.* Adapters in it: 'fox'.$",
    "file.txt": "file.txt is a file: pass the folder of the adapter, which holds adapter_config.json and adapter_model",
    "pipeline/transformer": "transformer is neither an adapter nor a pipeline",
    "absent/absent/absent": "There is no file or folder .*absent/absent, and .* cannot be the id of a repository",
    "./absent": "There is no file or folder .*absent, and './absent' cannot be the id of a repository on the Hub",
    "~/absent": "There is no file or folder .*absent, and .* cannot be the id of a repository on the Hub",
    "https://huggingface.co/me/fox/tree/main": "is a URL. Pass the id of the repository, 'me/fox'.",
    "https://huggingface.co": "is a URL. Pass the id of the repository, such as 'user/name'.",
    "me/fox extra": "cannot be the id of a repository on the Hub, such as 'user/name'",
}
LOADERS = {
    "load": lambda pipe, path, **kwargs: pipe.load_difffit_weights(path, **kwargs),
    "pipeline": lambda pipe, path, **kwargs: DiffFitDiTPipeline.from_pretrained(path, **kwargs),
    "hotswap": lambda pipe, path, **kwargs: hotswap_adapter(pipe.transformer, path, "fox", **kwargs),
    "config": lambda pipe, path, **kwargs: DiffFitConfig.from_pretrained(path, **kwargs),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("path", WHERE)
def test_places_without_an_adapter(folder, pipe, places, monkeypatch, path, loader):
    """Said at once, by every function that takes such a place, and without asking the Hub."""
    monkeypatch.chdir(places)
    pipe.load_difffit_weights(folder / "fox", "fox")
    requests = len(HUB.requests)
    with pytest.raises(ValueError, match=WHERE[path]):
        LOADERS[loader](pipe, path)
    assert len(HUB.requests) == requests and pipe.get_list_adapters() == ["fox"]


@pytest.mark.parametrize("loader", LOADERS)
def test_folders_have_no_revisions_and_may_have_subfolders(folder, pipe, places, loader):
    pipe.load_difffit_weights(folder / "fox", "fox")
    with pytest.raises(ValueError, match="revision='v2': .*named is on this machine, where there are no revisions"):
        LOADERS[loader](pipe, places / "named", revision="v2", subfolder="fox")
    with pytest.raises(ValueError, match="absent does not exist: pass the folder of the adapter"):
        LOADERS[loader](pipe, places / "named", subfolder="absent")
    if loader != "pipeline":  # these adapters name no base
        LOADERS[loader](pipe, places / "named", subfolder="fox")


def test_a_pipeline_is_not_an_adapter(folder, pipe, places):
    for loader in ("load", "hotswap", "config"):
        pipe.load_difffit_weights(folder / "fox", "fox")
        with pytest.raises(ValueError, match="is a pipeline, not an adapter: load it with .* in it: 'adapters/fox'.$"):
            LOADERS[loader](pipe, places / "pipeline")
        pipe.unload_difffit_weights()
    pipe.load_difffit_weights(places / "pipeline" / "adapters" / "fox")
    assert torch.equal(images(pipe), stock(folder, "fox"))


@pytest.mark.parametrize("keyword", ["adapter_weights", "weight_name", "subfoldr"])
def test_keywords_that_no_verb_knows(folder, pipe, keyword):
    pipe.load_difffit_weights(folder / "fox", "fox")
    for verb in (
        lambda **kwargs: pipe.load_difffit_weights(folder / "art", **kwargs),
        lambda **kwargs: hotswap_adapter(pipe.transformer, folder / "fox", "fox", **kwargs),
        lambda **kwargs: pipe.save_difffit_weights(folder / "new", **kwargs),
        lambda **kwargs: pipe.save_pretrained(folder / "new", **kwargs),
    ):
        with pytest.raises(TypeError, match=keyword):
            verb(**{keyword: 0.3})
    assert pipe.get_list_adapters() == ["fox"] and not (folder / "new").exists()


def test_fields_of_a_config_are_not_taken_beside_its_file(folder):
    with pytest.raises(ValueError, match=r"\['inference_mode', 'r'\]: load the config first, and then set its fields"):
        DiffFitConfig.from_pretrained(str(folder / "fox"), r=2, inference_mode=True)


def test_a_base_that_leaves_its_output_channels_open(tmp_path):
    """`None` means as many as go in, which the stock pipeline does not know."""
    model = get_peft_model(make_dit(out_channels=None), DiffFitConfig(num_classes=3))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    make_pipeline(out_channels=None).save_pretrained(tmp_path / "base")
    pipe = DiffFitDiTPipeline.from_pretrained(tmp_path / "base")
    pipe.load_difffit_weights(tmp_path / "adapter")
    expected = make_pipeline(out_channels=4)
    expected.transformer = PeftModel.from_pretrained(expected.transformer, tmp_path / "adapter")
    assert torch.equal(images(pipe), images(expected))


# Refusals


def test_a_scheduler_that_starts_from_other_noise_is_refused(pipe):
    """`DiTPipeline` does not scale the noise it starts from: the pictures would be noise, and nothing would say so."""
    for other in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        pipe.scheduler = other.from_config(pipe.scheduler.config)
        assert images(pipe).isfinite().all()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler starts from noise of standard deviation 157.4, and a"):
        images(pipe)


def test_label_ids_of_unknown_names(pipe):
    with pytest.raises(
        ValueError,
        match="'goldfsh' is not a class: give the name of one, or an index from 0 to 999. Did you mean 'goldfish'?",
    ):
        pipe.get_label_ids("goldfsh")


def test_wrong_names_and_weights(folder, pipe):
    with pytest.raises(ValueError, match="no DiffFit adapter: call load_adapter.*load_difffit_weights"):
        pipe.set_adapters("fox")
    pipe.load_difffit_weights(folder / "fox", "fox")
    expected = images(pipe)
    for refused, message in {
        lambda: pipe.load_difffit_weights(folder / "art", "fox"): "'fox' is taken",
        lambda: pipe.load_difffit_weights(folder / "art", "art", hotswap=True): "no adapter 'art' to swap",
        lambda: pipe.set_adapters(["fox", "fix"]): "Did you mean 'fox'?",
        lambda: pipe.set_adapters([]): "at least one",
        lambda: pipe.set_adapters(["fox", "fox"]): "each adapter once",
        lambda: pipe.set_adapters({"fox": 0.1}): r"Scales go apart, as in set_adapters\(\['a', 'b'\], \[0.8, 0.2\]\)",
        lambda: pipe.delete_adapters({"fox": 0.1}): "a string or a list of strings",
        lambda: pipe.fuse_difffit({"fox": 0.1}): "a string or a list of strings",
        lambda: pipe.fuse_difffit([]): "at least one",
        lambda: pipe.fuse_difffit(["fox", "fox"]): "each adapter once",
        lambda: pipe.save_difffit_weights("nowhere", ["fox"]): "no adapter \\['fox'\\]",
        lambda: pipe.set_adapters("fox", [0.1, 0.2]): "one finite number",
        lambda: pipe.set_adapters("fox", float("nan")): "one finite number",
        lambda: pipe.delete_adapters(["fox", "fix"]): "no adapter 'fix'",
        lambda: pipe.save_difffit_weights("nowhere", "fix"): "no adapter 'fix'",
    }.items():
        with pytest.raises(ValueError, match=message):
            refused()
    assert pipe.get_active_adapters() == ["fox"] and torch.equal(images(pipe), expected)


REFUSED = {
    "pickle": "a pickle can run any code",
    "empty": "is neither an adapter nor a pipeline",
    "lora": "is of an adapter of LORA",
    "truncated": "adapter_model.safetensors is truncated",
    "other base": "belongs to another base",
    "lacks a weight": "1 are missing",
    "other rows": r"embedding_table.difffit_delta has shape \(2, 16\), not \(4, 16\)",
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_leaves_the_pipeline_as_it_was(folder, pipe, tmp_path, kind, first):
    if not first:
        pipe.load_difffit_weights(folder / "fox", "fox")
    expected, labels, names = images(pipe), pipe.labels, [name for name, _ in pipe.transformer.named_modules()]
    model = get_peft_model(make_dit(num_layers=3 if kind == "other base" else 4), DiffFitConfig(num_classes=3))
    if kind == "lora":
        model = get_peft_model(make_dit(), LoraConfig(target_modules=["to_q"]))
    if kind != "empty":
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        weights = tmp_path / "adapter_model.safetensors"
    if kind == "pickle":
        torch.save(load_file(weights), tmp_path / "adapter_model.bin")
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif kind in ("lacks a weight", "other rows"):
        tensors = load_file(weights)
        name = next(name for name in tensors if "embedding_table" in name)
        tensor = tensors.pop(name)
        if kind == "other rows":
            tensors[name] = tensor[:2].clone()
        save_file(tensors, weights)
    with pytest.raises(ValueError, match=REFUSED[kind]):
        pipe.load_difffit_weights(tmp_path, "new")
    assert torch.equal(images(pipe), expected) and pipe.labels == labels
    assert [name for name, _ in pipe.transformer.named_modules()] == names
