"""The two models of bench/: one that writes value by value, and a diffusion model that jumps."""

from itertools import product

import pytest
import torch
from torch import nn

from bench.autoregressive import Autoregressive
from bench.one_step import OneStep

S = 0.3  # the deviation of the normal data below


def randomized(model, std):
    """Layers that start at zero hide what is behind them: all weights become random."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model.requires_grad_(False)


def writer(side, channels=1):
    """A small autoregressive model, in double precision, of images whose values are 0 to 3."""
    shape = channels, side, side
    model = Autoregressive(shape, ["a"], width=8)
    randomized(model.double(), 0.2)
    model.out.bias[4:] = -1e6
    return model


def text(model, n):
    return model.embed(model.tokenize(["a"] * n))


def test_probabilities_of_all_images_sum_to_1():
    model = writer(2)
    values = list(product(range(4), repeat=4))
    x = torch.tensor(values).double() / 127.5 - 1
    p = model.log_prob(x.view(-1, 1, 2, 2), text(model, len(x))).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    assert p.std() > 1e-5


def test_value_by_value_it_draws_what_all_at_once_says():
    model = writer(4, 3)
    z, c = torch.randn(50, 3, 4, 4).double(), text(model, 50)
    x = model.sample(z, c)
    assert len(x.unique()) == 4
    f = model(x, c).softmax(2).cumsum(2)
    u = torch.special.ndtr(z).movedim(1, 3).flatten(1)[..., None]
    value = (f < u).sum(2) / 127.5 - 1
    assert torch.allclose(value, x.movedim(1, 3).flatten(1).float())


@pytest.fixture
def jumper():
    return randomized(OneStep((1, 4, 4), ["a"], width=8), 0.1)


@pytest.mark.parametrize("a", [1.0, 0.5, 0.05])
def test_the_exact_jump_to_a_single_image_has_no_loss(jumper, monkeypatch, a):
    x = torch.rand(1, 1, 4, 4).repeat(8, 1, 1, 1)
    c = text(jumper, 8)

    def exact(z, t, *others):
        return (z - x) / t.clamp(1e-6)[..., None, None]

    untrained, _ = jumper.loss(x, c, exact, a)
    assert untrained > 0.5
    monkeypatch.setattr(jumper, "mean_velocity", exact)
    loss, _ = jumper.loss(x, c, exact, a)
    assert loss < 1e-6


def deviation(t):
    """Of z_t, for x ~ N(0, S^2). On its path, z_t is proportional to this."""
    t = torch.as_tensor(t)
    return torch.hypot((1 - t) * S, t)


def normal_jump(z, t, h, c=None):
    """The mean velocity from t to t - h."""
    rest = deviation(t - h) / deviation(t)
    u = torch.as_tensor((1 - rest) / h)
    return z * u.view(-1, 1, 1, 1)


def test_the_target_tends_to_the_exact_jump_of_normal_data(jumper, monkeypatch):
    monkeypatch.setattr(jumper, "mean_velocity", normal_jump)
    z = torch.randn(4, 1, 4, 4).double()
    t = 0.5 + torch.rand(4, 1).double() / 2
    h = 0.9 * t
    slope = (t - (1 - t) * S**2) / deviation(t) ** 2
    v = z * slope[..., None, None]
    truth, errors = normal_jump(z, t, h), []
    for a in (0.02, 0.01):
        error = jumper.target(z, t, h, None, v, a) - truth
        errors.append(error.norm())
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.3)  # of order a^2


@pytest.mark.parametrize("steps", [1, 3])
def test_exact_jumps_land_where_the_path_does(jumper, monkeypatch, steps):
    monkeypatch.setattr(jumper, "mean_velocity", normal_jump)
    z = torch.randn(4, 1, 4, 4)
    x = jumper.sample(z, None, steps)
    assert torch.allclose(x, (S * z).clamp(-1, 1), atol=1e-6)
