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
PLACES = [(0.0, -2.0), (-1.2, -5.0), (0.99, -3.0), (4.0, -1.0), (0.3, 2.0)]
D, N, SIGMA = 3, 4000, 0.7
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


class Linear:
    """x = W z + noise, and an encoder that is somewhat off and knows no correlations."""

    def __init__(self):
        self.w = torch.randn(16, D, dtype=torch.float64) / 2
        gram = self.w.T @ self.w / SIGMA**2
        precision = torch.eye(D) + gram
        self.slope = precision.inverse() @ self.w.T / SIGMA**2
        self.log_var = -(precision.diagonal() / 2).log()
        covariance = self.w @ self.w.T + SIGMA**2 * torch.eye(16)
        exact = MultivariateNormal(torch.zeros(16).double(), covariance)
        x = exact.sample((N,))
        self.log_p = exact.log_prob(x)
        self.x = x.view(N, 1, 4, 4)

    def infer(self, x, c):
        mu = x.flatten(1) @ self.slope.T + 0.1
        return mu, self.log_var.expand(len(x), D)

    def decode(self, z, c):
        return (z @ self.w.T).unflatten(-1, (1, 4, 4))


@pytest.fixture
def linear(monkeypatch):
    """A VAE with the functions and the likelihood of the linear model, and the linear model."""
    truth, model = Linear(), vae.VAE((1, 4, 4), ["a"], width=8, latent=D)
    model.infer, model.decode = truth.infer, truth.decode

    def log_gaussian(x, location, log_scale):
        return Normal(location, SIGMA).log_prob(x)

    monkeypatch.setattr(vae, "log_logistic", log_gaussian)
    return model, truth


def iwae(model, x, k):
    """The bound of k draws of z: log of the mean of p(x | z) p(z) / q(z | x), in nats, (N,)."""
    mu, log_var = model.infer(x, None)
    q = Normal(mu, (0.5 * log_var).exp())
    weights = []
    for _ in range(k):
        z = prior.reparameterize(mu, log_var)
        log_p = vae.log_logistic(x, model.decode(z, None), None)
        log_p = log_p.flatten(1).sum(1)
        weights.append(log_p + prior.log_prob(z) - q.log_prob(z).sum(1))
    return torch.stack(weights).exp().mean(0).log()


def test_elbo_iwae_and_the_exact_likelihood_stand_in_order(linear):
    model, truth = linear
    loss = model.loss(truth.x, None)[0]
    elbo = -loss / BITS
    bounds = [iwae(model, truth.x, k) for k in (1, 4, 64)]
    error = (bounds[0] - truth.log_p).std() / N**0.5
    first, second, last = (bound.mean() for bound in bounds)
    exact = truth.log_p.mean()
    assert (elbo - first).abs() < 6 * error
    assert elbo < second < last < exact + 3 * error
    assert exact - last < 0.1 * (exact - elbo)
    assert exact - elbo > 10 * error


def test_the_elbo_is_its_closed_form(linear):
    """E |x - W z|^2 = |x - W mu|^2 + sum over d of sigma_d^2 |W_d|^2, and the KL is known."""
    model, truth = linear
    mu, log_var = model.infer(truth.x, None)
    rest = truth.x.flatten(1) - mu @ truth.w.T
    spread = log_var.exp() * truth.w.square().sum(0)
    squares = rest.square().sum(1) + spread.sum(1)
    nats = squares / (2 * SIGMA**2) + 8 * math.log(2 * math.pi * SIGMA**2)
    kl = (mu.square() + log_var.exp() - log_var - 1) / 2
    nll, kl = BITS * nats.mean(), BITS * kl.sum(1).mean()
    for beta in (0.0, 1.0, 100.0):
        loss, log = model.loss(truth.x, None, beta)
        assert close(log["nll"], nll, 5e-3)
        assert close(log["kl"], kl, 1e-9)
        assert close(loss, log["nll"] + beta * kl, 1e-9)
    assert torch.equal(model.encode(truth.x, None), mu)
