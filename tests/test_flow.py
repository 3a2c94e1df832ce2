"""flow.py against the full Jacobian, its own inverse, known densities and odd images."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import flow
import prior


def tiny(shape=(1, 8, 8), std=0.1, width=16, dtype=torch.float64, **options):
    """A flow with random weights everywhere, the zero-init heads too."""
    torch.manual_seed(0)
    cfg = replace(flow.Config(), width=width, embedding=16, couplings=6, **options)
    model = flow.Flow(cfg, shape, 3).to(dtype).requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    nn.init.normal_(model.equalize.logits)
    return model


def values(n, shape=(1, 8, 8), dtype=torch.float64):
    """u in (0, 256) and c."""
    seeds = torch.arange(n)
    u = 256 * prior.uniform(seeds, shape)
    return u.to(dtype), prior.normal(seeds, (16,), 1).to(dtype)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4)])
def test_log_determinant_is_the_full_jacobians(shape):
    model = tiny(shape)
    u, c = values(3, shape)
    _, log_det = model(u, c)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, i=i: model(v[None], c[i : i + 1])[0].flatten(), u[i]
        )
        truth = torch.linalg.slogdet(jacobian.flatten(1))[1]
        assert abs(log_det[i] - truth) < 1e-8


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4)])
def test_inverse_of_forward_and_forward_of_inverse(shape):
    model = tiny(shape)
    u, c = values(5, shape)
    assert (model.inverse(model(u, c)[0], c) - u).abs().max() < 1e-9
    z = prior.normal(torch.arange(5), shape).double()
    assert (model(model.inverse(z, c), c)[0] - z).abs().max() < 1e-9


def test_permutations_are_permutations_and_every_value_is_moved():
    cfg = replace(flow.Config(), width=16, embedding=16)
    model = flow.Flow(cfg, (1, 8, 8), 3)
    orders = [layer.order for layer in model.couplings]
    assert all(torch.equal(order.sort()[0], torch.arange(64)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    place, moved = torch.arange(64), torch.zeros(64)
    for index, order in enumerate(orders):
        place = place[order]
        moved[place[:32]] += 1
        channels = order.view(16, 4)  # a channel's values keep their places but in each third
        assert (channels % 4 == torch.arange(4)).all() == (index % 3 != 2)
    assert moved.min() >= 5
    kinds = [type(layer.network).__name__ for layer in model.couplings]
    assert kinds == ["Local", "Dense", "Dense"] * (len(kinds) // 3)


def test_zero_init_couplings_are_the_identity_up_to_their_permutation():
    for index in range(6):
        layer = flow.Coupling(index, (16, 2, 2), 16, 8)
        h, c = torch.randn(3, 16, 2, 2), torch.randn(3, 8)
        y, log_det = layer(h, c)
        assert torch.equal(y.flatten(1), h.flatten(1)[:, layer.order])
        assert not log_det.any()


def test_affine_is_a_gaussian_likelihood():
    torch.manual_seed(0)
    layer = flow.Affine((2, 3, 3), 4).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    h, c = torch.randn(5, 2, 3, 3).double(), torch.randn(5, 4).double()
    mu, log_sigma = layer.mu_and_log_sigma(c)
    z, log_det = layer(h, c)
    truth = torch.distributions.Normal(mu, log_sigma.exp()).log_prob(h).flatten(1).sum(1)
    assert torch.allclose(prior.log_prob(z) + log_det, truth)
    assert torch.allclose(layer.inverse(z, c), h)


def test_bits_of_independent_pixels_are_their_entropy():
    """Without couplings, text or affine, and F such that y is nearly normal, a pixel value k costs
    -log2 of the density in its bin; over all values and noise the density integrates to 1."""
    model = tiny((1, 4, 4), std=0.0, dtype=torch.float32)
    u = torch.arange(0.0, 256, 1 / 64) + 1 / 128
    y, _ = model.equalize(u[:, None])
    density = prior.log_prob(y) + model.equalize(u[:, None])[1]
    assert density.exp().mean() * 256 == pytest.approx(1, abs=2e-3)
    k = torch.arange(16.0).view(1, 1, 4, 4) * 16
    x = k / 127.5 - 1
    c, seeds = torch.zeros(400, 16), torch.arange(400)
    bits = model.bits_per_dim(x.expand(400, -1, -1, -1), c, seeds)
    inside = density.view(256, 64)[::16].mean() / math.log(2)
    assert bits.mean().item() == pytest.approx(-inside.item(), abs=0.02)


@pytest.mark.parametrize("kind", [0, 1])
def test_the_density_in_the_plane_integrates_to_one(kind):
    torch.manual_seed(0)
    couplings = [flow.Coupling(3 * i + kind, (2, 1, 1), 32, 4) for i in range(3)]
    layers = [flow.Affine((2, 1, 1), 4), *couplings]
    for layer in layers:
        layer.requires_grad_(False)
        for p in layer.parameters():
            nn.init.normal_(p, std=0.1)
    axis = torch.linspace(-30, 30, 1200)
    h = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    c = torch.randn(1, 4)
    total = 0
    for part in h.split(100_000):
        log_p, z = 0, part
        for layer in layers:
            z, log_det = layer(z, c.expand(len(z), -1))
            log_p = log_p + log_det
        total += (prior.log_prob(z) + log_p).double().exp().sum()
    assert total * (60 / 1199) ** 2 == pytest.approx(1, abs=0.01)


def test_set_from_data_starts_where_the_data_are():
    torch.manual_seed(0)
    model = flow.Flow(replace(flow.Config(), width=16, embedding=16), (1, 8, 8), 3)
    k = torch.randint(0, 256, (200, 1, 8, 8)) * (torch.rand(200, 1, 8, 8) < 0.3)
    x, seeds = k / 127.5 - 1, torch.arange(200)
    before = model.bits_per_dim(x, torch.zeros(200, 16), seeds).mean()
    model.set_from_data(x, seeds)
    cdf = model.equalize(model.dequantize(x, seeds))[0].sigmoid()
    ranks = cdf.flatten().sort()[0]
    assert (ranks - torch.linspace(0, 1, len(ranks))).abs().max() < 0.02
    z, _ = model(model.dequantize(x, seeds), torch.zeros(200, 16))
    assert z.mean(0).abs().max() < 1e-3
    assert (z.std(0) - 1).abs().max() < 0.01
    assert model.bits_per_dim(x, torch.zeros(200, 16), seeds).mean() < before - 1


def test_dequantization_stays_in_its_bin():
    model = tiny(dtype=torch.float32)
    k = torch.arange(256).view(4, 1, 8, 8)
    u = model.dequantize(k / 127.5 - 1, torch.arange(4))
    assert torch.equal(u.floor().long(), k)
    assert not torch.equal(u, u.floor() + 0.5)
    white = torch.ones(3000, 1, 32, 32)  # 255 + noise has the fewest bits left for the noise
    assert model.dequantize(white, torch.arange(3000)).max() < 256


def test_rare_values_survive_the_round_trip():
    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        model.equalize.logits[100:200] = -40.0
    u = torch.arange(256).view(1, 1, 16, 16) + 0.5
    y, log_det = model.equalize(u)
    assert log_det.isfinite()
    assert (model.equalize.inverse(y) - u).abs().max() < 0.1


def test_round_trips_in_float32_and_temperature():
    model = tiny(dtype=torch.float32, std=0.05)
    k = torch.randint(0, 256, (6, 1, 8, 8))
    x, c, seeds = k / 127.5 - 1, torch.randn(6, 16), torch.arange(6)
    assert (model.sample(model.encode(x, c), c) - x).abs().max() < 1e-3
    y = model.sample(prior.normal(seeds, (1, 8, 8)), c, seeds)
    assert (model.sample(model.encode(y, c), c) - y).abs().max() < 1e-3
    half = tiny(dtype=torch.float32, std=0.05, temperature=0.5)
    z = prior.normal(seeds, (1, 8, 8))
    assert torch.equal(half.sample(z, c, seeds), model.sample(0.5 * z, c, seeds))
    assert torch.equal(half.sample(z, c), model.sample(z, c))  # reconstruction is exact


def test_sampling_and_likelihood_know_no_bf16():
    model = tiny(dtype=torch.float32)
    x, c, seeds = torch.zeros(2, 1, 8, 8), torch.randn(2, 16), torch.arange(2)
    z = prior.normal(seeds, (1, 8, 8))
    calls = [lambda: model.sample(z, c), lambda: model.encode(x, c)]
    calls.append(lambda: model.bits_per_dim(x, c, seeds))
    torch.set_float32_matmul_precision("high")
    for call in calls:
        truth = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), truth)
            assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


def test_pixels_never_lit_in_training_keep_a_sane_likelihood(tmp_path):
    x = np.zeros((64, 8, 8), np.uint8)
    x[:, 2:6, 2:6] = np.random.default_rng(0).integers(0, 256, (64, 4, 4))
    model = flow.Flow(replace(flow.Config(), width=16, embedding=16, train_steps=30), (1, 8, 8), 1)
    ema = flow.copy.deepcopy(model).requires_grad_(False)
    optimizers = flow.make_optimizers(model, model.cfg)
    optimizers[0].found_inf = torch.zeros(())
    images = torch.from_numpy(x)[:, None] / 127.5 - 1
    words = torch.ones(64, 1, dtype=torch.long)
    for k in range(30):
        flow.step(model, ema, optimizers, images, words, torch.arange(64), k, model.cfg)
    seeds, c = torch.arange(64), ema.embed(words)
    usual = ema.bits_per_dim(images, c, seeds).mean()
    dots = images.clone()
    dots[:, :, 0, 0] = dots[:, :, 7, 3] = 1.0
    odd = ((dots, 200), (images.roll(3, 3), 2000), (torch.ones(64, 1, 8, 8), 2000))
    for strange, limit in odd:
        bits = ema.bits_per_dim(strange, c, seeds)
        assert bits.isfinite().all()
        assert usual < bits.mean() < limit
        assert (ema.sample(ema.encode(strange, c), c) - strange).abs().max() < 1e-3


def test_loss_is_the_mean_of_bits_per_dim():
    model = tiny(dtype=torch.float32)
    x, c, seeds = torch.zeros(4, 1, 8, 8), torch.randn(4, 16), torch.arange(4)
    loss, metrics = model.loss(x, c, seeds)
    assert torch.allclose(loss, model.bits_per_dim(x, c, seeds).mean())
    assert torch.equal(loss, metrics["loss"])
