"""hybrids.py: the posterior in closed form, who moves whom, what each model keeps of its own."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import hybrids
import prior


def tiny(model, shape=(1, 8, 8), **options):
    """A model with random weights everywhere, the zero-init layers too."""
    torch.manual_seed(0)
    sizes = {"width": 32, "embedding": 16, "latent": 4, "couplings": 3}
    cfg = replace(hybrids.Config(), model=model, **(sizes | options))
    network = hybrids.build(cfg, shape, 3)
    for p in network.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return network


def batch(n=4, shape=(1, 8, 8)):
    """x of 256 grey values, c for width 16, seeds."""
    seeds = torch.arange(n)
    x = (256 * prior.uniform(seeds, shape, 40)).floor() / 127.5 - 1
    return x, prior.normal(seeds, (32,), 41), seeds


def test_posterior_is_the_gaussian_that_two_noisings_imply():
    """x_s ~ N((1 - s) x, s^2) and x_t = a x_s + sqrt(q) eps: conditioning on x_t in closed form."""
    for s, t in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0), (0.1, 0.9)):
        s, t = torch.tensor(s).double(), torch.tensor(t).double()
        x, x_t = torch.tensor(0.3).double(), torch.tensor(-0.8).double()
        a = (1 - t) / (1 - s)
        q = t**2 - (a * s) ** 2
        gain = s**2 * a / (a**2 * s**2 + q)  # Kalman
        mean = (1 - s) * x + gain * (x_t - a * (1 - s) * x)
        variance = s**2 * (1 - gain * a)
        ours = hybrids.posterior(x, x_t, s, t)
        assert torch.allclose(ours[0], mean) and torch.allclose(ours[1] ** 2, variance, atol=1e-12)


def test_real_pairs_have_the_forward_process_moments():
    model = tiny("diffusion-gan", (1, 4, 4))
    x, seeds = torch.full((40_000, 1, 4, 4), 0.5), torch.arange(40_000)
    model.denoise = lambda *_: x  # the same noise: a perfect fake is the real one
    x_s, fake, x_t, k = model.pair(x, None, seeds, 10)
    assert torch.equal(fake, x_s)
    model.denoise = lambda *_: x + 1
    x_s, fake, x_t, k = model.pair(x, None, seeds, 10)
    assert torch.allclose((fake - x_s)[k == 1], torch.ones(1), atol=1e-5)
    assert torch.allclose((fake - x_s)[k == 4], torch.tensor(0.25), atol=1e-5)
    for step in range(1, 5):
        s, t = (step - 1) / 4, step / 4
        a, b = x_s[k == step].double(), x_t[k == step].double()
        assert abs((k == step).float().mean() - 0.25) < 0.01
        for sample, u in ((a, s), (b, t)):
            assert abs(sample.mean() - (1 - u) * 0.5) < 0.01
            assert abs(sample.var() - u**2) < 0.01
        covariance = ((a - a.mean()) * (b - b.mean())).mean()
        assert abs(covariance - (1 - t) / max(1 - s, 1e-9) * s**2) < 0.01


def test_an_ideal_generator_draws_what_the_forward_process_has():
    """With x^ = x in each step, x_s of all steps have the moments of N((1 - s) x, s^2)."""
    model, truth, seeds = tiny("diffusion-gan", (1, 4, 4)), 0.5, torch.arange(20_000)
    x = prior.normal(seeds, (1, 4, 4))
    image = torch.full_like(x, truth)
    for k in (4, 3, 2, 1):
        eps = prior.normal(seeds, (1, 4, 4), k)
        x = model.step_towards(image, x, torch.full_like(seeds, k), eps)
        s = (k - 1) / 4
        assert abs(x.mean() - (1 - s) * truth) < 0.01
        assert abs(x.std() - s) < 0.01


@pytest.mark.parametrize("name", hybrids.MODELS)
def test_each_step_moves_its_own_networks_alone(name):
    model = tiny(name)
    optimizers = hybrids.make_optimizers(model, model.cfg)
    for optimizer in optimizers:
        optimizer.found_inf = torch.zeros(())
    moves, critic_loss, generator_loss = [], model.critic_loss, model.generator_loss

    def snapshot():
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    def watch(loss_of):
        def watched(*args):
            moves.append(snapshot())
            return loss_of(*args)

        return watched

    model.critic_loss, model.generator_loss = watch(critic_loss), watch(generator_loss)
    ema = hybrids.copy.deepcopy(tiny(name)).requires_grad_(False)
    x, _, seeds = batch()
    words = torch.tensor([[1], [2], [3], [0]])
    for k in (500, 501):
        hybrids.step(model, ema, optimizers, x, words, seeds, k, model.cfg)
    moves.append(snapshot())
    for phase, (before, after) in enumerate(itertools.pairwise(moves)):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        critic = {name for name in before if name.startswith("critic")}
        assert moved == (before.keys() - critic if phase % 2 else critic)


class LinearCritic:
    """D(x, c) = <w, x> (1 + first entry of c)."""

    w = torch.linspace(-1, 1, 128)

    def __call__(self, x, c):
        return x.flatten(1) @ self.w * (1 + c[:, 0])

    def features(self, x):
        return x.flatten(1)


@pytest.mark.parametrize("name", hybrids.MODELS)
def test_critic_loss_is_relativistic_with_per_image_penalties(name):
    model = tiny(name, gamma=0.8)
    model.critic_step.requires_grad_(False).weight.zero_()
    model.critic, w = None, LinearCritic.w
    model.__dict__["critic"] = LinearCritic()
    x, c, seeds = batch(8)
    all_of_it = x, c, seeds
    x, c, seeds = (a[:: model.share] for a in all_of_it)
    with torch.no_grad():
        real, fake, origin, _ = model.pair(x, c[:, :16], seeds, 10)
    a, b = ((torch.cat([v, origin], 1).flatten(1) @ w) * (1 + c[:, 16]) for v in (real, fake))
    squares = w[:64].square().sum() * (1 + c[:, 16]) ** 2  # by x alone, not by its origin
    truth = torch.log1p(torch.exp(b - a)).mean() + 0.8 * squares.mean()
    loss, metrics = model.critic_loss(*all_of_it)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-4)
    assert metrics["r1"].item() == pytest.approx(squares.mean().item(), rel=1e-4)
    real, fake, origin, _ = model.pair(x, c[:, :16], seeds, 20)
    a, b = ((torch.cat([v, origin], 1).flatten(1) @ w) * (1 + c[:, 16]) for v in (real, fake))
    _, metrics = model.generator_loss(*all_of_it)
    truth = torch.log1p(torch.exp(a - b)).mean()
    assert metrics["adversarial"].item() == pytest.approx(truth.item(), rel=1e-4)
    if name == "diffusion-gan":  # its L is known in closed form
        truth += 10 * (fake - real).square().mean()
        assert metrics["loss"].item() == pytest.approx(truth.item(), rel=1e-4)


def test_vae_gan_loss_is_feature_likelihood_and_kl():
    model = tiny("vae-gan", adversarial_weight=0.0)
    x, c, seeds = batch()
    mu, log_var = model.encoder(x, c[:, :16])
    z = prior.reparameterize(mu, log_var, prior.normal(seeds, (4,)))
    y = model.decoder(z, c[:, :16])
    ruler = [model.critic.features(torch.cat([a, torch.zeros_like(a)], 1)) for a in (x, y)]
    error = (ruler[0] - ruler[1]).square().mean()
    sigma = error.sqrt()  # the variance with the highest likelihood
    normal = torch.distributions.Normal(ruler[1], sigma)
    features = -normal.log_prob(ruler[0]).mean() / math.log(2)
    constant = 0.5 * math.log2(2 * math.pi * math.e)
    kl = prior.kl(mu, log_var).sum(1).mean() / 64 / math.log(2)
    pixels = 0.05 * (x - y).square().mean().log2()
    for beta in (1.0, 7.0):
        loss, _ = model.generator_loss(x, c, seeds, beta)
        truth = features - constant + pixels + beta * kl
        assert loss.item() == pytest.approx(truth.item(), rel=1e-4)


def test_feature_loss_never_reaches_the_critic_in_a_step():
    model = tiny("vae-gan", adversarial_weight=0.0)
    optimizers = hybrids.make_optimizers(model, model.cfg)
    for optimizer in optimizers:
        optimizer.found_inf = torch.zeros(())
    ema = hybrids.copy.deepcopy(model).requires_grad_(False)
    x, _, seeds = batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hybrids.step(model, ema, optimizers, x, torch.ones(4, 1).long(), seeds, 500, model.cfg)
    for name, p in model.named_parameters():
        critic = name.startswith("critic")
        assert torch.equal(p, before[name]) == critic
        assert not critic or p.grad is None


def test_flow_gan_is_the_flow_and_its_inverse_carries_gradients():
    model = tiny("flow-gan").double()
    x, c, seeds = batch()
    x, c = x.double(), c.double()
    u = model.flow.dequantize(x, seeds)
    z, _ = model.flow(u, c[:, :16])
    z = z.detach().requires_grad_()
    assert torch.allclose(model.flow.inverse(z, c[:, :16]), u, atol=1e-6)
    weights = torch.randn(x.shape).double()
    torch.autograd.gradcheck(
        lambda z: (model.flow.inverse(z[None], c[:1, :16]) * weights[:1]).sum(), z[0], atol=1e-4
    )
    p = model.flow.couplings[1].network.head.bias  # and to the weights: by finite differences

    def value():
        return (model.flow.inverse(z, c[:, :16]) * weights).sum()

    (slope,) = torch.autograd.grad(value(), p)
    i = slope.abs().argmax()
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            p[i] += shift
            values.append(value().item())
            p[i] -= shift
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope[i].item(), rel=1e-3)


def test_flow_gan_without_a_critic_is_the_pure_flow():
    model = tiny("flow-gan", adversarial_weight=0.0)
    x, c, seeds = batch()
    loss, _ = model.generator_loss(x, c, seeds)
    assert torch.equal(loss, model.flow.loss(x, c[:, :16], seeds)[0])
    assert torch.allclose(loss, model.bits_per_dim(x, c, seeds).mean())
    assert (model.sample(model.encode(x, c), c) - x).abs().max() < 1e-3


def test_what_a_model_lacks_is_said(capsys):
    for name in ("vae-gan", "diffusion-gan"):
        model = tiny(name)
        with pytest.raises(SystemExit):
            model.bits_per_dim(*batch())
        assert name in capsys.readouterr().err
    with pytest.raises(SystemExit):
        model.encode(*batch()[:2])
