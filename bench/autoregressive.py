"""Autoregressive, for contrast: an image is written as a text is, one value after the other.

  p(x | c) = product over values i of p(x_i | x_1, ..., x_(i-1), c)                            (1)
  h_i = dilated convolutions of all rows above that of x_i, of the place i and of the text c   (2)
  logits of x_i = an MLP of h_i and the values to the left, one for each of 256 values         (3)
  loss = -log2 p(x | c) per value:   exact, no bound and no noise                              (4)
  x_i = the first value k with F_i(k) >= Phi(z_i),   F_i the distribution function of (3)      (5)

(1) is how texts are written, (2) the vertical stack of a PixelCNN (van den Oord et al. 2016).

  python -m bench.autoregressive --train
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from bench import runs
from vae import Text

REACH = 14  # how many pixels to the left (3) reads


class Autoregressive(nn.Module):
    """p(x | text) for images of a shape (C, H, W) and texts made of the words in a vocabulary.
    Values are written row by row, pixel by pixel, channel by channel."""

    def __init__(self, shape, vocabulary, width=96):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width)
        self.latent_shape = shape
        channels, side, _ = shape
        self.reach = REACH * channels
        self.embed = Text(vocabulary, width)
        self.tokenize = self.embed.tokenize
        self.stem = nn.Conv2d(2, width, 1)
        self.place = nn.Parameter(0.1 * torch.randn(width, side, side * channels))
        self.convs = nn.ModuleList()
        for n in (1, 2, 4, 8, 1):
            self.convs.append(nn.Conv2d(width, width, 3, dilation=(n, n * channels)))
        self.left = nn.Linear(2 * self.reach, width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 256)

    def padded(self, x):
        """The rows of images (B, C, H, W), with black above and to the left: (B, 1 + H, ...)."""
        rows = rearrange(x, "b c h w -> b h (w c)")
        return F.pad(rows, (self.reach, 0, 1, 0), value=-1.0)

    def context(self, rows, c, first=0, past=None):
        """h of (2), (B, n, W C, E), for n rows from the first on, of the padded rows above each;
        past is what the convolutions saw of those before, and is brought up to date."""
        past = {} if past is None else past
        rows = rows[:, :, self.reach :]
        ink = (rows > -1).to(rows)
        h = self.stem(torch.stack([rows, ink], 1))
        h = h + self.place[:, first : first + h.shape[2]]
        h = h + c[:, :, None, None]
        for conv in self.convs:
            down, across = conv.dilation
            y = F.pad(F.silu(h), (across, across, 0 if first else 2 * down, 0))
            y = torch.cat([past[conv], y], 2) if first else y
            past[conv] = y[:, :, -2 * down :]
            h = h + conv(y)
        return h.movedim(1, -1)

    def logits(self, h, left):
        """(3) for h (B, ..., E) and the values to the left (B, ..., reach)."""
        ink = (left > -1).to(left)
        h = h + self.left(torch.cat([left, ink], -1))
        return self.out(F.silu(self.hidden(F.silu(h)))).float()

    def forward(self, x, c):
        """x (B, C, H, W) in [-1, 1], c (B, E) -> the logits of all values (B, H W C, 256)."""
        rows = self.padded(x)
        h = self.context(rows[:, :-1], c)                                      # (2)
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
        for i, row in enumerate(u):
            h = self.context(rows[:, i : i + 1], c, i, past)[:, 0]             # (2)
            for j, u_i in enumerate(row):
                left = rows[:, i + 1, j : j + self.reach]
                p = self.logits(h[:, j], left).softmax(1)                      # (3)
                k = (p.cumsum(1) < u_i).sum(1).clamp(max=255)                  # (5)
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
