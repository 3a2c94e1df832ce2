"""Tables and pictures from result files: `python -m bench.report` rewrites the README's."""

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"


def environment(device="cpu"):
    """Where figures are from."""
    cores = f"{os.cpu_count()} cores of {platform.machine()}"
    device = torch.cuda.get_device_name() if device == "cuda" else cores

    def git(*call):
        if not shutil.which("git"):
            return ""
        return subprocess.run(["git", *call], cwd=ROOT, capture_output=True, text=True).stdout

    commit = git("rev-parse", "--short", "HEAD").strip() or os.environ.get("COMMIT", "")
    if git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md"):  # what it writes
        commit += "-dirty"
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    return {"device": device, "python": platform.python_version(), "commit": commit, **versions}


def write(path, data):
    """Writes JSON whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(data, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def read(path):
    """A result file, or {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def table(head, rows):
    """A Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def number(value, digits=2):
    """A figure, with its spread where it has one; a dash where there is none."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"
    return f"{value:.{digits}f}"


def percent(value):
    return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}%"


def quality_table(folder, file="quality.json"):
    """What the samples are like, a row a model, beside the real images and the baselines; and what
    that took: parameters, seconds of training, evaluations of the network for an image."""
    rows, speed = read(folder / file).get("rows", {}), read(folder / "throughput.json")
    return table_of_quality(rows, speed.get("rows", {}))


def table_of_quality(rows, speed):
    """quality_table of rows of quality.json and of throughput.json."""
    attributes = {name for row in rows.values() for name in row["agreement"]}
    names = [n for n in ("digit", "weight", "slant") if n in attributes] or sorted(attributes)
    others = "fld precision recall density coverage sharpness nearest diversity".split()
    body = []
    for name, row in rows.items():
        cells = [percent(row["agreement"][n]) for n in names]
        cells += [number(row[n], 1 if n == "fld" else 2) for n in others]
        bits, timed = row.get("bits_per_dim"), speed.get(name.split()[0])
        cost = ["-"] * 3
        if timed and "updates" in row:
            training = row["updates"] * timed["training"]["seconds"]
            size = row["parameters"] / 1e6
            cost = [number(size), number(training, 0), str(row["evaluations"])]
        body.append([name, *cells, number(bits and bits["bits_per_dim"]), *cost])
    head = ["images", *names, "FLD", *others[1:], "bits/dim", "parameters (M)", "training (s)"]
    return table([*head, "evaluations"], body)


def equal_table(folder):
    """The same of models that were trained for equal seconds."""
    return quality_table(folder, "equal.json")


def fashion_table(folder):
    """The same of Fashion-MNIST."""
    return quality_table(folder / "fashion")


def stacked_table(folder):
    """How many of StackedMNIST's 1,000 modes samples find, a row a model."""
    rows = read(folder / "stacked.json").get("rows", {}).items()
    body = [[name, number(row["modes"], 0), number(row["kl"], 3)] for name, row in rows]
    return table(["images", "modes of 1,000", "KL to uniform (nats)"], body)


def unseen_table(folder):
    """Agreement with three captions that were left out of training, and were not."""
    body, names = [], ("digit", "weight", "slant")
    for name, row in read(folder / "unseen.json").get("rows", {}).items():
        model, captions = name.split(", ")
        body.append([model, captions, *(percent(row["agreement"][n]) for n in names)])
    return table(["model", "the captions were", *names], body)


def speed_table(folder, results=None):
    """How fast each sampler is, a row a sampler and mode."""
    if results is None:
        results = read(folder / "throughput.json").get("rows", {})
    head = ["sampler", "mode", "evaluations", "images/s", "latency (ms)", "GFLOP/image"]
    head += ["MB/image", "nearer ceiling", "share of it", "memory (MB)", "parameters (M)"]
    body = []
    for result in results.values():
        for row in result["sampling"]:
            rate = row["images_per_s"]
            cells = [row["name"], f"{row['mode']}, {row['dtype']}", str(row["evaluations"])]
            cells += [number(rate, 0 if rate >= 10 else 2), number(1000 * row["latency"], 1)]
            cells += [number(row["gflops_per_image"], 3), number(row["megabytes_per_image"], 1)]
            cells += [row["bound"], f"{100 * row['share_of_ceiling']:.0f}%"]
            cells += [number(row["peak_memory_mb"], 0), number(row["parameters"] / 1e6)]
            body.append(cells)
    return table(head, body)


