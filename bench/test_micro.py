"""Micro-benchmarks: `pytest bench --benchmark-only`. Not part of the plain test run."""

import pytest
import torch

import diffusion
import gan
import prior
from bench import models

SHAPE, BATCH = (1, 28, 28), 32
SEEDS = torch.arange(BATCH)


@pytest.fixture
def latents():
    return prior.normal(SEEDS, SHAPE)


def test_prior_normal(benchmark):
    benchmark(prior.normal, SEEDS, SHAPE)


def test_prior_kl(benchmark, latents):
    benchmark(prior.kl, latents, latents)


def test_prior_slerp(benchmark, latents):
    benchmark(prior.slerp, latents, latents.flip(0), 0.3)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm", "ddpm"])
def test_one_step_of_a_sampler(benchmark, latents, sampler):
    model = models.build("diffusion", SHAPE, 14, "cpu", guidance=1.0)
    velocity = model.velocity(model.embed(torch.ones(BATCH, 3, dtype=torch.long)))
    noise = (lambda k: latents,) if sampler == "ddpm" else ()
    with torch.no_grad():
        benchmark(getattr(diffusion, sampler), velocity, latents, [0.6, 0.5], *noise)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("index", [0, 2])
def test_a_coupling(benchmark, direction, index):
    model = models.build("flow", SHAPE, 14, "cpu")
    h, c = prior.normal(SEEDS, (16, 7, 7)), prior.normal(SEEDS, (256,), 1)
    with torch.no_grad():
        benchmark(getattr(model.couplings[index], direction), h, c)


def test_gradient_penalty(benchmark, latents):
    model = models.build("gan", SHAPE, 14, "cpu").requires_grad_(True)
    c = prior.normal(SEEDS, (model.cfg.embedding,), 1)
    benchmark(lambda: gan.penalty(model.critic, latents, c)[1].mean().backward())
