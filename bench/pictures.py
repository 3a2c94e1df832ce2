"""Pictures of samples and of results, drawn without a window."""

import textwrap

import numpy as np
from einops import rearrange
from matplotlib.figure import Figure

from bench.models import MODELS


def show(axes, image):
    """Draws an image (H, W, C) in [-1, 1]."""
    image = image.cpu().float().clamp(-1, 1)
    axes.imshow((image.numpy() + 1) / 2, "gray", vmin=0, vmax=1)


def picture(path, rows):
    """Writes a picture of rows: (title, images (N, C, H, W) in [-1, 1]) each."""
    n = max(len(images) for _, images in rows)
    figure = Figure(figsize=(n, 1.25 * len(rows)), layout="constrained")
    every = figure.subplots(len(rows), squeeze=False).flat
    for axes, (title, images) in zip(every, rows):
        show(axes, rearrange(images, "n c h w -> h (n w) c"))
        axes.set_title(title, fontsize=9, loc="left")
        axes.axis("off")
    figure.savefig(path, dpi=80)


def samples_picture(path, captions, rows):
    """Writes a picture of samples: a row a model, (name, images (N, C, H, W) in [-1, 1]) each, and
    under a caption each column."""
    width, height = len(captions) + 1.2, len(rows) + 0.7
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(1.2 / width, 0, 1, 1 - 0.6 / height, 0.05, 0.05)
    grid = figure.subplots(len(rows), len(captions), squeeze=False)
    for line, (name, images) in zip(grid, rows):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
        for axes, image in zip(line, rearrange(images, "n c h w -> n h w c")):
            show(axes, image)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, caption in zip(grid[0], captions):
        axes.set_title(textwrap.fill(caption, 15, max_lines=3), fontsize=8, parse_math=False)
    figure.savefig(path, dpi=100)


def quality_against_speed(path, rows, rate):
    """Writes a picture with a point a way to sample: FD, of its row in rows, against images/s; the
    steps of a sampler make a curve."""
    points = {name: (rate[name], rows[name]["fd"]["mean"]) for name in rows if name in rate}
    if not points:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curve = [point for name, point in points.items() if name.startswith("diffusion, dpm")]
    curve = np.array(sorted(curve)).reshape(-1, 2)
    axes.plot(*curve.T, color="silver", zorder=1)
    worst_first = sorted(points, key=lambda name: -points[name][1])
    for name in worst_first:
        if name in MODELS:
            axes.scatter(*points[name], s=40, label=name)
    others = [points[name] for name in points if name not in MODELS]
    others = np.array(others).reshape(-1, 2)
    axes.scatter(*others.T, color="silver", s=12, label="other settings")
    if "real, held out" in rows:
        real = rows["real, held out"]["fd"]["mean"]
        axes.axhline(real, linestyle=":", color="black", linewidth=1, label="real images")
    figure.legend(loc="outside right upper", frameon=False)
    axes.set(xscale="log", yscale="log", xlabel="images / s", ylabel="FD (lower is better)")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    figure.savefig(path, dpi=150)
