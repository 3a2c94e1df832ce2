"""Tables and pictures from the JSON files of the benchmarks.

`python -m bench.report` writes the table in README.md and docs/README.zh.md, all tables into
bench/RESULTS.md, and bench/results/quality_speed.png, from quality.json, which `python -m bench`
writes, and speed.json, from `pytest bench`. Sub-folders, for other data or machines, become
sections of RESULTS.md.
"""

import re
import statistics
from pathlib import Path

from bench import pictures
from bench.files import read
from bench.models import MODELS, ROOT, script

RESULTS = ROOT / "bench/results"
PAGES = "README.md", "docs/README.zh.md"
CHINESE = {
    "| model |": "| 模型 |",
    "evaluations an image": "网络计算次数",
    "images/s": "图像/秒",
    "text obeyed": "符合文字",
    "lines of its file": "文件行数",
    "real images": "真实图像",
    " (importance-weighted bound)": "（重要性加权上界）",
    " (bound)": "（上界）",
    " (exact)": "（精确）",
    " (ODE estimate)": "（ODE 估计）",
}
FIGURES = "precision", "recall", "density", "coverage", "sharpness", "nearest", "diversity"

CLAIMS = (  # statement, of which way to sample, against which, in what, and whether more is better
    ("a GAN is sharper than a VAE", "gan", "vae", "sharpness", 1),
    ("a critic makes a VAE sharper", "vae-gan", "vae", "sharpness", 1),
    ("a critic makes a flow better", "flow-gan", "flow", "fd", -1),
    ("a critic helps in four steps", "diffusion-gan", "diffusion, dpm, 4 steps", "fd", -1),
    ("twenty steps beat one jump", "diffusion", "one-step", "fd", -1),
    ("one jump beats one plain step", "one-step", "diffusion, ddim, 1 step", "fd", -1),
    ("one jump is faster than twenty steps", "one-step", "diffusion", "images/s", 1),
    ("value by value is slower than a GAN", "autoregressive", "gan", "images/s", -1),
    ("value by value is slower than twenty steps", "autoregressive", "diffusion", "images/s", -1),
)


def spread(values):
    """Mean and standard deviation, as plain numbers; one value has no deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation}


def number(value, digits=2, scale=1):
    """A figure, with its deviation where it has one; a dash where there is none."""
    if value is None:
        return "-"
    parts = value.values() if isinstance(value, dict) else [value]
    return " ± ".join(f"{scale * part:.{digits}f}" for part in parts if part is not None)


def significant(value):
    """A figure of three digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(value, digits=1):
    """A share, as number writes it."""
    return "-" if value is None else f"{number(value, digits, 100)}%"


def bits(row):
    """Bits per dimension and what kind of statement that is."""
    likelihood = row.get("bits_per_dim")
    if not likelihood:
        return "-"
    return f"{likelihood['bits_per_dim']:.2f} ({likelihood['kind']})"


def table(head, rows):
    """A Markdown table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trained(quality, label):
    """The row of a way to sample, and those of the same model from other training seeds, after as
    many updates."""
    row = quality["rows"][label]
    others = [rows[label] for rows in quality.get("other_seeds", {}).values() if label in rows]
    return [row, *(other for other in others if other.get("updates") == row.get("updates"))]


def over_seeds(quality, label, figure):
    """Mean and deviation of a figure over training seeds; None where it is not defined."""
    values = [row[figure] for row in trained(quality, label)]
    return None if None in values else spread([value["mean"] for value in values])


def measured(speed, task):
    """What was recorded beside each benchmark of a task, sampling or training."""
    notes = [benchmark["extra_info"] for benchmark in speed.get("benchmarks", ())]
    return [note for note in notes if note.get("task") == task]


def page_table(folder, page):
    """The README's table in the language of a page."""
    result = main_table(folder)
    for english, chinese in CHINESE.items() if "zh" in page else ():
        result = result.replace(english, chinese)
    return result


