"""Makes data files: of the built-in digits, and of emoji.

  python -m bench.datasets stacked stacked.npz
      StackedMNIST (Metz et al. 2017): three random digits as red, green and blue, no caption
  python -m bench.datasets modes samples.npz ...
      how many of the 1,000 modes 26,000 samples have, and the KL to the uniform in nats; also into
      bench/results/stacked.json
  python -m bench.datasets bound bound.npz
      the same with captions, "three five seven" for a red three, a green five and a blue seven: is
      each word bound to its place? A tenth of the 1,000 captions is left out of training
  python -m bench.datasets obeyed samples.npz ...
      how many samples have all three digits as asked, and each of them, for captions of training
      and for others; also into bench/results/bound.json
  npm pack emoji-datasource
  python -m bench.datasets emoji emoji-datasource-*.tgz emoji.npz [--vendors google twitter]
      coloured pictures of 32 x 32 and their names; held out: a tenth of those with a skin tone

Google's pictures are under the Apache License 2.0, Twitter's under CC BY 4.0; those of apple and
facebook are their owners' and not to be published.
"""

import argparse
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from bench import files, report
from bench.models import held_out
from bench.pack import save
from bench.quality import Judge, read_samples
from bench.reader import DIGITS
from vae import load_data, words_of

TONES = {
    "1F3FB": "light skin",
    "1F3FC": "medium light skin",
    "1F3FD": "medium skin",
    "1F3FE": "medium dark skin",
    "1F3FF": "dark skin",
}


def triples(x, captions, n, seed):
    """n colour images of three digits of x, uint8 (N, 1, 28, 28), and their names in order."""
    pick = np.random.default_rng(seed).integers(len(x), size=(n, 3))
    images = rearrange(x[torch.from_numpy(pick)], "n colour 1 h w -> n h w colour")
    names = np.array([caption.split()[2] for caption in captions])[pick]
    return images.numpy(), np.array([" ".join(row) for row in names])


def stacked(n=20_000):
    """n colour images of three training digits, without captions."""
    x, _ = triples(*load_data(), n, 0)
    return {"x": x, "y": np.full(n, "")}


def left_out():
    """The 100 captions of three digits that are left out of training."""
    every = [f"{a} {b} {c}" for a in DIGITS for b in DIGITS for c in DIGITS]
    return np.random.default_rng(0).permutation(every)[:100]


def bound(n=20_000):
    """n captioned colour images of three training digits, and 1,000 of held-out digits, under the
    captions that are left out of training."""
    x, y = triples(*load_data(), n * 10 // 8, 0)
    seen = np.flatnonzero(~np.isin(y, left_out()))[:n]
    x_test, y_test = triples(*held_out(), 20_000, 1)
    unseen = np.flatnonzero(np.isin(y_test, left_out()))[:1000]
    train = {"x": x[seen], "y": y[seen]}
    return train | {"x_test": x_test[unseen], "y_test": y_test[unseen]}


def read_package(package, vendors):
    """What a package says of its emoji, and each vendor's sheet of pictures on white (H, W, 3)."""
    sheets = {}
    with tarfile.open(package) as tar:
        entries = json.load(tar.extractfile("package/emoji.json"))
        for vendor in vendors:
            file = tar.extractfile(f"package/img/{vendor}/sheets/32.png")
            picture = Image.open(io.BytesIO(file.read())).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            whole = Image.alpha_composite(white, picture).convert("RGB")
            sheets[vendor] = np.asarray(whole)
    return entries, sheets


def forms(entry):
    """Of an emoji: captions and what the package says of the picture, for each skin tone too."""
    name = " ".join(words_of(entry["name"]))
    yield name, entry
    for code, variation in entry.get("skin_variations", {}).items():
        tones = " and ".join(TONES[tone] for tone in code.split("-"))
        yield f"{name} {tones}", variation


def emoji(package, vendors):
    """Pictures of all vendors with their captions, a tenth of the captions with a tone held out."""
    x, y = [], []
    entries, sheets = read_package(package, vendors)
    for vendor, sheet in sheets.items():
        for caption, form in (pair for entry in entries for pair in forms(entry)):
            if form.get(f"has_img_{vendor}"):
                top, left = 34 * form["sheet_y"] + 1, 34 * form["sheet_x"] + 1  # with a margin
                x.append(sheet[top : top + 32, left : left + 32])
                y.append(caption)
    x, y = np.stack(x), np.array(y)
    toned = sorted({caption for caption in y.tolist() if caption.endswith(" skin")})
    chosen = np.random.default_rng(0).permutation(toned)[: len(toned) // 10]
    out = np.isin(y, chosen)
    return {"x": x[~out], "y": y[~out], "x_test": x[out], "y_test": y[out]}


def read_digits(reader, x):
    """Names of the digits in the channels of x, uint8 (N, 3, 28, 28): a list of three (N,)."""
    names, columns = np.array(list(reader.values[2])), []
    for channel in x.split(1, 1):
        _, _, read = reader.classify(reader.features(channel))
        columns.append(names[read.numpy()])
    return columns


def modes(reader, x, _):
    """Modes found of 1,000, and the KL of the samples' modes to the uniform in nats."""
    mode = 0
    for column in read_digits(reader, x):
        mode = 10 * mode + torch.tensor([DIGITS.index(name) for name in column])
    p = torch.bincount(mode, minlength=1000).double() / len(x)
    kl = torch.special.xlogy(p, p).sum() + math.log(1000)
    return {"n": len(x), "modes": int((p > 0).sum()), "kl": kl.item()}


def obeyed(reader, x, captions):
    """Shares of samples whose red, green, blue digit is as asked, and of those with all three."""
    asked = np.array([caption.split() for caption in captions])
    right = np.stack(read_digits(reader, x), 1) == asked
    unseen, result = np.isin(captions, left_out()), {}
    for part, chosen in (("seen", ~unseen), ("unseen", unseen)):
        if chosen.any():
            shares = dict(zip(("red", "green", "blue"), right[chosen].mean(0).tolist()))
            all_three = float(right[chosen].all(1).mean())
            result[part] = {"n": int(chosen.sum()), "all three": all_three, **shares}
    return result


def measure(paths, name, function):
    """A row of results for each file of samples, also into bench/results/NAME.json."""
    sets = {path.stem: read_samples(path) for path in paths}
    if any(x.shape[1:] != (3, 28, 28) for x, _ in sets.values()):
        raise SystemExit("take 28x28 images in colour")
    path, reader = report.RESULTS / f"{name}.json", Judge().reader
    result = {**files.environment(), "rows": files.read(path).get("rows", {})}
    for stem, (x, captions) in sets.items():
        result["rows"][stem] = function(reader, x, captions)
        print(json.dumps({stem: result["rows"][stem]}))
    files.write(path, result)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices="stacked bound emoji modes obeyed".split())
    parser.add_argument("files", type=Path, nargs="+", help=".npz to write, or of samples to read")
    parser.add_argument("--vendors", nargs="+", default=["google", "twitter"])
    args = parser.parse_args(argv)
    if args.what == "modes":
        return measure(args.files, "stacked", modes)
    if args.what == "obeyed":
        return measure(args.files, "bound", obeyed)
    *packages, path = args.files
    if bool(packages) != (args.what == "emoji"):
        parser.error("emoji takes a package and a file to write, others a file")
    made = {"stacked": stacked, "bound": bound, "emoji": lambda: emoji(*packages, args.vendors)}
    save(path, made[args.what]())
    print(path)


if __name__ == "__main__":
    main()
