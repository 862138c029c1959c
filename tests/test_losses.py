"""The loss against the formulas of guided-diffusion written out in numpy, in double precision."""

import numpy as np
import pytest
import torch
from conftest import make_dit
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from peft import get_peft_model
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from difffit_peft import DiffFitConfig
from difffit_peft.training.losses import (
    _discretized_gaussian_log_likelihood,
    diffusion_loss,
    training_scheduler,
    vlb_loss,
)
from difffit_peft.training.objective import FlowMatching

STEPS = 20
SHAPE = (5, 2, 3, 3)  # batch, channels, height, width
TIMESTEPS = np.array([0, 1, 7, 19, 0])

BETAS = np.linspace(0.01, 0.2, STEPS)
ALPHAS_CUMPROD = np.cumprod(1 - BETAS)
ALPHAS_CUMPROD_PREV = np.append(1.0, ALPHAS_CUMPROD[:-1])
POSTERIOR_VARIANCE = BETAS * (1 - ALPHAS_CUMPROD_PREV) / (1 - ALPHAS_CUMPROD)
POSTERIOR_LOG_VARIANCE = np.log(np.append(POSTERIOR_VARIANCE[1], POSTERIOR_VARIANCE[1:]))
MEAN_COEF_X_0 = BETAS * np.sqrt(ALPHAS_CUMPROD_PREV) / (1 - ALPHAS_CUMPROD)
MEAN_COEF_X_T = (1 - ALPHAS_CUMPROD_PREV) * np.sqrt(1 - BETAS) / (1 - ALPHAS_CUMPROD)


def at(table: np.ndarray) -> np.ndarray:
    return table[TIMESTEPS].reshape(-1, 1, 1, 1)


def mean_flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).mean(1)


def normal_kl(mean1, logvar1, mean2, logvar2):
    return 0.5 * (-1.0 + logvar2 - logvar1 + np.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * np.exp(-logvar2))


def approx_standard_normal_cdf(x):
    return 0.5 * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x, means, log_scales):
    centered_x = x - means
    inv_stdv = np.exp(-log_scales)
    cdf_plus = approx_standard_normal_cdf(inv_stdv * (centered_x + 1.0 / 255.0))
    cdf_min = approx_standard_normal_cdf(inv_stdv * (centered_x - 1.0 / 255.0))
    log_cdf_plus = np.log(np.maximum(cdf_plus, 1e-12))
    log_one_minus_cdf_min = np.log(np.maximum(1.0 - cdf_min, 1e-12))
    log_delta = np.log(np.maximum(cdf_plus - cdf_min, 1e-12))
    return np.where(x < -0.999, log_cdf_plus, np.where(x > 0.999, log_one_minus_cdf_min, log_delta))


def reference_vlb(prediction, v, x_0, x_t, prediction_type):
    if prediction_type == "epsilon":
        predicted_x_0 = (x_t - np.sqrt(1 - at(ALPHAS_CUMPROD)) * prediction) / np.sqrt(at(ALPHAS_CUMPROD))
    else:
        predicted_x_0 = np.sqrt(at(ALPHAS_CUMPROD)) * x_t - np.sqrt(1 - at(ALPHAS_CUMPROD)) * prediction
    true_mean = at(MEAN_COEF_X_0) * x_0 + at(MEAN_COEF_X_T) * x_t
    mean = at(MEAN_COEF_X_0) * predicted_x_0 + at(MEAN_COEF_X_T) * x_t
    min_log, max_log = at(POSTERIOR_LOG_VARIANCE), at(np.log(BETAS))
    frac = (v + 1) / 2
    log_variance = frac * max_log + (1 - frac) * min_log
    kl = mean_flat(normal_kl(true_mean, min_log, mean, log_variance)) / np.log(2.0)
    nll = mean_flat(-discretized_gaussian_log_likelihood(x_0, mean, 0.5 * log_variance)) / np.log(2.0)
    return np.where(TIMESTEPS == 0, nll, kl)


def scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(STEPS, trained_betas=BETAS.tolist(), prediction_type=prediction_type)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """`x_0` has values beyond both ends of [-1, 1], where the outermost bins are open."""
    generator = np.random.default_rng(0)
    names = ("x_0", "noise", "prediction", "v")
    arrays = {name: generator.normal(size=SHAPE).astype(np.float32).astype(np.float64) for name in names}
    # near the truth at t = 0, as from a trained model: else every bin there has probability 0
    arrays["prediction"] = arrays["noise"] + 0.05 * arrays["prediction"]
    arrays["v"] = np.tanh(arrays["v"])
    arrays["x_t"] = np.sqrt(at(ALPHAS_CUMPROD)) * arrays["x_0"] + np.sqrt(1 - at(ALPHAS_CUMPROD)) * arrays["noise"]
    return arrays


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).float() if values.dtype == np.float64 else torch.from_numpy(values)


