"""What a finished run of any model has learned, in pictures, which go into its folder.

  python -m bench.explore runs/vae [--data FILE.npz]

  idea.png            one z a row, one text a column
  interpolation.png   from one z to another under one text, and between two texts at one z
  reconstruction.png  held-out images, and what sample makes of what encode makes of them
  steps.png           what one z becomes in 1, 2, 5, 10 and 20 steps, where a model takes steps

The last line printed is a JSON object, with bits_per_dim where the model has a likelihood.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for a call by file name

import torch

import prior
from bench import likelihood, models
from bench.pictures import picture
from vae import load_data


def interpolation(model, z, c, texts):
    """Rows from z to z, then rows from text to text. All columns get the same noise, if any."""
    others_z, others_c = z.roll(-1, 0), c.roll(-1, 0)
    frames = []
    for t in torch.linspace(0, 1, 11).tolist():
        torch.manual_seed(0)
        above = model.sample(prior.slerp(z, others_z, t), c)
        torch.manual_seed(0)
        below = model.sample(z, torch.lerp(c, others_c, t))
        frames.append(torch.cat([above, below]))
    titles = [f"{text} to {other}" for text, other in zip(texts, texts[1:] + texts[:1])]
    return list(zip(texts + titles, torch.stack(frames, 1)))


@torch.no_grad()
def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--data", help="the .npz that it was trained on [built-in digits]")
    parser.add_argument("--images", type=int, default=500, help="for bits_per_dim, at most [500]")
    parser.add_argument("--device", default=models.HERE)
    args = parser.parse_args(argv)
    model, checkpoint = models.load(args.run, args.device)
    x, captions = models.held_out(args.data)
    name, known = checkpoint["name"], checkpoint["captions"]
    texts = [known[i] for i in models.evenly(6, len(known))]
    c = model.embed(model.tokenize(texts))
    z = prior.sample(len(c), *model.latent_shape, seed=0).to(args.device)
    every, rows = sorted(set(known)), []
    eight = random.Random(0).sample(every, min(8, len(every)))
    c_eight = model.embed(model.tokenize(eight))
    for one in z:
        torch.manual_seed(0)
        rows.append(("", model.sample(one.expand(len(eight), *one.shape), c_eight)))
    picture(args.run / "idea.png", rows, eight)
    picture(args.run / "interpolation.png", interpolation(model, z, c, texts))
    if hasattr(model, "encode"):
        chosen = models.evenly(12, len(x))
        some = x[chosen].to(args.device) / 127.5 - 1
        c_some = model.embed(model.tokenize([captions[i] for i in chosen]))
        undone = models.plain(name)
        if "sampler" in models.options(name):
            undone["sampler"] = "ddim"  # which adds no noise
        back = model.sample(model.encode(some, c_some), c_some, **undone)
        picture(args.run / "reconstruction.png", [("held out", some), ("encoded, sampled", back)])
    if "steps" in models.options(name):
        rows = [(f"{n} steps", model.sample(z, c, steps=n)) for n in (1, 2, 5, 10, 20)]
        picture(args.run / "steps.png", rows)
    given = x, captions, load_data(args.data), args.images
    result = likelihood.measure(model, *given) or {}
    print(json.dumps({"model": name, "updates": checkpoint["update"], **result}))


if __name__ == "__main__":
    main()
