"""Autoregressive, for contrast: an image is written as a text is, one value after the other.

  p(x | c) = product over values i of p(x_i | x_1, ..., x_(i-1), c)                            (1)
  h_i = dilated convolutions over the rows above x_i, after place and text c are added         (2)
  logits of x_i, 256 of them = an MLP of h_i and of the values just before x_i in its row      (3)
  loss = -log2 p(x | c) per value:   exact, no bound and no noise                              (4)
  x_i = the first value k with F_i(k) >= Phi(z_i),   F_i the distribution function of (3)      (5)

By (5) an image is a function of z ~ N(0, I) and a text; each value takes an evaluation. (2) is the
vertical stack of a Gated PixelCNN (van den Oord et al. 2016), with dilation and without gates.

  python -m bench.autoregressive --train
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from bench import runs
from vae import Text

REACH = 14  # how many pixels' values before x_i in its row (3) reads


class Autoregressive(nn.Module):
    """p(x | text) of images (C, H, W), row by row, pixel by pixel and channel by channel."""

    def __init__(self, shape, vocabulary, width=96):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width)
        self.latent_shape = shape
        channels, side, _ = shape
        self.reach = REACH * channels
        self.embed = Text(vocabulary, width)
        self.tokenize = self.embed.tokenize
        pixel = 2 * channels - 1  # all channels of the one above
        self.stem = nn.Conv2d(2, width, (1, pixel), padding=(0, channels - 1))
        self.place = nn.Parameter(0.1 * torch.randn(width, side, side * channels))
        self.convs = nn.ModuleList()
        for n in (1, 2, 4, 8, 1):  # together 33 rows above, 16 pixels to either side
            self.convs.append(nn.Conv2d(width, width, 3, dilation=(n, n * channels)))
        self.read_left = nn.Linear(2 * self.reach, width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 256)

    def padded(self, x):
        """The rows of images (B, C, H, W), black above and to the left: (B, 1 + H, reach + W C)."""
        rows = rearrange(x, "b c h w -> b h (w c)")
        return F.pad(rows, (self.reach, 0, 1, 0), value=-1.0)

    def context(self, rows, c, first, past):
        """h of (2), (B, n, W C, E), of n rows from number first on. rows are the padded ones above
        each, (B, n, reach + W C); past keeps what the convolutions need of these for the next."""
        rows = rows[:, :, self.reach :]
        ink = (rows > -1).to(rows)
        h = self.stem(torch.stack([rows, ink], 1))
        h = h + self.place[:, first : first + h.shape[2]]
        h = h + c[:, :, None, None]
        for conv in self.convs:
            down, across = conv.dilation
            y = F.pad(F.silu(h), (across, across, 2 * down, 0))
            if conv in past:
                y[:, :, : 2 * down] = past[conv]
            past[conv] = y[:, :, -2 * down :]
            h = h + conv(y)
        return h.movedim(1, -1)

    def logits(self, h, left):
        """(3), (B, ..., 256), for h (B, ..., E) and the values to the left (B, ..., reach)."""
        ink = (left > -1).to(left)
        h = h + self.read_left(torch.cat([left, ink], -1))
        return self.out(F.silu(self.hidden(F.silu(h)))).float()

    def forward(self, x, c):
        """x (B, C, H, W) in [-1, 1], c (B, E) -> the logits of all values (B, H W C, 256)."""
        rows = self.padded(x)
        h = self.context(rows[:, :-1], c, 0, {})                               # (2)
        left = rows[:, 1:, :-1].unfold(2, self.reach, 1)
        return self.logits(h, left).flatten(1, 2)                              # (3)

    def log_prob(self, x, c):
        """The log of (1) for x (B, C, H, W) in [-1, 1] and c (B, E), (B,)."""
        k = rearrange(127.5 * (x + 1), "b c h w -> b (h w c)").round().long()
        logits = self(x, c).movedim(2, 1)
        return -F.cross_entropy(logits, k, reduction="none").sum(1)

    def loss(self, x, c):
        """(4) for x (B, C, H, W) in [-1, 1] and c (B, E), in bits per value, and what is logged."""
        loss = -self.log_prob(x, c).mean() / (x[0].numel() * math.log(2))
        return loss, {"loss": loss}

    @torch.no_grad()
    def sample(self, z, c):
        """z ~ N(0, I) (B, C, H, W), c (B, E) -> x in [-1, 1], value by value."""
        u = rearrange(torch.special.ndtr(z), "b c h w -> h (w c) b 1")
        rows = self.padded(torch.full_like(z, -1.0))
        past = {}
        for i, u_row in enumerate(u):
            h = self.context(rows[:, i : i + 1], c, i, past)[:, 0]             # (2)
            for j, u_ij in enumerate(u_row):
                left = rows[:, i + 1, j : j + self.reach]
                p = self.logits(h[:, j], left).softmax(1)                      # (3)
                k = (p.cumsum(1) < u_ij).sum(1).clamp(max=255)                 # (5)
                rows[:, i + 1, j + self.reach] = k / 127.5 - 1
        x = rows[:, 1:, self.reach :]
        return rearrange(x, "b h (w c) -> b c h w", c=z.shape[1])


def load(run, device="cpu"):
    return runs.load(Autoregressive, run, device)


def prepare(model, args):
    """The loss of images and their word ids."""
    return lambda images, ids, progress: model.loss(images, model.embed(ids))


def main(argv=None):
    sizes = {"train_steps": 3000, "batch_size": 8, "lr": 2e-3, "width": 96}
    runs.main(argv, "autoregressive", Autoregressive, prepare, **sizes)


if __name__ == "__main__":
    main()
