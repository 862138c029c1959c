"""`AdapterPool`: what it draws, what is in memory, and what it does with threads and broken files."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import images, make_pipeline, save_adapter

from difffit_peft import AdapterPool, DiffFitDiTPipeline

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven adapters, of which `f` and `g` have other layers than the rest."""
    folder = tmp_path_factory.mktemp("pool")
    for seed, name in enumerate("abcdefg"):
        save_adapter(folder / name, seed, id2label={0: f"{name} 0", 1: f"{name} 1"}, r=2 * (name in "fg"))
    return folder


def make_pool(folder, max_adapters: int) -> AdapterPool:
    return AdapterPool(DiffFitDiTPipeline.from_pipe(make_pipeline()), folder, max_adapters)


def drawn(pool, name: str, seed: int = 0) -> torch.Tensor:
    return images_of(pool, [f"{name} 1"], [name], seed)


def images_of(pool, labels, names, seed: int = 0) -> torch.Tensor:
    pool.pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
    result = pool(labels, names, num_inference_steps=2, generator=generator, output_type="np")
    return torch.as_tensor(result.images)


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, torch.Tensor]:
    """What each adapter draws by itself."""
    result = {}
    for name in "abcdefg":
        pipe = DiffFitDiTPipeline.from_pipe(make_pipeline())
        pipe.load_difffit_weights(folder / name)
        result[name] = images(pipe, [f"{name} 1"], generator=[torch.Generator().manual_seed(0)])
    assert len({tensor.numpy().tobytes() for tensor in result.values()}) == 7
    return result


@pytest.mark.parametrize("max_adapters", [1, 3, 10])
def test_any_adapter_draws_as_it_does_alone(folder, alone, max_adapters):
    pool = make_pool(folder, max_adapters)
    assert [*pool.places] == [*"abcdefg"] and pool.loaded == []
    for name in "abcfgabdefa":
        torch.testing.assert_close(drawn(pool, name), alone[name], **CLOSE)
        assert pool.loaded[-1] == name and len(pool.loaded) <= max_adapters
        assert len(pool.pipe.get_list_adapters()) == len(pool.loaded)


def test_the_one_asked_for_the_longest_time_ago_makes_room(folder):
    pool = make_pool(folder, 3)
    for name in "abcad":
        drawn(pool, name)
    assert pool.loaded == ["c", "a", "d"]
    images_of(pool, ["c 0", "e 1"], ["c", "e"])  # c is asked for in this batch: it stays
    assert pool.loaded == ["d", "c", "e"]


def test_a_batch_of_several(folder, alone):
    pool = make_pool(folder, 3)
    drawn(pool, "g")
    three = images_of(pool, ["a 1", "b 1", 0], ["a", "b", "__base__"])
    base = images(make_pipeline(), [0], generator=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(three, torch.cat([alone["a"], drawn(pool, "b", seed=1), base]), **CLOSE)
    two = images_of(pool, ["a 1", "b 1"], [("a", "c"), "b"])
    torch.testing.assert_close(two[1:], three[1:2], **CLOSE)
    assert not torch.allclose(two[:1], alone["a"], **CLOSE)


def test_threads_get_what_they_asked_for(folder, alone):
    pool = make_pool(folder, 2)
    names = "abcdefg" * 3
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda name: drawn(pool, name), names))
    for name, result in zip(names, results, strict=True):
        torch.testing.assert_close(result, alone[name], **CLOSE)


def test_a_broken_adapter_is_refused_and_the_others_go_on(folder, alone, tmp_path):
    shutil.copytree(folder, tmp_path / "pool")
    weights = tmp_path / "pool/b/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    pool = make_pool(tmp_path / "pool", 2)
    for name in "acd":
        drawn(pool, name)
    with pytest.raises(ValueError, match="truncated"):
        drawn(pool, "b")
    assert pool.loaded == ["c", "d"] and len(pool.pipe.get_list_adapters()) == 2
    for name in "cda":
        torch.testing.assert_close(drawn(pool, name), alone[name], **CLOSE)


def test_refusals(folder, tmp_path):
    pool = make_pool(folder, 2)
    with pytest.raises(ValueError, match="There is no adapter 'h' among the 7 of the pool"):
        drawn(pool, "h")
    with pytest.raises(ValueError, match="The batch names 3 adapters, and max_adapters is 2"):
        images_of(pool, [0, 0], ["a", ("b", "c")])
    with pytest.raises(ValueError, match="holds no folder with adapter_config.json"):
        make_pool(tmp_path, 2)
    with pytest.raises(ValueError, match="max_adapters=0"):
        make_pool(folder, 0)
    drawn(pool, "a")
    with pytest.raises(ValueError, match="The pipeline has the adapters"):
        AdapterPool(pool.pipe, folder)


def test_names_and_places(folder):
    pipe = DiffFitDiTPipeline.from_pipe(make_pipeline())
    assert AdapterPool(pipe, {"one": folder / "a"}).places == {"one": str(folder / "a")}
    pool = AdapterPool(pipe, [str(folder / "a"), "me/other"])
    images_of(pool, ["a 0"], [str(folder / "a")])
    assert pool.loaded == [str(folder / "a")]