def velocity(arrays):
    return np.sqrt(at(ALPHAS_CUMPROD)) * arrays["noise"] - np.sqrt(1 - at(ALPHAS_CUMPROD)) * arrays["x_0"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_vlb_is_the_published_one(arrays, prediction_type):
    if prediction_type == "v_prediction":
        arrays["prediction"] += velocity(arrays) - arrays["noise"]
    expected = reference_vlb(*(arrays[name] for name in ("prediction", "v", "x_0", "x_t")), prediction_type)
    inputs = [tensor(arrays[name]) for name in ("prediction", "v", "x_0", "x_t")]
    vlb = vlb_loss(*inputs, tensor(TIMESTEPS), scheduler(prediction_type))
    np.testing.assert_allclose(vlb.numpy(), expected, rtol=2e-4)
    assert (arrays["x_0"][TIMESTEPS == 0] > 1).any() and (arrays["x_0"][TIMESTEPS == 0] < -1).any()
    assert len(set(expected.round(3))) == len(expected)


def test_vlb_is_zero_for_the_true_posterior(arrays):
    """With the true noise and v = -1 the predicted distribution is q(x_{t-1} | x_t, x_0)."""
    inputs = [tensor(arrays[name]) for name in ("noise", "v", "x_0", "x_t")]
    inputs[1] = -torch.ones(SHAPE)
    vlb = vlb_loss(*inputs, tensor(TIMESTEPS), scheduler())
    assert vlb[TIMESTEPS > 0].abs().max() < 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_is_mse_plus_vlb(arrays, prediction_type):
    target = arrays["noise"] if prediction_type == "epsilon" else velocity(arrays)
    arrays["prediction"] += target - arrays["noise"]
    mse = mean_flat((arrays["prediction"] - target) ** 2)
    vlb = reference_vlb(*(arrays[name] for name in ("prediction", "v", "x_0", "x_t")), prediction_type)
    inputs = [tensor(arrays[name]) for name in ("x_0", "noise")] + [tensor(TIMESTEPS), scheduler(prediction_type)]
    fixed = diffusion_loss(tensor(arrays["prediction"]), *inputs)
    learned = diffusion_loss(tensor(np.concatenate([arrays["prediction"], arrays["v"]], 1)), *inputs)
    assert fixed.shape == learned.shape == (SHAPE[0],)
    np.testing.assert_allclose(fixed.numpy(), mse, rtol=1e-5)
    np.testing.assert_allclose(learned.numpy(), mse + vlb, rtol=2e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_shift_moves_the_target_of_the_mse_alone(arrays, prediction_type):
    target = arrays["noise"] if prediction_type == "epsilon" else velocity(arrays)
    shift = np.full(SHAPE, 0.25)
    inputs = [tensor(arrays[name]) for name in ("x_0", "noise")] + [tensor(TIMESTEPS), scheduler(prediction_type)]
    output = tensor(np.concatenate([arrays["prediction"], arrays["v"]], 1))
    difference = diffusion_loss(output, *inputs, shift=tensor(shift)) - diffusion_loss(output, *inputs)
    moved = mean_flat((arrays["prediction"] - (target + shift)) ** 2 - (arrays["prediction"] - target) ** 2)
    np.testing.assert_allclose(difference.numpy(), moved, rtol=1e-3, atol=1e-4)


def test_vlb_trains_the_variance_alone(arrays):
    channels = SHAPE[1]
    inputs = [tensor(arrays[name]) for name in ("x_0", "noise")] + [tensor(TIMESTEPS), scheduler()]
    prediction = tensor(arrays["prediction"]).requires_grad_()
    diffusion_loss(prediction, *inputs).sum().backward()
    output = tensor(np.concatenate([arrays["prediction"], arrays["v"]], 1)).requires_grad_()
    diffusion_loss(output, *inputs).sum().backward()
    assert torch.equal(output.grad[:, :channels], prediction.grad)
    assert (output.grad[:, channels:].flatten(1).abs().sum(1) > 0).all()


def test_half_precision_output_is_scored_in_single(arrays):
    output = tensor(np.concatenate([arrays["prediction"], arrays["v"]], 1)).bfloat16()
    inputs = [tensor(arrays[name]) for name in ("x_0", "noise")] + [tensor(TIMESTEPS), scheduler()]
    loss = diffusion_loss(output, *inputs)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, diffusion_loss(output.float(), *inputs))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights(arrays, prediction_type):
    x_0, noise, output = (tensor(arrays[name]) for name in ("x_0", "noise", "prediction"))
    timesteps, plan = torch.from_numpy(TIMESTEPS), scheduler(prediction_type)
    snr = (ALPHAS_CUMPROD / (1 - ALPHAS_CUMPROD))[TIMESTEPS]
    weight = np.minimum(snr, 5) / (snr if prediction_type == "epsilon" else snr + 1)
    assert weight.min() < 0.9 * weight.max()
    plain = diffusion_loss(output, x_0, noise, timesteps, plan)
    weighted = diffusion_loss(output, x_0, noise, timesteps, plan, snr_gamma=5)
    np.testing.assert_allclose(weighted, plain * tensor(weight), rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_refuses_other_channels(channels):
    x_0 = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=f"returned {channels} channels for latents of 2: expected 2, or 4"):
        diffusion_loss(torch.zeros(5, channels, 3, 3), x_0, x_0, tensor(TIMESTEPS), scheduler())


def test_refuses_other_prediction_types():
    x_0 = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="'sample' cannot be trained: use 'epsilon' or 'v_prediction'"):
        diffusion_loss(x_0, x_0, x_0, tensor(TIMESTEPS), scheduler("sample"))


