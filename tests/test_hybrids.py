"""hybrids.py: the posterior in closed form, who moves whom, what each model keeps of its own."""

import itertools
import math

import pytest
import torch
from torch import nn

import hybrids
import prior


def tiny(model, shape=(1, 8, 8), **options):
    """A model with random weights everywhere, the zero-init layers too."""
    torch.manual_seed(0)
    sizes = {"width": 32, "embedding": 16, "latent": 4, "couplings": 3}
    cfg = hybrids.Config(model=model, **(sizes | options))
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


class BilinearCritic:
    """D(x, x', c) = <w, x> (1 + <w, x'> / 10) (1 + first entry of c), x and x' side by side."""

    w = torch.linspace(-1, 1, 64)

    def forward(self, both, c):
        x, origin = (a.flatten(1) @ self.w for a in both.chunk(2, 1))
        return x * (1 + origin / 10) * (1 + c[:, 0])

    __call__ = forward

    def features(self, both):
        return both.flatten(1)


@pytest.mark.parametrize("name", hybrids.MODELS)
def test_both_losses_are_relativistic_with_per_image_penalties(name):
    model = tiny(name, gamma=0.8)
    model.critic, w = None, BilinearCritic.w
    model.__dict__["critic"] = BilinearCritic()
    x, c, seeds = batch(8)
    all_of_it = x, c, seeds
    x, c, seeds = (a[:: model.share] for a in all_of_it)

    def margins(stream):
        """D of real and of fake images, and the gradient of D is w times the last."""
        with torch.no_grad():
            real, fake, origin, k = model.pair(x, c[:, :16], seeds, stream)
            scale = 1 + origin.flatten(1) @ w / 10
            scale = scale * (1 + c[:, 16] + model.critic_step(k)[:, 0])
        return *((v.flatten(1) @ w) * scale for v in (real, fake)), scale, (fake - real)

    d_real, d_fake, scale, _ = margins(10)
    squares = w.square().sum() * scale**2  # by x alone, not by its origin
    truth = torch.log1p(torch.exp(d_fake - d_real)).mean() + 0.8 * squares.mean()
    loss, metrics = model.critic_loss(*all_of_it)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-4)
    assert metrics["r1"].item() == pytest.approx(squares.mean().item(), rel=1e-4)
    assert metrics["r2"].item() == pytest.approx(squares.mean().item(), rel=1e-4)
    d_real, d_fake, _, error = margins(20)
    _, metrics = model.generator_loss(*all_of_it)
    truth = torch.log1p(torch.exp(d_real - d_fake)).mean()
    assert metrics["adversarial"].item() == pytest.approx(truth.item(), rel=1e-4)
    if name == "diffusion-gan":  # its L is known in closed form
        truth = model.cfg.adversarial_weight * truth + 10 * error.square().mean()
        assert metrics["loss"].item() == pytest.approx(truth.item(), rel=1e-4)


@pytest.mark.parametrize("name", hybrids.MODELS)
def test_the_critic_moves_the_generator_as_finite_differences_say(name):
    model, (x, c, seeds) = tiny(name), batch()
    bias = {
        "vae-gan": lambda: model.decoder.head.bias,
        "flow-gan": lambda: model.flow.couplings[1].network.head.bias,
        "diffusion-gan": lambda: model.net.head.bias,
    }[name]()

    def adversarial():
        model.cfg.adversarial_weight = 1.0
        with_critic = model.generator_loss(x, c, seeds)[0]
        model.cfg.adversarial_weight = 0.0
        return with_critic - model.generator_loss(x, c, seeds)[0]

    (gradient,) = torch.autograd.grad(adversarial(), bias)
    ends, h = [], 0.01
    for sign in (1, -1):
        with torch.no_grad():
            bias += sign * h * gradient / gradient.norm()
            ends.append(adversarial().item())
            bias -= sign * h * gradient / gradient.norm()
    assert gradient.norm() > 1e-5
    assert gradient.norm().item() == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=0.05)


def test_log2_of_a_mean_has_its_gradient():
    error = torch.tensor(0.3, requires_grad=True)
    hybrids.log2(error).backward()
    assert error.grad.item() == pytest.approx(1 / (0.3 * math.log(2)))
    assert hybrids.log2(error).item() == pytest.approx(math.log2(0.3))


def test_sample_steps_through_the_posterior_to_the_image():
    for steps in (1, 4):
        model, seeds = tiny("diffusion-gan", (1, 4, 4), denoising_steps=steps), torch.arange(20_000)
        seen = []

        def denoise(x_t, k, c, seeds, stream, seen=seen):
            seen.append((x_t, k, stream))
            return torch.full_like(x_t, 0.5)

        model.denoise = denoise
        z = prior.normal(seeds, (1, 4, 4))
        assert torch.equal(model.sample(z, torch.zeros(len(seeds), 32), seeds), z * 0 + 0.5)
        assert [k[0].item() for _, k, _ in seen] == list(range(steps, 0, -1))
        assert len({stream for _, _, stream in seen}) == steps
        for x_t, k, _ in seen:
            t = k[0].item() / steps
            assert abs(x_t.mean() - (1 - t) * 0.5) < 0.01 and abs(x_t.std() - t) < 0.01


@pytest.mark.parametrize("name, gamma, weight, size", [
    ("vae-gan", 1.0, 1.0, 32), ("flow-gan", 1.0, 0.1, 128), ("diffusion-gan", 0.05, 1.0, 32),
])  # fmt: skip
def test_defaults_are_each_models_own(name, gamma, weight, size):
    cfg = hybrids.Config(model=name)
    assert (cfg.gamma, cfg.adversarial_weight, cfg.batch_size) == (gamma, weight, size)
    assert hybrids.Config(model=name, gamma=0.0, adversarial_weight=0.0).gamma == 0


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