def rates(speed):
    """Images per second of each way to sample, at its best batch, by its label; all in one mode,
    eager and in fp32 (where CUDA's convolutions use TF32)."""
    best = {}
    for row in measured(speed, "sampling"):
        if row["mode"] == "eager":
            best[row["label"]] = max(row["images_per_s"], best.get(row["label"], 0))
    return best


def main_table(folder):
    """The README's table, a row a model, as its script samples by default."""
    quality, rate = read(folder / "quality.json"), rates(read(folder / "speed.json"))
    rows, body = quality.get("rows", {}), []
    for name in ("real, held out", *MODELS):
        if name not in rows:
            continue
        row = rows[name]
        model, lines = "real images", "-"
        if name in MODELS:
            file = script(name).__name__.replace(".", "/") + ".py"
            model = f"[{name}](/{file})"  # from the root, in any folder's page
            lines = len(Path(script(name).__file__).read_text().splitlines())
        cells = [model, row.get("evaluations", "-"), significant(rate.get(name))]
        fd, obeyed = (over_seeds(quality, name, figure) for figure in ("fd", "obeyed"))
        cells += [number(fd, 1), percent(obeyed, 0), bits(row), lines]
        body.append(cells)
    head = "model", "evaluations an image", "images/s", "FD", "text obeyed", "bits/dim"
    return table([*head, "lines of its file"], body)


def claims(files):
    """A row for each claim whose figures are known."""
    quality, rate, rows = files["quality"], rates(files["speed"]), []

    def known(label, figure):
        if figure == "images/s":
            return label in rate and {"mean": rate[label], "std": 0.0}
        if label not in quality["rows"]:
            return None
        row, *others = trained(quality, label)
        return over_seeds(quality, label, figure) if others else row[figure]

    for statement, first, second, figure, sign in CLAIMS:
        a, b = known(first, figure), known(second, figure)
        if a and b:
            holds = sign * (a["mean"] - b["mean"]) > a["std"] + b["std"]
            if figure == "images/s":
                cells = significant(a["mean"]), significant(b["mean"]), "-"
            else:
                seeds = [f"{len(trained(quality, label))}" for label in (first, second)]
                cells = number(a), number(b), " and ".join(seeds)
            rows.append([statement, first, second, figure, *cells, "yes" if holds else "no"])
    return rows


def claims_table(files):
    """Claims with their figures. One holds if the first mean is better than the second by more than
    the sum of their deviations: over training seeds where there are several, as many as are told,
    else over three draws from one trained model."""
    head = "claim", "first", "second", "figure", "of first", "of second", "training seeds", "holds"
    return table(head, claims(files))


def seeds_table(quality):
    """Mean and deviation over training seeds; in brackets the deviation over three draws from the
    model of the first seed. One-step's seeds all start from one diffusion model."""
    body = []
    for label, row in quality["rows"].items():
        seeds = len(trained(quality, label))
        if seeds > 1:
            cells = []
            for figure in ("obeyed", "fd", *FIGURES):
                write = percent if figure == "obeyed" else number
                within = row[figure] and row[figure]["std"]
                cells.append(f"{write(over_seeds(quality, label, figure))} ({write(within)})")
            body.append([label, seeds, *cells])
    return table(["images", "training seeds", "text obeyed", "FD", *FIGURES], body)


def quality_table(files):
    """What samples are like beside real images: mean and deviation over three sampling seeds of one
    trained model. The columns after "text obeyed" are its parts; bench/quality.py defines all.
    Minutes are updates times what one takes on a quiet machine; one-step's add to diffusion's."""
    rows = files["quality"]["rows"]
    training = measured(files["speed"], "training")
    seconds = {row["label"]: row["seconds"] for row in training if row["mode"] == "eager"}
    names, body = list(next(iter(rows.values()))["agreement"]), []
    for label, row in rows.items():
        cells = [label]
        cells += [percent(row["obeyed"]), percent(row["obeyed_by_chance"])]
        cells += [percent(row["agreement"].get(name)) for name in names]
        cells += [number(row["fd"], 1), *(number(row[figure]) for figure in FIGURES)]
        cells += [bits(row), *(row.get(name, "-") for name in ("evaluations", "width", "updates"))]
        minutes = row.get("updates", 0) * seconds.get(label.split(",")[0], 0) / 60
        body.append([*cells, significant(minutes or None)])
    head = ["images", "text obeyed", "by chance", *names, "FD", *FIGURES]
    return table([*head, "bits/dim", "evaluations", "width", "updates", "minutes"], body)


