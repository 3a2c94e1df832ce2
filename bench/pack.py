"""Makes a data file for --data from a folder of images or of MNIST-format files.

  python -m bench.pack photos photos.npz --size 64
  python -m bench.pack /usr/share/datasets/fashion-mnist fashion.npz --names "t-shirt,trouser,..."

From images: each is centre-cropped to a square and resized to --size. Its caption is the text of
the .txt file of the same name where there is one, else the name of its sub-folder (_ read as a
space). Grey if all images are, else RGB. From MNIST-format files (train-images-idx3-ubyte, ...,
plain or .gz): as they are; captions are the labels or their --names; t10k becomes x_test, y_test.
"""

import argparse
import gzip
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}


def fail(message):
    """Ends the program with one line."""
    raise SystemExit("bench.pack: " + " ".join(message.split())) from None


def read_idx(folder, name):
    """The array in an IDX file of bytes, plain or .gz: big-endian sizes, then data."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        fail(f"{folder} has no {name} or {name}.gz")
    try:
        raw = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
        shape = np.frombuffer(raw, ">u4", raw[3], 4)
        if raw[:3] != b"\0\0\x08":
            raise ValueError("its header is not that of bytes in IDX format")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        fail(f"{path} cannot be read: {error}")


def pack_idx(folder, names):
    """The arrays of a folder in MNIST's format; its test files are optional."""
    arrays = {}
    for part, prefix in (("", "train"), ("_test", "t10k")):
        if part and not any(folder.glob(f"{prefix}-images-idx3-ubyte*")):
            continue
        x = read_idx(folder, f"{prefix}-images-idx3-ubyte")
        labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte")
        if len(x) != len(labels):
            fail(f"{folder}: {len(x)} {prefix} images, but {len(labels)} labels")
        if names and labels.max() >= len(names):
            fail(f"--names has {len(names)} names, but there is a label {labels.max()}")
        arrays["x" + part] = x
        arrays["y" + part] = np.array(names)[labels] if names else labels
    return arrays


def pack_images(folder, size):
    """The arrays of a folder of images, sub-folders included, in the order of their paths."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        fail(f"{folder} holds neither images nor MNIST-format files")
    images, captions = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError("more than 8 bits a channel")
                grey = image.mode in ("1", "L", "LA")
                image = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
                images.append(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
            text = path.with_suffix(".txt")
            folder_name = path.parent.name.replace("_", " ") if path.parent != folder else ""
            captions.append(text.read_text().strip() if text.exists() else folder_name)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            fail(f"{path} cannot be read: {error}; remove it or mend it")
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    return {"x": np.stack([image.convert(mode) for image in images]), "y": np.array(captions)}


def save(path, arrays):
    """Writes an .npz whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", type=Path, help="a folder of images or of MNIST-format files")
    parser.add_argument("file", type=Path, help="the .npz to write")
    parser.add_argument("--size", type=int, default=32, help="side of packed images [32]")
    parser.add_argument("--names", default="", help="what MNIST-format labels 0, 1, ... are called")
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        fail(f"{args.source} is no folder")
    if args.size < 4 or args.size % 4:
        parser.error(f"--size {args.size}: take a multiple of 4, as the models need")
    if args.file.exists() or args.file.suffix != ".npz" or not args.file.parent.is_dir():
        fail(f"{args.file} exists already, does not end in .npz, or its folder does not exist")
    names = [name.strip() for name in args.names.split(",")] if args.names else []
    if any(args.source.glob("train-images-idx3-ubyte*")):
        arrays = pack_idx(args.source, names)
    else:
        arrays = pack_images(args.source, args.size)
    save(args.file, arrays)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    print(f"{args.file}: {shapes}")


if __name__ == "__main__":
    main()
