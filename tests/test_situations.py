"""What `situations.md` lists and no other file holds: where people stumbled, by public issue threads."""

import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from conftest import (
    images,
    make_dit,
    make_inputs,
    make_pipeline,
    outputs,
    picture,
    save_adapter,
    write_folder,
    write_parquet,
)
from datasets import Value
from diffusers import DDPMScheduler, DiTTransformer2DModel
from peft import PeftModel, get_peft_model

import difffit_peft
from difffit_peft import DiffFitConfig, DiffFitDiTPipeline
from difffit_peft.training.images import to_pixels
from difffit_peft.training.latents import _PixelDataset, encode_latents
from difffit_peft.training.loop import TrainingLoop
from difffit_peft.training.objective import class_conditional


def test_every_line_of_the_list_is_held():
    """By a test that is there."""
    lines = Path(__file__).with_name("situations.md").read_text(encoding="utf-8").splitlines()
    rows = [re.fullmatch(r"\| \[.+ (#\d+)\]\((https://\S+)\) \| .+ \| (.+) \|", line) for line in lines if "](" in line]
    assert all(rows) and len({row[2] for row in rows}) == len(rows) > 20
    for test in {test for row in rows for test in re.findall(r"`(.+?)`", row[3])}:
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in Path(__file__).with_name(file).read_text(encoding="utf-8"), test


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`base`, and adapters of it."""
    folder = tmp_path_factory.mktemp("situations")
    pipe = make_pipeline()
    pipe.register_to_config(id2label={0: "tench", 1: "goldfish"})
    pipe.save_pretrained(folder / "base")
    save_adapter(folder / "fox", 1, id2label={0: "fox", 1: "owl"})
    save_adapter(folder / "art", 2, id2label={0: "oil"})
    return folder


def load(folder, *adapters: str) -> DiffFitDiTPipeline:
    pipe = DiffFitDiTPipeline.from_pretrained(folder / "base")
    for name in adapters:
        pipe.load_difffit_weights(folder / name, name)
    return pipe


# Diffusers


def test_fused_adapters_leave_with_a_word(folder):
    """Diffusers leaves fused LoRA in the weights when it is unloaded. What is unloaded here is gone."""
    pipe = load(folder, "fox")
    pipe.fuse_difffit()
    with pytest.warns(UserWarning, match=r"\['fox'\] were fused, .*base's again. To leave them in, .*merge_and_unload"):
        pipe.unload_difffit_weights()
    assert torch.equal(images(pipe), images(load(folder)))
    with pytest.raises(ValueError, match="has no DiffFit adapter"):
        pipe.unfuse_difffit()


def test_fusing_one_after_the_other_and_unfusing(folder):
    pipe = load(folder, "fox", "art")
    pipe.set_adapters(["fox", "art"])
    both, base = images(pipe), images(load(folder))
    for _ in range(2):
        pipe.fuse_difffit("fox")
        pipe.fuse_difffit("art")
        torch.testing.assert_close(images(pipe), both, rtol=0, atol=1e-4)
        pipe.unfuse_difffit()
        pipe.fuse_difffit("art")  # of the two, fox is out again
        torch.testing.assert_close(images(pipe), images(load(folder, "art")), rtol=0, atol=1e-4)
        pipe.unfuse_difffit()
        assert torch.equal(images(pipe), both)
    pipe.unload_difffit_weights()
    assert torch.equal(images(pipe), base)


def test_a_broken_adapter_comes_out_again(folder):
    pipe = load(folder, "fox")
    for name, parameter in pipe.transformer.named_parameters():
        if name.endswith("proj_out_2.difffit_delta.fox"):
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="values that are not finite"):
        pipe.fuse_difffit(safe_fusing=True)
    pipe.fuse_difffit()
    pipe.unfuse_difffit()
    pipe.unload_difffit_weights()
    assert torch.equal(images(pipe), images(load(folder)))


def test_loading_into_a_model_that_is_elsewhere(folder):
    """Its weights are on the meta device: what is written there is lost."""
    pipe = load(folder)
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="transformer are not where .* Use enable_model_cpu_offload.*or load and fuse"):
        pipe.load_difffit_weights(folder / "fox")
    assert pipe.get_list_adapters() == [] and isinstance(pipe.transformer, DiTTransformer2DModel)
    pipe = load(folder, "fox")
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="weights of 'fox' are not where .* new ones would be lost"):
        pipe.load_difffit_weights(folder / "fox", "fox", hotswap=True)


# PEFT


@pytest.mark.parametrize("verb", ["merge_and_unload", "unload"])
def test_a_merge_whose_result_is_not_kept(folder, tmp_path, verb):
    """The pipeline then has what it draws with, and no adapter; nothing empty is saved."""
    pipe, base = load(folder, "fox"), load(folder)
    expected, names = (images(pipe), pipe.id2label) if verb == "merge_and_unload" else (images(base), base.id2label)
    left = pipe.transformer
    getattr(pipe.transformer, verb)()
    assert pipe.get_list_adapters() == pipe.get_active_adapters() == [] and pipe.id2label == names
    assert isinstance(pipe.transformer, DiTTransformer2DModel)
    torch.testing.assert_close(images(pipe), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="has no DiffFit adapter"):
        pipe.set_adapters("fox", 0.5)
    with pytest.raises(ValueError, match="'fox' is not on the model any more.*returned is the merged model: save that"):
        difffit_peft.publishing.save_adapter(left, tmp_path / "adapter", "fox")
    assert not list(tmp_path.glob("adapter/*"))
    pipe.save_pretrained(tmp_path / "saved")
    loaded = DiffFitDiTPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(images(loaded), images(pipe)) and loaded.id2label == names
    pipe.load_difffit_weights(folder / "art")
    assert pipe.get_label_ids("oil") == [0]


def test_a_merged_model_saved_beside_its_adapter(folder, tmp_path):
    shutil.copytree(folder / "fox", tmp_path / "fox")
    model = PeftModel.from_pretrained(make_dit(), tmp_path / "fox").eval()
    expected = outputs(model, make_inputs())
    model.merge_and_unload().save_pretrained(tmp_path / "fox")
    merged = DiTTransformer2DModel.from_pretrained(tmp_path / "fox").eval()
    torch.testing.assert_close(outputs(merged, make_inputs()), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs(PeftModel.from_pretrained(make_dit(), tmp_path / "fox"), make_inputs()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_in_half_precision_rounds_as_the_adapter_does(folder, dtype):
    """Both are off what float32 gives, by about as much."""
    inputs = make_inputs()
    half = inputs | {"hidden_states": inputs["hidden_states"].to(dtype)}
    exact = PeftModel.from_pretrained(make_dit().to(dtype).float(), folder / "fox").eval()
    expected = outputs(exact, half | {"hidden_states": half["hidden_states"].float()})
    model = PeftModel.from_pretrained(make_dit().to(dtype), folder / "fox").eval()
    adapted = (outputs(model, half).float() - expected).abs().max()
    merged = (outputs(model.merge_and_unload(), half).float() - expected).abs().max()
    assert 0 < merged < 2 * adapted < 0.05 * expected.abs().max()


def test_a_model_with_nothing_to_train_is_refused(folder):
    model = PeftModel.from_pretrained(make_dit(), folder / "fox")
    accelerator, objective = Accelerator(cpu=True), class_conditional(model, DDPMScheduler())
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"no parameters that require gradients.*is_trainable=True"):
        TrainingLoop(accelerator, model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), objective, seed=0)


def test_loading_to_train_leaves_others_frozen(folder):
    model = PeftModel.from_pretrained(make_dit(), folder / "fox", "fox")
    model.load_adapter(folder / "art", "art", is_trainable=True)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"art"}
    assert torch.equal(
        outputs(model, make_inputs()), outputs(PeftModel.from_pretrained(make_dit(), folder / "fox"), make_inputs())
    )


def test_disabled_modules_saved_whole_are_the_bases():
    model = get_peft_model(make_dit(), DiffFitConfig(modules_to_save=["proj_out_2"])).eval()
    model.base_model.model.proj_out_2.modules_to_save["default"].weight.data += 0.1
    base = outputs(make_dit(), make_inputs())
    assert not torch.equal(outputs(model, make_inputs()), base)
    with model.disable_adapter():
        assert torch.equal(outputs(model, make_inputs()), base)


# Datasets


@pytest.mark.parametrize("kind", ["metadata.csv", "metadata.jsonl", "data.parquet", "folder/data.parquet"])
def test_an_edited_file_is_read_anew(tmp_path, load, kind):
    """Also where the edit leaves its size and time as they were."""
    place = write_folder(tmp_path / "images", ["all"]) if "metadata" in kind else tmp_path / kind
    place.parent.mkdir(exist_ok=True)

    def write(*labels: str) -> list[str]:
        rows = [{"file_name": f"all/{i}.png", "label": label} for i, label in enumerate(labels)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if kind.endswith("csv"):
            text = "file_name,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in rows)
        file = place / kind if place.is_dir() else place
        if place.is_dir():
            file.write_text(text)
        else:
            write_parquet(file, list(labels), Value("string"))
        os.utime(file, ns=(10**18, 10**18))
        data = load(place.parent if kind.startswith("folder") else place)
        return [data.class_names[label] for label in data.labels]

    for labels in (["ant", "bee"], ["bee", "ant"], ["cow", "bee"]):
        assert write(*labels) == labels


def test_a_picture_is_turned_once(tmp_path, load):
    """As EXIF says, by `datasets` or by us."""
    (tmp_path / "images" / "ant").mkdir(parents=True)
    image, exif = picture(size=(20, 40)), PIL.Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "images" / "ant" / "0.png", exif=exif)
    pixels = _PixelDataset(load(tmp_path / "images").images, 16, "white")[0]
    assert torch.equal(pixels, to_pixels(image.transpose(PIL.Image.Transpose.ROTATE_270), 16))


def test_a_picture_with_broken_metadata(tmp_path, load):
    """It is read, or named with the others that are not; it does not end the run in another place."""
    folder = write_folder(tmp_path / "images", ["ant"])
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff", xmp=b'<x \xa8 tiff:Orientation="6">')
    (folder / "ant" / "2.jpg").write_bytes(buffer.getvalue())
    dataset = encode_latents(make_pipeline().vae, load(folder), 16, tmp_path / "latents", skip_broken_images=True)
    assert len(dataset) in (2, 3)


def test_numbers_of_numpy_and_the_home_folder(tmp_path, load, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = load(write_folder(tmp_path / "images"), max_samples=np.int64(3))
    assert len(encode_latents(make_pipeline().vae, data, np.int64(16), "~/latents")) == 3
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("latents")] == ["latents"]
