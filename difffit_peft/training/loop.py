"""The training loop: everything that changes while a run goes on, one optimiser step after another."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .objective import Guidance, Objective
from .sampling import Draws, draw, sample_latents


class Diverged(RuntimeError):
    """A loss, or the gradients, are not finite."""


class TrainingLoop:
    """Trains the parameters that require gradients of a conditional model, on cached latents.

        loop = TrainingLoop(accelerator, model, optimizer, lr_scheduler, class_conditional(model, scheduler), seed=0)
        for loss in loop.steps(loader):
            print(loop.step, loss)
        with loop.averaged_weights():
            model.save_pretrained("adapter", state_dict=loop.trained_weights(), save_embedding_layers=False)

    All that is drawn is a function of the seed and the step (`sampling`), dropped labels too. So a run that goes on
    from `state_dict()` is, on a CPU, the uninterrupted one to the last bit.

    On the accelerator are the trained weights, their gradients and AdamW's moments, 16 bytes a parameter in all. The
    average of the weights is kept in the memory of the CPU.

    Args:
        accelerator: an `accelerate.Accelerator`, which has prepared the next three.
        model: what `objective` calls; adapted or not.
        optimizer: of the model's parameters that require gradients.
        lr_scheduler: stepped with the optimizer.
        objective: gives the losses of a batch: `objective.class_conditional` or `text_to_image.TextToImage.objective`.
        seed: of all draws.
        max_grad_norm: gradients are clipped to this norm; 0: they are not.
        ema_decay: of the average of the weights (Diffusers' `EMAModel`, warmed up); `None`: no average.
        guidance: to train in; the model must be a `PeftModel`, and the objective have a null label.
        compile: call the model through `torch.compile`.

    Attributes:
        step: optimiser steps done.
        average: running mean of the loss over about 100 steps, or `None` before the first.
        seconds: of each step done here, without what was done between steps.
        stopping: whether `steps` ends after this step, because `stop` was called in one of the processes.

    Raises:
        ValueError: for a model without parameters that require gradients; for guidance without a null label.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        objective: Objective,
        *,
        seed: int,
        max_grad_norm: float = 1.0,
        ema_decay: float | None = None,
        guidance: Guidance = Guidance(),  # noqa: B008 (it is frozen)
        compile: bool = False,
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.lr_scheduler = accelerator, model, optimizer, lr_scheduler
        if guidance.scale != 1 and objective.null is None:
            raise ValueError(f"Guidance of scale {guidance.scale} cannot be trained in: the model has no null label.")
        self.objective, self.seed, self.guidance = objective, seed, guidance
        self.max_grad_norm = max_grad_norm or math.inf
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(
                "The model has no parameters that require gradients. An adapter is loaded to be trained with "
                "PeftModel.from_pretrained(model, path, is_trainable=True)."
            )
        self.ema = None
        if ema_decay is not None:
            self.ema = EMAModel([self._flat()], decay=ema_decay, use_ema_warmup=True, power=0.75)
        self.step = 0
        self.average: float | None = None
        self.seconds: list[float] = []
        self.stopping = self._stop_asked = False
        self._forward = torch.compile(model) if compile else model
        # without what Accelerate puts around it, for several processes and `accelerate launch --dynamo_backend`
        self._plain = accelerator.unwrap_model(model, keep_torch_compile=False)

    def steps(self, loader: DataLoader) -> Iterator[float]:
        """Trains on the batches of `loader`, without those already trained on; yields the loss of each optimiser step.

        A batch is what `LatentDataset` gives: mean and std of shape (batch, views, channels, height, width), labels
        (batch,).

        Raises:
            Diverged: if the loss or the norm of the gradients is not finite; the weights are then as they were.
        """
        self.model.train()
        losses = []
        start = time.perf_counter()
        done = self.step * self.accelerator.gradient_accumulation_steps
        for batch, (mean, std, labels) in enumerate(skip_first_batches(loader, done), start=done):
            with self.accelerator.accumulate(self.model):
                losses.append(self._backward(self._draw(batch, mean.shape), mean, std, labels))
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
                    if self.accelerator.scaler is None:  # a scaler skips such a step, and lowers its scale
                        self._check_finite("norm of the gradients", _whole(norm).item())
                self.optimizer.step()
                self.lr_scheduler.step()
                self.optimizer.zero_grad()
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            if self.ema is not None and not self.optimizer.step_was_skipped:
                self.ema.step([self._flat()])
            loss = statistics.fmean(losses)
            losses.clear()
            self.average = loss if self.average is None else 0.99 * self.average + 0.01 * loss
            self.seconds.append(time.perf_counter() - start)
            yield loss
            if self.stopping:
                return
            start = time.perf_counter()

    def stop(self) -> None:
        """Asks all processes to stop after the step they are in; a signal handler may call it."""
        self._stop_asked = True

    @torch.no_grad()
    def validation_loss(self, dataset: Dataset, batch_size: int) -> float:
        """The mean loss of images that are not trained on, at the same noise and timesteps at every call.

        With FSDP all processes must call it.
        """
        model = self._plain
        training, device = model.training, self.accelerator.device
        model.eval()
        losses = []
        hidden = not self.accelerator.is_local_main_process
        batches = tqdm(DataLoader(dataset, batch_size), desc="Validation loss", leave=False, disable=hidden)
        for batch, (mean, std, labels) in enumerate(batches):
            draws = draw(self.seed, batch, mean.shape, self.objective.noising.num_train_timesteps, device=device)
            x_0 = sample_latents(mean.to(device), std.to(device), draws.view, draws.posterior)
            losses.append(self.objective.losses(model, draws, x_0, labels.to(device)))
        model.train(training)
        return torch.cat(losses).mean().item()

    def trained_weights(self) -> dict[str, Tensor]:
        """The trained weights by name, whole, in the memory of the CPU. All processes must call it."""
        names = [n for n, p in self._plain.named_parameters() if p.requires_grad]
        return dict(zip(names, self._split(self._flat()), strict=True))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Puts the average of the weights, where there is one, in their place for a while, in all processes."""
        if self.ema is None:
            yield
            return
        trained = self._flat()
        self._set(self.ema.shadow_params[0])
        try:
            yield
        finally:
            self._set(trained)

    def state_dict(self) -> dict[str, Any]:
        """All that another run needs to go on from here, beside the data and the base. All processes must call it."""
        scaler = self.accelerator.scaler
        optimizer = self.optimizer.state_dict()
        return {
            "parameters": self._flat().detach(),
            "optimizer": optimizer | {"state": _map_state(lambda value, _: _whole(value), optimizer["state"])},
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "step": self.step,
            "average": self.average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._set(state["parameters"])
        of = _map_state(lambda value, i: _sharded(value, self.parameters[i]), state["optimizer"]["state"])
        self.optimizer.load_state_dict(state["optimizer"] | {"state": of})
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.average = state["step"], state["average"]

    def _draw(self, batch: int, shape: tuple[int, ...]) -> Draws:
        return draw(
            self.seed,
            batch,
            shape,
            self.objective.noising.num_train_timesteps,
            label_dropout=self.objective.dropout,
            process=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            device=self.accelerator.device,
        )

    @torch.no_grad()
    def _shift(self, draws: Draws, x_0: Tensor, labels: Tensor) -> Tensor | None:
        """What `Guidance` adds to the target of each sample, (batch, channels, height, width)."""
        scale, null = self.guidance.scale, self.objective.null
        if scale == 1 or self.step < self.guidance.start:
            return None
        x_t, timesteps = self.objective.noising.add_noise(x_0, draws.noise, draws.timesteps)
        with self.averaged_weights():
            average = self.objective.predict(self._plain, x_t, timesteps, labels)
        with self._plain.disable_adapter():
            base = self.objective.predict(self._plain, x_t, timesteps, torch.full_like(labels, null))
        shift = (scale - 1) * (average.float() - base.float())[:, : x_0.shape[1]]  # not of a learned variance
        return shift * (labels != null).view(-1, *[1] * (shift.dim() - 1))

    def _backward(self, draws: Draws, mean: Tensor, std: Tensor, labels: Tensor) -> float:
        """Adds the gradients of one batch; its loss over all processes."""
        x_0, labels = sample_latents(mean, std, draws.view, draws.posterior), self.objective.drop(draws, labels)
        shift = self._shift(draws, x_0, labels)
        loss = self.objective.losses(self._forward, draws, x_0, labels, shift).mean()
        # the loss, and whether a process was asked to stop: all must know, to stop together
        told = torch.tensor([loss.detach(), float(self._stop_asked)], device=self.accelerator.device)
        everyones, stop = self.accelerator.reduce(told, reduction="mean").tolist()
        self.stopping = self.stopping or stop > 0
        self._check_finite("loss", everyones)
        self.accelerator.backward(loss)
        return everyones

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise Diverged(
                f"The {what} is {value} at step {self.step + 1}: lower the learning rate, or train in bfloat16 or "
                "float32."
            )

    @torch.no_grad()
    def _flat(self) -> nn.Parameter:
        """A copy of the trained weights, (parameters,), in the memory of the CPU."""
        return nn.Parameter(torch.cat([_whole(p).detach().flatten() for p in self.parameters]).cpu())

    @torch.no_grad()
    def _set(self, flat: Tensor) -> None:
        for parameter, value in zip(self.parameters, self._split(flat), strict=True):
            parameter.copy_(_sharded(value.to(parameter.device), parameter))

    def _split(self, flat: Tensor) -> list[Tensor]:
        values = flat.detach().split([p.numel() for p in self.parameters])
        return [value.view(p.shape) for value, p in zip(values, self.parameters, strict=True)]


def _whole(value: Any) -> Any:
    """A tensor whose parts FSDP2 keeps in several processes; all of them must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _sharded(value: Any, like: Tensor) -> Any:
    """A whole tensor in parts, if that is how the parameter is that it belongs to."""
    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def _map_state(function: Callable[[Any, int], Any], state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """An optimiser's state with `function(value, index of the parameter)` in the place of each value."""
    return {i: {name: function(value, i) for name, value in values.items()} for i, values in state.items()}
