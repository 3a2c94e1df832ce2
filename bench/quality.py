"""Samples of any data with captions: do they obey their text, are they varied, are they copies?

  python diffusion.py --sample --n 500 --npz samples.npz
  python -m bench.quality samples.npz [MORE.npz ...] [--data FILE.npz] [--out FILE.json]

prints one JSON line a file, after one for the held-out images, what a perfect model would reach,
and two baselines that must fail: training images replayed (in nearest), one image a caption (in
diversity).

  agreement  share of samples read as asked, for each attribute, that is place in the caption where
             all captions have as many words, else for the caption as a whole; beside it, shuffled:
             the same for captions in another order. Read by a classifier trained on the training
             images alone, weight and slant of the built-in digits by the captions' own formulas
  FLD        Frechet distance of the classifier's features to the training images' (FID has other
             features: never compare the two)
  precision, recall   Kynkaanniemi et al. 2019; density, coverage: Naeem et al. 2020; k = 5, against
             all training images or, of more than 5,000, every so manyth
  sharpness  mean absolute Laplacian over that of the training images; both sides of 1 are wrong
  nearest    median distance of a sample to its nearest training image, in pixels, over the same
             for held-out images; well under 1 are copies
  diversity  mean distance of two samples of one caption, in features, over the training images'

All depend on the number of samples: compare at equal n.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from torch import nn

import prior
from bench import models
from bench.report import environment, write
from diffusion import DIGITS, digit_attributes, load_data

K, REFERENCES = 5, 5000


class Classifier(nn.Module):
    """Images in [0, 1], (B, C, H, W) -> logits of all attributes side by side."""

    def __init__(self, shape, n):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * (shape[1] // 4) * (shape[2] // 4), 128), nn.ReLU(),
        )  # fmt: skip
        self.out = nn.Linear(128, n)

    def forward(self, x):
        return self.out(self.features(x))


def attributes(captions, n=None):
    """Captions -> a list of columns, each the value of one attribute in each caption; n: of how
    many words, if captions had n in training."""
    rows = [caption.split() for caption in captions]
    lengths = {len(row) for row in rows}
    n = n or (lengths.pop() if len(lengths) == 1 else 1)
    if n < 2:
        return [list(captions)]
    return [[row[i] if len(row) == n else "" for row in rows] for i in range(n)]


def neighbours(reference, queries, k):
    """Distances of each query to its k nearest references, ascending: (N, k)."""
    return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(reference).kneighbors(queries)[0]


def manifold_figures(real, fake, k=K):
    """precision, recall, density and coverage of fake features (M, F) against real ones (N, F)."""
    k = min(k, len(real) - 1, len(fake) - 1)
    distance = torch.cdist(torch.as_tensor(real), torch.as_tensor(fake)).numpy()
    # the first neighbour is the image itself
    real_radius, fake_radius = (neighbours(a, a, k + 1)[:, k] for a in (real, fake))
    inside = distance < real_radius[:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (distance < fake_radius).any(1).mean(),
        "density": inside.sum() / (k * len(fake)),
        "coverage": inside.any(1).mean(),
    }


def frechet_distance(a, b):
    """Of the normals with the moments of features a (N, F) and b (M, F): Heusel et al. 2017."""
    a, b = (np.asarray(v, float) for v in (a, b))
    roots, distance = [], ((a.mean(0) - b.mean(0)) ** 2).sum()
    for covariance in (np.cov(a, rowvar=False), np.cov(b, rowvar=False)):
        values, vectors = np.linalg.eigh(covariance)
        roots.append(vectors * np.sqrt(values.clip(0)) @ vectors.T)
        distance += np.trace(covariance)
    # tr sqrt(AB) is the nuclear norm of sqrt(A) sqrt(B), also where A or B is singular
    return distance - 2 * np.linalg.norm(roots[0] @ roots[1], "nuc")


def sharpness(x):
    """Mean absolute Laplacian of images, uint8 (N, C, H, W)."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return F.conv2d(x.float().flatten(0, 1)[:, None] / 255, kernel).abs().mean().item()


def diversity(features, captions):
    """Mean distance between two images of one caption, over captions with two or more."""
    groups = {}
    for i, caption in enumerate(captions):
        groups.setdefault(caption, []).append(i)
    distances = [torch.pdist(features[rows]) for rows in groups.values() if len(rows) > 1]
    return torch.cat(distances).mean().item() if distances else 0.0


