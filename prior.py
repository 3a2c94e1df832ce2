"""The prior N(0, I), shared by every model here.

Why a standard normal: it is easy to sample; it is smooth and round, so that one latent can move to
another (`slerp`); the KL to it from another normal has a closed form (`kl`); and gradients flow
through mu + sigma eps to mu and sigma (`reparameterize`).

All noise is a pure function of integer seeds: no generator, no state, the same on every device (to
the last rounding of log and cos), in every batch and on every rank. The integers come from
SplitMix64 (Steele, Lea & Flood 2014) used as a counter-based hash, as in Salmon et al. 2011.
"""

import math

import torch

GOLDEN, MIX1, MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685  # SplitMix64


def _mix(h):
    """SplitMix64's finalizer on int64; `&` makes the arithmetic shifts logical ones."""
    h = (h ^ ((h >> 30) & (2**34 - 1))) * MIX1
    h = (h ^ ((h >> 27) & (2**37 - 1))) * MIX2
    return h ^ ((h >> 31) & (2**33 - 1))


def fold_in(seed, i):
    """The i-th new seed from a seed: int64 tensors, which broadcast, or ints -> int64 tensor."""
    return _mix(_mix(torch.as_tensor(seed) + GOLDEN) + torch.as_tensor(i) * GOLDEN)


def _words(seeds, n, stream):
    """(B, n) hashed int64: word j of row i depends on seeds[i], stream and j alone."""
    counter = torch.arange(1, n + 1, device=seeds.device)
    return _mix(fold_in(seeds, stream)[:, None] + counter * GOLDEN)


def uniform(seeds, shape, stream=0):
    """Uniform on the open (0, 1); arguments and result as normal's. A stream serves one use."""
    words = _words(seeds, math.prod(shape), stream) >> 41 & (2**23 - 1)  # 23 bits: k + 1/2 is exact
    return ((words.float() + 0.5) / 2**23).view(len(seeds), *shape)


def normal(seeds, shape, stream=0):
    """z ~ N(0, I): float32 (B, *shape) for int64 seeds (B,), on seeds' device.

    Row i depends on seeds[i] and stream alone. Box & Muller 1958: sqrt(-2 log u) times the cosine
    and sine of a uniform angle; |z| is at most 6.7.
    """
    n = math.prod(shape)
    words = _words(seeds, (n + 1) // 2, stream)
    # in float64, where there is one, vectorized and scalar kernels round to the same float32
    real = torch.float32 if seeds.device.type == "mps" else torch.float64
    radius = (-2 * (((words >> 32 & (2**32 - 1)).to(real) + 1) / 2**32).log()).sqrt()
    angle = (words & (2**32 - 1)).to(real) * (2 * math.pi / 2**32)
    z = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :n]
    return z.float().view(len(seeds), *shape)


def log_prob(z):
    """log N(z; 0, I) in nats: (B, ...) -> (B,), summed over all axes but the first."""
    z = z.flatten(1)
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


def reparameterize(mu, log_var, eps):
    """z = mu + sigma eps, a draw of N(mu, sigma^2) through which gradients flow (Kingma & Welling
    2014, section 2.4). Any shape, the same for all three; eps ~ N(0, I)."""
    return mu + (0.5 * log_var).exp() * eps


def kl(mu, log_var):
    """KL(N(mu, sigma^2) || N(0, 1)) of each latent in nats, the shape of mu; their sum is the KL to
    N(0, I) (Kingma & Welling 2014, appendix B). expm1 keeps it exact near 0."""
    return 0.5 * (mu.square() + log_var.expm1() - log_var)


def slerp(z0, z1, t):
    """The arc from z0 (t = 0) to z1 (t = 1), (B, ...) each, t a number or (B,): stays where N(0, I)
    has its mass, as a straight line does not (White 2016). The line where there is no arc: parallel
    vectors."""
    a, b = z0.flatten(1), z1.flatten(1)
    t = torch.as_tensor(t, dtype=z0.dtype, device=z0.device).reshape(-1, 1)
    cos = torch.nn.functional.cosine_similarity(a, b, dim=1)[:, None]
    angle = cos.clamp(-1, 1).acos()
    sin = angle.sin()
    parallel = sin < 1e-4
    sin = sin.masked_fill(parallel, 1)
    w0 = torch.where(parallel, 1 - t, ((1 - t) * angle).sin() / sin)
    w1 = torch.where(parallel, t, (t * angle).sin() / sin)
    return (w0 * a + w1 * b).view_as(z0)
