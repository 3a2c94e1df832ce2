"""vae.py: the pixels' likelihood, and its bound on a linear-Gaussian model, whose likelihood is
known exactly."""

import math

import pytest
import torch
from conftest import close
from torch.distributions import MultivariateNormal, Normal

import prior
import vae

VALUES = torch.arange(256, dtype=torch.float64) / 127.5 - 1
PLACES = [(0.0, -2.0), (4.0, -1.0)]
D, N, VAR = 3, 4000, 0.5
BITS = 1 / (16 * math.log(2))


@pytest.mark.parametrize(("location", "log_scale"), PLACES)
def test_the_discretized_logistic_is_a_difference_of_cdfs_and_sums_to_1(location, log_scale):
    place = torch.tensor([location, log_scale], dtype=torch.float64)
    p = vae.log_logistic(VALUES, *place).exp()
    edges = VALUES[:-1] + 1 / 255
    cdf = torch.sigmoid((edges - location) / math.exp(log_scale))
    cdf = torch.cat([torch.zeros(1), cdf, torch.ones(1)])
    assert close(p, cdf.diff(), atol=1e-12)
    assert close(p.sum(), 1, 1e-9)


def test_the_discretized_logistic_is_finite_far_out_and_pulls_back():
    location = torch.tensor([-300.0, 300.0], requires_grad=True)
    x = torch.tensor([1.0, -1.0])
    log_p = vae.log_logistic(x, location, torch.tensor(-6.0))
    log_p.sum().backward()
    assert log_p.isfinite().all()
    assert location.grad[0] > 0 > location.grad[1]


def test_the_elbo_is_its_closed_form_and_below_the_exact_likelihood(monkeypatch):
    """For x = W z + noise, and an encoder that is somewhat off and knows no correlations. There
    E |x - W z|^2 = |x - W mu|^2 + sum over d of sigma_d^2 |W_d|^2, and the KL is known."""
    w = torch.randn(16, D, dtype=torch.float64) / 2
    precision = torch.eye(D) + w.T @ w / VAR
    covariance = w @ w.T + VAR * torch.eye(16)
    exact = MultivariateNormal(covariance[0] * 0, covariance)
    x = exact.sample((N,))
    mu = x @ w @ precision.inverse() / VAR + 0.1
    log_var = -(precision.diagonal() / 2).log().expand(N, D)
    spread = log_var.exp() * w.square().sum(0)
    rest = x - mu @ w.T
    squares = rest.square().sum(1) + spread.sum(1)
    of_sigma = 8 * math.log(2 * math.pi * VAR)
    nats = squares / (2 * VAR) + of_sigma
    nll = BITS * nats.mean()
    kl = BITS * prior.kl(mu, log_var).sum(1).mean()

    model = vae.VAE((1, 4, 4), ["a"], width=8, latent=D)
    images = x.view(N, 1, 4, 4)
    model.infer = lambda x, c: (mu, log_var)
    model.decode = lambda z, c: (z @ w.T).view_as(images)
    log_gaussian = lambda x, location, _: Normal(location, VAR**0.5).log_prob(x)  # noqa: E731
    monkeypatch.setattr(vae, "log_logistic", log_gaussian)
    for beta in (0.0, 100.0):
        loss, log = model.loss(images, None, beta)
        assert close(log["nll"], nll, 5e-3)
        assert close(log["kl"], kl, 1e-9)
        assert close(loss, log["nll"] + beta * kl, 1e-9)
    loss, _ = model.loss(images, None)
    assert loss > 0.01 - BITS * exact.log_prob(x).mean()
    assert torch.equal(model.encode(images, None), mu)
