"""gan.py's penalties and losses in closed form, who moves whom, and modes found."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import gan
import prior


def tiny(**options):
    torch.manual_seed(0)
    cfg = replace(gan.Config(), width=8, embedding=16, latent=4, **options)
    model = gan.GAN(cfg, (1, 4, 4), 3)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model


def swap(model, name, function):
    """Puts a plain function where the model had a network."""
    setattr(model, name, None)
    model.__dict__[name] = function.forward = function


class Linear(nn.Module):
    """D(x, c) = <w, x> (1 + first entry of c): its gradient is w times that, image by image."""

    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, size))

    def forward(self, x, c):
        return x.flatten(1) @ self.w * (1 + c[:, 0])


def test_penalties_of_a_linear_critic_are_per_image_norms():
    critic, c = Linear(48), torch.tensor([[0.0], [1.0], [-3.0]])
    d, squares = gan.penalty(critic, torch.randn(3, 3, 4, 4), c)
    w2 = critic.w.square().sum()
    assert torch.allclose(squares, torch.stack([w2, 4 * w2, 4 * w2]))
    squares.mean().backward()  # d/dw of w2 (1 + 4 + 4) / 3
    assert torch.allclose(critic.w.grad, 2 * critic.w * 3)


@pytest.mark.parametrize("loss", ["relativistic", "nonsaturating"])
def test_losses_and_their_gradients_follow_the_formulas(loss):
    model = tiny(loss=loss, gamma=0.8)
    model.critic = Linear(16)
    x, seeds = torch.rand(5, 1, 4, 4) * 2 - 1, torch.arange(5)
    c = torch.zeros(5, 32)
    fake = model.generator(prior.normal(seeds, (4,)), c[:, :16]).detach()
    w = model.critic.w
    a, b = x.flatten(1) @ w.detach(), fake.flatten(1) @ w.detach()
    value, metrics = model.critic_loss(x, c, seeds)
    value.backward()
    w2 = w.detach().square().sum()
    s = torch.sigmoid
    if loss == "relativistic":
        truth = torch.log1p(torch.exp(b - a)).mean() + 0.8 * w2
        slope = (s(b - a)[:, None] * (fake - x).flatten(1)).mean(0) + 1.6 * w.detach()
    else:
        truth = (torch.log1p(torch.exp(-a)) + torch.log1p(torch.exp(b))).mean() + 0.4 * w2
        slope = (s(b)[:, None] * fake.flatten(1) - s(-a)[:, None] * x.flatten(1)).mean(0)
        slope = slope + 0.8 * w.detach()
    assert torch.allclose(value, truth, rtol=1e-4)
    assert torch.allclose(w.grad, slope, atol=1e-4)
    assert metrics["margin"].item() == pytest.approx((a - b).mean().item(), rel=1e-4)
    assert metrics["sign_rate"].item() == pytest.approx((a > b).float().mean().item())
    assert metrics["r1"].item() == pytest.approx(w2.item(), rel=1e-4)
    fake = model.generator(prior.normal(seeds, (4,), 1), c[:, :16])
    b = fake.flatten(1) @ w.detach()
    value, _ = model.generator_loss(x, c, seeds)
    score = b - a if loss == "relativistic" else b
    assert value.item() == pytest.approx(torch.log1p(torch.exp(-score)).mean().item(), rel=1e-4)
    p = model.generator.head.bias
    truth = torch.autograd.grad(torch.log1p(torch.exp(-score)).mean(), p)[0]
    assert torch.allclose(torch.autograd.grad(value, p)[0], truth, rtol=1e-3)


def test_each_step_moves_its_own_network_alone_and_the_generator_meets_the_moved_critic():
    model = tiny()
    optimizers = gan.make_optimizers(model, model.cfg)
    owned = [{id(p) for g in o.param_groups for p in g["params"]} for o in optimizers]
    assert not owned[0] & owned[1]
    assert owned[0] | owned[1] == {id(p) for p in model.parameters()}
    moves, critic_loss, generator_loss = [], model.critic_loss, model.generator_loss

    def snapshot():
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    def watch(loss_of):
        def watched(*args):
            moves.append(snapshot())
            return loss_of(*args)

        return watched

    model.critic_loss, model.generator_loss = watch(critic_loss), watch(generator_loss)
    for optimizer in optimizers:
        optimizer.found_inf = torch.zeros(())
    ema = gan.copy.deepcopy(tiny()).requires_grad_(False)
    x, words = torch.rand(4, 1, 4, 4), torch.tensor([[1], [2], [3], [0]])
    for k in (500, 501):
        gan.step(model, ema, optimizers, x, words, torch.arange(4), k, model.cfg)
    moves.append(snapshot())
    for phase, part in enumerate(("critic", "generator") * 2):
        before, after = moves[phase], moves[phase + 1]
        for name in before:
            assert torch.equal(before[name], after[name]) != name.startswith(part), (phase, name)


def test_c_holds_each_networks_own_text():
    model = tiny()
    words = torch.tensor([[1, 2], [0, 0]])
    c = model.embed(words)
    assert torch.equal(c[:, :16], model.generator_text(words))
    assert torch.equal(c[:, 16:], model.critic_text(words))
    x = torch.zeros(2, 1, 4, 4)
    assert not torch.allclose(model.critic(x, c[:, 16:]), model.critic(x, c[:, 16:].flip(0)))


class Points(nn.Sequential):
    """A perceptron that takes (z, c) or (x, c) and ignores c; images are (B, 2, 1, 1)."""

    def __init__(self, d_in, d_out):
        layers = [nn.Linear(d_in, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Linear(128, d_out))

    def forward(self, x, c):
        y = super().forward(x.flatten(1))
        return y.squeeze(1) if y.shape[1] == 1 else y[:, :, None, None]


@pytest.mark.parametrize("loss", ["relativistic", "nonsaturating"])
def test_eight_gaussians_in_the_plane_are_all_found(loss):
    model = tiny(loss=loss, gamma=0.1, lr=2e-3, train_steps=1500, dropout=0.0)
    model.generator, model.critic = Points(4, 2), Points(2, 1)
    optimizers = gan.make_optimizers(model, model.cfg)
    for optimizer in optimizers:
        optimizer.found_inf = torch.zeros(())
    ema = gan.copy.deepcopy(model).requires_grad_(False)
    angle = torch.arange(8) * math.pi / 4
    centres = torch.stack([angle.cos(), angle.sin()], 1)
    words = torch.zeros(128, 1, dtype=torch.long)
    for k in range(1500):
        seeds = prior.fold_in(prior.fold_in(0, k), torch.arange(128))
        mode = (prior.uniform(seeds, (), 9) * 8).long()
        x = centres[mode] + 0.05 * prior.normal(seeds, (2,), 9)
        gan.step(model, ema, optimizers, x[:, :, None, None], words, seeds, k, model.cfg)
    z = prior.normal(prior.fold_in(1, torch.arange(2000)), (4,))
    distance, nearest = torch.cdist(ema.generator(z, None).flatten(1), centres).min(1)
    good = distance < 0.25
    share = torch.bincount(nearest[good], minlength=8) / 2000
    assert good.float().mean() > 0.7
    assert (share > 0.04).all()


def test_a_collapsed_batch_and_a_critic_that_wins_are_told():
    model = tiny()
    x, c, seeds = torch.rand(8, 1, 4, 4) * 2 - 1, torch.zeros(8, 32), torch.arange(8)
    constant, varied = torch.zeros(8, 1, 4, 4), torch.randn(8, 1, 4, 4)
    for fake, collapsed in ((constant, 1.0), (varied, 0.0)):
        swap(model, "generator", lambda z, c, fake=fake: fake)
        assert model.generator_loss(x, c, seeds)[1]["collapsed"] == collapsed
    swap(model, "generator", lambda z, c: constant)
    for scale, wins in ((0.0, 0.0), (1e3, 1.0)):
        swap(model, "critic", lambda x, c, scale=scale: scale * x.square().flatten(1).sum(1))
        assert model.critic_loss(x, c, seeds)[1]["critic_wins"] == wins
