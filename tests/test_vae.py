"""vae.py's bounds on a linear-Gaussian model, of exact likelihood, and its pixel likelihood."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

import prior
import vae

D, N = 3, 4000  # latents; images


def tiny(**options):
    torch.manual_seed(0)
    cfg = replace(vae.Config(), width=8, embedding=16, latent=D, **options)
    return vae.VAE(cfg, (1, 4, 4), 2)


def linear_gaussian(**options):
    """x = W z + noise with sigma 0.7, and an encoder that is off, with half the precision."""
    model = tiny(**options).double()
    w = torch.randn(16, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 2
    precision = torch.eye(D) + w.T @ w / 0.49
    posterior = torch.linalg.inv(precision) @ w.T / 0.49

    def encoder(x, c):
        log_var = -(precision.diagonal() / 2).log()
        return x.flatten(1) @ posterior.T + 0.1, log_var.expand(len(x), D)

    def log_likelihood(x, z, c):
        return Normal(z @ w.T, 0.7).log_prob(x.flatten(1)).sum(1)

    model.log_likelihood = log_likelihood
    del model.encoder
    model.encoder = encoder
    exact = MultivariateNormal(torch.zeros(16).double(), w @ w.T + 0.49 * torch.eye(16))
    x = exact.sample((N,)).view(N, 1, 4, 4)
    return model, x, exact.log_prob(x.flatten(1)) / (16 * math.log(2))


def test_elbo_iwae_and_the_exact_likelihood_stand_in_order():
    seeds = prior.fold_in(0, torch.arange(N))
    bits = {}
    for k in (1, 4, 16, 64):
        model, x, log_p = linear_gaussian(importance=k)
        bits[k] = model.bits_per_dim(x, None, seeds)
    elbo = model.loss(x, None, seeds)[1]["loss"]
    bits["exact"] = -log_p
    noise = (bits[1] - bits["exact"]).std() / N**0.5
    assert elbo.item() == pytest.approx(bits[1].mean().item(), abs=6 * noise.item())
    means = [bits[k].mean().item() for k in (1, 4, 16, 64, "exact")]
    assert means == sorted(means, reverse=True)  # each bound tighter than the last
    assert means[0] - means[-1] > 10 * noise
    error = (bits[64] - bits["exact"]).std().item() / N**0.5
    assert means[-1] < means[-2] + 3 * error
    assert means[-2] - means[-1] < 0.1 * (means[0] - means[-1])


def test_the_loss_is_the_likelihood_plus_beta_times_prior_kl():
    model, x, _ = linear_gaussian()
    seeds = prior.fold_in(0, torch.arange(N))
    mu, log_var = model.encoder(x, None)
    kl = prior.kl(mu, log_var).sum(1).mean() / (16 * math.log(2))
    for beta in (0.0, 0.3, 1.0):
        loss, metrics = model.loss(x, None, seeds, beta)
        assert metrics["kl"].item() == pytest.approx(kl.item(), rel=1e-9)
        assert loss.item() == pytest.approx((metrics["nll"] + beta * kl).item(), rel=1e-9)


@pytest.mark.parametrize(("location", "log_scale"), [(0, -2), (-1.2, -5), (0.99, -3), (4, -1)])
def test_the_discretized_logistic_sums_to_1_over_the_256_values(location, log_scale):
    x = (torch.arange(256) / 127.5 - 1).double()
    log_p = vae.discretized_logistic(x, torch.tensor(location), torch.tensor(float(log_scale)))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
    cdf = torch.sigmoid((x[:-1] + 1 / 255 - location) / math.exp(log_scale))
    assert torch.allclose(log_p.exp().cumsum(0)[:-1], cdf.double(), atol=1e-6)


def test_the_discretized_logistic_is_finite_and_has_gradients_far_out():
    location = torch.tensor([-300.0, 300.0, 0.0], requires_grad=True)
    log_p = vae.discretized_logistic(torch.tensor([1.0, -1.0, 0.5]), location, torch.tensor(-6.0))
    log_p.sum().backward()
    assert log_p.isfinite().all()
    assert location.grad[0] > 0 > location.grad[1]


def test_noisy_samples_follow_the_likelihood():
    model = tiny(noisy=True)
    model.decoder = None
    model.__dict__["decoder"] = lambda z, c: torch.full((len(z), 1, 4, 4), 0.2)
    seeds = prior.fold_in(0, torch.arange(20000))
    x = model.sample(torch.zeros(20000, D), None, seeds)
    pixels = ((x + 1) * 127.5).round().long().flatten()
    share = torch.bincount(pixels, minlength=256).double() / len(pixels)
    values = torch.arange(256) / 127.5 - 1
    truth = vae.discretized_logistic(values, torch.tensor(0.2), model.log_scale.detach()).exp()
    assert (share - truth).abs().sum() < 0.02
    assert torch.equal(model.sample(torch.zeros(2, D), None), torch.full((2, 1, 4, 4), 0.2))


def test_encode_is_the_posterior_mean_and_gradients_reach_every_part():
    model = tiny()
    x, seeds = torch.rand(4, 1, 4, 4) * 2 - 1, torch.arange(4)
    c = model.embed(torch.tensor([[1], [2], [0], [1]]))
    assert torch.equal(model.encode(x, c), model.encoder(x, c)[0])
    for block in model.modules():
        if isinstance(block, vae.Block):
            torch.nn.init.normal_(block.conv2.weight)
    model.loss(x, c, seeds)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_collapsed_posterior_is_told():
    model = tiny()
    model.encoder = None
    x, c = torch.zeros(4, 1, 4, 4), model.embed(torch.zeros(4, 1, dtype=torch.long))
    for mu, collapsed in ((0.01, 1.0), (1.0, 0.0)):
        model.__dict__["encoder"] = lambda x, c, mu=mu: (torch.full((4, D), mu), torch.zeros(4, D))
        assert model.loss(x, c, torch.arange(4))[1]["collapsed"] == collapsed
