"""Autoregressive, for contrast: an image is written as a text is, one value after the other.

  p(x | c) = product over values i of p(x_i | x_1, ..., x_(i-1), c)                            (1)
  h_i = GRU(h_(i-1), e_i),   e_i = read(the values near x_i) + the place i + the text c        (2)
  logits of x_i = a linear layer of h_i + e_i, one for each of 256 values                      (3)
  loss = -log2 p(x | c) per value:   exact, no bound and no noise                              (4)
  x_i = the first value k with F_i(k) >= Phi(z_i),   F_i the distribution function of (3)      (5)

(1) is how texts are written, and (2) is a PixelRNN (van den Oord et al. 2016). By (5) this, too, is
a function of z ~ N(0, I) and a text. It needs an evaluation for each value, one after the other.

  python -m bench.autoregressive --train
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from bench import runs
from vae import Text

ROWS, REACH = 4, 6  # what (2) reads: so many rows above, and pixels on either side


class Autoregressive(nn.Module):
    """p(x | text) for images of a shape (C, H, W) and texts made of the words in a vocabulary.
    Values are written row by row, pixel by pixel, channel by channel."""

    def __init__(self, shape, vocabulary, width=256):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width)
        self.latent_shape = shape
        channels, side, _ = shape
        self.reach = REACH * channels
        self.embed = Text(vocabulary, width)
        self.tokenize = self.embed.tokenize
        seen = torch.ones(ROWS + 1, 2 * self.reach + 1, dtype=torch.bool)
        seen[ROWS, self.reach :] = False
        self.register_buffer("seen", seen, persistent=False)
        self.read = nn.Linear(2 * seen.numel(), width)
        self.place = nn.Parameter(0.1 * torch.randn(side, side * channels, width))
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, 256)

    def evidence(self, near, place, c):
        """e_i of (2) for the values near x_i (B, ..., ROWS + 1, 2 reach + 1), black where nothing
        is written yet."""
        near = near.flatten(-2)
        ink = (near > -1).to(near)
        read = self.read(torch.cat([near, ink], -1))
        return read + place + c                                                # (B, ..., E)

    def forward(self, x, c):
        """x (B, C, H, W) in [-1, 1], c (B, E) -> the logits of all values (B, H W C, 256)."""
        rows = rearrange(x, "b c h w -> b h (w c)")
        padded = F.pad(rows, (self.reach, self.reach, ROWS, 0), value=-1.0)
        near = padded.unfold(1, ROWS + 1, 1)
        near = near.unfold(2, 2 * self.reach + 1, 1)
        near = near.where(self.seen, -1.0)
        e = self.evidence(near, self.place, c[:, None, None])
        e = e.flatten(1, 2)
        with torch.autocast(x.device.type, enabled=False):  # in which cuDNN's GRU is in fp16
            h, _ = self.gru(e)                                                 # (2)
        return self.out(h + e).float()                                         # (3)

    def log_prob(self, x, c):
        """The log of (1) for x (B, C, H, W) in [-1, 1] and c (B, E), (B,)."""
        k = (127.5 * (x + 1)).round().long()
        k = rearrange(k, "b c h w -> b (h w c)")
        logits = self(x, c).movedim(2, 1)
        return -F.cross_entropy(logits, k, reduction="none").sum(1)

    def loss(self, x, c):
        """(4) for x (B, C, H, W) in [-1, 1] and c (B, E), in bits per value, and what is logged."""
        nats = -self.log_prob(x, c).mean()
        loss = nats / (x[0].numel() * math.log(2))
        return loss, {"loss": loss}

    @torch.no_grad()
    def sample(self, z, c):
        """z ~ N(0, I) (B, C, H, W), c (B, E) -> x in [-1, 1], value by value."""
        u = torch.special.ndtr(z)
        u = rearrange(u, "b c h w -> h (w c) b 1")
        black = torch.full_like(rearrange(z, "b c h w -> b h (w c)"), -1.0)
        padded = F.pad(black, (self.reach, self.reach, ROWS, 0), value=-1.0)
        h = None
        for i, j in np.ndindex(*u.shape[:2]):
            near = padded[:, i : i + ROWS + 1, j : j + 2 * self.reach + 1]
            e = self.evidence(near, self.place[i, j], c)
            y, h = self.gru(e[:, None], h)                                     # (2)
            p = self.out(y[:, 0] + e).float().softmax(1)
            below = (p.cumsum(1) < u[i, j]).sum(1)                             # (5)
            padded[:, i + ROWS, j + self.reach] = below.clamp(max=255) / 127.5 - 1
        x = padded[:, ROWS:, self.reach : -self.reach]
        return rearrange(x, "b h (w c) -> b c h w", c=z.shape[1])


def load(run, device="cpu"):
    return runs.load(Autoregressive, run, device)


def prepare(model, args):
    """The loss of images and their word ids."""
    return lambda images, ids, progress: model.loss(images, model.embed(ids))


def main(argv=None):
    sizes = {"train_steps": 800, "batch_size": 32, "lr": 2e-3, "width": 256}
    runs.main(argv, "autoregressive", Autoregressive, prepare, **sizes)


if __name__ == "__main__":
    main()
