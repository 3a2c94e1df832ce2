"""Makes a data file for --data from a folder of images.

  python -m bench.pack photos photos.npz --size 64

Of images at any depth, each is centre-cropped to a square and resized to --size; what is
transparent is laid on white. Every file that the installed Pillow opens counts. Names that begin
with a dot and __MACOSX are passed over, and what cannot be read is left out: a line says how many
files, which and why. The captions are, in this order: the text of file_name in a metadata.jsonl of
the same folder; a line of the .txt file of the same name (of several lines one is drawn, always the
same); the name of the sub-folder, _ read as a space. Texts are UTF-8, and of each the first 500
characters count. A folder train is x and y; test, or else val, beside it becomes x_test and y_test.
Grey if all images are, else RGB.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def fail(message):
    """Ends the program with one line."""
    raise SystemExit("bench.pack: " + " ".join(message.split())) from None


def visible_files(folder):
    """All files below a folder, sorted, but hidden ones; through links, and each folder once."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        names = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        folders[:] = [] if real in seen else sorted(names)
        if real not in seen:
            found += [Path(place, name) for name in files if not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def read_image(path, size):
    """A square image of a side, of mode L or RGB."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError("it has more than 8 bits a channel")
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return ImageOps.fit(image.convert(mode), (size, size), Image.Resampling.LANCZOS)


def described(files):
    """Captions from metadata.jsonl files: path of the image -> text."""
    captions = {}
    for path in files:
        try:
            lines = path.read_text("utf-8-sig").splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
            captions |= {path.parent / row["file_name"]: str(row["text"]) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            fail(f"{path}: each line is to be a JSON object with file_name and text: {error!r}")
    return captions


def pack_images(folder, size):
    """Images and captions of a folder, and what was left out: path -> why."""
    files = visible_files(folder)
    captions = described([path for path in files if path.name == "metadata.jsonl"])
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    images, chosen, left_out = [], [], {}
    draw = np.random.default_rng(0)
    for path in files:
        if path.suffix.lower() in (".txt", ".jsonl"):
            continue
        folder_name = path.parent.name.replace("_", " ") if path.parent != folder else ""
        try:
            if path.suffix.lower() not in SUFFIXES:
                raise ValueError("no image by its suffix")
            image = read_image(path, size)
            text = texts.get(path.with_suffix(""))
            lines = text.read_text("utf-8-sig").splitlines() if text else []
            lines = [line.strip() for line in lines if line.strip()] or [folder_name]
            caption = captions.get(path, lines[draw.integers(len(lines))])
        except Exception as error:  # of a decoder, whatever its kind
            why = f"{text.name}: {error}" if isinstance(error, UnicodeError) else str(error)
            left_out[path] = why or type(error).__name__
            continue
        images.append(image)
        chosen.append(caption[:500])  # some 64 words, which is what the models read
    return images, chosen, left_out


def pack_folder(folder, size):
    """The arrays of a folder of images, of its train and test where it has them; prints what was
    left out, what has no caption, and what may be a mistake."""
    held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
    split = (folder / "train").is_dir()
    places = {"": folder / "train" if split else folder}
    if split and held_out:
        places["_test"] = folder / held_out
    packed = {part: pack_images(place, size) for part, place in places.items()}
    n = sum(len(images) for images, _, _ in packed.values())
    left_out = dict(pair for _, _, part in packed.values() for pair in part.items())
    for path in visible_files(folder):
        if not any(path.is_relative_to(place) for place in places.values()):
            left_out[path] = "beside train, test and val"
    names = [f"{path.relative_to(folder)} ({why})" for path, why in left_out.items()]
    report = f"packed {n}, left out {len(names)}" + ": " * bool(names) + "; ".join(names[:20])
    if not all(images for images, _, _ in packed.values()):
        fail(f"{folder} holds no images: {report}")
    print(report + ", ..." * (len(names) > 20))
    grey = all(image.mode == "L" for images, _, _ in packed.values() for image in images)
    arrays = {}
    for part, (images, captions, _) in packed.items():
        mode = "L" if grey else "RGB"
        arrays["x" + part] = np.stack([image.convert(mode) for image in images])
        arrays["y" + part] = np.array(captions)
    without = sum((arrays["y" + part] == "").sum() for part in packed)
    if without:
        print(f"{without} of {n} images have no caption")
    return arrays


def save(path, arrays):
    """Writes an .npz whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("source", type=Path, help="a folder of images")
    parser.add_argument("file", type=Path, help="the .npz to write")
    parser.add_argument("--size", type=int, default=32, help="side of packed images [32]")
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        fail(f"{args.source} is no folder; unpack it first if it is an archive")
    if args.size < 4 or args.size % 4:
        fail(f"--size {args.size}: take a multiple of 4, as the models need")
    if args.file.exists() or args.file.suffix != ".npz" or not args.file.parent.is_dir():
        fail(f"{args.file} exists already, does not end in .npz, or its folder does not exist")
    arrays = pack_folder(args.source, args.size)
    save(args.file, arrays)
    print(args.file, {name: array.shape for name, array in arrays.items()})


if __name__ == "__main__":
    main()