def test_the_schedule_of_training_is_that_of_sampling():
    """Of the same betas, also in pipelines that sample with other schedulers."""
    options = {"beta_start": 1e-3, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    expected = DDPMScheduler(**options)
    for other in (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        found = training_scheduler(other(**options))
        assert type(found) is DDPMScheduler and found.config.prediction_type == "v_prediction"
        assert torch.equal(found.betas, expected.betas)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            FlowMatchEulerDiscreteScheduler(),
            "FlowMatchEulerDiscreteScheduler, which has no betas.*such as flow matching",
        ),
        (EDMEulerScheduler(), "EDMEulerScheduler, which has no betas"),
        (DDIMScheduler(prediction_type="sample"), "'sample' cannot be trained"),
    ],
)
def test_refuses_what_was_not_trained_as_ddpm(scheduler, message):
    with pytest.raises(ValueError, match=message):
        training_scheduler(scheduler)


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the meta device, as MPS does on a Mac."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.is_meta and value.dtype == torch.float64:
                raise TypeError(f"{func}: Cannot convert a MPS Tensor to float64 dtype")
        return output


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_needs_no_float64_on_the_device(prediction_type):
    """Model, loss and gradients, on a device that stands for a Mac's; float64 on the CPU is there."""
    model = get_peft_model(make_dit(num_layers=2), DiffFitConfig(r=1)).train()
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    with FakeTensorMode(allow_non_fake_inputs=True), NoFloat64():
        model.to("meta")
        x_0, noise = torch.randn(2, 2, 4, 8, 8, device="meta")
        timesteps = torch.randint(1000, (2,), device="meta")
        x_t = scheduler.add_noise(x_0, noise, timesteps)
        output = model(x_t, timestep=timesteps, class_labels=torch.zeros_like(timesteps)).sample
        loss = diffusion_loss(output, x_0, noise, timesteps, scheduler, snr_gamma=5.0)
        loss.mean().backward()
    assert loss.is_meta and loss.dtype == torch.float32
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_flow_matching_needs_no_float64_on_the_device():
    target = FlowMatching(FlowMatchEulerDiscreteScheduler())
    with FakeTensorMode(allow_non_fake_inputs=True), NoFloat64():
        x_0, noise = torch.randn(2, 2, 4, 8, 8, device="meta")
        steps = torch.randint(1000, (2,), device="meta")
        x_t, timesteps = target.add_noise(x_0, noise, steps)
        loss = target.losses(x_t, x_0, noise, steps)
    assert (x_t.dtype, timesteps.dtype, loss.dtype) == (torch.float32,) * 3 and loss.is_meta


def test_a_bin_has_the_probability_of_a_normal_distribution():
    """Where neither tail nor peak decides, so that the approximation of the cdf shows."""
    x = torch.arange(-100, 101, dtype=torch.float64) / 127.5
    mean, scale, half = 0.1, 0.5, 1 / 255
    exact = torch.special.ndtr((x - mean + half) / scale) - torch.special.ndtr((x - mean - half) / scale)
    ours = _discretized_gaussian_log_likelihood(x, torch.tensor(mean), torch.tensor(scale).log()).exp()
    torch.testing.assert_close(ours, exact, rtol=1e-2, atol=0)
