"""The loss published DiTs are trained with: noise MSE plus, where the model also predicts its variance, the VLB term.

Tensors are latents of shape (batch, channels, height, width); timesteps are integers of shape (batch,).

Sources: Ho et al. 2020, arXiv 2006.11239 (DDPM: the posterior, eq. 6 and 7); Nichol & Dhariwal 2021, arXiv 2102.09672
(learned variance: eq. 15, and the hybrid loss, eq. 16); Salimans & Ho 2022, arXiv 2202.00512 (v-prediction).
"""

import math

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.training_utils import compute_snr
from torch import Tensor

# Published DiTs treat a latent like an image of 8 bits a channel when they score the last denoising step.
_BIN_HALF_WIDTH = 1 / 255


def training_scheduler(scheduler: SchedulerMixin) -> DDPMScheduler:
    """The schedule that a base was trained with, from the scheduler that its pipeline samples with.

    Raises:
        ValueError: if that is not a schedule of noise added in steps of variance `betas`, such as one of flow matching.
    """
    if not hasattr(scheduler, "betas"):
        raise ValueError(
            f"The base is sampled with {type(scheduler).__name__}, which has no betas: the base is trained by another "
            "method than DDPM's, such as flow matching, and cannot be trained on here."
        )
    _check_prediction_type(scheduler)
    return DDPMScheduler.from_config(scheduler.config)


def _check_prediction_type(scheduler: SchedulerMixin) -> None:
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {prediction_type!r} cannot be trained: use 'epsilon' or 'v_prediction'.")


def diffusion_loss(
    model_output: Tensor,
    x_0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler: SchedulerMixin,
    snr_gamma: float | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The training loss of every sample.

    Args:
        model_output: what the transformer returned for `scheduler.add_noise(x_0, noise, timesteps)`, with as many
            channels as `x_0`, or twice as many if the model has learned its variance.
        x_0: clean latents.
        noise: the Gaussian noise that was added.
        timesteps: the step of each sample.
        scheduler: a Diffusers scheduler with `betas`, `alphas_cumprod` and `config.prediction_type` ("epsilon" or
            "v_prediction").
        snr_gamma: weight samples by min(SNR, snr_gamma) / SNR (for v-prediction / (SNR + 1)): Hang et al. 2023,
            arXiv 2303.09556, where 5 is recommended. `None`: no weighting.
        shift: added to what the prediction is compared with, see `objective.Guidance`.

    Returns:
        Shape (batch,), float32: the MSE of the prediction plus, with learned variance, the VLB term in bits per
        dimension, in which the predicted mean is held constant (L_hybrid with lambda = 1, as DiT trains).

    Raises:
        ValueError: for another prediction type, or another number of channels.
    """
    _check_prediction_type(scheduler)
    prediction_type = scheduler.config.prediction_type
    channels = x_0.shape[1]
    if model_output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"The model returned {model_output.shape[1]} channels for latents of {channels}: "
            f"expected {channels}, or {2 * channels} with learned variance."
        )
    model_output, x_0, noise = model_output.float(), x_0.float(), noise.float()
    prediction = model_output[:, :channels]
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(x_0, noise, timesteps)
    target = target if shift is None else target + shift
    loss = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
    if model_output.shape[1] == 2 * channels:
        x_t = scheduler.add_noise(x_0, noise, timesteps)
        loss = loss + vlb_loss(prediction.detach(), model_output[:, channels:], x_0, x_t, timesteps, scheduler)
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        loss = loss * snr.clamp(max=snr_gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    return loss


def vlb_loss(
    prediction: Tensor, variance: Tensor, x_0: Tensor, x_t: Tensor, timesteps: Tensor, scheduler: SchedulerMixin
) -> Tensor:
    """One term of the variational lower bound per sample, in bits per dimension, shape (batch,).

    For t > 0 it is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); for t = 0 it is -log p(x_0 | x_1), with a Gaussian
    integrated over bins of 1/127.5. `variance` is the model's v in [-1, 1], which interpolates between the logarithms
    of the posterior variance and of beta_t.
    """
    betas = scheduler.betas.cpu().double()  # not all devices have float64
    alphas_cumprod = scheduler.alphas_cumprod.cpu().double()
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    posterior_variance[0] = posterior_variance[1]  # it is 0 at t = 0; the published code takes the next one

    def at(table: Tensor) -> Tensor:
        return table.float().to(x_0.device)[timesteps].view(-1, 1, 1, 1)

    if scheduler.config.prediction_type == "epsilon":
        predicted_x_0 = at(alphas_cumprod.rsqrt()) * x_t - at((1 / alphas_cumprod - 1).sqrt()) * prediction
    else:
        predicted_x_0 = at(alphas_cumprod.sqrt()) * x_t - at((1 - alphas_cumprod).sqrt()) * prediction

    # of the means' two terms that of x_t is the same in q and p, and 0 at t = 0
    x_0_weight = at(betas * previous.sqrt() / (1 - alphas_cumprod))
    true_mean, mean = x_0_weight * x_0, x_0_weight * predicted_x_0

    true_log_variance = at(posterior_variance.log())
    fraction = (variance + 1) / 2
    log_variance = fraction * at(betas.log()) + (1 - fraction) * true_log_variance

    kl = 0.5 * (
        log_variance
        - true_log_variance
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
        - 1
    )
    nll = -_discretized_gaussian_log_likelihood(x_0, mean, 0.5 * log_variance)
    term = torch.where(timesteps.view(-1, 1, 1, 1) == 0, nll, kl)
    return term.flatten(1).mean(1) / math.log(2)


def _discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of the bin around x; the outermost bins reach to infinity. The normal cdf by its tanh approximation."""

    def cdf(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    centered, inverse_scale = x - mean, (-log_scale).exp()
    upper = cdf(inverse_scale * (centered + _BIN_HALF_WIDTH))
    lower = cdf(inverse_scale * (centered - _BIN_HALF_WIDTH))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
