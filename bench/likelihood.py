"""Bits per value of held-out images: what they would cost to send, if the model were the code.

Four statements of different strength, each told apart by what the model has:

  exact                       value by value: -log P(x) is a sum of cross entropies
  importance-weighted bound   a decoder's likelihood and a posterior q (Burda et al. 2016):
      log P(x) >= E log mean_k P(x | z_k) p(z_k) / q(z_k | x)
  bound                       an exact density p(y) of the noisy image y = x + s eps:
      -log P(x) <= E[-log p(y) - log P(x | y)] - D/2 log(2 pi e s^2), for any guess P(x | y)
      of the pixels; bits_per_dim_of_y is -log2 p(y) / D itself, exact, of a continuous y
  ODE estimate                a velocity v (Song et al. 2021), with Hutchinson's probes for div v:
      log p(x) = log N(z_1; 0, I) + the integral of div v over t, for dequantized x
"""

import math
from itertools import pairwise

import torch

import prior
from bench.models import evenly
from vae import log_logistic

SAMPLES, STEPS = 64, 50


@torch.no_grad()
def value_by_value(model, x, c):
    """-log P(x) in nats, (B,), of a model of each value given those before."""
    return {"bits_per_dim": -model.log_prob(x, c)}


@torch.no_grad()
def importance_weighted(model, x, c):
    """-log of the bound in nats, (B,), from SAMPLES draws of q."""
    mu, log_var = model.infer(x, c)
    weights = []
    for _ in range(SAMPLES):
        eps = torch.randn_like(mu)
        z = mu + (0.5 * log_var).exp() * eps
        log_q = prior.log_prob(eps) - 0.5 * log_var.sum(1)
        location = model.decode(z, c)
        log_p = log_logistic(x, location, model.log_scale).flatten(1)
        weights.append(log_p.sum(1) + prior.log_prob(z) - log_q)
    nats = math.log(SAMPLES) - torch.stack(weights).logsumexp(0)
    return {"bits_per_dim": nats}


@torch.no_grad()
def noisy_density(model, x, c):
    """The bound on -log P(x), and -log p(y), in nats, (B,) each, from one draw of the noise."""
    y = model.add_noise(x)
    z, log_det = model(y, c)
    nats_of_y = -prior.log_prob(z) - log_det
    k = (127.5 * (x + 1)).round().long()
    log_posterior = model.pixel_logits(model.clean(y, c)).log_softmax(-1)
    guess = log_posterior.gather(-1, k[..., None]).flatten(1).sum(1)
    nats = nats_of_y - guess - x[0].numel() * model.noise_entropy()
    return {"bits_per_dim": nats, "bits_per_dim_of_y": nats_of_y}


def probability_flow(model, x, c):
    """-log p(x) in nats, (B,), of one draw of x in its bins, which are 1 / 127.5 wide, by Heun's
    method on log-uniform times from 1e-3."""
    z, change = x + (torch.rand_like(x) - 0.5) / 127.5, 0
    probe = torch.randn_like(x).sign()

    def slope(z, t):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            v = model.velocity(z, t, c)
            (product,) = torch.autograd.grad(v, z, probe)  # probe^T dv/dz
        return v.detach(), (product * probe).flatten(1).sum(1)

    for t, s in pairwise((10 ** torch.linspace(-3, 0, STEPS + 1)).tolist()):
        v, divergence = slope(z, t)
        v_s, divergence_s = slope(z + (s - t) * v, s)
        z = z + (s - t) / 2 * (v + v_s)
        change = change + (s - t) / 2 * (divergence + divergence_s)
    bins = x[0].numel() * math.log(127.5)
    return {"bits_per_dim": bins - prior.log_prob(z) - change}


# the member that a model must have, the kind of statement, and the function
WAYS = (
    ("window", "exact", value_by_value),
    ("log_scale", "importance-weighted bound", importance_weighted),
    ("pixel_logits", "bound", noisy_density),
    ("velocity", "ODE estimate", probability_flow),
)


def measure(model, x, captions, n=500, seed=0, batch=50):
    """bits_per_dim, its standard_error and kind, for n of the images x, uint8 (N, C, H, W), and
    their captions; None for a model without a likelihood."""
    ways = [way for way in WAYS if hasattr(model, way[0])]
    if not ways:
        return None
    _, kind, function = ways[0]
    device, values = next(model.parameters()).device, {}
    chosen = evenly(min(n, len(x)), len(x))
    x, ids = x[chosen].to(device), model.tokenize([captions[i] for i in chosen]).to(device)
    torch.manual_seed(seed)
    for part, words in zip(x.split(batch), ids.split(batch)):
        nats = function(model, part / 127.5 - 1, model.embed(words))
        for name, value in nats.items():
            bits = value.cpu().double() / (x[0].numel() * math.log(2))
            values.setdefault(name, []).append(bits)
    values = {name: torch.cat(parts) for name, parts in values.items()}
    result = {name: bits.mean().item() for name, bits in values.items()}
    error = values["bits_per_dim"].std().item() / len(x) ** 0.5
    return {**result, "standard_error": error, "kind": kind, "n": len(x)}
