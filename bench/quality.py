"""Samples of the built-in digits: do they obey their text, are they varied, are they copies?

  python diffusion.py --sample --n 2000 --npz samples.npz
  python -m bench.quality samples.npz [MORE.npz ...] [--out FILE.json]

prints one JSON line a file, after two for real images: the held-out ones, and 2,000 training images
against the other 2,500, what a perfect model of as many samples would reach. The figures:

  digit, weight, slant   share of samples read as asked: the digit by a classifier trained on the
                         training images alone, the other two by the captions' own formulas
  coverage, density      Naeem et al. 2020, k = 5, against the training images, in the classifier's
                         features: how many real images have a sample near, and the converse
  nearest                median distance of a sample to its nearest training image, as a multiple of
                         the same for held-out images; well under 1 are copies
"""

import argparse
import json
import os
import platform
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from torch import nn

import prior
from diffusion import DIGITS, digit_attributes, load_data


class Classifier(nn.Module):
    """A small convolutional network: images in [0, 1], (B, 1, 28, 28) -> logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(),
        )  # fmt: skip
        self.out = nn.Linear(128, 10)

    def forward(self, x):
        return self.out(self.features(x))


def train_classifier(x, digits, steps=800, batch_size=128):
    """A classifier of the images x, uint8 (N, 1, 28, 28), trained with shifts of up to 2 pixels."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    padded = F.pad(x.float() / 255, (2, 2, 2, 2))
    for k in range(steps):
        seeds = prior.fold_in(prior.fold_in(0, k), torch.arange(batch_size))
        index = (prior.uniform(seeds, ()) * len(x)).long()
        down, right = (prior.uniform(seeds[:1], (2,), 1)[0] * 5).long().tolist()
        logits = model(padded[index, :, down : down + 28, right : right + 28])
        loss = F.cross_entropy(logits, digits[index], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def neighbours(reference, queries, k):
    """Distances of each query to its k nearest references, ascending: (N, k)."""
    return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(reference).kneighbors(queries)[0]


def density_and_coverage(real, fake, k=5):
    """Of fake features (M, F) against real ones (N, F): Naeem et al. 2020."""
    radius = neighbours(real, real, k + 1)[:, k]  # the first neighbour is the image itself
    inside = torch.cdist(torch.as_tensor(real), torch.as_tensor(fake)).numpy() < radius[:, None]
    return inside.sum() / (k * len(fake)), inside.any(1).mean()


def digits_of(captions):
    """The digit that each caption names: int64 (N,)."""
    return torch.tensor([DIGITS.index(caption.split()[2]) for caption in captions])


def medians(x, digits):
    """Each digit's median ink and slant over all its images: the captions' thresholds."""
    ink, slant = digit_attributes(x[:, 0].numpy() / 255)
    by_digit = [digits.numpy() == d for d in range(10)]
    return [np.array([np.median(a[mask]) for mask in by_digit]) for a in (ink, slant)]


@torch.no_grad()
def measure(classifier, thresholds, x_train, x_test, x, captions):
    """The figures above for images x, uint8 (N, 1, 28, 28), drawn for captions."""
    asked = [caption.split() for caption in captions]
    digits = digits_of(captions).numpy()
    ink, slant = digit_attributes(x[:, 0].numpy() / 255)
    bold = np.array([words[0] == "bold" for words in asked])
    slanted = np.array([words[1] == "slanted" for words in asked])
    read = classifier(x.float() / 255).argmax(1).numpy()
    real, fake = (classifier.features(a.float() / 255).numpy() for a in (x_train, x))
    density, coverage = density_and_coverage(real, fake)
    pixels_train, pixels_test, pixels = (a.flatten(1).numpy() / 255 for a in (x_train, x_test, x))
    held_out = np.median(neighbours(pixels_train, pixels_test, 1))
    return {
        "n": len(x),
        "digit": float((read == digits).mean()),
        "weight": float(((ink > thresholds[0][digits]) == bold).mean()),
        "slant": float(((slant > thresholds[1][digits]) == slanted).mean()),
        "coverage": float(coverage),
        "density": float(density),
        "nearest": float(np.median(neighbours(pixels_train, pixels, 1)) / held_out),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help=".npz files that --sample --npz wrote")
    parser.add_argument("--out", type=Path, help="also write the figures, and where they are from")
    args = parser.parse_args(argv)
    for path in args.files:
        if not path.exists():
            parser.exit(2, f"bench.quality: error: there is no file {path}\n")
    x, captions, x_test, captions_test = load_data("")
    digits = digits_of(captions)
    thresholds = medians(torch.cat([x, x_test]), torch.cat([digits, digits_of(captions_test)]))
    classifier = train_classifier(x, digits)
    order = torch.arange(len(x)) % 9
    some, rest = order < 4, order >= 4
    texts = [caption for caption, taken in zip(captions, some) if taken]
    sets = [("real, held out", x, x_test, captions_test), ("real, 2,000", x[rest], x[some], texts)]
    for path in args.files:
        with np.load(path, allow_pickle=False) as npz:
            samples = torch.from_numpy(npz["x"]).permute(0, 3, 1, 2)
            sets.append((path.stem, x, samples, npz["y"].tolist()))
    rows = []
    for name, reference, samples, texts in sets:
        figures = measure(classifier, thresholds, reference, x_test, samples, texts)
        rows.append({"images": name, **figures})
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        where = f"{os.cpu_count()} cores of {platform.machine()}, torch {torch.__version__}"
        args.out.write_text(json.dumps({"where": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
