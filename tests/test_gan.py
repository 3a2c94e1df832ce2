"""gan.py: losses and penalties as textbooks write them, who moves whom, and modes found."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close, fill_zeros
from torch import nn

import gan
import hybrids
import prior

KINDS = ("relativistic", "nonsaturating")
C = torch.zeros(1, 1)  # for critics that read no text
each_kind = pytest.mark.parametrize("kind", KINDS)


def penalty_of(slopes):
    n = slopes[0].numel()
    return slopes.square().flatten(1).sum(1) * n / 784


def critics_loss(judge, real, fake, c, gamma, kind):
    """The loss of D as the textbooks write it, for fake images that do not lead back to G."""
    images = torch.cat([real, fake]).detach().requires_grad_()
    d = judge(images, torch.cat([c, c]))
    (slopes,) = torch.autograd.grad(d.sum(), images, create_graph=True)
    r1, r2 = penalty_of(slopes).chunk(2)
    d_real, d_fake = d.chunk(2)
    if kind == "relativistic":
        others = torch.cat([c[-1:], c[:-1]])
        other = judge(real, others)
        loss = F.softplus(d_fake - d_real) + F.softplus(other - d_real) / 4
        loss = loss + gamma / 2 * (r1 + r2)
    else:
        loss = F.softplus(-d_real) + F.softplus(d_fake) + gamma / 2 * r1
    return loss.mean()


def generators_loss(judge, real, fake, c, kind):
    images = torch.cat([real, fake])
    d = judge(images, torch.cat([c, c]))
    d_real, d_fake = d.chunk(2)
    lead = d_real - d_fake if kind == "relativistic" else -d_fake
    return F.softplus(lead).mean()


class Points(nn.Sequential):
    """A perceptron from vectors to images of two values, (B, 2, 1, 1), or from these to numbers. A
    text, if any, moves what it is given."""

    def __init__(self, d_in, d_out, width=128):
        first, hidden = nn.Linear(d_in, width), nn.Linear(width, width)
        last = nn.Linear(width, d_out)
        super().__init__(first, nn.LeakyReLU(0.2), hidden, nn.LeakyReLU(0.2), last)

    def forward(self, x, c=0):
        y = super().forward(x.flatten(1) + c)
        if y.shape[1] == 1:
            return y.flatten()
        return y.unflatten(1, (-1, 1, 1))


def gradients(loss, weights):
    return torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)


def assert_same(ours, truth):
    for a, b in zip(ours, truth, strict=True):
        assert close(a, b, 1e-7, 1e-10)
        assert b.any()


@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("kind", [*KINDS, "with weight"])
def test_one_backward_pass_gives_each_player_its_own_gradient(kind, gamma):
    """That of hybrids.py gives the generator's a weight."""
    torch.set_default_dtype(torch.float64)
    g, d = Points(4, 2, 16), Points(2, 1, 16)
    real = torch.randn(8, 2, 1, 1)
    z = torch.randn(8, 4)
    c = torch.randn(8, 1)
    weights_g = tuple(g.parameters())
    weights_d = tuple(d.parameters())[:-1]  # its last shift cancels in (3)
    weight = 0.3 if kind == "with weight" else 1.0
    if kind in KINDS:
        loss, log = gan.duel(d, real, g(z), c, gamma, kind)
    else:
        kind = "relativistic"
        loss, log = hybrids.duel(d, real, g(z), c, gamma, weight)

    g.requires_grad_(False)
    loss_d = critics_loss(d, real, g(z), c, gamma, kind)
    assert_same(gradients(loss, weights_d), gradients(loss_d, weights_d))

    g.requires_grad_(True)
    d.requires_grad_(False)
    loss_g = generators_loss(d, real, g(z), c, kind)
    d.requires_grad_(True)
    assert_same(gradients(loss, weights_g), gradients(weight * loss_g, weights_g))

    assert close(log["loss_d"], loss_d)
    assert close(log["loss_g"], loss_g)
    lead = d(real, c) - d(g(z), c)
    assert close(log["sign_rate"], (lead > 0).double().mean())
    images = torch.cat([real, g(z).detach()]).requires_grad_()
    total = d(images, torch.cat([c, c])).sum()
    (slopes,) = torch.autograd.grad(total, images)
    r1, r2 = penalty_of(slopes).chunk(2)
    assert close(log["r1"], r1.mean())
    assert close(log["r2"], r2.mean())


def test_values_beyond_the_range_are_judged_as_drawn_and_only_led_back():
    fake = torch.tensor([-3.0, -0.5, 0.5, 2.0]).view(1, 4, 1, 1).requires_grad_()
    real = fake.detach().sign()
    for slope, led in ((1.0, [1, 1, 1, 0]), (-1.0, [0, 1, 1, 1])):
        judge = lambda x, c: slope * x.sum((1, 2, 3))  # noqa: B023, E731
        loss, log = gan.duel(judge, real, fake, C, 1.0)
        (gradient,) = torch.autograd.grad(loss, fake)
        assert close(log["loss_g"], math.log(2))  # the clamped values add up to 0
        assert torch.equal(gradient.flatten(), -slope / 2 * torch.tensor(led))


@each_kind
def test_neither_loss_of_the_whole_model_moves_the_other_player(kind, monkeypatch):
    """A frozen copy of the critic tells what G should feel; the text is the critic's alone."""
    torch.set_default_dtype(torch.float64)
    model = gan.GAN((1, 8, 8), ["a", "b"], width=8, latent=4)
    frozen = copy.deepcopy(fill_zeros(model)).requires_grad_(False)
    real = torch.randn(4, 1, 8, 8)
    z = torch.randn(4, 4)
    c = model.embed(model.tokenize(["a", "b", "", "a b"]))
    monkeypatch.setattr(prior, "sample", lambda *shape, device=None: z)
    loss, _ = model.loss(real, c, 1.5, kind)

    fake = model.decode(z, c.detach())
    loss_d = critics_loss(model.critic, real, fake, c, 1.5, kind)
    loss_g = generators_loss(frozen.critic, real, fake, c.detach(), kind)
    for name, p in model.named_parameters():
        draws = name.startswith(("decoder", "style", "start"))
        own, other = (loss_g, loss_d) if draws else (loss_d, loss_g)
        assert gradients(other, [p]) == (None,), name
        assert_same(gradients(loss, [p]), gradients(own, [p]))


@each_kind
def test_eight_gaussians_in_the_plane_are_all_found(kind):
    g, d = Points(4, 2), Points(2, 1)
    weights = [*g.parameters(), *d.parameters()]
    c = C.expand(128, 1)
    optimizer = torch.optim.AdamW(weights, betas=(0.0, 0.99), fused=True)
    angle = torch.arange(8) * math.pi / 4
    centres = 0.7 * torch.stack([angle.cos(), angle.sin()], 1)
    for step in range(1200):
        centre = centres[torch.randint(8, (128,))]
        real = centre + 0.03 * torch.randn(128, 2)
        fake = g(torch.randn(128, 4))
        real = real.view_as(fake)
        loss, _ = gan.duel(d, real, fake, c, 20, kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 1200)
        optimizer.step()
    fake = g(torch.randn(2000, 4)).flatten(1)
    distance, nearest = torch.cdist(fake, centres).min(1)
    good = distance < 0.2
    share = torch.bincount(nearest[good], minlength=8) / 2000
    assert good.float().mean() > 0.7
    assert (share > 0.04).all()
