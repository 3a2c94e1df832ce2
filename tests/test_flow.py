"""flow.py against the full Jacobian, its own inverse, and densities and sums that are known."""

import math

import pytest
import torch
from conftest import close
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

import flow

SHAPES = [
    (1, 8, 8),
    (1, 20, 20),  # of two stacks
    (3, 4, 4),
    (3, 20, 20),  # of three
]


def images(shape):
    """400 random images whose places differ in how bright they are."""
    spread = torch.linspace(20, 250, math.prod(shape)).view(shape)
    return (torch.rand(400, *shape) * spread).byte()


def tiny(shape=(1, 8, 8), std=0.05, width=8, dtype=torch.float64):
    """A flow with random weights, fit to random images, and c of five texts, the last null."""
    torch.set_default_dtype(dtype)
    model = flow.Flow(shape, ["a", "b", "c"], width)
    model.eval().requires_grad_(False)
    for p in [*model.stacks.parameters(), *model.readers.parameters()]:
        nn.init.normal_(p, std=std)
    model.fit(images(shape))
    c = model.embed(model.tokenize(["a", "b", "c", "a c", ""]))
    return model, c


@pytest.mark.parametrize("shape", SHAPES)
def test_log_determinant_is_the_full_jacobians_and_inverse_undoes_forward(shape):
    model, c = tiny(shape)
    y = torch.randn(5, *shape)
    z, log_det = model(y, c)
    assert z.shape == y.shape
    assert close(model.inverse(z, c)[0], y, 0, 1e-8)
    back, _ = model(model.inverse(y, c)[0], c)
    assert close(back, y, 0, 1e-8)

    def forward(v):
        z, _ = model(v.view(1, *shape), c[:1])
        return z.flatten()

    jacobian = torch.autograd.functional.jacobian(forward, y[0].flatten())
    truth = torch.linalg.slogdet(jacobian).logabsdet
    assert close(log_det[0], truth, 0, 1e-7)
    if len(model.stacks) > 1:  # details depend on their neighbours and the coarser picture
        assert (jacobian.abs() > 1e-12).double().mean() > 0.1


def test_a_round_trip_in_float32_is_exact_to_a_thousandth():
    model, c = tiny((3, 32, 32), 0.03, 32, torch.float32)
    y = 2 * torch.rand(5, 3, 32, 32) - 1
    z, _ = model(y, c)
    assert close(model.inverse(z, c)[0], y, 0, 1e-3)


def test_the_density_of_images_of_two_values_integrates_to_1():
    """By the midpoint rule in the plane."""
    model, c = tiny((2, 1, 1), std=0.1)
    step = 0.05
    axis = torch.arange(-16, 16, step) + step / 2
    points = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    for text in c[:2]:
        log_p = model.log_prob(points, text.expand(len(points), -1))
        assert close(log_p.exp().sum() * step**2, 1, 1e-3)


def test_split_is_orthogonal_and_merge_undoes_it():
    torch.set_default_dtype(torch.float64)
    y = torch.randn(64, 3, 4, 4)
    coarse, details = flow.split(y)
    assert close(coarse, 2 * nn.functional.avg_pool2d(y, 2))
    squares = coarse.square().sum() + details.square().sum()
    assert close(squares, y.square().sum())
    assert close(flow.merge(coarse, details), y)
    _, flat = flow.split(torch.ones(1, 3, 4, 4))
    assert not flat.any()


def test_fit_whitens_the_parts_of_noisy_images():
    model, c = tiny((1, 20, 20), std=0.0)
    x = images((1, 20, 20)) / 127.5 - 1
    z = model.encode(x, c[:1].expand(400, -1))
    for stack, part in zip(model.stacks, model.analyze(z)):
        assert part.mean((0, 2, 3)).abs().max() < 0.35
        assert close(part.square().mean(), 1, 0.05)
        assert stack.std.isfinite()
    model.fit(images((1, 20, 20))[:1])
    assert all(stack.std > 0 for stack in model.stacks)


def entropy_of_noise(model):
    """That of y given x, in nats per value."""
    *details, h = model.analyze(torch.zeros(1, *model.latent_shape))
    scales = [torch.full_like(part, model.noise) for part in details]
    scales.append(torch.full_like(h, model.coarse_noise))
    scales = torch.cat([part.flatten() for part in scales])
    return Normal(0.0, scales).entropy().mean()


def test_the_coarsest_picture_has_noise_of_its_own():
    model, _ = tiny((1, 20, 20))
    y = model.add_noise(torch.ones(400, 1, 20, 20))
    *details, h = model.analyze(y)
    assert all(close(part.std(), model.noise, 0.02) for part in details)
    assert close(h.std(), model.coarse_noise, 0.02)
    assert close(h.mean(), 2, 0.01)
    assert close(model.noise_entropy(), entropy_of_noise(model))


def test_the_loss_is_the_likelihood_of_y_above_the_noise_and_that_of_the_pixels(monkeypatch):
    """With one image, all parts are learned from it."""
    model, c = tiny((1, 20, 20))
    x = images((1, 20, 20))[:1] / 127.5 - 1
    noise = torch.randn_like(x)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    y = model.add_noise(x)
    n = x.numel()
    of_noise = entropy_of_noise(model)
    nats = -model.log_prob(y, c[:1]) / n - of_noise
    k = ((x + 1) * 127.5).round().long()
    m = model.clean(y, c[:1])
    logits = model.pixel_logits(m).movedim(-1, 1)
    pixels = nn.functional.cross_entropy(logits, k)
    coarse = 2 * nn.functional.avg_pool2d(x, 2)
    *_, h = model.analyze(y)
    error = model.clean_coarsest(h, c[:1]) - coarse
    error = (error / model.coarse_noise).square().sum() / n
    loss, log = model.loss(x, c[:1])
    assert close(log["loss"], nats / math.log(2))
    assert close(log["error"], error)
    assert close(loss, (nats + pixels / 4) / math.log(2) + error)