def bound_table(rows):
    """Three digits as red, green and blue, asked for in this order: shares of samples with all
    three as asked, and with each, read by the classifier of digits; real images are the most that
    can be reached. Unseen captions were left out of training."""
    body = []
    for name, parts in rows.items():
        for part, row in parts.items():
            shares = (row[figure] for figure in ("all three", "red", "green", "blue"))
            cells = [f"{100 * share:.1f}%" for share in shares]
            body.append([name, part, row["n"], *cells])
    return table(["samples", "captions", "n", "all three", "red", "green", "blue"], body)


def stacked_table(rows):
    """Images of three digits: of 1,000 modes, 26,000 perfect samples have all, and KL 0.019."""
    body = [[name, row["n"], row["modes"], number(row["kl"], 3)] for name, row in rows.items()]
    return table(["model", "samples", "modes", "KL"], body)


def speed_table(speed):
    """How fast each way to sample is. The ceiling is a large product's, convolution's or copy's."""
    body = []
    for row in measured(speed, "sampling"):
        cells = [row["label"], row["mode"], row["batch"], row["evaluations"]]
        cells += [significant(row["images_per_s"]), significant(1000 * row["seconds"])]
        cells += [number(row["gflop_per_image"], 3), significant(row.get("mb_per_image"))]
        cells += [number(row.get("share_of_ceiling")), significant(row.get("peak_memory_mb"))]
        body.append(cells)
    head = "sampler", "mode", "batch", "evaluations", "images/s", "ms a batch", "GFLOP an image"
    return table([*head, "MB an image", "of the ceiling", "memory (MB)"], body)


def training_table(speed):
    """What training takes: the script's own mean update, times its number of updates."""
    body = []
    for row in measured(speed, "training"):
        cells = [row["label"], row["mode"], row["batch"], row["updates"]]
        cells += [significant(row["images_per_s"]), significant(1000 * row["seconds"])]
        cells += [number(row["parameters"] / 1e6), significant(row["updates"] * row["seconds"])]
        body.append(cells)
    head = "model", "mode", "batch", "updates", "images/s", "ms an update"
    return table([*head, "parameters (M)", "training (s)"], body)


def where(result):
    """A line on where the figures of a file are from."""
    # pytest-benchmark keeps what bench/conftest.py tells it in machine_info
    here, rows = result.get("machine_info", result), result.get("rows", {}).values()
    commits = {row["commit"] for row in rows if "commit" in row} or {here.get("commit")}
    text = f"Measured on {here.get('device')} with torch {here.get('torch')}, numpy"
    return f"{text} {here.get('numpy')}, commit {', '.join(sorted(map(str, commits)))}."


