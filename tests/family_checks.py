"""What must be true of an adapter on a model of any family: each check raises `AssertionError` where it is not."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import PeftModel, get_peft_model
from tiny import Tiny
from torch import Tensor, nn

from difffit_peft import DiffFitConfig


def output(model: nn.Module, inputs: dict[str, Any], gradients: bool = False) -> Tensor:
    """All that the model computes of a copy of the inputs, as one tensor."""
    with torch.random.fork_rng(), torch.set_grad_enabled(gradients):
        torch.manual_seed(0)
        return torch.cat([tensor.flatten() for tensor in _tensors(model(**copy.deepcopy(inputs)))])


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    values = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".difffit_" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def scaled_through(cls: type[nn.Module]) -> list[str]:
    """The argument by which Diffusers scales the adapters of such a model; none where it does not."""
    if cls.__name__ == "UNet2DConditionModel" and not hasattr(diffusers.utils, "apply_lora_scale"):
        return []  # this Diffusers scales a UNet's layers late, see test_diffusers_verbs
    if "lora_scale" not in inspect.getsource(inspect.getmodule(cls)):  # type: ignore[arg-type]
        return []
    return [name for name in inspect.signature(cls.forward).parameters if name.endswith("attention_kwargs")]


class Checks:
    """The checks of one model, to be done in their order."""

    NAMES = ("identity", "gradients", "scale", "save_and_load", "merge", "unload")

    def __init__(self, tiny: Tiny, folder: Path) -> None:
        self.tiny, self.folder = tiny, folder
        self.base, self.inputs = tiny.make(), tiny.inputs()
        self.state = {name: tensor.clone() for name, tensor in self.base.state_dict().items()}
        self.before = output(self.base, self.inputs)
        self.model = get_peft_model(self.base, DiffFitConfig()).eval()
        self.idle: list[str] = []

    def identity(self) -> None:
        """A new adapter changes no bit."""
        assert torch.equal(output(self.model, self.inputs), self.before)

    def gradients(self) -> None:
        """Every parameter that is trained has a part in the output: no zeros and no `None`. Nothing else is trained."""
        randomise(self.model)
        self.model.train()
        y = output(self.model, self.inputs, gradients=True)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.model.eval()
        assert trained and all(".difffit_" in name for name in trained)
        self.idle = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
        assert not self.idle, f"{len(self.idle)} of {len(trained)} have no part in the output, such as {self.idle[0]}"

    def scale(self) -> None:
        """At scale 0 and disabled it is the base, to the last bit; so it is through Diffusers' `attention_kwargs`."""
        adapted = output(self.model, self.inputs)
        assert not torch.allclose(adapted, self.before, atol=1e-2)
        with self.model.disable_adapter():
            assert torch.equal(output(self.model, self.inputs), self.before)
        self.model.set_scale("default", 0.0)
        assert torch.equal(output(self.model, self.inputs), self.before)
        self.model.set_scale("default", 0.5)
        half = output(self.model, self.inputs)
        self.model.set_scale("default", 1.0)
        for argument in scaled_through(type(self.base)):
            assert torch.equal(output(self.model, self.inputs | {argument: {"scale": 0.0}}), self.before)
            assert torch.equal(output(self.model, self.inputs | {argument: {"scale": 0.5}}), half)
        assert torch.equal(output(self.model, self.inputs), adapted)

    def save_and_load(self) -> None:
        """A saved adapter computes the same bits on another copy of the base."""
        self.model.save_pretrained(self.folder / "adapter", save_embedding_layers=False)
        self.again = PeftModel.from_pretrained(self.tiny.make(), self.folder / "adapter").eval()
        assert torch.equal(output(self.again, self.inputs), output(self.model, self.inputs))

    def merge(self) -> None:
        """A merged model computes the same, and is the base's class with its keys, which Diffusers saves and loads."""
        adapted = output(self.again, self.inputs)
        merged = self.again.merge_and_unload()
        assert relative(output(merged, self.inputs), adapted) <= 1e-5
        assert type(merged) is type(self.base) and [*merged.state_dict()] == [*self.state]
        merged.save_pretrained(self.folder / "merged")
        loaded = type(self.base).from_pretrained(self.folder / "merged").eval().requires_grad_(False)
        assert torch.equal(output(loaded, self.inputs), output(merged, self.inputs))

    def unload(self) -> None:
        """Without its adapters the model is the base, to the last bit."""
        unloaded = self.model.unload()
        assert unloaded is self.base and [*unloaded.state_dict()] == [*self.state]
        assert all(torch.equal(tensor, self.state[name]) for name, tensor in unloaded.state_dict().items())
        assert torch.equal(output(unloaded, self.inputs), self.before)
