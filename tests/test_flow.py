"""flow.py against the full Jacobian, its own inverse, and densities and sums that are known."""

import math

import pytest
import scipy.fft
import torch
from conftest import close
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

import flow


def images(shape):
    """4000 random images whose places differ in how bright they are."""
    spread = torch.linspace(20, 250, math.prod(shape)).view(shape)
    return (torch.rand(4000, *shape) * spread).byte()


def tiny(shape=(1, 8, 8), std=0.1, width=32, couplings=4, dtype=torch.float64):
    """A flow with random weights, whitened by random images, and c of five texts, the last null."""
    torch.set_default_dtype(dtype)
    model = flow.Flow(shape, ["a", "b", "c"], width, couplings).eval()
    model.requires_grad_(False)
    for p in model.couplings.parameters():
        nn.init.normal_(p, std=std)
    model.fit(images(shape))
    c = model.embed(model.tokenize(["a", "b", "c", "a c", ""]))
    return model, c


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4)])
def test_log_determinant_is_the_full_jacobians_and_inverse_undoes_forward(shape):
    model, c = tiny(shape)
    y = torch.randn(5, *shape)
    z, log_det = model(y, c)
    assert close(model.inverse(z, c), y, 0, 1e-9)
    assert close(model(model.inverse(y, c), c)[0], y, 0, 1e-9)

    def forward(v):
        z, _ = model(v.view(1, *shape), c[:1])
        return z.flatten()

    jacobian = torch.autograd.functional.jacobian(forward, y[0].flatten())
    truth = torch.linalg.slogdet(jacobian).logabsdet
    assert close(log_det[0], truth, 0, 1e-8)


def test_a_round_trip_in_float32_is_exact_to_a_thousandth():
    model, c = tiny((1, 28, 28), 0.03, 128, 16, torch.float32)
    y = 2 * torch.rand(5, 1, 28, 28) - 1
    assert close(model.inverse(model(y, c)[0], c), y, 0, 1e-3)


def test_the_density_of_images_of_two_values_integrates_to_1():
    """By the midpoint rule in the plane."""
    model, c = tiny((2, 1, 1), std=0.2, couplings=0)
    step = 0.05
    axis = torch.arange(-16, 16, step) + step / 2
    points = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    for text in c[:2]:
        log_p = model.log_prob(points, text.expand(len(points), -1))
        assert close(log_p.exp().sum() * step**2, 1, 1e-3)


@pytest.mark.parametrize("side", [4, 28])
def test_the_dct_is_orthogonal_and_that_of_scipy(side):
    torch.set_default_dtype(torch.float64)
    model = flow.Flow((1, side, side), ["a"], width=8, couplings=1)
    assert close(model.dct @ model.dct.T, torch.eye(side), atol=1e-12)
    y = torch.randn(3, 1, side, side)
    z, _ = model(y, torch.zeros(3, 2))  # couplings change nothing before the training
    truth = scipy.fft.dctn(y.numpy(), axes=(2, 3), norm="ortho")
    assert close(z, truth)


def test_fit_whitens_the_frequencies_of_noisy_images():
    model, c = tiny(std=0.0)
    x = images((1, 8, 8)) / 127.5 - 1
    z = model.encode(x, c[:1].expand(4000, -1))
    assert z.mean(0).abs().max() < 6 / 4000**0.5
    assert (z.var(0) - 1).abs().max() < 8 / 4000**0.5


def test_guidance_goes_from_the_null_text_through_the_conditional_inverse():
    """In each coupling: the null text is at 0, the conditional model at 1."""
    model, c = tiny(std=0.3)
    h, null = torch.randn(5, 64), c[4:].expand(5, -1)
    coupling = model.couplings[1]
    shift, r = coupling.affine(h, c)
    shift_null, r_null = coupling.affine(h, null)
    for w in (0.0, 0.5, 1.0, 2.5):
        guided = shift_null + w * (shift - shift_null)
        scale = (r_null + w * (r - r_null)).exp()
        y = coupling.inverse(h, c, null, w)
        truth = h[:, coupling.changed] * scale + guided
        assert close(y[:, coupling.changed], truth)
    z = h.view(5, 1, 8, 8)
    y = model.inverse(z, c, 0.0)
    assert close(y, model.inverse(z, null))
    assert not close(y, model.inverse(z, c), atol=1e-2)


LEVELS = 17 * torch.arange(16)  # pixel values


def images_of_levels(p, n):
    """n images of independent pixels that take LEVELS[i] with the probability p[i]."""
    i = torch.multinomial(p, 64 * n, replacement=True)
    return LEVELS[i].view(n, 1, 8, 8).byte()


def test_p_of_a_pixel_given_y_is_the_sum_written_out():
    model, _ = tiny()
    x = images_of_levels(torch.rand(16), 500)
    model.fit(x)
    counts = torch.bincount(x.flatten(), minlength=256) + 1
    for y in (-1.4, -1.0, -0.03, 0.5, 1.2):
        weights = []
        for k, count in enumerate(counts.tolist()):
            distance = (y - (2 * k / 255 - 1)) / model.noise
            weights.append(count * math.exp(-0.5 * distance**2))
        truth = torch.tensor(weights) / sum(weights)
        ours = model.pixel_logits(torch.tensor(y)).softmax(0)
        assert close(ours, truth, 1e-9)


def test_sample_takes_the_likeliest_value_of_what_the_inverse_gives():
    model, c = tiny()
    model.fit(images_of_levels(torch.rand(16) + 0.1, 500))
    z = 2 * torch.randn(5, 1, 8, 8)
    y = model.inverse(0.5 * z, c, 1.5).clamp(-2, 2)
    x = model.sample(z, c, 1.5, 0.5)
    k = ((x + 1) * 127.5).round().long()
    assert close(x, k / 127.5 - 1)
    logits = model.pixel_logits(y)
    ours = logits.gather(-1, k[..., None]).squeeze(-1)
    best = logits.max(-1).values
    assert (ours == best).double().mean() > 0.98
    # y is looked up on a grid of 1/1000; the slope of a logit in y is at most (2 + 1) / s^2
    assert (best - ours).max() < 2 * 3 / model.noise**2 * 0.5e-3


def bits_of_pixels(model, x, c):
    """The bound on -log2 P(x) per value: by Jensen it is E [-log2 p(y) - log2 P(x | y)] less the
    entropy of the noise, for y = x + s eps. The loss is its first and its last part."""
    k = (x * 127.5 + 127.5).round().long()
    y = x + model.noise * torch.randn_like(x)
    log_p = model.pixel_logits(y).log_softmax(-1)
    log_p = log_p.gather(-1, k[..., None])
    loss, _ = model.loss(x, c)
    return loss - log_p.mean() / math.log(2)


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

    noisy = Normal(LEVELS / 127.5 - 1, model.noise)
    density = MixtureSameFamily(Categorical(p), noisy)
    model.log_prob = lambda y, c: density.log_prob(y).flatten(1).sum(1)
    assert close(bits_of_pixels(model, x, c), bits, atol=0.03)
