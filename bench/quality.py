"""Samples of any data with captions: do they obey their text, are they varied, are they copies?

  python diffusion.py --sample --images 500 --npz samples.npz
  python -m bench.quality samples.npz [MORE.npz ...] [--data FILE.npz]

prints one JSON line a file, after lines for held-out images, which a perfect model would equal, and
for training images replayed.

  obeyed     share of samples of which all is as asked, as bench/reader.py reads them; agreement: of
             each attribute by itself; obeyed_by_chance: for captions in another order
  fd         Frechet distance of the classifier's features to the training images'. It is no FID,
             whose features are Inception's
  precision, recall   Kynkaanniemi et al. 2019; density, coverage: Naeem et al. 2020; k = 5, against
             as many random training images as there are samples, so that for a perfect model
             precision and recall are near 0.95 and coverage near 0.97
  sharpness  mean absolute Laplacian over that of the training images; both sides of 1 are wrong
  grid       power at periods of 2 and 4 pixels over that beside: of real images, or it is a pattern
  nearest    median distance of a sample to its nearest training image, in pixels, over the same
             for held-out images; well under 1 are copies

Compare at equal n; for every figure but obeyed, draw for captions of training.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from sklearn.neighbors import NearestNeighbors

from bench.models import evenly, held_out
from bench.reader import Reader
from vae import load_data, words_of


def manifold_figures(real, fake, k=5):
    """precision, recall, density and coverage of fake features (M, F) against real ones (N, F)."""
    k = min(k, len(real) - 1, len(fake) - 1)
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}  # equal images: a distance of 0
    distance = torch.cdist(real, fake, **exact)
    # the first neighbour is the image itself
    real_radius = torch.cdist(real, real, **exact).kthvalue(k + 1).values
    fake_radius = torch.cdist(fake, fake, **exact).kthvalue(k + 1).values
    inside = (distance <= real_radius[:, None]).double()
    reached = (distance <= fake_radius).double()
    return {
        "precision": inside.amax(0).mean().item(),
        "recall": reached.amax(1).mean().item(),
        "density": inside.sum().item() / (k * len(fake)),
        "coverage": inside.amax(1).mean().item(),
    }


def frechet_distance(a, b):
    """Of the normals with the moments of features a (N, F) and b (M, F): Heusel et al. 2017."""
    roots, means, distance = [], [], 0
    for features in (a, b):
        features = np.asarray(features, float)
        covariance = np.cov(features, rowvar=False)
        values, vectors = np.linalg.eigh(covariance)
        roots.append(vectors * np.sqrt(values.clip(0)) @ vectors.T)
        means.append(features.mean(0))
        distance += np.trace(covariance)
    distance += ((means[0] - means[1]) ** 2).sum()
    # tr sqrt(AB) is the nuclear norm of sqrt(A) sqrt(B), also where A or B is singular
    return distance - 2 * np.linalg.norm(roots[0] @ roots[1], "nuc")


def sharpness(x):
    """Mean absolute Laplacian of images, uint8 (N, C, H, W)."""
    x = x.float().flatten(0, 1) / 255
    middle = x[:, 1:-1, 1:-1]
    beside = x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    above = x[:, :-2, 1:-1] + x[:, 2:, 1:-1]
    return (beside + above - 4 * middle).abs().mean().item()


def grid(x, period):
    """The power of images, uint8 (N, C, S, S), at a period along either axis, over that of the
    frequencies beside it. A decoder's strides make it larger than it is for real images."""
    x, at, power = x.double(), x.shape[2] // period, 0
    for axis in (2, 3):
        waves = torch.fft.rfft(x, dim=axis).abs()
        power = power + waves.square().mean((0, 1, 5 - axis))
    beside = [power[i] for i in (at - 1, at + 1) if i < len(power)]
    return (power[at] / torch.stack(beside).mean()).item()


class Judge:
    """What samples are held against: real images, and a classifier trained on them."""

    def __init__(self, path=None, steps=None, batch_size=128):
        self.x, captions = load_data(path)
        self.captions = [" ".join(words_of(caption)) for caption in captions]
        self.x_test, self.captions_test = held_out(path)
        self.reader = Reader(self.x, self.captions, steps, batch_size)
        if path is None:
            every = torch.cat([self.x, self.x_test])
            self.reader.fit_digits(every, self.captions + self.captions_test)
        self.features = self.reader.features(self.x)
        self.sharpness = sharpness(self.x)
        search = NearestNeighbors(n_neighbors=1, algorithm="brute")
        self.nearest = search.fit(self.x.flatten(1).numpy() / 255)
        self.held_out = self.distance(self.x_test)

    def distance(self, x):
        """Median distance in pixels to the nearest training image."""
        distance, _ = self.nearest.kneighbors(x.flatten(1).numpy() / 255)
        return float(np.median(distance))

    def obedience(self, x, captions):
        """The share of images of which all is as asked, None where no training caption says what is
        asked; the share for each attribute; and the first for shuffled captions."""
        features, found = self.reader.features(x), []
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        for texts in (captions, [captions[i] for i in order]):
            read = self.reader.read(x, features, texts)
            asked = {name: right for name, right in read.items() if not right.isnan().all()}
            agreement = {name: right.nanmean().item() for name, right in asked.items()}
            share = None
            if asked:
                wrong = torch.stack([right == 0 for right in asked.values()])
                share = 1 - wrong.any(0).float().mean().item()
            found.append((share, agreement))
        (obeyed, agreement), (by_chance, _) = found
        return {"obeyed": obeyed, "agreement": agreement, "obeyed_by_chance": by_chance}

    def likeness(self, x):
        """The figures beside the training images of images x, uint8 (N, C, H, W)."""
        features = self.reader.features(x)
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0))
        return {
            "n": len(x),
            "fd": float(frechet_distance(self.features, features)),
            **manifold_figures(self.features[order[: len(x)]], features),
            "sharpness": sharpness(x) / self.sharpness,
            "grid": [grid(x, 2), grid(x, 4)],
            "nearest": self.distance(x) / self.held_out if self.held_out else None,
        }

    def measure(self, x, captions):
        """All figures of images drawn for captions."""
        return {**self.obedience(x, captions), **self.likeness(x)}

    def baselines(self, n):
        """Real images beside which samples stand: name -> images, captions."""
        real = evenly(min(n, len(self.x_test)), len(self.x_test))
        replay = evenly(n, len(self.x))
        return {
            "real, held out": (self.x_test[real], [self.captions_test[i] for i in real]),
            "training images replayed": (self.x[replay], [self.captions[i] for i in replay]),
        }


def read_samples(path):
    """x, uint8 (N, C, H, W), and captions of an .npz that --sample --npz wrote."""
    with np.load(path) as npz:
        x, y = torch.from_numpy(npz["x"]), npz["y"]
    x = rearrange(x, "n h w ... -> n (...) h w")
    if x.dtype != torch.uint8 or len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{path}: take two or more uint8 images, and as many texts")
    return x, [" ".join(words_of(str(text))) for text in y]


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("files", nargs="+", type=Path, help=".npz files that --sample --npz wrote")
    parser.add_argument("--data", help="the .npz they were trained on [built-in digits]")
    args = parser.parse_args(argv)
    sets = {str(path): read_samples(path) for path in args.files}
    judge = Judge(args.data)
    for name, (x, captions) in (judge.baselines(500) | sets).items():
        print(json.dumps({"images": name, **judge.measure(x, captions)}), flush=True)


if __name__ == "__main__":
    main()