class Judge:
    """What samples are held against: real images, and a classifier trained on them."""

    def __init__(self, path="", steps=None, batch_size=128):
        self.x, self.captions, self.x_test, self.captions_test = load_data(path)
        steps = steps or min(max(len(self.x) // 20, 800), 4000)
        self.digits = not path  # the built-in ones: attributes by formula
        columns = attributes(self.captions)
        self.values = [{v: i for i, v in enumerate(sorted(set(column)))} for column in columns]
        torch.manual_seed(0)
        self.classifier = Classifier(self.x.shape[1:], sum(map(len, self.values)))
        optimizer = torch.optim.AdamW(self.classifier.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        size, labels = self.x.shape[2], self.labels(self.captions)
        padded = F.pad(self.x, (2, 2, 2, 2))
        for k in range(steps):
            seeds = prior.fold_in(prior.fold_in(0, k), torch.arange(batch_size))
            i = (prior.uniform(seeds, ()) * len(self.x)).long()
            down, right = (prior.uniform(seeds[:1], (2,), 1)[0] * 5).long().tolist()
            x = padded[i, :, down : down + size, right : right + size] / 255
            parts = self.classifier(x).split([len(values) for values in self.values], 1)
            losses = [
                F.cross_entropy(part, column[i], label_smoothing=0.1)
                for part, column in zip(parts, labels)
            ]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
            schedule.step()
        self.classifier.eval().requires_grad_(False)
        self.features, self.sharpness = self.embed(self.x), sharpness(self.x)
        stride = -(-len(self.x) // REFERENCES)
        self.references = self.features[::stride].numpy()
        self.diversity = diversity(self.features[::stride], self.captions[::stride])
        if self.digits:
            every = torch.cat([self.x, self.x_test])
            digit = np.array([c.split()[2] for c in self.captions + self.captions_test])
            both = digit_attributes(every[:, 0].numpy() / 255)
            self.thresholds = {n: [np.median(a[digit == n]) for a in both] for n in DIGITS}
        pixels = self.x.flatten(1).numpy() / 255
        self.nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(pixels)
        self.held_out = self.distance(self.x_test)

    def labels(self, captions):
        """The class of each attribute: int64 (N,) each, -1 where no training caption had it."""
        return [
            torch.tensor([values.get(v, -1) for v in column])
            for values, column in zip(self.values, attributes(captions, len(self.values)))
        ]

    def embed(self, x):
        """Features of uint8 images: (N, 128)."""
        return torch.cat([self.classifier.features(part / 255) for part in x.split(500)])

    def distance(self, x):
        """Median distance in pixels to the nearest training image."""
        return float(np.median(self.nearest.kneighbors(x.flatten(1).numpy() / 255)[0]))

    def read(self, x, features, captions):
        """Is each attribute read as asked? 1 or 0, (N,) for each, under its name; NaN where the
        caption does not ask for it."""
        parts = self.classifier.out(features).split([len(values) for values in self.values], 1)
        if not self.digits:
            asked = self.labels(captions)
            right = [(part.argmax(1) == label).float() for part, label in zip(parts, asked)]
            names = ["text"] if len(right) == 1 else [f"word {i + 1}" for i in range(len(right))]
            return dict(zip(names, right))
        figures = {name: torch.full((len(x),), torch.nan) for name in ("digit", "weight", "slant")}
        digits, attributes = parts[2].argmax(1), digit_attributes(x[:, 0].numpy() / 255)
        for i, caption in enumerate(captions):
            words = caption.split()
            for digit in set(DIGITS) & set(words):
                figures["digit"][i] = float(digits[i] == self.values[2][digit])
                for j, (name, over, under) in enumerate(
                    (("weight", "bold", "thin"), ("slant", "slanted", "upright"))
                ):
                    is_over = attributes[j][i] > self.thresholds[digit][j]
                    if over in words or under in words:
                        figures[name][i] = float(is_over == (over in words))
        return figures

    def measure(self, x, captions):
        """The figures above for images x, uint8 (N, C, H, W), drawn for captions."""
        features = self.embed(x)
        order = prior.uniform(torch.tensor([0]), (len(x),))[0].argsort().tolist()
        shuffled = self.read(x, features, [captions[i] for i in order])
        figures = {
            "n": len(x),
            "agreement": self.read(x, features, captions),
            "shuffled": shuffled,
            "fld": frechet_distance(self.features, features),
            **manifold_figures(self.references, features.numpy()),
            "sharpness": sharpness(x) / self.sharpness,
            "nearest": self.distance(x) / self.held_out,
            "diversity": diversity(features, captions) / self.diversity,
        }
        for name in ("agreement", "shuffled"):
            means = {key: right.nanmean().item() for key, right in figures[name].items()}
            figures[name] = {key: mean for key, mean in means.items() if mean == mean}
        return {k: v if isinstance(v, (int, dict)) else float(v) for k, v in figures.items()}

    def baselines(self, n):
        """What real images are, and two ways to fail: name -> images, captions."""
        one = {caption: i for i, caption in enumerate(self.captions)}
        captions = models.cycle(self.captions_test, n)
        captions = [caption if caption in one else self.captions[0] for caption in captions]
        replay = torch.arange(n) * len(self.x) // n
        return {
            "real, held out": (self.x_test[:n], self.captions_test[:n]),
            "training images replayed": (self.x[replay], [self.captions[i] for i in replay]),
            "one image a caption": (self.x[[one[caption] for caption in captions]], captions),
        }


def read_samples(path):
    """x, uint8 (N, C, H, W), and captions of an .npz that --sample --npz wrote; else one line on
    stderr and exit code 2."""
    try:
        with np.load(path, allow_pickle=False) as npz:
            x, y = npz["x"], npz["y"]
        x = torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2)
    except Exception as error:
        print(f"bench: error: {path} holds no samples: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return x, [" ".join(str(text).lower().split()) for text in y]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help=".npz files that --sample --npz wrote")
    parser.add_argument(
        "--data", default="", help="the .npz they were trained on [built-in digits]"
    )
    parser.add_argument("--out", type=Path, help="also write the figures, and where they are from")
    args = parser.parse_args(argv)
    sets = {}
    for path in args.files:
        sets[str(path)] = read_samples(path)
    if args.out and not args.out.parent.is_dir():
        parser.exit(2, f"bench.quality: error: --out {args.out}: there is no such folder\n")
    judge, rows = Judge(args.data), {}
    for name, (x, _) in sets.items():
        if x.shape[1:] != judge.x.shape[1:] or len(x) < 2:
            parser.exit(2, f"bench.quality: error: {name}: take 2 or more images like the data's\n")
    for name, (x, captions) in (judge.baselines(500) | sets).items():
        rows[name] = judge.measure(x, captions)
        print(json.dumps({"images": name, **rows[name]}), flush=True)
    if args.out:
        write(args.out, {**environment(), "rows": rows})


if __name__ == "__main__":
    main()
