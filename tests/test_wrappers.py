"""What people put around a model: compilers, quantisation, casting, offloading."""

import accelerate
import pytest
import torch
from conftest import CLOSE, images, make_dit, make_inputs, make_pipeline, outputs, randomise, save_adapter
from diffusers import DiTTransformer2DModel, QuantoConfig, TorchAoConfig
from peft import PeftModel, get_peft_model

from difffit_peft import DiffFitConfig, DiffFitDiTPipeline, hotswap_adapter, publishing


def train(model, inputs, steps: int = 8) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).sample.float().square().mean()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# torch.compile


def test_nothing_is_compiled_anew(tmp_path, inputs):
    for name in ("a", "b"):
        other = get_peft_model(make_dit(), DiffFitConfig(num_classes=3, r=1))
        randomise(other)
        other.base_model.model.proj_out_1.difffit_delta["default"].data += name == "b"
        other.save_pretrained(tmp_path / name, save_embedding_layers=False)
    model = PeftModel.from_pretrained(make_dit(), tmp_path / "a")
    model.load_adapter(tmp_path / "b", "b")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    small = make_inputs(3)
    for batch in (inputs, small):
        torch.testing.assert_close(outputs(compiled, batch), outputs(model, batch), **CLOSE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (0.5, 0.0, -1.0, 1.0):
            model.set_scale("default", scale)
            torch.testing.assert_close(outputs(compiled, inputs), outputs(model, inputs), **CLOSE)
        before = outputs(compiled, inputs)
        hotswap_adapter(compiled, tmp_path / "b")
        swapped = outputs(compiled, inputs)
        assert not torch.allclose(swapped, before, atol=1e-3)
        for batch in (small, inputs):
            torch.testing.assert_close(outputs(compiled, batch), outputs(model, batch), **CLOSE)
    torch.testing.assert_close(swapped, outputs(PeftModel.from_pretrained(make_dit(), tmp_path / "b"), inputs), **CLOSE)


def test_compiled_training_gives_the_same_gradients(inputs):
    gradients = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager", fullgraph=True)):
        model = get_peft_model(make_dit(), DiffFitConfig(num_classes=3))
        randomise(model)
        wrap(model)(**inputs).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_compiled_model_is_saved_whole(tmp_path, inputs):
    model = get_peft_model(make_dit(), DiffFitConfig(num_classes=3))
    randomise(model)
    compiled = torch.compile(model, backend="eager")
    model.add_adapter("other", DiffFitConfig())
    expected = outputs(model, inputs)

    def saved(name: str) -> torch.Tensor:
        return outputs(PeftModel.from_pretrained(make_dit(), tmp_path / name), inputs)

    states = {"itself": None, "state": model.state_dict(), "compiled": compiled.state_dict()}
    for name, state in states.items():
        publishing.save_adapter(compiled, tmp_path / name, state_dict=state)
        assert torch.equal(saved(name), expected)
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    less = {name: tensor for name, tensor in model.state_dict().items() if "proj_out_1" not in name}
    total = sum(name.endswith(".default") for name, _ in model.named_parameters())
    for state, count in ((wrapped, total), (less, 1), ({}, total)):
        with pytest.raises(ValueError, match=f"lack {count} of the {total} of the adapter 'default', for instance "):
            publishing.save_adapter(model, tmp_path / "itself", state_dict=state)
    assert torch.equal(saved("itself"), expected)


@pytest.fixture
def folder(tmp_path):
    """`base`, a pipeline, and adapters of it, `a` and `b`."""
    make_pipeline().save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / name, seed, num_classes=3)
    return tmp_path


def load(folder, adapter: str | None = None) -> DiffFitDiTPipeline:
    pipe = DiffFitDiTPipeline.from_pretrained(folder / "base")
    if adapter is not None:
        pipe.load_difffit_weights(folder / adapter, "x")
    return pipe


