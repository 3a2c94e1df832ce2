"""What a finished run of any model has learned, in pictures, which go into its folder.

  python -m bench.explore runs/vae [--data FILE.npz]

  idea.png            one z a row, one text a column
  interpolation.png   from one z to another under one text, and between two texts at one z
  reconstruction.png  held-out images, and what sample makes of what encode makes of them
  path.png            how an image comes about: x_hat at each step of a sampler, scales of a flow;
                      where one step is all, a walk along the latents that matter most

The last line printed is a JSON object: the run's model and, where it has a likelihood, bits_per_dim
of held-out images, its standard_error, and what kind of statement that is.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))  # for a call by file name

import torch

import prior
from bench import likelihood, models
from bench.pictures import picture, samples_picture
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


def idea(model, texts, device):
    """Rows for samples_picture: of each of six z the images for all texts."""
    c = model.embed(model.tokenize(texts))
    strips = []
    for z in prior.sample(6, *model.latent_shape, seed=0).split(1):
        torch.manual_seed(0)
        z = z.to(device).expand(len(c), *model.latent_shape)
        strips.append(("", model.sample(z, c)))
    return strips


def recorded(model, name, z, c):
    """What a method is given and returns, in each of its calls, while the model samples."""
    method, calls = getattr(model, name), []

    def record(*given):
        calls.append((*given, method(*given)))
        return calls[-1][-1]

    with mock.patch.object(model, name, record):
        model.sample(z, c)
    return calls


def steps(model, z, c):
    """x_hat at each step. A guided velocity calls itself: the outer call ends last, and counts."""
    calls = recorded(model, "velocity", z, c)
    frames = {t: z - t * v for z, t, *_, v in calls}
    return list(frames.values())


def jumps(model, z, c):
    """x_hat at each of a few large steps."""
    return [x for *_, x in recorded(model, "denoise", z, c)]


def scales(model, z, c):
    """The image as its coarsest picture is drawn, and with the details of each scale added: where z
    has no details yet, they are what is most likely."""
    frames = []
    for n in range(len(model.stacks)):
        *parts, h = model.analyze(z)
        for details in parts[: len(parts) - n]:
            details.zero_()
        frames.append(model.sample(model.synthesize([*parts, h]), c))
    return frames


def walk(model, z, c):
    """Each of the latents that change an image most, a row each, from -2.5 to 2.5."""
    n = z.shape[1]
    z, c = z[:1].repeat(n, 1), c[:1].expand(n, -1)
    values = torch.linspace(-2.5, 2.5, 11).tolist()
    frames = [model.sample(z.clone().fill_diagonal_(value), c) for value in values]
    change = (frames[-1] - frames[0]).abs().flatten(1).sum(1)
    most = change.argsort(descending=True)[:8]
    return [frame[most] for frame in frames]


# the member that tells how a model comes to an image, and what shows it
PATHS = {
    "velocity": steps,
    "stacks": scales,
    "denoise": jumps,
    "decode": walk,
}


@torch.no_grad()
def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--data", help="the .npz that it was trained on [built-in digits]")
    parser.add_argument("--images", type=int, default=500, help="for bits_per_dim, at most [500]")
    parser.add_argument("--device", default=models.HERE, choices=sorted({models.HERE, "cpu"}))
    args = parser.parse_args(argv)
    model, checkpoint = models.load(args.run, args.device)
    x, captions = models.held_out(args.data)
    if x.shape[1:] != model.args["shape"]:
        raise SystemExit(f"{args.run} was trained on other images: give its --data")
    name, known = checkpoint["name"], checkpoint["captions"]
    texts = [known[i] for i in models.evenly(6, len(known))]
    c = model.embed(model.tokenize(texts))
    z = prior.sample(len(c), *model.latent_shape, seed=0).to(args.device)
    every = sorted(set(known))
    eight = random.Random(0).sample(every, min(8, len(every)))
    samples_picture(args.run / "idea.png", eight, idea(model, eight, args.device))
    picture(args.run / "interpolation.png", interpolation(model, z, c, texts))
    if hasattr(model, "encode"):
        chosen = models.evenly(12, len(x))
        some = x[chosen].to(args.device) / 127.5 - 1
        c_some = model.embed(model.tokenize([captions[i] for i in chosen]))
        undone = models.plain(name)
        if "sampler" in models.options(name):
            undone["sampler"] = "ddim"  # which adds no noise
        back = model.sample(model.encode(some, c_some), c_some, **undone)
        rows = [("held out", some), ("encoded and sampled again", back)]
        picture(args.run / "reconstruction.png", rows)
    show = next((PATHS[member] for member in PATHS if hasattr(model, member)), None)
    if show:
        rows = torch.stack(show(model, z, c), 1)
        picture(args.run / "path.png", [("", row) for row in rows])
    given = x, captions, load_data(args.data), args.images
    result = likelihood.measure(model, *given) or {}
    print(json.dumps({"model": name, "updates": checkpoint["update"], **result}))


if __name__ == "__main__":
    main()
