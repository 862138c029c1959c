"""`TrainingLoop` by itself: what it keeps where. What comes out of it is tested in `test_train_script.py`."""

import pytest
import torch
from accelerate import Accelerator
from conftest import make_dit
from diffusers import DDPMScheduler, UNet2DModel
from peft import get_peft_model
from torch.utils.data import DataLoader

from difffit_peft import DiffFitConfig
from difffit_peft.training.latents import LatentDataset
from difffit_peft.training.loop import TrainingLoop
from difffit_peft.training.objective import Guidance, class_conditional
from difffit_peft.training.sampling import draw


def test_training_takes_16_bytes_a_parameter_beside_the_frozen_base():
    """At its most, when the gradients are there: weights, gradients, AdamW's moments."""
    model = get_peft_model(make_dit(num_layers=2), DiffFitConfig())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    used = []

    def measure(optimizer: torch.optim.Optimizer, *_) -> None:
        state = [tensor for values in optimizer.state.values() for tensor in values.values() if tensor.dim()]
        tensors = [*parameters, *(p.grad for p in model.parameters() if p.grad is not None), *state]
        used.append(sum(tensor.nbytes for tensor in tensors))

    optimizer.register_step_post_hook(measure)
    accelerator = Accelerator(cpu=True)
    lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    prepared = accelerator.prepare(model, optimizer, lr_scheduler)
    loop = TrainingLoop(accelerator, *prepared, class_conditional(model, DDPMScheduler()), seed=0, ema_decay=0.9999)
    latents = LatentDataset(torch.randn(1, 8, 4, 8, 8), torch.rand(1, 8, 4, 8, 8), torch.arange(8))
    assert [loop.step for _ in loop.steps(DataLoader(latents, 4))] == [1, 2]
    assert used == [16 * sum(p.numel() for p in parameters)] * 2


def test_a_norm_of_0_clips_nothing():
    """As in other training scripts. Clipped to 0, nothing would be trained, and nothing would say so."""
    weights = []
    for max_grad_norm in (0.0, 1e9):
        torch.manual_seed(0)
        model = get_peft_model(make_dit(num_layers=2), DiffFitConfig())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        accelerator = Accelerator(cpu=True)
        prepared = accelerator.prepare(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
        loop = TrainingLoop(
            accelerator, *prepared, class_conditional(model, DDPMScheduler()), seed=0, max_grad_norm=max_grad_norm
        )
        latents = LatentDataset(torch.ones(1, 4, 4, 8, 8), torch.ones(1, 4, 4, 8, 8), torch.arange(4))
        before = loop.trained_weights()
        list(loop.steps(DataLoader(latents, 4)))
        weights.append(loop.trained_weights())
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights[0].items())
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def make_unet() -> UNet2DModel:
    """A class-conditional model without a null class."""
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    channels = {"in_channels": 4, "out_channels": 4}
    return UNet2DModel(8, **channels, **blocks, layers_per_block=1, norm_num_groups=4, num_class_embeds=64)


@pytest.mark.parametrize(("make_model", "null"), [(lambda: make_dit(num_layers=2), 1000), (make_unet, None)])
def test_labels_are_dropped_where_a_model_has_a_null_class(make_model, null):
    model, seen = make_model(), []
    model.register_forward_pre_hook(
        lambda _, args, inputs: seen.extend(inputs["class_labels"].tolist()), with_kwargs=True
    )
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    loop = TrainingLoop(accelerator, *prepared, class_conditional(model, DDPMScheduler()), seed=0)
    latents = LatentDataset(torch.randn(1, 64, 4, 8, 8), torch.rand(1, 64, 4, 8, 8), torch.arange(64))
    assert all(loss > 0 for loss in loop.steps(DataLoader(latents, 32)))
    dropped = [label for row, label in enumerate(seen) if label != row]
    assert set(dropped) == ({null} if null else set())
    assert len(dropped) < 16


# Guidance trained in


def trained(guidance: Guidance, ema_decay: float | None = 0.5, steps: int = 4, state=None) -> TrainingLoop:
    torch.manual_seed(0)
    model = get_peft_model(make_dit(num_layers=2, out_channels=4), DiffFitConfig())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    objective = class_conditional(model, DDPMScheduler())
    loop = TrainingLoop(accelerator, *prepared, objective, seed=0, ema_decay=ema_decay, guidance=guidance)
    if state is not None:
        loop.load_state_dict(state)
    latents = LatentDataset(torch.randn(1, 32, 4, 8, 8), torch.rand(1, 32, 4, 8, 8), torch.arange(32))
    for _ in loop.steps(DataLoader(latents, 8)):
        if loop.step == steps:
            break
    return loop


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_target_of_guidance_that_is_trained_in(ema_decay):
    """ε + (w - 1) (ε_average(x_t, c) - ε_base(x_t, ∅)), and plain ε where the label was dropped."""
    w, scheduler = 1.5, DDPMScheduler()
    loop = trained(Guidance(w, start=0), ema_decay, steps=3)
    mean, std = torch.randn(8, 1, 4, 8, 8), torch.rand(8, 1, 4, 8, 8)
    labels, draws = torch.arange(8), draw(0, 99, mean.shape, 1000, label_dropout=0.5)
    before = loop.trained_weights()
    loss = loop._backward(draws, mean, std, labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loop.trained_weights().items())

    dropped, t = draws.dropped, draws.timesteps
    assert 0 < dropped.sum() < 8
    x_t = scheduler.add_noise(mean[:, 0] + std[:, 0] * draws.posterior, draws.noise, t)
    null = torch.full((8,), 1000)
    with torch.no_grad():
        output = loop._plain(x_t, timestep=t, class_labels=torch.where(dropped, null, labels)).sample
        base = make_dit(num_layers=2, out_channels=4)(x_t, t, null).sample
        if ema_decay is not None:
            sizes = [p.numel() for p in loop.parameters]
            for p, value in zip(loop.parameters, loop.ema.shadow_params[0].split(sizes), strict=True):
                p.data = value.view(p.shape)
        average = loop._plain(x_t, timestep=t, class_labels=labels).sample
    target = draws.noise + (w - 1) * (average - base) * ~dropped.view(8, 1, 1, 1)
    assert loss == pytest.approx((output - target).square().mean().item(), rel=1e-5)
    assert loss != pytest.approx((output - draws.noise).square().mean().item(), rel=1e-3)


def test_a_scale_of_1_trains_as_without_it():
    weights = [trained(guidance).trained_weights() for guidance in (Guidance(), Guidance(1.0, 2), Guidance(1.5, 2))]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    assert not all(torch.equal(weights[2][name], tensor) for name, tensor in weights[0].items())
    late = trained(Guidance(1.5, start=4)).trained_weights()
    assert all(torch.equal(late[name], tensor) for name, tensor in weights[0].items())


def test_guidance_needs_a_null_label():
    model = make_unet()
    optimizer = torch.optim.AdamW(model.parameters())
    parts = (model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    with pytest.raises(ValueError, match="Guidance of scale 1.5 cannot be trained in: the model has no null label"):
        TrainingLoop(
            Accelerator(cpu=True), *parts, class_conditional(model, DDPMScheduler()), seed=0, guidance=Guidance(1.5)
        )


def test_guidance_goes_on_where_it_was_stopped():
    whole = trained(Guidance(1.5, start=1)).trained_weights()
    resumed = trained(Guidance(1.5, start=1), state=trained(Guidance(1.5, start=1), steps=2).state_dict())
    assert all(torch.equal(resumed.trained_weights()[name], tensor) for name, tensor in whole.items())
