"""Autoregressive, for contrast: an image is written as a text is, one value after the other.

  p(x | c) = product over rows i and places j of p(x_ij | rows above, values to the left, c)   (1)
  h_i = T(c, row 1, ..., row i - 1),   T a causal transformer of which each row is a token     (2)
  logits of x_ij = a perceptron of h_i, j and the last few values above x_ij and to its left   (3)
  loss = -log2 p(x | c) per value:   exact, no bound and no noise                              (4)
  x_ij = the first value k with F_ij(k) >= Phi(z_ij),   F_ij the distribution function of (3)  (5)
  z_ij = Phi^-1(u),   u uniform between F_ij(x_ij - 1) and F_ij(x_ij)                          (6)

(1) is how texts are written; an image has 256 "words" (van den Oord et al. 2016, PixelCNN). (2) is
an image GPT (Chen et al. 2020) with a row as a token. What a pixel needs beyond the rows above is
close to it, so that (3) may be small. By (5) this, too, is a function of z ~ N(0, I) and a text,
and (6) is its inverse. Sampling keeps the keys and values of the rows above. It still needs one
evaluation of (3) for each value, one after the other: the other models draw all values at once.

  python -m bench.autoregressive --train
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from bench import runs
from vae import Text, load_data, words_of

UP, LEFT, RIGHT = 4, 8, 2  # the window of (3): so many rows above, and pixels on either side


def wide(x):
    """The widest floats that the device of x has: Apple's GPUs have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


class Layer(nn.Module):
    """A layer of a causal transformer. past holds the keys and values of the tokens before."""

    def __init__(self, width):
        super().__init__()
        self.head = math.gcd(width, 32)  # the width of each
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        layers = nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(*layers)

    def forward(self, h, past=None):
        qkv = self.qkv(self.norm1(h))                                          # (B, n, 3 E)
        q, k, v = rearrange(qkv, "b n (s m d) -> s b m n d", s=3, d=self.head)
        if past:
            k = torch.cat([past[0], k], 2)                                     # (B, heads, n, d)
            v = torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=not past)
        h = h + self.out(rearrange(y, "b m n d -> b n (m d)"))
        h = h + self.mlp(self.norm2(h))
        return h, (k, v)


