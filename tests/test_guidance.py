"""Guidance by the class or by the base, and an adapter per image, in `DiffFitDiTPipeline`."""

import numpy as np
import pytest
import torch
from conftest import NULL, images, make_dit, make_pipeline, outputs, save_adapter
from peft import inject_adapter_in_model

from difffit_peft import DiffFitConfig, DiffFitDiTPipeline

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LABELS = {"fox": ["fox", "owl", "hare"], "art": ["owl", "ink"], "plain": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guidance")
    for seed, (name, labels) in enumerate(LABELS.items()):
        save_adapter(folder / name, seed, id2label=labels and dict(enumerate(labels)), r=seed)
    return folder


@pytest.fixture
def pipe(folder) -> DiffFitDiTPipeline:
    base = make_pipeline()
    base.labels = {"tench": 0, "goldfish": 1}
    pipe = DiffFitDiTPipeline.from_pipe(base)
    for name in LABELS:
        pipe.load_difffit_weights(folder / name, name)
    return pipe


def written_out(pipe, unguided: torch.nn.Module, w: float, labels=(0, 1)) -> torch.Tensor:
    """ε = ε_unguided(∅) + w (ε_adapted(c) - ε_unguided(∅)), sampled in two steps in plain torch."""
    x = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(2)
    for t in pipe.scheduler.timesteps:
        given = {"hidden_states": x, "timestep": t.expand(len(labels))}
        of_class = outputs(pipe.transformer, given | {"class_labels": torch.tensor(labels)})[:, :4]
        of_none = outputs(unguided, given | {"class_labels": torch.full((len(labels),), NULL)})[:, :4]
        x = pipe.scheduler.step(of_none + w * (of_class - of_none), t, x).prev_sample
    with torch.no_grad():
        return (pipe.vae.decode(x).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("w", [1.25, 3.0])
@pytest.mark.parametrize("active", [{"fox": 1.0}, {"fox": 0.7, "art": 0.4, "plain": -0.5}])
def test_the_base_is_the_unconditional_branch(pipe, w, active):
    pipe.set_adapters([*active], [*active.values()])
    guided = images(pipe, guidance_scale=w, guidance="domain")
    torch.testing.assert_close(guided, written_out(pipe, make_dit(), w), **CLOSE)
    by_class = images(pipe, guidance_scale=w)
    torch.testing.assert_close(by_class, written_out(pipe, pipe.transformer, w), **CLOSE)
    assert (guided - by_class).abs().max() > 1e-3


def test_without_a_scale_it_is_the_adapted_model(pipe):
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    assert torch.equal(
        images(pipe, guidance_scale=1.0, guidance="domain"), images(pipe, guidance_scale=torch.tensor(1))
    )
    assert calls == [2] * 4  # no second half


def test_the_base_stays_as_it_is(pipe):
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    images(pipe, guidance="domain")
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.transformer.state_dict().items())


def test_guidance_by_the_base_without_an_adapter_is_the_usual_one(pipe):
    pipe.disable_difffit()
    torch.testing.assert_close(images(pipe, guidance="domain"), images(pipe), **CLOSE)
    pipe.unload_difffit_weights()
    assert torch.equal(images(pipe, guidance="domain"), images(pipe))


@pytest.mark.parametrize("guidance", ["class", "domain"])
def test_an_adapter_per_image(pipe, guidance):
    """Each image is what its adapters make alone, with the names of its own classes."""
    entries = ["fox", "art", "__base__", ("fox", "plain"), "plain"]
    labels = ["owl", "owl", "goldfish", "hare", 7]
    options = {"guidance": guidance, "guidance_scale": 2.0}

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(5)]

    together = images(pipe, labels, adapter_names=entries, generator=generators(), **options)
    for i, generator in enumerate(generators()):
        if entries[i] == "__base__":
            pipe.disable_difffit()
        else:
            pipe.set_adapters([entries[i]] if isinstance(entries[i], str) else [*entries[i]], 1.0)
        alone = images(pipe, [labels[i]], generator=[generator], **options)
        torch.testing.assert_close(together[i : i + 1], alone, **CLOSE)
    assert len({picture.tobytes() for picture in np.asarray(together)}) == 5


def test_refusals(pipe):
    for options, message in [
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: must be a finite number"),
        ({"guidance_scale": "4"}, "guidance_scale='4': must be a finite number"),
        ({"guidance": "base"}, 'guidance=\'base\' is not a kind of guidance: use "class" or "domain"'),
        ({"adapter_names": ["fox"]}, "give a list of 2, one entry for each image"),
        ({"adapter_names": "fox"}, "give a list of 2"),
        ({"adapter_names": ["fox", ("fox", "atr")]}, "There is no adapter 'atr'.*Did you mean 'art'"),
    ]:
        with pytest.raises(ValueError, match=message):
            images(pipe, **options)
    with pytest.raises(ValueError, match="'hare' is not a class"):
        images(pipe, ["fox", "hare"], adapter_names=["fox", "art"])
    pipe.fuse_difffit()
    for options in ({"guidance": "domain"}, {"adapter_names": ["fox", "art"]}):
        with pytest.raises(ValueError, match="fused, and so part of the base: call unfuse_difffit"):
            images(pipe, **options)
    images(pipe)


def test_what_is_injected_guides_by_its_class_and_is_refused_by_the_base():
    pipe = DiffFitDiTPipeline.from_pipe(make_pipeline())
    plain = images(pipe)
    inject_adapter_in_model(DiffFitConfig(init_weights=False, id2label={0: "fox", 1: "owl"}), pipe.transformer)
    assert not torch.equal(images(pipe, ["fox", "owl"]), plain)
    for options in ({"guidance": "domain"}, {"adapter_names": ["__base__"] * 2}):
        with pytest.raises(ValueError, match="without a PeftModel.*load_difffit_weights"):
            images(pipe, **options)


def test_adapters_with_guidance_trained_in_take_one_forward_a_step(pipe, folder):
    save_adapter(folder / "guided", id2label={0: "fox"}, trained_guidance_scale=1.5)
    pipe.load_difffit_weights(folder / "guided", "guided")
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    assert pipe.default_guidance_scale == 1
    assert torch.equal(images(pipe), images(pipe, guidance_scale=1.0))
    images(pipe, guidance_scale=3.0)
    images(pipe, adapter_names=["guided", "fox"])  # one of them needs guidance
    images(pipe, adapter_names=["guided", "guided"])
    pipe.set_adapters(["guided", "fox"], [0.5, 0.5])
    assert pipe.default_guidance_scale == 4
    images(pipe)
    assert [calls[i] for i in range(0, len(calls), 2)] == [2, 2, 4, 4, 2, 4]
