"""hybrids.py: whose weights each loss moves, and the steps that diffusion-gan draws."""

import pytest
import torch
from conftest import fill_zeros

import hybrids
import prior

SHAPE = 1, 20, 20  # of two grids, and of two stacks of a flow


def build(name):
    """A small model without dropout, in which every layer speaks."""
    return fill_zeros(hybrids.MODELS[name](SHAPE, ["left", "right"], width=8)).eval()


def same(a, b):
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


def gradients(model, **options):
    """The gradients of the critic's weights, of the text's, and of the others, for one batch."""
    torch.manual_seed(0)
    x = 2 * torch.rand(8, *SHAPE) - 1
    c = model.embed(model.tokenize(["left", "right"] * 4))
    loss, _ = model.loss(x, c, **options)
    model.zero_grad()
    loss.backward()
    critic, text, others = [], [], []
    for name, p in model.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        part = critic if name.startswith("critic") else others
        (text if name.startswith("embed") else part).append(gradient.flatten())
    return torch.cat(critic), torch.cat(text), torch.cat(others)


def no_duel(*_, **__):
    return torch.zeros(()), {}


def weighted(weight):
    """A duel in which the generator's loss has this weight."""
    duel = hybrids.duel
    return lambda *given, **options: duel(*given[:5], **options | {"weight": weight})


@pytest.fixture(params=hybrids.MODELS)
def model(request):
    return build(request.param)


def test_the_critic_learns_from_its_own_loss_alone(model, monkeypatch):
    critic, _, _ = gradients(model, progress=1.0)
    assert critic.abs().max() > 0
    with monkeypatch.context() as patch:
        patch.setattr(hybrids, "duel", weighted(7.0))
        assert same(gradients(model, progress=0.7)[0], critic)
    monkeypatch.setattr(hybrids, "duel", no_duel)
    assert not gradients(model)[0].any()  # the distance of features does not reach it


def test_the_model_does_not_learn_from_the_penalties(model):
    critic_0, text_0, others_0 = gradients(model, gamma=0.0)
    critic_9, text_9, others_9 = gradients(model, gamma=9.0)
    assert same(others_9, others_0)
    assert not same(text_9, text_0)  # but the text does
    assert not same(critic_9, critic_0)


def test_weight_0_is_the_model_itself_and_no_other_weight_is(model, monkeypatch):
    found = []
    for weight in (0.0, 10.0, 20.0):
        with monkeypatch.context() as patch:
            patch.setattr(hybrids, "duel", weighted(weight))
            found.append(gradients(model)[1:])
    (text_0, zero), (text_1, one), (text_2, two) = found
    assert same(two - zero, 2 * (one - zero))
    assert same(text_2 + text_0, 2 * text_1)
    assert same(text_1, text_0) != isinstance(model, hybrids.DiffusionGAN)
    assert (one - zero).abs().max() > 1e-5
    monkeypatch.setattr(hybrids, "duel", no_duel)
    _, text, others = gradients(model)
    assert same(others, zero)
    assert not same(text, text_0)


def test_vae_gan_learns_by_equation_3(monkeypatch):
    model = build("vae-gan")
    monkeypatch.setattr(hybrids, "duel", no_duel)

    def loss(x, c, progress):
        mu, log_var = model.infer(x, c)
        x_rec = model.decode(prior.reparameterize(mu, log_var), c)
        phi, _ = model.critic.encoder(x, c.detach())
        phi_rec, _ = model.critic.encoder(x_rec, c.detach())
        bits = torch.dist(phi, phi_rec).log2()  # up to a constant
        bits = bits + 0.1**progress * torch.dist(x, x_rec).log2()
        kl = prior.kl(mu, log_var).sum().div(x.numel()).exp().log2()  # of nats, bits
        return bits + 100 * 0.16**progress * kl, {}

    _, *found = gradients(model, progress=0.3)
    monkeypatch.setattr(model, "loss", loss)
    assert all(map(same, found, gradients(model, progress=0.3)[1:]))


def test_the_critic_of_the_flow_compares_samples_with_images_that_had_noise(monkeypatch):
    model, seen = build("flow-gan"), []
    monkeypatch.setattr(hybrids, "duel", lambda *given, **_: (seen.append(given), no_duel())[1])
    x = 2 * torch.rand(16, *SHAPE) - 1
    y = model.add_noise(x[::8])
    monkeypatch.setattr(model, "add_noise", lambda x: y if len(x) == 2 else x)
    model.loss(x, torch.zeros(16, 16))
    _, real, fake, text, _, _ = seen[0]
    assert len(real) == len(fake) == len(text) == 2
    assert torch.equal(real, model.clean(y, text).clamp(-1, 1))
    assert fake.requires_grad and not real.requires_grad


def test_the_critic_sees_steps_to_both_images_by_one_noise(monkeypatch):
    model, seen = build("diffusion-gan"), []
    monkeypatch.setattr(model, "denoise", lambda x_t, k, c: 1 + 2.0 * (k == 1).view(-1, 1, 1, 1))
    model.critic.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.loss(torch.ones(64, *SHAPE), torch.zeros(64, 32))
    (images,) = seen  # and no image with the text of another
    real, fake = images.chunk(2)
    x_s, x_t = real.chunk(2, 1)
    assert torch.equal(real, fake) and not torch.equal(x_s, x_t)  # x^ of 3 is drawn as 1, as x is


def test_the_flow_learns_alone_before_the_critic_does():
    critic, _, flow = gradients(build("flow-gan"), progress=0.59)
    assert flow.any() and not critic.any()


def test_a_step_of_diffusion_gan_is_a_draw_of_the_exact_posterior():
    """q(x_s | x_t, x) by Bayes: the product of N(x_t; a x_s, q) and N(x_s; (1 - s) x, s^2)."""
    model = hybrids.DiffusionGAN(SHAPE, [], width=8)
    x, x_t = torch.randn(2, 1, *SHAPE, dtype=torch.float64)
    for k in range(2, model.steps + 1):
        s, t = model.times[[k - 1, k]].double()
        a = (1 - t) / (1 - s)
        q = t**2 - (a * s) ** 2
        precision = a**2 / q + 1 / s**2
        mean = (a * x_t / q + (1 - s) * x / s**2) / precision
        for eps in (0.0, 1.0):
            noise = torch.full_like(x, eps)
            drawn = model.step(x, x_t, torch.tensor([k]), noise)
            assert torch.allclose(drawn, mean + eps * precision**-0.5)
    last = model.step(x, x_t, torch.tensor([1]), torch.ones_like(x))
    assert torch.allclose(last, x) and model.times[-1] == 1
