"""Names and indices of classes: they belong to the weights that sample, and lead to the same rows everywhere."""

import importlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import images, make_pipeline, randomise, save_adapter
from diffusers import DiTPipeline
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftModel, get_peft_model

from difffit_peft import DiffFitConfig, DiffFitDiTPipeline
from difffit_peft.class_names import class_indices, classes_called, join_names, split_names
from difffit_peft.training.visualize import label_rows, sample_grid

BASE = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "crane"}
DIGITS = sorted(map(str, range(1, 13)))  # as class folders "1" ... "12" are indexed
ADAPTERS = {
    "fox": {"id2label": {0: "fox", 1: "owl"}},
    "digits": {"id2label": dict(enumerate(DIGITS))},
    "comma": {"id2label": {0: "salt, fine", 1: "salt, coarse"}},
    "nameless": {"num_classes": 2},
    "same": {"num_classes": 2, "init_class_rows": "base"},
    "all": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`base`, a pipeline whose classes are named, and adapters of it."""
    folder = tmp_path_factory.mktemp("names")
    pipe = make_pipeline()
    pipe.register_to_config(id2label=BASE)
    pipe.save_pretrained(folder / "base")
    for name, fields in ADAPTERS.items():
        save_adapter(folder / name, **fields)
    return folder


@pytest.fixture
def pipe(folder) -> DiffFitDiTPipeline:
    return DiffFitDiTPipeline.from_pretrained(folder / "base")


def attached(pipe, path: Path, name: str = "default") -> PeftModel:
    """By PEFT, not by the pipeline."""
    return PeftModel.from_pretrained(pipe.transformer, path, name)


# Name or index


def test_name_first_then_index():
    names = dict(enumerate(DIGITS))
    assert class_indices(["10", "2", "1", "12"], names, 1000) == [1, 4, 0, 3]
    assert class_indices(["10", "0", 10, "999"], names, 1000) == [1, 0, 10, 999]
    assert class_indices(["0", 7], {}, 10) == [0, 7]


def test_numbers_of_numpy_and_pytorch_are_numbers(pipe):
    numbers = [np.int64(1), np.uint8(2), torch.tensor(3), *torch.arange(2), *np.arange(2)]
    assert class_indices(numbers, BASE, 1000) == [1, 2, 3, 0, 1, 0, 1]
    assert pipe.get_label_ids(torch.tensor([1, 3])) == [1, 3]


def test_names_of_several_names():
    assert class_indices(["tench", "Tinca tinca", "tench, Tinca tinca", "Tinca tinca, tench"], BASE, 1000) == [0] * 4
    comma = ADAPTERS["comma"]["id2label"]
    assert class_indices(["salt, coarse", "fine", "salt, fine"], comma, 1000) == [1, 0, 0]
    assert class_indices(["maillot"], {0: "maillot", 1: "maillot, tank suit"}, 1000) == [0]  # the whole name is nearest
    assert classes_called("salt, iodised", comma) == []
    assert join_names(split_names(BASE | {3: "heron"})) == {
        0: "Tinca tinca, tench",
        1: "goldfish",
        2: "crane",
        3: "heron",
    }


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("goldfsh", r"'goldfsh' is not a class: .*an index from 0 to 9. Did you mean 'goldfish'\?"),
        ("whale", r"'whale' is not a class: .*from 0 to 9. Names are \['tench, Tinca tinca', .*'crane'\]\.$"),
        ("crane", r"'crane' is the name of the classes \[2, 3\]: give one of these indices"),
        ("10", r"'10' is not a class: give the name of one, or an index from 0 to 9"),
        ("-1", "'-1' is not a class"),
        (10, "10 is not a class"),
        (-1, "-1 is not a class"),
        (1.0, "1.0 is not a class"),
        (None, "None is not a class"),
    ],
)
def test_what_is_no_class(label, message):
    with pytest.raises(ValueError, match=message):
        class_indices([label], BASE, 10)


def test_of_classes_without_names():
    with pytest.raises(ValueError, match="'fox' is not a class: give an index from 0 to 9. The classes have no names"):
        class_indices(["fox"], {}, 10)


@pytest.fixture
def example(monkeypatch):
    """Runs an example's `main` on arguments."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")

    def run(name: str, *arguments: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        script = importlib.import_module(name)
        script.main(script.parse_args([*arguments, "--num_images", "2", "--num_inference_steps", "2"]))

    return run


@pytest.mark.parametrize(
    ("adapter", "labels", "classes", "captions"),
    [
        ("digits", [], [*range(8)], DIGITS[:8]),
        ("digits", ["10", "2"], [1, 4], ["10", "2"]),
        ("digits", ["0", "2"], [0, 4], ["1", "2"]),
        ("comma", ["fine", "1"], [0, 1], ["salt, fine", "salt, coarse"]),
        ("nameless", ["1"], [1], ["1"]),
    ],
)
def test_rows_and_captions_of_generate_and_push_to_hub(
    folder, pipe, example, tmp_path, adapter, labels, classes, captions
):
    flags = ["--labels", *labels] if labels else []
    base = ["--pretrained_model_name_or_path", str(folder / "base")]
    pipe.load_difffit_weights(folder / adapter)
    pipe.set_progress_bar_config(disable=True)

    def expected(classes: list[int], captions: list[str]) -> np.ndarray:
        return np.asarray(label_rows(sample_grid(pipe, classes, 2, num_inference_steps=2), captions))

    output = tmp_path / "grid.png"
    example("generate", *base, "--adapters", str(folder / adapter), "--output", str(output), *flags)
    assert np.array_equal(np.asarray(PIL.Image.open(output)), expected(classes, captions))
    example("push_to_hub", *base, "--adapter", str(folder / adapter), "--repo_id", f"me/{adapter}", *flags)
    picture = PIL.Image.open(hf_hub_download(f"me/{adapter}", "samples.png", cache_dir=tmp_path / "cache"))
    shown = len(labels) or 4
    assert np.array_equal(np.asarray(picture), expected(classes[:shown], captions[:shown]))


# Names belong to the weights


def test_names_are_those_of_the_weights_however_they_got_there(folder, pipe):
    base = dict(pipe.labels)
    assert base == DiTPipeline.from_pretrained(folder / "base").labels and pipe.id2label == BASE
    pipe.transformer = attached(pipe, folder / "fox", "fox")
    assert pipe.labels == {"fox": 0, "owl": 1} and pipe.get_label_ids("owl") == [1]
    with pytest.raises(ValueError, match="'goldfish' is not a class"):
        pipe.get_label_ids("goldfish")
    with pipe.transformer.disable_adapter():
        assert pipe.labels == base and pipe.get_label_ids("Tinca tinca") == [0]
    pipe.transformer.load_adapter(folder / "digits", "digits")
    assert "owl" in pipe.labels
    pipe.transformer.set_adapter("digits")
    assert pipe.get_label_ids("10") == [1]
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert pipe.get_label_ids("10") == [1]
    pipe.transformer = pipe.transformer._orig_mod.unload()
    assert pipe.labels == base and pipe.id2label == BASE


def test_adapters_without_names(folder, pipe):
    """The rows of new classes are not the base's classes; those that started as the base's are."""
    for name in ("all", "same"):
        pipe.load_difffit_weights(folder / name, name)
        assert pipe.id2label == BASE
    pipe.load_difffit_weights(folder / "nameless", "nameless")
    assert pipe.id2label == {} == pipe.labels
    with pytest.raises(ValueError, match="give an index from 0 to 999. The classes have no names"):
        pipe.get_label_ids("goldfish")
    assert pipe.get_label_ids("1") == [1]
    pipe.load_difffit_weights(folder / "fox", "fox")
    pipe.set_adapters(["nameless", "fox"])
    assert pipe.get_label_ids("owl") == [1]
    lora = DiffFitDiTPipeline.from_pretrained(folder / "base")
    lora.transformer = get_peft_model(lora.transformer, LoraConfig(target_modules=["to_q"]))
    assert lora.id2label == BASE


def test_merged_by_peft(folder, pipe, tmp_path):
    """The plain transformer then has the adapter's classes: names go with it, to a pipeline of any kind."""
    pipe.transformer = attached(pipe, folder / "comma").merge_and_unload()
    merged = ADAPTERS["comma"]["id2label"]
    assert pipe.id2label == merged and pipe.get_label_ids("salt, coarse") == [1]
    pipe.load_difffit_weights(folder / "fox")
    assert pipe.get_label_ids("owl") == [1]
    pipe.unload_difffit_weights()
    assert pipe.id2label == merged
    pipe.save_pretrained(tmp_path)
    assert DiffFitDiTPipeline.from_pretrained(tmp_path).id2label == merged
    stock = DiTPipeline.from_pretrained(folder / "base")
    stock.transformer = attached(stock, folder / "comma").merge_and_unload()
    assert DiffFitDiTPipeline.from_pipe(stock).id2label == merged
    nameless = DiffFitDiTPipeline.from_pretrained(folder / "base")
    nameless.transformer = attached(nameless, folder / "nameless").merge_and_unload()
    assert nameless.id2label == {} == DiffFitDiTPipeline.from_pipe(nameless).id2label


def test_mixed_with_another_method_and_merged(folder, pipe):
    model = get_peft_model(pipe.transformer, DiffFitConfig(id2label={0: "fox", 1: "owl"}), "fox", mixed=True)
    model.add_adapter("lora", LoraConfig(target_modules=["to_q"]))
    model.set_adapter(["fox", "lora"])
    pipe.transformer = model
    assert pipe.get_label_ids("owl") == [1]
    pipe.transformer = model.merge_and_unload()
    assert pipe.id2label == {0: "fox", 1: "owl"}
    other = DiffFitDiTPipeline.from_pretrained(folder / "base")
    model = get_peft_model(other.transformer, LoraConfig(target_modules=["to_q"]), "low_rank", mixed=True)
    model.add_adapter("fox", DiffFitConfig(id2label={0: "fox"}))
    other.transformer = model.merge_and_unload(adapter_names=["low_rank"])
    assert other.id2label == BASE


def test_what_is_not_fused_names_nothing(folder, pipe):
    pipe.load_difffit_weights(folder / "fox", "fox")
    pipe.load_difffit_weights(folder / "digits", "digits")
    pipe.set_adapters(["fox", "digits"])
    assert pipe.get_label_ids("owl") == [1]
    pipe.fuse_difffit(["digits"])
    assert pipe.get_label_ids("10") == [1] and "owl" not in pipe.labels
    pipe.unfuse_difffit()
    assert pipe.get_label_ids("owl") == [1]


def test_pipelines_of_the_same_parts(folder, pipe):
    def again() -> list[DiffFitDiTPipeline]:
        return [DiffFitDiTPipeline(**pipe.components, **pipe.parameters), DiffFitDiTPipeline.from_pipe(pipe)]

    assert [other.id2label for other in again()] == [BASE, BASE]
    pipe.load_difffit_weights(folder / "fox")
    for other in again():
        assert other.get_label_ids("owl") == [1]
        other.disable_difffit()
        assert other.id2label == BASE and other.get_label_ids("goldfish") == [1]
        other.enable_difffit()
    stock = DiTPipeline.from_pretrained(folder / "base")
    stock.transformer = attached(stock, folder / "fox")
    parts = DiffFitDiTPipeline(**stock.components)
    assert parts.get_label_ids("fox") == [0]
    parts.unload_difffit_weights()  # who has a stock pipeline's parts has no names of the base
    with pytest.raises(ValueError, match="'goldfish' is not a class: .* The classes have no names"):
        parts.get_label_ids("goldfish")
    named = DiffFitDiTPipeline.from_pipe(stock)
    named.unload_difffit_weights()
    assert named.get_label_ids("goldfish") == [1]


def test_a_pipeline_class_of_ones_own(folder):
    class Own(DiffFitDiTPipeline):
        pass

    pipe = Own.from_pretrained(folder / "base")
    assert type(pipe) is Own
    base = DiTPipeline.from_pretrained(folder / "base").labels
    assert pipe.labels == base
    pipe.transformer = attached(pipe, folder / "fox")
    assert pipe.labels == {"fox": 0, "owl": 1} and pipe.get_label_ids(["owl"]) == [1]
    pipe.unload_difffit_weights()
    assert pipe.labels == base


def test_names_that_are_assigned_are_the_bases(folder, pipe, tmp_path):
    pipe.load_difffit_weights(folder / "fox")
    pipe.labels = {"carp": 0, "koi": 0, "eel": 1}
    assert pipe.get_label_ids("owl") == [1]
    pipe.unload_difffit_weights()
    assert pipe.labels == {"carp": 0, "koi": 0, "eel": 1} and pipe.get_label_ids(["koi", "eel"]) == [0, 1]
    pipe.save_pretrained(tmp_path)
    assert DiffFitDiTPipeline.from_pretrained(tmp_path).id2label == {0: "carp, koi", 1: "eel"}


@pytest.mark.parametrize("fused", [False, True])
def test_names_survive_saving_whole(folder, pipe, tmp_path, fused):
    pipe.load_difffit_weights(folder / "comma")
    if fused:
        pipe.fuse_difffit()
    expected, names = pipe.labels, ["salt, fine", "salt, coarse", "coarse", "1"]
    pipe.save_pretrained(tmp_path / "saved")
    loaded = DiffFitDiTPipeline.from_pretrained(tmp_path / "saved")
    assert loaded.id2label == pipe.id2label == ADAPTERS["comma"]["id2label"]
    assert loaded.labels == expected and loaded.get_label_ids(names) == pipe.get_label_ids(names) == [0, 1, 1, 1]
    loaded.unload_difffit_weights()
    assert loaded.id2label == (ADAPTERS["comma"]["id2label"] if fused else BASE)  # not with parts in another order
    pipe.unfuse_difffit(), pipe.unload_difffit_weights()
    assert DiffFitDiTPipeline.from_pipe(pipe).id2label == BASE  # saving fused ones left nothing behind


def test_the_card_names_a_class_that_is_found(pipe, tmp_path):
    pipe.transformer = get_peft_model(
        pipe.transformer, DiffFitConfig(id2label={0: "crane", 1: "crane", 2: "a, b", 3: "owl"})
    )
    pipe.save_difffit_weights(tmp_path, "default")
    assert 'pipe.get_label_ids("owl")' in (tmp_path / "README.md").read_text()


def test_a_pipeline_takes_names_and_indices(folder, pipe):
    pipe.load_difffit_weights(folder / "fox")
    expected = images(pipe, (1, 0))
    for labels in (
        ["owl", 0],
        torch.tensor([1, 0]),
        np.array([1, 0]),
        [np.int64(1), torch.tensor(0)],
        range(1, -1, -1),
    ):
        sample = pipe(labels, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
        assert torch.equal(torch.as_tensor(sample.images), expected)
    for one in ("owl", 1, torch.tensor(1)):
        sample = pipe(one, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
        assert torch.equal(torch.as_tensor(sample.images), images(pipe, (1,)))
    assert images(pipe, (1000,)).isfinite().all()  # the null class
    for labels, message in {
        (0, 1001): "1001 is not a class: .* an index from 0 to 1000",
        (-1,): "-1 is not a class",
        (0.5,): "0.5 is not a class",
        ("owll",): "'owll' is not a class.*Did you mean 'owl'",
        (): "class_labels is empty",
    }.items():
        with pytest.raises(ValueError, match=message):
            images(pipe, labels)


# The null class is the base's


def test_guidance_by_the_bases_null_class():
    """The stock pipeline takes class 1000 for it: with the two rows exchanged it must make what ours makes."""
    ours = DiffFitDiTPipeline(**make_pipeline(num_embeds_ada_norm=2000).components)
    assert not torch.equal(images(DiTPipeline(**ours.components)), images(ours))
    stock = make_pipeline(num_embeds_ada_norm=2000)
    for block in stock.transformer.transformer_blocks:
        rows = block.norm1.emb.class_embedder.embedding_table.weight.data
        rows[[1000, 2000]] = rows[[2000, 1000]]
    expected = images(stock)
    assert torch.equal(images(ours), expected)
    assert torch.equal(images(ours, guidance_scale=1.0), images(stock, guidance_scale=1.0))
    ours.transformer = torch.compile(ours.transformer, backend="eager")
    torch.testing.assert_close(images(ours), expected, rtol=0, atol=1e-5)
    assert torch.equal(images(ours, (1999,)), images(stock, (1999,)))


def test_a_base_of_fewer_classes():
    pipe = DiffFitDiTPipeline(**make_pipeline(num_embeds_ada_norm=10).components)
    with pytest.raises(IndexError):
        images(DiTPipeline(**pipe.components))
    assert images(pipe).isfinite().all() and not pipe.transformer._forward_pre_hooks
    pipe.transformer = get_peft_model(pipe.transformer, DiffFitConfig(num_classes=3)).eval()
    randomise(pipe.transformer)
    before = images(pipe)
    table = pipe.transformer.base_model.model.norm1_emb.class_embedder.embedding_table
    table.difffit_delta["default"].data[-1] += 5  # of the null class
    assert not torch.equal(images(pipe), before)
    with pytest.raises(ValueError, match="from 0 to 9"):
        pipe.get_label_ids("10")
