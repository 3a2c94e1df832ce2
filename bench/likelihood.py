"""Bits per value of held-out images: what they would cost to send, if the model were the code.

Three statements, all of P(x), the probability of the pixel values:

  exact                       value by value: -log P(x) is a sum of cross entropies
  importance-weighted bound   a decoder's likelihood and a posterior q (Burda et al. 2016):
      log P(x) >= E log mean_k P(x | z_k) p(z_k) / q(z_k | x)
  bound                       a density p(y) of the image y = x + noise, and any guess P(x | y):
      -log P(x) <= E [-log p(y) - log P(x | y) + log q(y | x)],   q the density of the noise
      A flow has p(y) exactly; its guess is P(k) N(m(y); x_k, tau^2) over its sum, P(k) being how
      frequent the value k is in training images, and tau fitted to some of them. A diffusion model
      has log p(y) = log N(z_1; 0, I) + the integral of div v over t (Song et al. 2021), with
      Hutchinson's probes, but for errors of the solver; y is z_t at t = 1e-3, of pixels spread over
      their bins, and the guess is P(k) q(y | x_k) over its sum.
"""

import math
from itertools import pairwise

import torch

import prior
from bench.models import evenly
from vae import log_logistic

SAMPLES, STEPS, START = 64, 100, 1e-3
SCALES = torch.logspace(-2, 0, 21).tolist()  # tau that are tried


@torch.no_grad()
def value_by_value(model, x, c, guess):
    """-log P(x) in nats, (B,), of a model of each value given those before."""
    return -model.log_prob(x, c)


@torch.no_grad()
def importance_weighted(model, x, c, guess):
    """The bound on -log P(x) in nats, (B,), from SAMPLES draws of q."""
    mu, log_var = model.infer(x, c)
    weights = []
    for _ in range(SAMPLES):
        eps = torch.randn_like(mu)
        z = mu + (0.5 * log_var).exp() * eps
        log_q = prior.log_prob(eps) - 0.5 * log_var.sum(1)
        log_p = log_logistic(x, model.decode(z, c), model.log_scale).flatten(1)
        weights.append(log_p.sum(1) + prior.log_prob(z) - log_q)
    return math.log(SAMPLES) - torch.stack(weights).logsumexp(0)


@torch.no_grad()
def noisy_density(model, x, c, guess):
    """The bound on -log P(x) in nats, (B,), from one draw of the noise."""
    y = model.add_noise(x)
    log_posterior = guessed(x, model.clean(y, c), *guess)
    log_p = 0
    for z, log_det in model.factors(y, c):
        log_p = log_p + prior.log_prob(z) + log_det
    return -log_p - log_posterior.flatten(1).sum(1) - noise_entropy(model)


def values(x):  # the pixel values k of images x in [-1, 1]
    return (127.5 * (x + 1)).round().long()


@torch.no_grad()
def fit_guess(model, x, c):
    """log P(k), how frequent each value is in images x in [-1, 1], (256,), and for a flow the tau
    that fits some of them."""
    count = torch.bincount(values(x).flatten(), minlength=256) + 1e-9
    log_share = (count / count.sum()).log()
    if not hasattr(model, "stacks"):
        return log_share, None
    x, c = x[:100], c[:100]
    m = model.clean(model.add_noise(x), c)
    return log_share, max(SCALES, key=lambda tau: guessed(x, m, log_share, tau).mean())


def guessed(x, m, log_share, tau):
    """log P(x | y) of a flow, of the shape of x, for m = m(y)."""
    k = torch.linspace(-1, 1, 256, device=m.device)
    logits = log_share - ((m[..., None] - k) / tau) ** 2 / 2
    return logits.log_softmax(-1).gather(-1, values(x)[..., None]).squeeze(-1)


def noise_entropy(model):
    """The entropy of the noise of a flow, that is of y given x, in nats."""
    y = model.stacks[0].std.new_zeros(1, *model.latent_shape)
    parts, of_value = model.analyze(y), math.log(2 * math.pi * math.e) / 2
    nats = [part.numel() * (of_value + math.log(s)) for part, s in zip(parts, model.scales)]
    return sum(nats)


def log_noise(y):
    """log q(y | x_k) for each of 256 pixel values k: y of any shape -> (..., 256). y is (1 - START)
    (x_k + u) + START eps, u uniform in the bin and eps ~ N(0, 1)."""
    k = torch.linspace(-1, 1, 256, dtype=torch.double, device=y.device)
    half = (1 - START) / 255
    distance = y.double()[..., None] - (1 - START) * k
    distance = distance.abs()  # the density is symmetric
    a = torch.special.log_ndtr((half - distance) / START)
    b = torch.special.log_ndtr((-half - distance) / START)
    a = a + torch.log1p(-(b - a).exp())
    return a - math.log(2 * half)


def probability_flow(model, x, c, guess):
    """The bound on -log P(x) in nats, (B,), from one draw of the noise, by Heun's method on
    log-uniform times from START."""
    u = (torch.rand_like(x) - 0.5) / 127.5
    y = z = (1 - START) * (x + u) + START * torch.randn_like(x)
    probe, change = torch.randn_like(x).sign(), 0

    def slope(z, t):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            v = model.velocity(z, t, c)
            (product,) = torch.autograd.grad(v, z, probe)  # probe^T dv/dz
        return v.detach(), (product * probe).flatten(1).sum(1)

    times = torch.logspace(math.log10(START), 0, STEPS + 1)
    for t, s in pairwise(times.tolist()):
        v, divergence = slope(z, t)
        v_s, divergence_s = slope(z + (s - t) * v, s)
        z = z + (s - t) / 2 * (v + v_s)
        change = change + (s - t) / 2 * (divergence + divergence_s)
    log_share, _ = guess
    # of log q(y | x) - log P(x | y), q(y | x) cancels
    of_y = torch.logsumexp(log_share + log_noise(y), -1) - log_share[values(x)]
    return of_y.flatten(1).sum(1) - prior.log_prob(z) - change


# the member that a model must have, the kind of statement, and the function
WAYS = (
    ("logits", "exact", value_by_value),
    ("log_scale", "importance-weighted bound", importance_weighted),
    ("stacks", "bound", noisy_density),
    ("velocity", "bound", probability_flow),
)


def measure(model, x, captions, known, n=500, seed=0, batch=50):
    """bits_per_dim, its standard_error and kind, for n of the images x, uint8 (N, C, H, W), and
    their captions; known are images and captions of training. None without a likelihood."""
    ways = [way for way in WAYS if hasattr(model, way[0])]
    if not ways:
        return None
    _, kind, function = ways[0]
    device = next(model.parameters()).device

    def some(x, captions, n):
        chosen = evenly(min(n, len(x)), len(x))
        c = model.embed(model.tokenize([captions[i] for i in chosen]))
        x = x[chosen].to(device)
        return x / 127.5 - 1, c.detach()

    torch.manual_seed(seed)
    guess = fit_guess(model, *some(*known, 1000))
    x, c = some(x, captions, n)
    nats = []
    for part in zip(x.split(batch), c.split(batch)):
        nats.append(function(model, *part, guess).cpu().double())
    bits = torch.cat(nats) / (x[0].numel() * math.log(2))
    result = {"bits_per_dim": bits.mean().item(), "kind": kind, "n": len(x)}
    result["standard_error"] = bits.std().item() / len(x) ** 0.5
    return result
