"""diffusion.py on Gaussian data, whose velocity and whose map from noise to data are known.

For x ~ N(M, S^2) in every pixel, z_t ~ N((1 - t) M, d(t)^2) with d(t)^2 = (1 - t)^2 S^2 + t^2. The
ODE keeps each z at its number of standard deviations from the mean: samplers must find that map."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import close, fill_zeros
from torch.distributions import Normal

import diffusion

M, S = 0.1, 0.3
SAMPLERS = ("ddpm", "ddim", "dpm")
Z = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)


def variance(t):
    return ((1 - t) * S) ** 2 + t**2


def ideal(z, t, c=None, guidance=1.0):
    """E[eps - x | z_t = z], for t a number or (B, 1)."""
    if isinstance(t, torch.Tensor):
        t = t.view(-1, 1, 1, 1)
    score = (z - (1 - t) * M) / variance(t)
    return t * score - (M + (1 - t) * S**2 * score)


def exact(z, t, s):
    """Where the ODE takes z from time t to time s."""
    scale = math.sqrt(variance(s) / variance(t))
    return (1 - s) * M + scale * (z - (1 - t) * M)


def tiny():
    """A network of 8 x 8 images whose every layer speaks."""
    model = diffusion.Diffusion((1, 8, 8), ["a", "b", "c"], width=8)
    return fill_zeros(model).requires_grad_(False)


@pytest.fixture
def gaussian():
    """A model with the ideal velocity."""
    model = tiny()
    model.velocity = ideal
    return model


def orders(error):
    """The measured orders of convergence of error(steps) as the steps are halved."""
    errors = [error(steps) for steps in (40, 80, 160, 320)]
    return [math.log2(a / b) for a, b in pairwise(errors)]


def test_ddim_and_encode_converge_to_the_exact_map_with_order_1(gaussian):
    def error(steps):
        x = gaussian.sample(Z, None, steps, "ddim", 1.0)
        return (x - exact(Z, 1, 0)).abs().max()

    def error_of_encode(steps):
        z = gaussian.encode(0.3 * Z, None, steps)
        return (z - exact(0.3 * Z, 0, 1)).abs().max()

    for measured in (error, error_of_encode):
        assert orders(measured) == pytest.approx([1] * 3, abs=0.15)
    assert close(gaussian.encode(Z, None, 1), Z + ideal(Z, 0.0))


def test_dpm_converges_with_order_2_in_steps_of_equal_log_ratio(gaussian, monkeypatch):
    """The step is that in log((1 - t) / t), from -4.6 to 4.6. On the samplers' grid from t = 1,
    where such steps are long, the order comes slowly: 1.3, 1.6, 1.7, 1.8 as steps are halved."""
    linspace = torch.linspace

    def error(steps):
        logits = linspace(4.6, -4.6, steps + 1, dtype=torch.float64)
        t = logits.sigmoid()
        monkeypatch.setattr(torch, "linspace", lambda *_: t)
        x = gaussian.sample(Z, None, steps, "dpm", 1.0)
        return (x - exact(Z, t[0], t[-1])).abs().max()

    assert orders(error) == pytest.approx([2] * 3, abs=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_lands_on_the_data_and_returns_its_estimate_in_one_step(gaussian, sampler):
    z = torch.randn(20_000, 1, 1, 1).double()
    x = gaussian.sample(z, None, 400, sampler, 1.0)
    assert close(x.mean(), M, atol=4 * S / 20_000**0.5)
    assert close(x.std(), S, 0.03)
    if sampler != "ddpm":
        assert close(x, exact(z, 1, 0).clamp(-1, 1), atol=1e-2)
    once = gaussian.sample(Z / 4, None, 1, sampler, 1.0)
    assert close(once, Z / 4 - ideal(Z / 4, 1.0))


def steps_of(sampler, x):
    """Pairs of neighbours among the (t, z) that a sampler passes, whose x^ is the given x."""
    model, seen = tiny(), []

    def velocity(z, t, c, guidance):
        seen.append((t, z))
        return (z - x) / t

    model.velocity = velocity
    z = torch.randn(50_000, 1, 1, 1).double()
    model.sample(z, None, 5, sampler, 1.0)
    return pairwise(seen)


def test_a_ddpm_step_is_a_draw_of_the_exact_posterior_and_a_ddim_step_draws_nothing():
    """q(z_s | z_t, x) is the product of q(z_s | x) and q(z_t | z_s): their precisions add."""
    x = -0.8
    for (t, z_t), (s, z_s) in steps_of("ddim", x):
        eps = (z_t - (1 - t) * x) / t
        assert close(z_s, (1 - s) * x + s * eps)
    for (t, z_t), (s, z_s) in steps_of("ddpm", x):
        a = (1 - t) / (1 - s)
        q = t**2 - (a * s) ** 2
        var = 1 / (1 / s**2 + a**2 / q)
        mean = var * ((1 - s) * x / s**2 + a * z_t / q)
        eps = (z_s - mean) / math.sqrt(var)
        error = 4 / math.sqrt(len(eps))
        assert close(eps.mean(), 0, atol=error)
        assert close(eps.var(), 1, 1.5 * error)
        assert close((eps * z_t).mean() / z_t.std(), 0, atol=2 * error)


def test_guidance_1_is_the_conditional_model_and_w_goes_on_from_the_null_text():
    model, z = tiny(), torch.randn(4, 1, 8, 8)
    c = model.embed(model.tokenize(["a", "b", "c", "a b"]))
    null = model.embed(model.tokenize([""] * 4))
    v = model.velocity(z, 0.6, c)
    v_null = model.velocity(z, 0.6, null)
    assert torch.equal(model.velocity(z, 0.6, c, 1.0), v)
    assert not close(v, v_null, atol=1e-2)
    for w in (0.0, 0.5, 2.5):
        truth = v_null + w * (v - v_null)
        assert close(model.velocity(z, 0.6, c, w), truth, atol=1e-5)
        x = z - model.velocity(z, 1.0, c, w)
        assert close(model.sample(z, c, 1, "ddim", w), x.clamp(-1, 1))


def test_the_loss_on_known_data_and_its_times():
    """Of the ideal velocity it is Var(eps - x) - Cov(eps - x, z_t)^2 / Var(z_t), given t. The times
    are logit-normal but for a log-uniform tenth (Kolmogorov and Smirnov, at one in a thousand)."""
    model, times = tiny(), []

    def velocity(z, t, c):
        times.append(t)
        return ideal(z, t)

    model.velocity = velocity
    x = M + S * torch.randn(100_000, 1, 1, 4)
    loss, _ = model.loss(x, None)
    t = times[0].flatten().double().sort().values
    covariance = t - (1 - t) * S**2
    truth = 1 + S**2 - covariance**2 / variance(t)
    assert close(loss, truth.mean(), 0.01)
    logit_normal = Normal(1.0, 1.0).cdf(t.logit())
    log_uniform = 1 - t.log() / math.log(1e-3)
    cdf = 0.9 * logit_normal + 0.1 * log_uniform
    distance = cdf - torch.arange(1, 100_001) / 100_000
    assert distance.abs().max() < 1.95 / 100_000**0.5


def test_the_loss_spreads_each_pixel_over_its_bin(monkeypatch):
    model, seen = tiny(), []
    model.velocity = lambda z, t, c: seen.append(z / (1 - t.view(-1, 1, 1, 1))) or z
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    model.loss(torch.zeros(2000, 1, 4, 4), None)
    u = 255 * seen[0]  # a bin is 2/255 wide
    assert u.abs().max() < 1.001
    assert close(u.mean(), 0, atol=0.01)
    assert close(u.var(), 1 / 3, 0.03)
