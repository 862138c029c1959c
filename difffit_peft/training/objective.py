"""What a model is trained for: how a clean latent becomes its input, and its output a loss.

The loop draws the same for every model. How noise is added and what is predicted is a `Diffusion` or `FlowMatching`;
how a model is called is a function of noisy latents, timesteps and labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor, nn

from .losses import diffusion_loss, training_scheduler
from .sampling import Draws, disable_label_dropout, null_class


class Diffusion:
    """Noise added in steps, as DDPM does: the model predicts it, or v, and perhaps its variance.

    Args:
        scheduler: with the `betas` and the `prediction_type` of the base.
        snr_gamma: min-SNR weighting, see `losses.diffusion_loss`.
    """

    def __init__(self, scheduler: DDPMScheduler, snr_gamma: float | None = None) -> None:
        self.scheduler, self.snr_gamma = scheduler, snr_gamma
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps

    def add_noise(self, x_0: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and the timesteps as the model takes them."""
        return self.scheduler.add_noise(x_0, noise, steps), steps

    def losses(self, output: Tensor, x_0: Tensor, noise: Tensor, steps: Tensor, shift: Tensor | None = None) -> Tensor:
        """The loss of each sample, (batch,); `shift` is added to its target."""
        return diffusion_loss(output, x_0, noise, steps, self.scheduler, self.snr_gamma, shift)


WEIGHTING_SCHEMES = ("logit_normal", "none")


class FlowMatching:
    """A straight line from the latent to noise: x_t = (1 - σ) x_0 + σ noise, and the model predicts noise - x_0.

    Sources: Lipman et al. 2023, arXiv 2210.02747; Esser et al. 2024, arXiv 2403.03206 (Stable Diffusion 3).

    Args:
        scheduler: gives σ of each step: shifted as it says, unless the shift is one of each resolution.
        weighting_scheme: how often each step is trained on: "logit_normal", most often in the middle, as Esser et al.
            found best; "none": all as often.
    """

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, weighting_scheme: str = "logit_normal") -> None:
        count = self.num_train_timesteps = scheduler.config.num_train_timesteps
        index = torch.arange(count)
        if weighting_scheme == "logit_normal":  # by the normal's quantiles uniform draws become logit-normal ones
            index = (count * torch.special.ndtri((index.double() + 0.5) / count).sigmoid()).long()
        self.timesteps = scheduler.timesteps.cpu()[index].float()
        self.sigmas = scheduler.sigmas.cpu()[index].float()

    def add_noise(self, x_0: Tensor, noise: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and the timesteps as the model takes them."""
        sigmas = self.sigmas.to(x_0.device)[steps].view(-1, *[1] * (x_0.dim() - 1))
        return (1 - sigmas) * x_0 + sigmas * noise, self.timesteps.to(x_0.device)[steps]

    def losses(self, output: Tensor, x_0: Tensor, noise: Tensor, steps: Tensor, shift: Tensor | None = None) -> Tensor:
        """The loss of each sample, (batch,); `shift` is added to its target."""
        target = noise - x_0 if shift is None else noise - x_0 + shift
        return (output.float() - target).square().flatten(1).mean(1)


def noising(
    scheduler: SchedulerMixin, snr_gamma: float | None = None, weighting_scheme: str | None = None
) -> Diffusion | FlowMatching:
    """How a base was trained, from the scheduler that its pipeline samples with.

    Raises:
        ValueError: for an option that this way of training does not have, or a prediction that cannot be trained.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config.get("prediction_type") == "flow_prediction":
        if snr_gamma is not None:
            raise ValueError(
                f"--snr_gamma is {snr_gamma}, but the base is trained by flow matching ({name}), which has no "
                "min-SNR weighting: leave it out."
            )
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            fixed = FlowMatchEulerDiscreteScheduler.from_config(config)
        else:  # a solver (Sana's)
            fixed = FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.get("flow_shift", 1.0))
        return FlowMatching(fixed, weighting_scheme or WEIGHTING_SCHEMES[0])
    if weighting_scheme is not None:
        raise ValueError(
            f"--weighting_scheme is {weighting_scheme!r}, but the base is trained to predict noise ({name}), "
            "whose steps are all trained on as often: leave it out."
        )
    return Diffusion(training_scheduler(scheduler), snr_gamma)


@dataclass(frozen=True)
class Guidance:
    """Guidance by the base, trained in, so that sampling takes one forward a step (DogFit, arXiv 2508.05685).

    The target ε becomes ε + (w - 1) (ε_average(x_t, c) - ε_base(x_t, ∅)), for samples whose label is not dropped. The
    average is that of the weights, where there is one; the base is the model with its adapters disabled. What predicts
    v or a velocity is shifted the same way. The term of a learned variance stays as it is.

    Attributes:
        scale: w; 1: no guidance.
        start: the step from which on it is trained.
    """

    scale: float = 1.0
    start: int = 0


@dataclass(frozen=True)
class Objective:
    """What `TrainingLoop` minimises.

    Attributes:
        noising: how noise is added, and the loss.
        predict: what the model gives for noisy latents, timesteps and labels.
        null: the label that stands for any, which guidance needs; `None`: there is none, and no label is dropped.
        dropout: share of samples that are trained as `null`.
    """

    noising: Diffusion | FlowMatching
    predict: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    null: int | None = None
    dropout: float = 0.1

    def losses(
        self, model: nn.Module, draws: Draws, x_0: Tensor, labels: Tensor, shift: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, (batch,); `shift` is added to its target."""
        x_t, timesteps = self.noising.add_noise(x_0, draws.noise, draws.timesteps)
        output = self.predict(model, x_t, timesteps, labels)
        return self.noising.losses(output, x_0, draws.noise, draws.timesteps, shift)

    def drop(self, draws: Draws, labels: Tensor) -> Tensor:
        """The labels, some of them dropped."""
        return labels if self.null is None else torch.where(draws.dropped, self.null, labels)


def class_conditional(model: nn.Module, scheduler: DDPMScheduler, snr_gamma: float | None = None) -> Objective:
    """The objective of a model that takes noisy latents, `timestep` and `class_labels`, as Diffusers' DiT does.

    Labels are dropped where the model has a null class. The model's own label dropout is turned off.
    """
    disable_label_dropout(model)

    def predict(model: Any, x_t: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        return model(x_t, timestep=timesteps, class_labels=labels).sample

    return Objective(Diffusion(scheduler, snr_gamma), predict, null_class(model))
