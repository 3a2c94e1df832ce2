"""Two data files made of the built-in digits, each for one question, which `python -m bench` asks
of its models. By hand:

  python -m bench.datasets stacked stacked.npz     three random digits as red, green and blue, no
                                                   caption: how many of the 1,000 modes are found?
  python gan.py --train --data stacked.npz --out runs/stacked
  python gan.py --sample --out runs/stacked --n 26000 --npz samples.npz
  python -m bench.datasets modes samples.npz       modes found, and the KL to the uniform in nats;
                                                   26,000 perfect samples have 1,000 and 0.019

  python -m bench.datasets unseen unseen.npz       without the training images of three captions:
                                                   are texts obeyed that were never seen together?
  python diffusion.py --train --data unseen.npz --out runs/unseen
  python diffusion.py --sample --out runs/unseen --n 300 --npz samples.npz --caption "bold slanted
      two" --caption "thin upright five" --caption "bold upright eight"
  python -m bench.quality samples.npz

StackedMNIST as in Metz et al. 2017, of the 4,500 training images.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

import prior
from bench.pack import save
from bench.quality import Judge, read_samples
from diffusion import DIGITS, load_data

UNSEEN = ("bold slanted two", "thin upright five", "bold upright eight")


def stacked(n=20_000):
    """n colour images of three training digits, without captions."""
    x, _, _, _ = load_data("")
    pick = (prior.uniform(torch.arange(n), (3,)) * len(x)).long()
    return {"x": x[pick, 0].permute(0, 2, 3, 1).numpy(), "y": np.full(n, "")}


def unseen():
    """The built-in data; of the captions in UNSEEN, the held-out images alone."""
    x, captions, x_test, captions_test = load_data("")
    kept = [i for i, caption in enumerate(captions) if caption not in UNSEEN]
    return {
        "x": x[kept, 0].numpy(), "y": np.array(captions)[kept],
        "x_test": x_test[:, 0].numpy(), "y_test": np.array(captions_test),
    }  # fmt: skip


def modes(judge, x):
    """Modes found of 1,000, and the KL of the samples' modes to the uniform in nats, for images
    x, uint8 (N, 3, 28, 28), each channel read by the judge's classifier."""
    sizes = [len(values) for values in judge.values]
    names = sorted(DIGITS)  # the order of the classifier's classes
    digit = torch.tensor([DIGITS.index(name) for name in names])
    mode = 0
    for channel in x.split(1, 1):
        logits = judge.classifier.out(judge.embed(channel)).split(sizes, 1)[2]
        mode = 10 * mode + digit[logits.argmax(1)]
    p = torch.bincount(mode, minlength=1000).double() / len(x)
    kl = torch.special.xlogy(p, p).sum().item() + math.log(1000)
    return {"n": len(x), "modes": int((p > 0).sum()), "kl": kl}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("stacked", "unseen", "modes"))
    parser.add_argument("file", help="the .npz to write, or of samples to read")
    args = parser.parse_args(argv)
    if args.what == "modes":
        x, _ = read_samples(args.file)
        if x.shape[1:] != (3, 28, 28):
            parser.exit(2, f"bench.datasets: error: {args.file}: take 28x28 images in colour\n")
        print(json.dumps(modes(Judge(), x)))
        return
    save(Path(args.file), stacked() if args.what == "stacked" else unseen())
    print(args.file)


if __name__ == "__main__":
    main()
