"""diffusion.py's mathematics against Gaussian data, whose ideal velocity is known in closed form.

For x ~ N(m, s^2) in every pixel, z_t ~ N((1 - t) m, (1 - t)^2 s^2 + t^2), and the ODE keeps a z at
its number of standard deviations from the mean: that is the exact map the samplers must find."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal

import diffusion
import prior

M, S = 0.3, 0.6
C = torch.zeros(4, 16)
SEEDS = prior.fold_in(0, torch.arange(4))


def deviation(t):
    return math.sqrt(((1 - t) * S) ** 2 + t**2)


def ideal(z, t):
    """E[eps - x | z_t = z] for x ~ N(M, S^2)."""
    centred = (z - (1 - t) * M) / deviation(t) ** 2
    return t * centred - (M + (1 - t) * S**2 * centred)


def exact(z, t, s):
    """Where the ODE takes z from time t to time s."""
    return (1 - s) * M + deviation(s) / deviation(t) * (z - (1 - t) * M)


def tiny(n_words=3, **options):
    """A model of 8x8 images whose every layer speaks: the zeros of the start are filled."""
    torch.manual_seed(0)
    cfg = diffusion.Config(width=8, embedding=16, **options)
    model = diffusion.Diffusion(cfg, (1, 8, 8), n_words)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model.requires_grad_(False)


def order(solver, times):
    """The measured order of a solver on finer and finer grids times(N)."""
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for n in (40, 80, 160, 320):
        grid = times(n)
        errors.append((solver(ideal, z, grid) - exact(z, grid[0], grid[-1])).abs().max().item())
    return [math.log2(a / b) for a, b in pairwise(errors)]


def uniform_t(n):
    return torch.linspace(1, 0, n + 1, dtype=torch.float64).tolist()


def uniform_lambda(n):
    logits = torch.linspace(
        math.log(0.99 / 0.01), math.log(0.01 / 0.99), n + 1, dtype=torch.float64
    )
    return torch.sigmoid(logits).tolist()


def test_order_of_convergence_to_the_exact_map():
    assert order(diffusion.euler, uniform_t) == pytest.approx([1, 1, 1], abs=0.15)
    assert order(diffusion.heun, uniform_t) == pytest.approx([2, 2, 2], abs=0.15)
    assert order(diffusion.dpm, uniform_lambda) == pytest.approx([2, 2, 2], abs=0.25)


def test_every_sampler_lands_on_the_data_from_t_1_to_0_and_returns_x_hat_in_one_step():
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for solver in (diffusion.euler, diffusion.heun, diffusion.dpm):
        assert torch.allclose(solver(ideal, z, uniform_t(1000)), exact(z, 1, 0), atol=2e-2)
        if solver is not diffusion.heun:
            assert torch.allclose(solver(ideal, z, [1.0, 0.0]), z - ideal(z, 1.0))


def test_euler_is_ddim():
    """One step keeps x^ and eps^ and only mixes them anew (Song, Meng & Ermon 2021, eq. 12)."""
    z, t, s = torch.linspace(-2, 2, 9, dtype=torch.float64), 0.7, 0.4
    x, eps = z - t * ideal(z, t), z + (1 - t) * ideal(z, t)
    assert torch.allclose(diffusion.euler(ideal, z, [t, s]), (1 - s) * x + s * eps)


@pytest.mark.parametrize("n", [1, 2, 5, 40, 1000])
def test_ddpm_follows_its_closed_recursion_of_mean_and_variance(n):
    """The ideal x^ is linear in z, so is each step: mean and variance are known at every N."""
    mean, variance = 0.0, 1.0
    for t, s in pairwise(uniform_t(n)):
        alpha, d = (1 - t) / (1 - s), deviation(t) ** 2
        q = t**2 - (alpha * s) ** 2
        slope = alpha * s**2 / t**2 + (1 - s) * q / t**2 * (1 - t) * S**2 / d
        offset = (1 - s) * q / t**2 * (M - (1 - t) ** 2 * S**2 / d * M)
        mean, variance = slope * mean + offset, slope**2 * variance + q * s**2 / t**2
    count = 100000 if n < 1000 else 20000
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(count, dtype=torch.float64, generator=generator)
    x = diffusion.ddpm(
        ideal, z, uniform_t(n), lambda k: z.new_empty(count).normal_(generator=generator)
    )
    assert abs(x.mean() - mean) < 4 * math.sqrt(variance / count) + 1e-9
    assert abs(x.var() - variance) < 4 * variance * math.sqrt(2 / count) + 1e-9
    assert mean == pytest.approx(M, abs=1e-9)
    if n == 1000:
        assert variance == pytest.approx(S**2, rel=0.01)


def test_a_ddpm_step_is_the_exact_posterior():
    """q(z_s | z_t, x) as the product of q(z_s | x) and q(z_t | z_s), by its precisions."""
    z, x, t, s = torch.tensor([0.5], dtype=torch.float64), -0.8, 0.7, 0.45
    alpha = (1 - t) / (1 - s)
    q = t**2 - (alpha * s) ** 2
    variance = 1 / (1 / s**2 + alpha**2 / q)
    mean = variance * ((1 - s) * x / s**2 + alpha * z / q)
    for eps in (0.0, 1.0, -2.0):
        step = diffusion.ddpm(lambda z, t: (z - x) / t, z, [t, s], lambda k, eps=eps: eps)
        assert torch.allclose(step, mean + variance**0.5 * eps)


@pytest.mark.parametrize("steps", [1, 2, 3, 1001])
@pytest.mark.parametrize("sampler", ["ddpm", "euler", "heun", "dpm"])
def test_sample_takes_any_number_of_steps_and_ends_in_range(sampler, steps):
    model = tiny(sampler=sampler, steps=steps)
    model.velocity = lambda c, guidance: ideal
    x = model.sample(prior.normal(SEEDS, (1, 8, 8)), C, SEEDS)
    assert x.shape == (4, 1, 8, 8) and x.isfinite().all() and x.abs().max() <= 1


def test_the_same_z_and_text_give_the_same_image_in_any_batch():
    for sampler in ("ddpm", "dpm"):
        model = tiny(sampler=sampler, steps=4)
        c = model.embed(torch.tensor([[1, 0], [2, 3], [0, 0], [3, 1]]))
        z = prior.normal(SEEDS, (1, 8, 8))
        x = model.sample(z, c, SEEDS)
        assert torch.allclose(model.sample(z[2:], c[2:], SEEDS[2:]), x[2:], atol=1e-5)


def test_guidance():
    model = tiny()
    c = model.embed(torch.tensor([[1], [2], [3], [1]]))
    null = model.embed(torch.zeros(4, 1, dtype=torch.long))
    z, t = prior.normal(SEEDS, (1, 8, 8)), torch.full((4,), 0.6)
    v, v_null = model.net(z, t, c), model.net(z, t, null)
    assert not torch.allclose(v, v_null, atol=1e-3)
    for w, truth in ((1, v), (0, v_null), (2.5, v_null + 2.5 * (v - v_null))):
        assert torch.allclose(model.velocity(c, w)(z, 0.6), truth, atol=1e-5)


def test_encode_then_sample_returns_the_image_as_steps_grow():
    x = prior.uniform(SEEDS, (1, 8, 8)) - 0.5
    errors = []
    for steps in (10, 20, 40):
        model = tiny(steps=steps)
        c = model.embed(torch.tensor([[1], [2], [3], [0]]))
        errors.append((model.sample(model.encode(x, c), c) - x).abs().max().item())
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]
    assert errors[2] < 1e-3


def test_encode_finds_the_exact_z_of_gaussian_data():
    model = tiny(steps=200)
    model.velocity = lambda c, guidance: ideal
    x = prior.uniform(SEEDS, (1, 8, 8)) - 0.5
    assert torch.allclose(model.encode(x, C), exact(x, 0, 1), atol=1e-3)


def test_loss_of_the_ideal_velocity_is_its_conditional_variance():
    """Given t it is Var(eps - x) - Cov(eps - x, z_t)^2 / Var(z_t)."""
    model = tiny()
    seeds = prior.fold_in(1, torch.arange(20000))
    times = []

    def net(z, t, c):
        times.append(t)
        t = t[:, None, None, None].double()
        centred = (z - (1 - t) * M) / ((1 - t) ** 2 * S**2 + t**2)
        return t * centred - (M + (1 - t) * S**2 * centred)

    model.net = None
    model.__dict__["net"] = net
    model.dequantize = lambda x, seeds: x
    x = M + S * prior.normal(seeds, (1, 1, 4), 9)
    loss, metrics = model.loss(x, None, seeds)
    t = times[0]
    truth = S**2 + 1 - (t - (1 - t) * S**2) ** 2 / ((1 - t) ** 2 * S**2 + t**2)
    assert loss.item() == pytest.approx(truth.mean().item(), rel=0.02)
    assert metrics["loss"] == loss and not metrics["loss"].requires_grad
    below = (
        0.1 * math.log(20) / math.log(1000)
    )  # of the log-uniform tenth; logit-normal: next to none
    assert (t < 0.02).float().mean().item() == pytest.approx(below, abs=0.006)
    assert (t >= 1e-3).all() and (t < 1).all()


def test_bits_per_dim_of_gaussian_data():
    model = tiny()
    model.velocity = lambda c: ideal
    x = (0.4 * prior.normal(SEEDS, (1, 8, 8))).clamp(-1, 1)
    x = ((x + 1) * 127.5).round() / 127.5 - 1
    density = Normal(M, S).log_prob(model.dequantize(x, SEEDS)).mean((1, 2, 3)) / math.log(2)
    assert torch.allclose(model.bits_per_dim(x, C, SEEDS), math.log2(127.5) - density, atol=0.01)


def test_bits_per_dim_is_a_probability_of_pixels():
    """Over a pixel's 256 values 2^-bits sums to 1: the sign, the base, the bin's width."""
    model = tiny()
    narrow = 0.25
    model.velocity = lambda c: (
        lambda z, t: z * (t - (1 - t) * narrow**2) / ((1 - t) ** 2 * narrow**2 + t**2)
    )
    model.dequantize = lambda x, seeds: x
    values = (torch.arange(256) / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    bits = model.bits_per_dim(values, torch.zeros(256, 16), torch.arange(256))
    assert (2**-bits).sum().item() == pytest.approx(1, abs=0.01)


def test_hutchinsons_divergence_is_unbiased_for_a_network():
    """One image's estimates over many probes, against the trace of the full Jacobian."""
    model = tiny()
    c, x = model.embed(torch.tensor([[1]])), prior.uniform(SEEDS[:1], (1, 8, 8)) - 0.5
    model.dequantize = lambda x, seeds: x
    estimates = model.bits_per_dim(
        x.expand(400, 1, 8, 8), c.expand(400, -1), prior.fold_in(2, torch.arange(400)), 2
    )
    velocity = model.velocity(c)

    def flow(z, t):
        jacobian = torch.autograd.functional.jacobian(
            lambda z: velocity(z.view(1, 1, 8, 8), t).flatten(), z.flatten()
        )
        return velocity(z, t), jacobian.trace()

    z, change = x, 0
    for t, s in pairwise(torch.logspace(-3, 0, 3).tolist()):
        v, divergence = flow(z, t)
        v_s, divergence_s = flow(z + (s - t) * v, s)
        z, change = z + (s - t) / 2 * (v + v_s), change + (s - t) / 2 * (divergence + divergence_s)
    truth = -(prior.log_prob(z) + change) / 64 / math.log(2) + math.log2(127.5)
    error = estimates.std() / 20
    assert abs(estimates.mean() - truth) < 4 * error and error > 0


def test_dequantization_fills_each_bin_evenly():
    model = tiny()
    x = torch.zeros(4, 1, 8, 8)
    noise = (
        torch.cat([model.dequantize(x, prior.fold_in(i, torch.arange(4))) for i in range(100)])
        * 127.5
    )
    assert noise.abs().max() < 0.5 and abs(noise.mean()) < 0.01
    assert noise.var().item() == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.parametrize(("channels", "side"), [(1, 4), (2, 12), (3, 64)])
def test_any_channels_and_any_side_divisible_by_4(channels, side):
    cfg = replace(diffusion.Config(), width=8, embedding=16, steps=1)
    model = diffusion.Diffusion(cfg, (channels, side, side), 2)
    z = prior.normal(SEEDS, model.latent_shape)
    assert model.sample(z, C, SEEDS).shape == (4, channels, side, side)