def test_guidance_goes_from_the_null_text_through_the_conditional_inverse():
    """In each coupling: the null text is at 0, the conditional model at 1."""
    model, c = tiny((1, 20, 20), std=0.3)
    h = torch.randn(5, 100, 1, 1)
    known = c[:, :, None, None]
    null = known[4:].expand(5, -1, -1, -1)
    coupling = model.stacks[-1].couplings[1]
    shift, r = coupling.affine(h, known)
    shift_null, r_null = coupling.affine(h, null)
    for w in (0.0, 0.5, 1.0, 2.5):
        guided = shift_null + w * (shift - shift_null)
        scale = (r_null + w * (r - r_null)).clamp(-2, 2).exp()
        y = coupling.inverse(h, known, null, w)
        truth = h[:, coupling.changed] * scale + guided
        truth = truth if w == 1 else truth.clamp(-4, 4)
        assert close(y[:, coupling.changed], truth)
    z = torch.randn(5, 1, 20, 20)
    y, _ = model.inverse(z, c, 0.0)
    assert not close(y, model.inverse(z, c)[0], atol=1e-2)


def test_no_guidance_leads_out_of_the_range():
    model, c = tiny((1, 20, 20), std=1.0)
    z = 3 * torch.randn(5, 1, 20, 20)
    stack = model.stacks[-1]
    *_, h = model.analyze(z)
    known = c[:, :, None, None]
    null = known[4:].expand(5, -1, -1, -1)
    free = stack.inverse(h, known, null)
    free = (free - stack.mean) / stack.std
    kept = stack.inverse(h, known, null, 4.0)
    kept = (kept - stack.mean) / stack.std
    assert free.abs().max() > 4 >= kept.abs().max() - 1e-9


LEVELS = 17 * torch.arange(16)  # pixel values


def images_of_levels(p, n):
    """n images of independent pixels that take LEVELS[i] with the probability p[i]."""
    i = torch.multinomial(p, 64 * n, replacement=True)
    return LEVELS[i].view(n, 1, 8, 8).byte()


def test_p_of_a_pixel_given_m_is_the_sum_written_out():
    model, _ = tiny()
    x = images_of_levels(torch.rand(16), 500)
    model.fit(x)
    counts = torch.bincount(x.flatten(), minlength=256) + 1
    tau = model.log_tau.exp().item()
    for m in (-1.4, -1.0, -0.03, 0.5, 1.2):
        weights = []
        for k, count in enumerate(counts.tolist()):
            distance = (m - (2 * k / 255 - 1)) / tau
            weights.append(count * math.exp(-0.5 * distance**2))
        truth = torch.tensor(weights) / sum(weights)
        ours = model.pixel_logits(torch.tensor(m)).softmax(0)
        assert close(ours, truth, 1e-9)


def test_sample_takes_the_likeliest_value_of_what_the_inverse_gives():
    model, c = tiny()
    model.fit(images_of_levels(torch.rand(16) + 0.1, 500))
    nn.init.normal_(model.denoise.head.weight, std=0.3)
    z = 2 * torch.randn(5, 1, 8, 8)
    y, _ = model.inverse(0.5 * z, c, 1.5)
    m = model.clean(y, c).clamp(-2, 2)
    assert not close(m, y.clamp(-2, 2), atol=1e-2)
    x = model.sample(z, c, 1.5, 0.5)
    k = ((x + 1) * 127.5).round().long()
    assert close(x, k / 127.5 - 1)
    logits = model.pixel_logits(m)
    ours = logits.gather(-1, k[..., None]).squeeze(-1)
    best = logits.max(-1).values
    assert (ours == best).double().mean() > 0.97
    # m is looked up on a grid of 1/1000; the slope of a logit in m is at most (2 + 1) / tau^2
    steepest = 2 * 3 / model.log_tau.exp() ** 2
    assert (best - ours).max() < steepest * 0.5e-3


def bits_of_pixels(model, x, c):
    """The bound on -log2 P(x) per value: by Jensen it is E [-log2 p(y) - log2 P(x | y)] less the
    entropy of the noise."""
    k = (x * 127.5 + 127.5).round().long()
    y = model.add_noise(x)
    log_p = model.pixel_logits(model.clean(y, c)).log_softmax(-1)
    guess = log_p.gather(-1, k[..., None]).mean()
    nats = -guess - model.log_prob(y, c).mean() / x[0].numel()
    return (nats - entropy_of_noise(model)) / math.log(2)


def test_the_bound_on_pixel_bits_is_tight_for_the_exact_density_and_holds_for_another():
    """Pixels take 16 values, independently of each other: -log2 P(x) is known."""
    model, c = tiny()
    p = torch.rand(16) ** 2
    p = p / p.sum()
    x = images_of_levels(p, 300)
    model.fit(x)
    bits = -p.log2()[x.long() // 17].mean()
    x = x / 127.5 - 1
    c = c[:1].expand(300, -1)
    assert bits_of_pixels(model, x, c) > bits + 0.1

    for head in (model.denoise.head, model.denoise_coarsest.head):  # then m is y
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    nn.init.constant_(model.log_tau, math.log(model.coarse_noise))
    noisy = Normal(LEVELS / 127.5 - 1, model.coarse_noise)
    density = MixtureSameFamily(Categorical(p), noisy)
    model.log_prob = lambda y, c: density.log_prob(y).flatten(1).sum(1)
    assert close(bits_of_pixels(model, x, c), bits, atol=0.03)