def reading(files, unseen):
    """What the digits' tables say, in a few sentences with their numbers."""
    quality, rate = files["quality"], rates(files["speed"])
    rows = quality.get("rows", {})
    names = [name for name in rows if name in MODELS or "guidance" in name]
    told = [
        "± is a deviation over training seeds where several are told of, else over three draws "
        "from one trained model. Where two figures are closer than that, neither is better.",
        "Bits/dim: bounds say how good a model is at least, so a lower bound is not yet a better "
        "model; diffusion's estimate is of pixels with noise added, and compares with no bound.",
    ]

    def best(figure, write, most):
        values = {name: over_seeds(quality, name, figure) for name in names}
        order = sorted(names, key=lambda name: values[name]["mean"], reverse=most)
        return ", then ".join(f"{name} ({write(values[name])})" for name in order[:2])

    if len(names) > 1:
        told.append(f"Nearest to real images, by FD: {best('fd', number, False)}.")
        told.append(f"Texts are obeyed most by {best('obeyed', percent, True)}.")
        told.append(f"Most blurred: {best('sharpness', number, False)}; real images have 1.")
    for name in ("diffusion", "flow"):
        plain = f"{name}, guidance 1"
        if {name, plain} <= rows.keys():
            shares = [percent(over_seeds(quality, way, "obeyed")) for way in (plain, name)]
            recall = [number(over_seeds(quality, way, "recall")) for way in (plain, name)]
            text = f"Guidance takes {name} from {shares[0]} of texts obeyed to {shares[1]}"
            told.append(f"{text}, its recall from {recall[0]} to {recall[1]}.")
    if {"gan", "diffusion"} <= rate.keys():
        times = rate["gan"] / rate["diffusion"]
        told.append(f"In large batches gan draws {times:.0f} times as many images/s as diffusion.")
    obey = [f"{name} {percent(unseen[name]['obeyed'], 0)}" for name in unseen if name in MODELS]
    if obey:
        told.append(
            f"Captions whose words were never seen together are obeyed: {', '.join(obey)}. The "
            "section unseen has their figures; its FD compares three captions' images with all."
        )
    if rows:
        every = claims(files)
        failed = [statement for statement, *_, holds in every if holds == "no"]
        text = f"{len(every) - len(failed)} of {len(every)} claims below hold"
        told.append(f"{text}; not: {', '.join(failed)}." if failed else f"{text}.")
    return "\n".join(f"- {line}" for line in told)


def results(folder):
    """All tables of a folder of results, and of its sub-folders, as one page."""
    parts = ["# Results", "Written by `python -m bench.report`; bench/quality.py defines figures."]
    for part in (folder, *sorted(path for path in folder.glob("*") if path.is_dir())):
        names = "quality", "bound", "stacked", "speed"
        files = {name: read(part / f"{name}.json") for name in names}
        if part == folder:
            unseen = read(folder / "unseen/quality.json").get("rows", {})
            parts.append(reading(files, unseen))
        quality, bound, stacked, speed = files.values()
        tables = (
            ("Quality", quality_table, quality and files, quality),
            ("Training seeds", seeds_table, quality, quality),
            ("Claims", claims_table, quality and speed and files, quality),
            ("Words bound to places", bound_table, bound.get("rows"), bound),
            ("StackedMNIST", stacked_table, stacked.get("rows"), stacked),
            ("Speed of sampling", speed_table, speed, speed),
            ("Speed of training", training_table, speed, speed),
        )
        for title, function, given, source in tables:
            made = function(given) if given else ""
            if made:
                title += "" if part == folder else f", {part.name}"
                text = function.__doc__.replace("\n    ", " ")
                parts += [f"## {title}", text, made, where(source)]
        if (part / "samples.png").exists():
            parts.append(f"![samples]({(part / 'samples.png').relative_to(folder.parent)})")
    return "\n\n".join(parts) + "\n"


def plot(folder):
    """quality_speed.png of a folder of results."""
    rows, rate = read(folder / "quality.json").get("rows", {}), rates(read(folder / "speed.json"))
    pictures.quality_against_speed(folder / "quality_speed.png", rows, rate)


def main():
    for page in [page for page in PAGES if (ROOT / page).exists()]:
        path, fresh = ROOT / page, page_table(RESULTS, page)
        block = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- /table -->)", re.S)
        text = block.sub(lambda _, fresh=fresh: f"{fresh}\n", path.read_text())
        path.write_text(text)
    (ROOT / "bench/RESULTS.md").write_text(results(RESULTS))
    plot(RESULTS)


if __name__ == "__main__":
    main()