class Autoregressive(nn.Module):
    """p(x | text) for images of a shape (C, H, W) and texts made of the words in a vocabulary. The
    values of a row are its pixels from left to right, each channel by channel."""

    def __init__(self, shape, vocabulary, width=192, hidden=160):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width, hidden=hidden)
        self.latent_shape, self.hidden = shape, hidden
        channels, side, _ = shape
        left, right = LEFT * channels, RIGHT * channels
        self.margin = left, right, UP, 0
        self.reach = left + 1 + right
        self.embed = Text(vocabulary, width)
        self.tokenize = self.embed.tokenize
        self.position = nn.Parameter(0.5 * torch.randn(side, width))
        self.read = nn.Linear(2 * side * channels, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(3))
        row = nn.Linear(width, side * channels * hidden)
        self.row = nn.Sequential(nn.LayerNorm(width), row)
        seen = torch.ones(UP + 1, self.reach, dtype=torch.bool)
        seen[UP, left:] = False
        seen = seen.flatten().nonzero()[:, 0]
        self.register_buffer("seen", seen, persistent=False)
        self.window = nn.Linear(2 * len(seen), hidden)
        layers = nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 256)
        self.out = nn.Sequential(*layers)

    def rows(self, x):
        """Images in [-1, 1] (B, C, H, W) -> (B, 2, H, W C): the values, and whether ink is."""
        values = rearrange(x, "b c h w -> b h (w c)")
        return torch.stack([values, (values > -1).float()], 1)

    def logits(self, window, h):
        """(3) for the values around a place, (B, 2, ..., UP + 1, reach), and h (B, ..., hidden)."""
        window = window.flatten(-2)[..., self.seen]
        window = window.movedim(1, -2).flatten(-2)
        return self.out(self.window(window) + h).float()                       # (B, ..., 256)

    def forward(self, x, c):
        """x (B, C, H, W) in [-1, 1], c (B, E) -> the logits of all values (B, H, W C, 256)."""
        rows = self.rows(x)
        above = F.pad(rows[:, :, :-1], (0, 0, 1, 0))
        above = rearrange(above, "b s h n -> b h (s n)")
        h = c[:, None] + self.position + self.read(above)                      # (B, H, E)
        for layer in self.layers:
            h, _ = layer(h)                                                    # (2)
        h = self.row(h).unflatten(2, (-1, self.hidden))                        # (B, H, W C, hidden)
        padded = F.pad(rows, self.margin)
        windows = padded.unfold(2, UP + 1, 1).unfold(3, self.reach, 1)
        return self.logits(windows, h)

    def log_prob(self, x, c):
        """The log of (1) for x (B, C, H, W) in [-1, 1] and c (B, E), (B,)."""
        k = (127.5 * (x + 1)).round().long()
        k = rearrange(k, "b c h w -> b h (w c)")
        logits = self(x, c).movedim(3, 1)
        nats = F.cross_entropy(logits, k, reduction="none")
        return -nats.sum((1, 2))

    def loss(self, x, c):
        """(4) for x (B, C, H, W) in [-1, 1] and c (B, E), in bits per value, and what is logged."""
        nats = -self.log_prob(x, c).mean()
        loss = nats / (x[0].numel() * math.log(2))
        return loss, {"loss": loss}

    @torch.no_grad()
    def sample(self, z, c):
        """z ~ N(0, I) (B, C, H, W), c (B, E) -> x in [-1, 1], value by value."""
        u = torch.special.ndtr(z.to(wide(z)))
        u = rearrange(u, "b c h w -> h (w c) b 1")
        padded = torch.zeros_like(F.pad(self.rows(z), self.margin))
        rows = padded[:, :, UP:, self.margin[0] :]  # a view, to be filled
        above = torch.zeros_like(self.rows(z)[:, :, 0])
        past = [None] * len(self.layers)
        for i, u_row in enumerate(u):
            h = c + self.position[i] + self.read(above.flatten(1))
            h = h[:, None]                                                     # (B, 1, E)
            for m, layer in enumerate(self.layers):
                h, past[m] = layer(h, past[m])                                 # (2)
            h = self.row(h).view(len(z), -1, self.hidden)
            for j, u_ij in enumerate(u_row):
                window = padded[:, :, i : i + UP + 1, j : j + self.reach]
                logits = self.logits(window, h[:, j])
                f = logits.to(wide(z)).softmax(1).cumsum(1)
                k = (f < u_ij).sum(1).clamp(max=255)                           # (5)
                value = k / 127.5 - 1
                rows[:, 0, i, j] = value
                rows[:, 1, i, j] = (value > -1).float()
            above = rows[:, :, i, : len(u_row)]
        x = rows[:, 0, :, : len(u_row)]
        return rearrange(x, "b h (w c) -> b c h w", c=z.shape[1])

    @torch.no_grad()
    def encode(self, x, c):
        """x (B, C, H, W) in [-1, 1], c (B, E) -> z (B, C, H, W), of which (5) makes x again."""
        k = (127.5 * (x + 1)).round().long()
        k = rearrange(k, "b c h w -> b h (w c) 1")
        logits = self(x, c).to(wide(x))
        f = logits.softmax(3).cumsum(3)
        f = F.pad(f, (1, 0))
        low, high = f.gather(3, k), f.gather(3, k + 1)
        u = torch.lerp(low, high, torch.rand_like(low))                        # (6)
        z = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)).float()
        return rearrange(z, "b h (w c) 1 -> b c h w", c=x.shape[1])


def load(run, device="cpu"):
    return runs.load(Autoregressive, run, device)


def train(args):
    """Trains up to update args.train_steps, from nothing or on from the last checkpoint."""
    x, captions = load_data(args.data)
    torch.manual_seed(args.seed)
    vocabulary = sorted(set().union(*map(words_of, captions)))
    sizes = {"shape": tuple(x.shape[1:]), "vocabulary": vocabulary, "width": args.width}
    new = {"script": "autoregressive", "args": sizes, "captions": captions, "update": 0}
    checkpoint = load(args.out)[1] if args.resume else new
    model = Autoregressive(**checkpoint["args"])

    def loss_of(images, ids, _):
        # hides some captions and some words, so that parts of a caption have a meaning too
        seen = torch.rand(len(ids), 1 + ids.shape[1], device=ids.device) > 0.03
        words = ids * seen[:, :1] * seen[:, 1:]
        return model.loss(images, model.embed(words))

    runs.train(args, model, checkpoint, x, captions, loss_of)


def sample(args):
    runs.draw(args, *load(args.out, args.device))


def main(argv=None):
    parser = runs.parser(out=Path("runs/autoregressive"), train_steps=1900, batch_size=32, lr=2e-3)
    parser.add_argument("--width", type=int, default=192, help="of the transformer")
    runs.start(parser, argv, train, sample)


if __name__ == "__main__":
    main()
