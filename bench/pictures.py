"""Pictures of samples and of results, drawn without a window."""

import textwrap

from einops import rearrange
from matplotlib.figure import Figure


def picture(path, rows, captions=()):
    """Writes a picture of rows, a name and images (N, C, H, W) in [-1, 1] each, under captions, one
    a column, if there are any."""
    n = max(len(images) for _, images in rows)
    lines = 0.7 if captions else 0.1
    width, height = n + 1.2, len(rows) + lines
    figure = Figure(figsize=(width, height))
    left, top = 1.2 / width, 1 - lines / height
    figure.subplots_adjust(left, 0, 1, top, 0.05, 0.05)
    grid = figure.subplots(len(rows), n, squeeze=False)
    for line, (name, images) in zip(grid, rows):
        title = textwrap.fill(name, 15, max_lines=5)
        line[0].set_ylabel(title, rotation=0, size=9, parse_math=False, ha="right", va="center")
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, image in zip(line, rearrange(images, "n c h w -> n h w c")):
            image = image.cpu().float() / 2 + 0.5
            image = image.clamp(0, 1).numpy()
            axes.imshow(image, "gray", vmin=0, vmax=1)
    for axes, caption in zip(grid[0], captions):
        title = textwrap.fill(caption, 15, max_lines=3)
        axes.set_title(title, fontsize=8, parse_math=False)
    figure.savefig(path, dpi=100)


def quality_picture(path, lines, floors, what):
    """Writes a picture of FD against what: of each line, label -> points (x, FD), and of floors,
    label -> FD."""
    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        axes.loglog(*zip(*points), "o-", subs=[2, 3, 5], markersize=5, label=label)
    for (label, fd), style in zip(floors.items(), (":", "--")):
        axes.axhline(fd, linestyle=style, color="black", linewidth=1, label=label)
    figure.legend(loc="outside right upper", frameon=False)
    axes.set(xlabel=what, ylabel="FD (lower is better)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    figure.savefig(path, dpi=150)