def gpu_table(folder):
    """The same of the files that bench/gpu.sh wrote, with what they were measured on; whether the
    fast ways are right; and what the samples are like after training at a GPU's scale."""

    def files(kind):
        paths = sorted(Path(folder, "gpu").glob(f"{kind}-*.json"))
        return {path.stem.removeprefix(f"{kind}-"): read(path) for path in paths}

    kinds = ("throughput", "correct", "quality", "training")
    speed, correct, quality, training = (files(kind) for kind in kinds)
    results = [*speed.values(), *correct.values(), *quality.values()]
    if not results:
        return "Not measured yet: `bench/gpu.sh` has the commands."
    devices = {f"{result['device']}, torch {result['torch']}" for result in results}
    body = []
    for name, result in correct.items():
        for way, row in result["rows"].items():
            figures = [number(row["mean"], 3), number(row["largest"], 1)]
            body.append([name, way, *figures, "yes" if row["right"] else "no"])
    levels = table(["model", "way", "mean difference of 255", "largest", "right"], body)
    rows, timed = ({k: row for result in some.values() for k, row in result["rows"].items()}
                   for some in (quality, training))  # fmt: skip
    parts = [speed_table(folder, speed), levels, table_of_quality(rows, timed)]
    return "\n\n".join([f"{', '.join(sorted(devices))}:", *parts])


def training_table(folder):
    """What training took: images/s of the script's own step, times its number of updates."""
    body = []
    for name, result in read(folder / "throughput.json").get("rows", {}).items():
        row = result["training"]
        if row is None:
            continue
        steps = f"{row['train_steps']} x {row['batch_size']}"
        body.append([name, steps, number(row["images_per_s"], 0), f"{row['training_seconds']:.0f}"])
    return table(["model", "updates x batch", "images/s", "seconds"], body)


def claims_table(folder):
    """The textbook's claims, what was measured, and whether that bears them out."""
    rows = read(folder / "claims.json").get("rows", {}).values()
    body = [[row["claim"], row["measured"], row["verdict"]] for row in rows]
    return table(["claim", "measured", "borne out?"], body)


TABLES = {
    "quality": (quality_table, "quality.json"), "speed": (speed_table, "throughput.json"),
    "training": (training_table, "throughput.json"), "equal": (equal_table, "equal.json"),
    "claims": (claims_table, "claims.json"), "stacked": (stacked_table, "stacked.json"),
    "unseen": (unseen_table, "unseen.json"), "fashion": (fashion_table, "fashion/quality.json"),
    "gpu": (gpu_table, "none"),
}  # fmt: skip


def eager_rates(folder):
    """Images per second of each sampler, uncompiled, by its name."""
    results = read(folder / "throughput.json").get("rows", {}).values()
    rows = [row for result in results for row in result["sampling"]]
    return {row["name"]: row["images_per_s"] for row in rows if row["mode"] == "eager"}


def where(folder, file):
    """A line on where the figures of a file are from, and from which commits its rows."""
    result = read(folder / file)
    if not result:
        return ""
    commits = dict.fromkeys(row.get("commit", result["commit"]) for row in result["rows"].values())
    return f"Measured on {result['device']}, torch {result['torch']}, commit {', '.join(commits)}."


def readme():
    """The README as its result files want it."""
    text = (ROOT / "README.md").read_text()
    for name, (make, file) in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        fresh = f"{make(RESULTS)}\n\n{where(RESULTS, file)}\n"
        text = block.sub(lambda match, fresh=fresh: match[1] + fresh + match[2], text)
    return text


def plot_quality_against_speed(folder):
    """One point a model, diffusion as a curve over its steps: Frechet distance, images/s."""
    from matplotlib.figure import Figure

    quality, speed = read(folder / "quality.json")["rows"], eager_rates(folder)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    points = {n: (speed[n], quality[n]["fld"]["mean"]) for n in quality if n in speed}
    curve = [points[n] for n in points if n.startswith("diffusion dpm")]
    if curve:
        axes.plot(*zip(*sorted(curve)), color="tab:gray", zorder=1)
    for name, (x, y) in points.items():
        axes.scatter(x, y, color="tab:gray" if name.startswith("diffusion ") else "tab:blue")
        label, place = name, {"xytext": (4, 4)}
        if name.endswith("-gan"):
            place = {"xytext": (-5, -3), "ha": "right"}
        if name.startswith("diffusion dpm, "):
            label = name.removeprefix("diffusion dpm, ")
            label += " step" if label == "1" else " steps"
            place = {"xytext": (0, -12), "ha": "center"}
        axes.annotate(label, (x, y), textcoords="offset points", fontsize=7, **place)
    if curve:
        place = {"xytext": (-6, -2), "ha": "right", "textcoords": "offset points"}
        axes.annotate("diffusion", min(curve), fontsize=7, **place)
    real = quality.get("real, held out")
    if real:
        axes.axhline(real["fld"]["mean"], linestyle=":", color="black", linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        spot = (0.5, real["fld"]["mean"])
        axes.annotate("real images", spot, xytext=(0, 2), fontsize=7, **place)
    axes.margins(0.1)
    axes.set(xscale="log", yscale="log", xlabel="images / s", ylabel="FLD (lower is better)")
    figure.savefig(folder / "quality_speed.png", dpi=150)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme())
