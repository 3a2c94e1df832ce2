"""Two data files made of the built-in digits, each for one question.

  python -m bench.datasets stacked stacked.npz     three random digits as red, green and blue, no
                                                   caption: how many of the 1,000 modes are found?
  python gan.py --train --data stacked.npz --out runs/stacked
  python gan.py --sample --out runs/stacked --images 26000 --npz samples.npz
  python -m bench.datasets modes samples.npz       modes found, and the KL to the uniform in nats;
                                                   26,000 perfect samples have 1,000 and 0.019

  python -m bench.datasets unseen unseen.npz       without the training images of three captions:
                                                   are texts obeyed that were never seen together?
  python diffusion.py --train --data unseen.npz --out runs/unseen
  python diffusion.py --sample --out runs/unseen --images 300 --npz samples.npz
      --caption "bold slanted two" --caption "thin upright five" --caption "bold upright eight"
  python -m bench.quality samples.npz

StackedMNIST as in Metz et al. 2017, of the 4,500 training images.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from bench.models import held_out
from bench.pack import save
from bench.quality import Judge, read_samples
from bench.reader import DIGITS
from vae import load_data

UNSEEN = ("bold slanted two", "thin upright five", "bold upright eight")


def stacked(n=20_000):
    """n colour images of three training digits, without captions."""
    x, _ = load_data()
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(x), (n, 3), generator=generator)
    images = rearrange(x[pick], "n colour 1 h w -> n h w colour")
    return {"x": images.numpy(), "y": np.full(n, "")}


def unseen():
    """The built-in data; of the captions in UNSEEN, the held-out images alone."""
    x, captions = load_data()
    x_test, captions_test = held_out()
    captions = np.array(captions)
    kept = ~np.isin(captions, UNSEEN)
    return {
        "x": x[:, 0].numpy()[kept],
        "y": captions[kept],
        "x_test": x_test[:, 0].numpy(),
        "y_test": np.array(captions_test),
    }


def modes(reader, x):
    """Modes found of 1,000, and the KL of the samples' modes to the uniform in nats, for images
    x, uint8 (N, 3, 28, 28), each channel read by the classifier of digits."""
    names = list(reader.values[2])
    digits = torch.tensor([DIGITS.index(name) for name in names])
    mode = 0
    for channel in x.split(1, 1):
        _, _, read = reader.classify(reader.features(channel))
        mode = 10 * mode + digits[read]
    p = torch.bincount(mode, minlength=1000).double() / len(x)
    kl = torch.special.xlogy(p, p).sum().item() + math.log(1000)
    return {"n": len(x), "modes": int((p > 0).sum()), "kl": kl}


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("stacked", "unseen", "modes"))
    parser.add_argument("file", type=Path, help="the .npz to write, or of samples to read")
    args = parser.parse_args(argv)
    if args.what == "modes":
        x, _ = read_samples(args.file)
        if x.shape[1:] != (3, 28, 28):
            raise SystemExit(f"{args.file}: take 28x28 images in colour")
        print(json.dumps(modes(Judge().reader, x)))
        return
    if args.file.exists() or args.file.suffix != ".npz":
        raise SystemExit(f"{args.file} exists already, or does not end in .npz")
    save(args.file, stacked() if args.what == "stacked" else unseen())
    print(args.file)


if __name__ == "__main__":
    main()
