"""prior.py against torch.distributions, Monte Carlo and closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import prior


def seeds(n, seed=0):
    return prior.fold_in(seed, torch.arange(n))


def test_normal_has_the_moments_and_the_distribution_of_a_standard_normal():
    z = prior.normal(seeds(1000), (999,)).double().flatten()
    n = len(z)
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    empirical = torch.arange(1, n + 1) / n
    ks = (Normal(0.0, 1.0).cdf(z.sort().values) - empirical).abs().max()
    assert ks < 1.95 / n**0.5  # Kolmogorov-Smirnov at 0.001


def test_normal_is_independent_across_places_seeds_and_streams():
    z = prior.normal(seeds(20000), (6,))
    other = torch.cat(
        [z, prior.normal(seeds(20000), (2,), 1), prior.normal(seeds(20000, 1), (2,))], 1
    )
    for columns in (other, other.square(), other.roll(1, 0) * other):
        correlation = torch.corrcoef(columns.T) - torch.eye(10)
        assert correlation.abs().max() < 5 / 20000**0.5


def test_uniform_is_open_flat_and_independent_of_normal():
    u = prior.uniform(seeds(2000), (500,)).double()
    assert 0 < u.min() and u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 1e4).square() / 1e4).sum() < 149  # chi-squared, 99 degrees, at 0.001


@pytest.mark.parametrize("draw", [prior.normal, prior.uniform])
def test_a_row_depends_on_its_seed_and_stream_alone(draw):
    whole = draw(seeds(257), (3, 7), 5)
    for n in (1, 2, 31, 100):
        assert torch.equal(draw(seeds(257)[:n], (3, 7), 5), whole[:n])
    shuffled = torch.randperm(257)
    assert torch.equal(draw(seeds(257)[shuffled], (3, 7), 5), whole[shuffled])
    rows = torch.cat([whole, draw(seeds(257), (3, 7), 6), draw(seeds(257, 1), (3, 7), 5)])
    assert len(rows.flatten(1).unique(dim=0)) == len(rows)


def test_normal_is_pinned():
    """Another bit anywhere changes every published sample."""
    z = prior.normal(torch.tensor([0, -1]), (2, 2), 3).flatten()
    pinned = [1.074354, -1.339383, -2.244905, -0.032304, 0.132445, -0.416541, -0.362528, -0.230902]
    assert torch.allclose(z, torch.tensor(pinned), atol=1e-5)


def test_fold_in_does_not_collide():
    children = prior.fold_in(torch.arange(300)[:, None], torch.arange(300)[None, :])
    assert len(children.flatten().unique()) == 300 * 300


def test_log_prob():
    z = torch.randn(5, 3, 4, dtype=torch.float64)
    truth = Normal(0.0, 1.0).log_prob(z).sum((1, 2))
    assert torch.allclose(prior.log_prob(z), truth, rtol=1e-12)


def test_kl_against_torch_and_against_monte_carlo():
    mu = torch.linspace(-2, 2, 7, dtype=torch.float64)
    log_var = torch.linspace(-3, 1.5, 7, dtype=torch.float64)
    q = Normal(mu, (0.5 * log_var).exp())
    assert torch.allclose(prior.kl(mu, log_var), kl_divergence(q, Normal(0.0, 1.0)), rtol=1e-12)
    eps = torch.randn(200000, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = prior.reparameterize(mu, log_var, eps)
    log_ratio = q.log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    error = (log_ratio.mean(0) - prior.kl(mu, log_var)).abs() / (log_ratio.std(0) / 200000**0.5)
    assert error.max() < 4
    assert prior.kl(torch.zeros(1), torch.full((1,), 1e-4)) == pytest.approx(0.25e-8, rel=1e-3)


def test_gradients_through_reparameterize():
    """E z^2 = mu^2 + sigma^2: its gradient is 2 mu in mu and sigma^2 in log sigma^2."""
    mu = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    log_var = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    eps = torch.randn(400000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prior.reparameterize(mu, log_var, eps).square().mean().backward()
    assert mu.grad.item() == pytest.approx(1.4, abs=0.01)
    assert log_var.grad.item() == pytest.approx(math.exp(-0.4), abs=0.01)


def test_slerp_ends_norms_and_speed():
    z0, z1 = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(prior.slerp(z0, z1, 0), z0) and torch.allclose(prior.slerp(z0, z1, 1), z1)
    z1 = z1 / z1.flatten(1).norm(dim=1)[:, None, None] * z0.flatten(1).norm(dim=1)[:, None, None]
    path = torch.stack([prior.slerp(z0, z1, t) for t in torch.linspace(0, 1, 11).tolist()])
    norms = path.flatten(2).norm(dim=2)
    assert torch.allclose(norms, norms[:1].expand_as(norms))
    strides = path.diff(dim=0).flatten(2).norm(dim=2)
    assert torch.allclose(strides, strides[:1].expand_as(strides))
    each = prior.slerp(z0, z1, torch.tensor([0.0, 0.3, 0.7, 1.0]))
    assert torch.allclose(each[1], prior.slerp(z0, z1, 0.3)[1])


def test_slerp_of_parallel_opposite_and_zero_vectors_is_finite():
    z = torch.randn(3, 8)
    assert torch.allclose(prior.slerp(z, 2 * z, 0.5), 1.5 * z, atol=1e-5)
    assert torch.allclose(prior.slerp(z, z, 0.3), z, atol=1e-5)
    assert prior.slerp(z, -z, 0.5).isfinite().all()
    assert prior.slerp(z, torch.zeros_like(z), 0.5).isfinite().all()
