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


def quality_against_speed(path, fd, rate, curve):
    """Writes a picture with a point a way to sample, its FD against its images/s; those of curve,
    one sampler with more and more steps, are joined."""
    points = {label: (rate[label], fd[label]) for label in fd if label in rate}
    if not points:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [points[label] for label in curve if label in points]
    rates, distances = np.array(steps).reshape(-1, 2).T
    axes.plot(rates, distances, "o-", color="silver", markersize=4, zorder=1)
    for label in sorted(points, key=lambda label: -fd[label]):
        if label in MODELS:
            axes.scatter(*points[label], s=40, label=label)
    for label, style in (("real, held out", ":"), ("training images replayed", "--")):
        if label in fd:
            axes.axhline(fd[label], linestyle=style, color="black", linewidth=1, label=label)
    figure.legend(loc="outside right upper", frameon=False)
    axes.set(xscale="log", yscale="log", xlabel="images / s", ylabel="FD (lower is better)")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    figure.savefig(path, dpi=150)
