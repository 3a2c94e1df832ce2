"""The prior N(0, I): every generator here turns a draw of it, and a text, into an image.

Why a standard normal? It is easy to sample. It looks the same in every direction, so that an arc
between two draws stays where draws are common (`slerp`). The KL divergence to it from
another normal has a closed form (`kl`). And any normal draw is a shifted and scaled draw of it, so
that gradients reach mu and sigma (`reparameterize`).
"""

import math

import torch


def sample(*shape, seed=None, device=None):
    """z ~ N(0, I), float32 of the given shape, from torch's global generator or from a seed."""
    if seed is None:
        return torch.randn(shape, device=device)
    device = device or torch.get_default_device()
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)


def log_prob(z):
    """log N(z; 0, I) in nats: (B, ...) -> (B,), summed over all axes but the first."""
    squares = z.flatten(1).square()
    return -0.5 * (squares + math.log(2 * math.pi)).sum(1)


def reparameterize(mu, log_var):
    """A draw of N(mu, sigma^2) as z = mu + sigma eps, eps ~ N(0, I), so that gradients flow to mu
    and log_var = log sigma^2, which have one shape (Kingma & Welling 2014, section 2.4)."""
    eps = torch.randn_like(mu)
    return mu + torch.exp(0.5 * log_var) * eps


def kl(mu, log_var):
    """KL(N(mu, sigma^2) || N(0, 1)) in nats, elementwise, of the shape of mu. The sum is the KL to
    N(0, I) (Kingma & Welling 2014, appendix B). expm1 is more accurate near log_var = 0."""
    return 0.5 * (mu.square() + log_var.expm1() - log_var)


def slerp(z0, z1, t):
    """The arc from z0 (B, ...) at t = 0 to z1 at t = 1, t a number or (B,). Draws of N(0, I) have
    nearly one length, which the arc keeps; a straight line would cut through the middle, where
    draws are rare (White 2016). Between parallel vectors it is the line."""
    broadcast = -1, *[1] * (z0.ndim - 1)
    t = torch.as_tensor(t, dtype=z0.dtype, device=z0.device).view(broadcast)
    cos = torch.cosine_similarity(z0.flatten(1), z1.flatten(1))
    angle = cos.clamp(-1, 1).acos().view(broadcast)
    sin = angle.sin()
    weight0 = ((1 - t) * angle).sin() / sin
    weight1 = (t * angle).sin() / sin
    arc = weight0 * z0 + weight1 * z1
    return torch.where(sin < 1e-4, torch.lerp(z0, z1, t), arc)
