"""Frozen layers in int8 and fp8: their products, and adapters on a base whose blocks are held in them."""

import pytest
import torch
from conftest import make_dit, outputs, randomise
from peft import get_peft_model
from torch import nn

from difffit_peft import DiffFitConfig
from difffit_peft.low_precision import LowPrecisionLinear
from difffit_peft.training.base_precision import check_base_precision, lower_blocks

PRECISIONS = ["int8", "fp8"]


def integers(*shape: int, largest: int) -> torch.Tensor:
    """Random integers, the largest one in each row: quantising them changes nothing."""
    x = torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(len(shape))).float()
    x[..., 0] = largest
    return x


def product(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output, and the gradient of its input."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def dequantised(layer: LowPrecisionLinear) -> torch.Tensor:
    dtype = torch.int8 if layer.precision == "int8" else torch.float8_e4m3fn
    return layer.weight.data.view(dtype).float() * layer.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_integers_are_those_of_plain_torch(dtype):
    linear = nn.Linear(32, 16, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(integers(16, 32, largest=127))
    x, grad = integers(2, 3, 32, largest=127).to(dtype), integers(2, 3, 16, largest=127).to(dtype)
    for ours, plain in zip(product(LowPrecisionLinear(linear, "int8"), x, grad), product(linear, x, grad), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("precision", "step"), [("int8", 0.02), ("fp8", 0.06)])
def test_products_are_those_of_the_dequantised_weight_within_a_step(precision, step):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    linear.weight.data[:24] *= 4  # each row has a scale of its own
    layer = LowPrecisionLinear(linear, precision)
    assert (dequantised(layer) / linear.weight - 1).median().abs() < step
    x, grad = torch.randn(5, 64), torch.randn(5, 48)
    linear.weight.data = dequantised(layer)
    for ours, plain in zip(product(layer, x, grad), product(linear, x, grad), strict=True):
        assert ((ours - plain).norm(dim=1) / plain.norm(dim=1)).max() < step


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_zeros_and_a_layer_without_a_bias(precision):
    layer = LowPrecisionLinear(nn.Linear(16, 16, bias=False), precision)
    y, grad = product(layer, torch.zeros(3, 16), torch.zeros(3, 16))
    assert not y.any() and not grad.any()


def lowered(precision: str, **config) -> nn.Module:
    model = get_peft_model(make_dit(attention_head_dim=16), DiffFitConfig(num_classes=3, **config))
    lower_blocks(model, precision)
    randomise(model)
    return model


def gradients(model: nn.Module, call: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    """Of what is trained; the model draws no label dropout, so that runs can be compared."""
    model.zero_grad()
    call(**inputs).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def direction(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    flat = [torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (a, b)]
    return torch.cosine_similarity(*flat, dim=0).item()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapters_get_the_gradients_of_the_dequantised_base(precision, inputs):
    model = lowered(precision, r=1).eval()
    low = [m for m in model.modules() if isinstance(m, LowPrecisionLinear)]
    assert len(low) == 4 * 7  # of each block: q, k, v, out, two of the feed-forward and adaLN's
    ours = gradients(model, model, inputs)
    assert all(grad.isfinite().all() and grad.any() for name, grad in ours.items() if "to_k.difffit_delta" not in name)
    for name, module in list(model.named_modules()):
        if isinstance(module, LowPrecisionLinear):
            plain = nn.Linear(module.in_features, module.out_features).requires_grad_(False)
            plain.weight.data, plain.bias.data = dequantised(module), module.bias.data
            model.get_submodule(name.rpartition(".")[0]).base_layer = plain
    plain = gradients(model, model, inputs)
    assert direction(ours, plain) > (0.999 if precision == "int8" else 0.99)


def test_nothing_of_a_weight_is_kept_in_a_higher_precision(inputs):
    model = lowered("int8").eval()
    shapes = {m.weight.shape for m in model.modules() if isinstance(m, LowPrecisionLinear)}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    outside = {p.data_ptr() for p in model.parameters() if p.is_floating_point()}
    weights = [t for t in kept if {t.shape, t.shape[::-1]} & shapes and t.data_ptr() not in outside]
    assert len(weights) >= 4 * 6 and {t.dtype for t in weights} == {torch.int8}


def test_checkpointed_gradients_are_the_same(inputs):
    model = lowered("int8").eval()
    expected = gradients(model, model, inputs)
    model.get_base_model().enable_gradient_checkpointing()
    checkpointed = gradients(model, model, inputs)
    assert all(torch.equal(checkpointed[name], grad) for name, grad in expected.items())


def test_compiled_gradients_are_the_same_and_the_graph_has_no_break():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(32, 16)), DiffFitConfig(gamma_modules=["0"]))
    model.base_model.model[0].base_layer = LowPrecisionLinear(model.base_model.model[0].base_layer, "int8")
    randomise(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, values = torch.randn(4, 32), [p for p in model.parameters() if p.requires_grad]
    plain, ours = (torch.autograd.grad(call(x).square().sum(), values) for call in (model, compiled))
    torch.testing.assert_close(ours, plain)


def test_a_merge_multiplies_the_scales(inputs):
    model = lowered("int8")
    before = outputs(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, inputs), before, rtol=0.05, atol=0.05)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, inputs), before)


def test_a_change_of_low_rank_does_not_go_into_scales(inputs):
    model = lowered("int8", r=1)
    before = outputs(model, inputs)
    with pytest.raises(ValueError, match="Cannot merge a change of rank r into LowPrecisionLinear"):
        model.merge_adapter()
    assert torch.equal(outputs(model, inputs), before)


def test_a_model_without_such_layers_is_refused():
    model = get_peft_model(make_dit(attention_head_dim=10), DiffFitConfig())
    with pytest.raises(ValueError, match="--base_precision int8: .* no linear layers whose .* multiples of 16"):
        lower_blocks(model, "int8")


@pytest.mark.parametrize(
    ("precision", "mixed", "device", "sharded", "message"),
    [
        ("fp8", "bf16", "cpu", False, "fp8 needs an NVIDIA GPU of compute capability 8.9 or above, and .* is cpu"),
        ("int8", "bf16", "mps", False, "int8 needs an NVIDIA GPU of .* 8.0 or above, or a CPU, and this device is mps"),
        ("int8", "bf16", "cpu", True, "int8 is not for FSDP2"),
        ("bf16", "no", "cpu", False, "bf16 goes with --mixed_precision bf16, and that is no"),
    ],
)
def test_refused_precisions(precision, mixed, device, sharded, message):
    with pytest.raises(ValueError, match=message):
        check_base_precision(precision, mixed, torch.device(device), sharded)
    check_base_precision("int8", "no", torch.device("cpu"), False)
    check_base_precision(None, "no", torch.device("mps"), True)
