"""Makes a data file of emoji: coloured pictures of 32 x 32, and their names.

  npm pack emoji-datasource
  python -m bench.emoji emoji-datasource-*.tgz emoji.npz [--vendors google twitter]

Held out is a tenth of the captions with a skin tone. Google's pictures are under the Apache License
2.0, Twitter's under CC BY 4.0; those of apple and facebook are not free.
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from bench.pack import save
from vae import words_of

SKINS = "light", "medium light", "medium", "medium dark", "dark"
TONES = {f"1F3F{digit}": f"{skin} skin" for digit, skin in zip("BCDEF", SKINS)}


def read_package(package, vendors):
    """What a package says of its emoji, and each vendor's sheet of pictures on white (H, W, 3)."""
    sheets = {}
    with tarfile.open(package) as tar:
        entries = json.load(tar.extractfile("package/emoji.json"))
        for vendor in vendors:
            file = tar.extractfile(f"package/img/{vendor}/sheets/32.png")
            picture = Image.open(io.BytesIO(file.read())).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            sheets[vendor] = np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
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


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("package", type=Path)
    parser.add_argument("file", type=Path, help="the .npz to write")
    parser.add_argument("--vendors", nargs="+", default=["google", "twitter"])
    args = parser.parse_args(argv)
    save(args.file, emoji(args.package, args.vendors))


if __name__ == "__main__":
    main()
