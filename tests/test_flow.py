"""flow.py against the full Jacobian, its own inverse, and densities and sums that are known."""

import math

import pytest
import torch
from conftest import close
from torch import nn

import flow
import prior

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


def tiny(shape=(1, 8, 8), std=0.05):
    """A flow with random weights, fit to random images, and c of five texts, the last null."""
    torch.set_default_dtype(torch.float64)
    model = flow.Flow(shape, ["a", "b", "c"], width=8)
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
    assert close(model.inverse(z, c), y, 0, 1e-8)
    back, _ = model(model.inverse(y, c), c)
    assert close(back, y, 0, 1e-8)

    def forward(v):
        z, _ = model(v.view(1, *shape), c[:1])
        return z.flatten()

    jacobian = torch.autograd.functional.jacobian(forward, y[0].flatten())
    truth = torch.linalg.slogdet(jacobian).logabsdet
    assert close(log_det[0], truth, 0, 1e-7)
    if len(model.stacks) > 1:  # details depend on their neighbours and the coarser picture
        assert (jacobian.abs() > 1e-12).double().mean() > 0.1


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


def test_the_coarsest_picture_has_noise_of_its_own():
    model, _ = tiny((1, 20, 20))
    y = model.add_noise(torch.ones(400, 1, 20, 20))
    *details, h = model.analyze(y)
    assert all(close(part.std(), model.noise, 0.02) for part in details)
    assert close(h.std(), model.coarse_noise, 0.02)
    assert close(h.mean(), 2, 0.01)


def test_the_loss_is_the_likelihood_of_y_and_the_error_of_m(monkeypatch):
    """The coarsest picture counts for all of 16 images, details for four, m for two."""
    model, c = tiny((1, 20, 20))
    x = images((1, 20, 20))[:16] / 127.5 - 1
    c = c[torch.arange(16) % 5]
    noise = torch.randn_like(x)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    y = model.add_noise(x)
    *_, h = model.analyze(y)
    z, log_det = model.stacks[-1](h, c[:, :, None, None])
    of_coarsest = prior.log_prob(z) + log_det
    details = model.log_prob(y, c)[::4] - of_coarsest[::4]
    nats = -of_coarsest.mean() - details.mean()
    loss, log = model.loss(x, c)
    assert close(log["nll"], nats / 400 / math.log(2))
    off = (model.clean(y, c) - x)[::8].abs().mean()
    assert close(log["error"], off / model.noise)
    assert close(loss, log["nll"] + log["error"])


def test_of_the_loss_the_coarsest_picture_alone_teaches_the_text():
    model, _ = tiny((1, 20, 20))
    x = images((1, 20, 20))[:8] / 127.5 - 1
    c = model.embed(model.tokenize(["a", "b"] * 4)).requires_grad_()

    def slope_of_c():
        torch.manual_seed(0)
        loss, _ = model.loss(x, c)
        (slope,) = torch.autograd.grad(loss, c)
        return slope

    before = slope_of_c()
    for part in (model.denoise, *model.stacks[:-1], *model.readers):
        for p in part.parameters():
            nn.init.normal_(p, std=0.2)
    assert before.any() and close(slope_of_c(), before)
    nn.init.normal_(model.stacks[-1].couplings[0].net[0].weight, std=0.2)
    assert not close(slope_of_c(), before)


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
    assert not close(model.inverse(z, c, 0.0), model.inverse(z, c), atol=1e-2)


def test_sample_is_m_of_what_the_inverse_gives_and_m_corrects_y():
    model, c = tiny((1, 20, 20))
    nn.init.normal_(model.denoise.head.weight, std=0.3)
    z = 2 * torch.randn(5, 1, 20, 20)
    y = model.inverse(0.5 * z, c, 1.5)
    m = y + model.noise * model.denoise(y, c)
    assert close(model.sample(z, c, 1.5, 0.5), m.clamp(-1, 1))
    assert not close(m, y, atol=1e-2)