def test_every_verb_works_on_a_compiled_pipeline(folder):
    base, a, b = (images(load(folder, name)) for name in (None, "a", "b"))
    pipe = load(folder, "a")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert pipe.get_list_adapters() == pipe.get_active_adapters() == ["x"]
    assert torch.equal(images(pipe), a)
    pipe.load_difffit_weights(folder / "b", "x", hotswap=True)
    torch.testing.assert_close(images(pipe), b, **CLOSE)
    pipe.load_difffit_weights(folder / "a", "y")
    torch.testing.assert_close(images(pipe), a, **CLOSE)
    pipe.save_pretrained(folder / "pipeline")
    pipe.save_difffit_weights(folder / "adapter")
    loaded = DiffFitDiTPipeline.from_pretrained(folder / "pipeline")
    assert loaded.get_list_adapters() == ["x", "y"] and torch.equal(images(loaded), a)
    assert torch.equal(images(load(folder, "adapter")), a)
    pipe.set_adapters(["x", "y"], [0.0, 1.0])
    pipe.delete_adapters("x")
    pipe.fuse_difffit()
    torch.testing.assert_close(images(pipe), a, **CLOSE)
    pipe.unfuse_difffit()
    pipe.disable_difffit()
    torch.testing.assert_close(images(pipe), base, **CLOSE)
    pipe.enable_difffit()
    pipe.unload_difffit_weights()
    assert torch.equal(images(pipe), base) and pipe.get_list_adapters() == []


def test_a_compiled_base_takes_adapters_before_it_is_compiled(folder):
    pipe = load(folder)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    base = images(pipe)
    with pytest.raises(ValueError, match="The model is compiled: attach the adapter first"):
        pipe.load_difffit_weights(folder / "a")
    assert torch.equal(images(pipe), base) and pipe.get_list_adapters() == []


# Quantised bases


def quantised(name: str, folder, **overrides) -> DiTTransformer2DModel:
    make_dit(attention_head_dim=16, **overrides).save_pretrained(folder)
    if name == "bitsandbytes int8":  # Diffusers asks for a GPU before it quantises; the layers work without one
        bitsandbytes = pytest.importorskip("bitsandbytes")
        dit = DiTTransformer2DModel.from_pretrained(folder)
        for parent in list(dit.modules()):
            for child, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
                    int8 = bitsandbytes.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False)
                    int8.load_state_dict(linear.state_dict())
                    setattr(parent, child, int8.to("cpu"))
        return dit.requires_grad_(False).eval()
    if name == "torchao int8":
        torchao = pytest.importorskip("torchao.quantization")
        config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("optimum.quanto")
        config = QuantoConfig(weights_dtype=name.removeprefix("quanto "))
    return DiTTransformer2DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32)


QUANTISED = ["torchao int8", "quanto int8", "quanto int4", "bitsandbytes int8"]


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base_trains_saves_loads_and_takes_no_change_of_low_rank(name, tmp_path, inputs):
    model = get_peft_model(quantised(name, tmp_path / "base"), DiffFitConfig(num_classes=3, r=1))
    kinds = {type(m.get_base_layer().weight.data) for n, m in model.named_modules() if n.endswith("attn1.to_q")}
    dtypes = {m.get_base_layer().weight.dtype for n, m in model.named_modules() if n.endswith("attn1.to_q")}
    assert kinds != {torch.Tensor} or dtypes == {torch.int8}  # it is quantised
    with model.disable_adapter():
        base = outputs(model, inputs)
    assert torch.equal(outputs(get_peft_model(quantised(name, tmp_path / "base"), DiffFitConfig()), inputs), base)
    losses = train(model, inputs)
    assert losses[-1] < 0.9 * losses[0]
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(quantised(name, tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(outputs(loaded, inputs), expected)
    for merge in (loaded.merge_adapter, loaded.merge_and_unload):
        with pytest.raises(ValueError, match="Cannot merge a change of rank r into .*quantised"):
            merge()
    assert torch.equal(outputs(loaded, inputs), expected)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_merge_into_a_quantised_base_multiplies_its_scales(name, tmp_path, inputs):
    """No weight is quantised anew, so the only rounding is that of the scales; and back to the last bit."""
    base = quantised(name, tmp_path / "base")
    before = outputs(base, inputs)
    kinds = {n: type(m.weight.data) for n, m in base.named_modules() if n.endswith("attn1.to_q")}
    model = get_peft_model(base, DiffFitConfig())
    randomise(model)
    gammas = [p for n, p in model.named_parameters() if "difffit_gamma" in n and "to_q" in n]
    assert gammas
    for gamma in gammas:
        gamma.data[:3] = torch.tensor([0.0, -1.5, 1e-3])
    expected = outputs(model, inputs)
    assert (expected - before).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, inputs), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, inputs), expected, rtol=1e-5, atol=1e-5)
    assert all(type(merged.get_submodule(name).weight.data) is kind for name, kind in kinds.items())
    model = get_peft_model(quantised(name, tmp_path / "base"), DiffFitConfig())
    randomise(model)
    model.merge_adapter()
    assert torch.equal(outputs(model.unload(), inputs), before)


