"""Two data files made of the built-in digits: StackedMNIST (Metz et al. 2017) and unseen captions.

  python -m bench.datasets stacked stacked.npz     three random digits as red, green and blue, no
                                                   caption: how many of the 1,000 modes are found?
  python gan.py --train --data stacked.npz --out runs/stacked
  python gan.py --sample --out runs/stacked --images 26000 --npz samples.npz
  python -m bench.datasets modes samples.npz ...   modes found, and the KL to the uniform in nats,
                                                   also into bench/results/stacked.json

  python -m bench.datasets unseen unseen.npz       without the training images of three captions:
                                                   are texts obeyed that were never seen together?
  python -m bench --data unseen.npz --out bench/results/unseen
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from bench import report
from bench.pack import save
from bench.quality import Judge, read_samples
from bench.reader import DIGITS
from vae import captioned_digits, load_data

UNSEEN = ("bold slanted two", "thin upright five", "bold upright eight")


def stacked(n=20_000):
    """n colour images of three training digits, without captions."""
    x, _ = load_data()
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(x), (n, 3), generator=generator)
    images = rearrange(x[pick], "n colour 1 h w -> n h w colour")
    return {"x": images.numpy(), "y": np.full(n, "")}


def unseen():
    """The built-in data, of which all images of the captions in UNSEEN alone are held out."""
    data = captioned_digits()
    out = np.isin(data["y"], UNSEEN)
    kept = {name: values[~out] for name, values in data.items()}
    return kept | {f"{name}_test": values[out] for name, values in data.items()}


def modes(reader, x):
    """Modes found of 1,000, and the KL of the samples' modes to the uniform in nats, for images
    x, uint8 (N, 3, 28, 28), each channel read by the classifier of digits."""
    digits = torch.tensor([DIGITS.index(name) for name in reader.values[2]])
    mode = 0
    for channel in x.split(1, 1):
        _, _, read = reader.classify(reader.features(channel))
        mode = 10 * mode + digits[read]
    p = torch.bincount(mode, minlength=1000).double() / len(x)
    kl = torch.special.xlogy(p, p).sum() + math.log(1000)
    return {"n": len(x), "modes": int((p > 0).sum()), "kl": kl.item()}


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("stacked", "unseen", "modes"))
    parser.add_argument("file", type=Path, nargs="+", help=".npz to write, or of samples to read")
    args = parser.parse_args(argv)
    if args.what == "modes":
        sets = {path.stem: read_samples(path)[0] for path in args.file}
        if any(x.shape[1:] != (3, 28, 28) for x in sets.values()):
            raise SystemExit("take 28x28 images in colour")
        path, reader = report.RESULTS / "stacked.json", Judge().reader
        result = {**report.environment(), "rows": report.read(path).get("rows", {})}
        for name, x in sets.items():
            result["rows"][name] = modes(reader, x)
            print(json.dumps({name: result["rows"][name]}))
        report.write(path, result)
        return
    (path,) = args.file
    if path.exists() or path.suffix != ".npz":
        raise SystemExit(f"{path} exists already, or does not end in .npz")
    save(path, stacked() if args.what == "stacked" else unseen())
    print(path)


if __name__ == "__main__":
    main()
