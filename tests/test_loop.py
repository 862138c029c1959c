"""`TrainingLoop` by itself: what it keeps where. What comes out of it is tested in `test_train_script.py`."""

import torch
from accelerate import Accelerator
from conftest import make_dit
from diffusers import DDPMScheduler
from peft import get_peft_model
from torch.utils.data import DataLoader

from difffit_peft import DiffFitConfig
from difffit_peft.training.latents import LatentDataset
from difffit_peft.training.loop import TrainingLoop


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
    loop = TrainingLoop(accelerator, *prepared, DDPMScheduler(), seed=0, ema_decay=0.9999)
    latents = LatentDataset(torch.randn(1, 8, 4, 8, 8), torch.rand(1, 8, 4, 8, 8), torch.arange(8))
    assert [loop.step for _ in loop.steps(DataLoader(latents, 4))] == [1, 2]
    assert used == [16 * sum(p.numel() for p in parameters)] * 2