@pytest.mark.filterwarnings("ignore:The merge gives biases")
@pytest.mark.parametrize("name", QUANTISED)
def test_new_biases_on_a_quantised_base(name, tmp_path, inputs):
    base = quantised(name, tmp_path / "base", attention_bias=False)
    before = outputs(base, inputs)
    model = get_peft_model(base, DiffFitConfig(new_biases=True))
    assert torch.equal(outputs(model, inputs), before)
    assert model.base_model.model.transformer_blocks[0].attn1.to_q.difffit_delta
    randomise(model)
    expected = outputs(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs(model.unload(), inputs), before)


# Casting and offloading


@pytest.mark.parametrize("cast_first", [True, False])
def test_layerwise_casting(cast_first, inputs):
    dit = make_dit()
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    if cast_first:
        dit.enable_layerwise_casting(**cast)
    model = get_peft_model(dit, DiffFitConfig(num_classes=3))
    if not cast_first:
        dit.enable_layerwise_casting(**cast)
    assert dit.transformer_blocks[0].attn1.to_q.get_base_layer().weight.dtype == torch.float8_e4m3fn
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model, inputs)
    assert losses[-1] < 0.9 * losses[0]
    other = make_dit()
    other.enable_layerwise_casting(**cast)
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), outputs(other, inputs))


@pytest.mark.parametrize("offload_first", [True, False])
def test_model_offload_brings_the_embedder_too(offload_first):
    # the meta device stands for the accelerator: tensors there do not mix with those on the CPU
    dit = make_dit()
    if offload_first:
        accelerate.cpu_offload_with_hook(dit, "meta")
    model = get_peft_model(dit, DiffFitConfig())
    if not offload_first:
        model, _ = accelerate.cpu_offload_with_hook(model, "meta")
    inputs = {name: tensor.to("meta") for name, tensor in make_inputs().items()}
    assert outputs(model, inputs).device.type == "meta"


def test_a_pipeline_with_model_offload_samples():
    pipe = make_pipeline()
    pipe.transformer = get_peft_model(pipe.transformer, DiffFitConfig())
    randomise(pipe.transformer)
    expected = images(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(images(pipe), expected)
    assert torch.equal(images(pipe), expected)  # and once more, with what the first call has offloaded


def test_adapters_come_and_go_while_the_pipeline_offloads(folder):
    base, a, b = (images(load(folder, name)) for name in (None, "a", "b"))
    pipe = load(folder)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(images(pipe), base)
        pipe.load_difffit_weights(folder / "a", "a")
        assert torch.equal(images(pipe), a)
        pipe.load_difffit_weights(folder / "b", "b")
        assert torch.equal(images(pipe), b)
        pipe.fuse_difffit()
        torch.testing.assert_close(images(pipe), b, **CLOSE)
        pipe.save_pretrained(folder / "fused")
        pipe.unfuse_difffit()
        pipe.unload_difffit_weights()
    assert [type(hook.model).__name__ for hook in pipe._all_hooks] == ["DiTTransformer2DModel", "AutoencoderKL"]
    with pytest.raises(ValueError, match="is the name of a module"):
        pipe.load_difffit_weights(folder / "a", "0")
    assert torch.equal(images(pipe), base)  # offloading still
    assert [type(hook.model).__name__ for hook in pipe._all_hooks] == ["DiTTransformer2DModel", "AutoencoderKL"]
