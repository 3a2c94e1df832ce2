"""prior.py against torch.distributions, closed forms and Monte Carlo."""

import math

import torch
from conftest import close
from torch.distributions import Normal, kl_divergence

import prior

STANDARD = Normal(0.0, 1.0)
MU = torch.linspace(-2, 2, 7, dtype=torch.float64)
LOG_VAR = torch.linspace(-3, 1.5, 7, dtype=torch.float64)
Q = Normal(MU, (0.5 * LOG_VAR).exp())


def test_sample_is_a_standard_normal():
    """By Kolmogorov and Smirnov, at one in a thousand."""
    z = prior.sample(1000, 200, seed=0).flatten()
    assert z.dtype == torch.float32
    n = len(z)
    empirical = torch.arange(1, n + 1) / n
    distance = STANDARD.cdf(z.sort().values) - empirical
    assert distance.abs().max() < 1.95 / n**0.5


def test_a_seed_decides_the_draw_or_else_the_global_generator():
    a, b, c = (prior.sample(4, 3, 2, seed=seed) for seed in (1, 1, 2))
    assert a.shape == (4, 3, 2)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    first, second = prior.sample(3, 2), prior.sample(3, 2, device="cpu")
    torch.manual_seed(0)  # that with which each test begins
    assert torch.equal(prior.sample(3, 2), first)
    assert not torch.equal(first, second)


def test_log_prob_and_kl_are_those_of_torch():
    z = torch.randn(5, 3, 4, dtype=torch.float64)
    truth = STANDARD.log_prob(z).sum((1, 2))
    assert close(prior.log_prob(z), truth, 1e-12)
    truth = kl_divergence(Q, STANDARD)
    assert close(prior.kl(MU, LOG_VAR), truth, 1e-12)
    near = prior.kl(torch.zeros(1), torch.full((1,), 1e-4))
    assert close(near, 0.25e-8, 1e-3, 0)


def test_draws_of_reparameterize_have_its_moments_and_its_kl():
    n = 200_000
    z = prior.reparameterize(MU.expand(n, 7), LOG_VAR.expand(n, 7))
    log_ratio = Q.log_prob(z) - STANDARD.log_prob(z)
    draws_of = z, (z - MU).square(), log_ratio
    truths = MU, LOG_VAR.exp(), prior.kl(MU, LOG_VAR)
    for draws, truth in zip(draws_of, truths):
        error = draws.std(0) / n**0.5
        assert ((draws.mean(0) - truth).abs() < 4 * error).all()


def test_gradients_flow_through_reparameterize():
    """E z^2 = mu^2 + sigma^2: its gradient is 2 mu in mu and sigma^2 in log sigma^2."""
    mu = torch.tensor(0.7, requires_grad=True)
    log_var = torch.tensor(-0.4, requires_grad=True)
    z = prior.reparameterize(mu.expand(400_000), log_var.expand(400_000))
    z.square().mean().backward()
    assert close(mu.grad, 1.4, atol=0.01)
    assert close(log_var.grad, math.exp(-0.4), atol=0.01)


def norms(z):
    return z.flatten(1).norm(dim=1)


def test_slerp_ends_where_it_should_and_keeps_length_and_speed():
    z0, z1 = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    z1 = z1 * (norms(z0) / norms(z1))[:, None, None]
    path = [prior.slerp(z0, z1, i / 10) for i in range(11)]
    assert close(path[0], z0)
    assert close(path[-1], z1)
    strides = [norms(b - a) for a, b in zip(path, path[1:])]
    for z, stride in zip(path, strides):
        assert close(norms(z), norms(z0))
        assert close(stride, strides[0])
    rows = prior.slerp(z0, z1, torch.tensor([0.0, 0.3, 0.7, 1.0]))
    for row, i in enumerate((0, 3, 7, 10)):
        assert close(rows[row], path[i][row])
    for other in (z0, -z0, 0 * z0):
        assert prior.slerp(z0, other, 0.5).isfinite().all()
