"""Tables and pictures from the JSON files of the benchmarks.

`python -m bench.report` writes the table in README.md and docs/README.zh.md, six tables into
bench/RESULTS.md, and bench/results/quality_speed.png. In a folder of results, quality.json is from
`python -m bench`, every speed*.json from `pytest bench`. Sub-folders hold what was measured on other
data, or on a GPU, of which each gets a table of speed.
"""

import re
import statistics
from pathlib import Path

from scipy.stats import ttest_ind

from bench import pictures
from bench.files import read
from bench.models import MODELS, ROOT, script

RESULTS = ROOT / "bench/results"
PAGES = "README.md", "docs/README.zh.md"
CHINESE = {
    "| model |": "| 模型 |",
    "evaluations": "网络计算次数",
    "images/s": "图像/秒",
    "text obeyed": "符合文字",
    "minutes of training": "训练分钟数",
    "real images": "真实图像",
    " (importance-weighted bound)": "（重要性加权上界）",
    " (bound)": "（上界）",
    " (exact)": "（精确）",
}
STEPS = (  # of diffusion and one-step, from few to many
    *("diffusion, 1 step", "diffusion, 2 steps", "diffusion, 4 steps", "diffusion"),
    *("diffusion, 20 steps", "diffusion, 50 steps", "diffusion, ddpm, 20 steps"),
    *("diffusion, guidance 1", "one-step", "one-step, 2 steps", "one-step, 4 steps"),
)
CLAIMS = (  # statement, of which way to sample, against which, in what, and whether more is better
    ("a GAN is sharper than a VAE", "gan", "vae", "sharpness", 1),
    ("a critic makes a VAE sharper", "vae-gan", "vae", "sharpness", 1),
    ("a critic makes a flow better", "flow-gan", "flow", "fd", -1),
    ("a critic helps in four steps", "diffusion-gan", "diffusion, 4 steps", "fd", -1),
    ("ten steps beat one jump", "diffusion", "one-step", "fd", -1),
    ("one jump beats one plain step", "one-step", "diffusion, 1 step", "fd", -1),
    ("one jump is faster than ten steps", "one-step", "diffusion", "images/s", 1),
    ("value by value is slower than a GAN", "autoregressive", "gan", "images/s", -1),
    ("value by value is slower than ten steps", "autoregressive", "diffusion", "images/s", -1),
)


def number(value, digits=2, scale=1):
    """A figure; of several values the mean, with their deviation; a dash where there is none."""
    values = value if isinstance(value, list) else [value]
    if not values or None in values:
        return "-"
    text = f"{scale * statistics.fmean(values):.{digits}f}"
    return f"{text} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def significant(value):
    """A figure of three digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(value):
    """A share, as number writes it."""
    text = number(value, 0, 100)
    return text if text == "-" else f"{text}%"


def table(head, rows):
    """A Markdown table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seeds(quality, label):
    """The rows of a way to sample, one a training seed, of as many updates as the first."""
    rows = list(quality.get("rows", {}).get(label, {}).values())
    return [row for row in rows if row.get("updates") == rows[0].get("updates")]


def values(quality, label, figure):
    """A figure for each training seed; None where it is not defined for any."""
    found = [row.get(figure) for row in seeds(quality, label)]
    return found if found and None not in found else None


def bits(quality, label):
    """Bits per dimension and what kind of statement that is."""
    found = [row["likelihood"] for row in seeds(quality, label) if row.get("likelihood")]
    return f"{found[0]['bits_per_dim']:.2f} ({found[0]['kind']})" if found else "-"


def benchmarks(folder):
    """What each speed*.json of a folder says: what was recorded beside each benchmark, and of the
    machine."""
    notes, machine = [], {}
    for path in sorted(folder.glob("speed*.json")):
        speed = read(path)
        machine = machine or speed["machine_info"]
        notes += [benchmark["extra_info"] for benchmark in speed["benchmarks"]]
    return notes, machine


def rates(notes, mode="eager"):
    """Images per second of each way to sample, at its best batch, by its label, in one mode."""
    best = {}
    for row in notes:
        if row["mode"] == mode and row["task"] == "sampling":
            best[row["label"]] = max(row["images_per_s"], best.get(row["label"], 0))
    return best


def main_table(folder):
    """The README's table, a row a model, as its script samples by default."""
    quality, rate, body = read(folder / "quality.json"), rates(benchmarks(folder)[0]), []
    for name in ("real, held out", *MODELS):
        rows = seeds(quality, name)
        if rows:
            model = "real images"
            if name in MODELS:
                file = script(name).__name__.replace(".", "/") + ".py"
                model = f"[{name}](/{file})"  # from the root, in any folder's page
            cells = [model, rows[0].get("evaluations", "-"), significant(rate.get(name))]
            cells += [number(values(quality, name, "fd"), 1)]
            cells += [percent(values(quality, name, "obeyed")), bits(quality, name)]
            body.append([*cells, significant(rows[0].get("minutes"))])
    head = "model", "evaluations", "images/s", "FD", "text obeyed", "bits/dim"
    return table([*head, "minutes of training"], body)


def page_table(folder, page):
    """The README's table in the language of a page."""
    result = main_table(folder)
    for english, chinese in CHINESE.items() if "zh" in page else ():
        result = result.replace(english, chinese)
    return result


def models_table(quality):
    """As the scripts sample by default. FD, recall: samples for captions of the training set beside
    its images; replayed training images are the least that is possible, images that were held out
    what a perfect model has. Text obeyed: samples for held-out captions. ± is the deviation over
    three training seeds; rows without it were trained once."""
    body = []
    for label in ("real, held out", "training images replayed", *MODELS):
        rows = seeds(quality, label)
        if rows:
            cells = [label, rows[0].get("evaluations", "-")]
            cells += [number(values(quality, label, "fd"), 1), number(values(quality, label, "recall"))]
            cells += [percent(values(quality, label, "obeyed")), bits(quality, label)]
            cells += [significant(rows[0].get("minutes"))]
            body.append([*cells, significant(rows[0].get("parameters", 0) / 1e6 or None)])
    head = "model", "evaluations", "FD", "recall", "text obeyed", "bits/dim", "minutes"
    return table([*head, "parameters (M)"], body)


def steps_table(quality, rate):
    """Diffusion's samplers, dpm where no other is named, and the model that has learned to jump."""
    body = []
    for label in STEPS:
        rows = seeds(quality, label)
        if rows:
            cells = [label + ", 10 steps" * (label == "diffusion"), rows[0]["evaluations"]]
            cells += [number(values(quality, label, figure), 1 + (figure == "recall"))
                      for figure in ("fd", "recall")]
            cells += [percent(values(quality, label, "obeyed")), significant(rate.get(label))]
            body.append(cells)
    return table(["sampler", "evaluations", "FD", "recall", "text obeyed", "images/s"], body)


def speed_table(notes):
    """Images per second in a large batch, eager in fp32 (convolutions on CUDA in TF32) and, on CUDA,
    compiled in bf16; the share of the nearer ceiling, operations of a large product or convolution
    or bytes of a copy; milliseconds of a batch of one. Medians of five rounds or more."""
    best, ones, body = {}, {}, []
    for row in notes:
        if row["task"] == "sampling":
            if row["batch"] == 1:
                ones.setdefault(row["label"], row)
            else:
                best[row["label"], row["mode"]] = row
    for label, one in ones.items():
        eager, compiled = best.get((label, "eager"), {}), best.get((label, "compiled"), {})
        cells = [label, number(one["gflop_per_image"], 3), significant(eager.get("images_per_s"))]
        cells += [number(eager.get("share_of_ceiling")), significant(compiled.get("images_per_s"))]
        cells += [number(compiled.get("share_of_ceiling")), significant(1000 * one["seconds"])]
        body.append([*cells, significant(eager.get("peak_memory_mb"))])
    head = "sampler", "GFLOP an image", "images/s", "of the ceiling", "compiled", "of the ceiling"
    return table([*head, "ms for one", "memory (MB)"], body)


def others_table(folder):
    """Bound: three digits in colours, captions seen and unseen, all three as asked. StackedMNIST: how
    many of 1,000 modes 26,000 samples have. The last two columns are of emoji."""
    names = "bound", "stacked", "fashion-mnist/quality", "emoji/quality"
    bound, stacked, fashion, emoji = (read(folder / f"{name}.json") for name in names)
    bound, stacked, body = bound.get("rows", {}), stacked.get("rows", {}), []
    for name in ("real, held out", *MODELS):
        seen = bound.get(name, {})
        cells = [percent(seen.get(part, {}).get("all three")) for part in ("seen", "unseen")]
        cells += [stacked.get(name, {}).get("modes", "-")]
        for quality in (fashion, emoji):
            cells += [number(values(quality, name, "fd"), 1), percent(values(quality, name, "obeyed"))]
        if set(cells) != {"-"}:
            body.append([name, *cells])
    head = "model", "bound, seen", "bound, unseen", "StackedMNIST modes", "Fashion-MNIST FD"
    return table([*head, "obeyed", "emoji FD", "obeyed"], body)


def likelihood_table(quality):
    """Negative log-likelihood of held-out images in bits per value. The truth is below a bound, so
    that a bound says how good a model is at least."""
    body = []
    for name in MODELS:
        for row in seeds(quality, name)[:1]:
            if row.get("likelihood"):
                found = row["likelihood"]
                cells = number(found["bits_per_dim"], 3), number(found["standard_error"], 3)
                body.append([name, *cells, found["kind"], found["n"]])
    return table(["model", "bits/dim", "standard error", "kind", "images"], body)


def claims_table(quality, notes):
    """Each with p by Welch's t-test over three or more training seeds of both, of speed by the times
    of the rounds in which both were timed. One holds if p < 0.05."""
    body = []
    rounds = {}
    for row in notes:
        if row["mode"] == "eager" and row["batch"] > 1 and row.get("rounds"):
            rounds[row["label"]] = [row["batch"] / seconds for seconds in row["rounds"]]
    for statement, first, second, figure, sign in CLAIMS:
        a, b = (rounds.get(label) if figure == "images/s" else values(quality, label, figure)
                for label in (first, second))
        if not (a and b):
            continue
        write = significant if figure == "images/s" else number
        cells = [write(statistics.fmean(each) if figure == "images/s" else each) for each in (a, b)]
        told = "one seed"
        if min(len(a), len(b)) >= 3:
            better = sign * (statistics.fmean(a) - statistics.fmean(b)) > 0
            p = ttest_ind(a, b, equal_var=False).pvalue
            told = f"{p:.2g}" if better and p < 0.05 else f"{p:.2g}, does not hold"
        body.append([statement, f"{first}: {cells[0]}", f"{second}: {cells[1]}", figure, told])
    return table(["claim", "of first", "of second", "figure", "p"], body)


def where(result):
    """A line on where the figures of a file are from."""
    rows = [row for by_seed in result.get("rows", {}).values() for row in by_seed.values()]
    commits = {row["commit"] for row in rows if "commit" in row} or {result.get("commit")}
    text = f"Measured on {result.get('device')} with torch {result.get('torch')}, numpy"
    return f"{text} {result.get('numpy')}, commit {', '.join(sorted(map(str, commits)))}."


def results(folder):
    """All tables of a folder of results as one page."""
    quality, (notes, machine) = read(folder / "quality.json"), benchmarks(folder)
    parts = ["# Results", "Written by `python -m bench.report`; bench/quality.py defines figures."]

    def add(title, function, source, *given):
        made = function(*given)
        if made:
            text = function.__doc__.replace("\n    ", " ")
            parts.extend([f"## {title}", text, made, *([where(source)] if source else [])])

    add("Models", models_table, quality, quality)
    add("Steps", steps_table, quality, quality, rates(notes))
    add("Speed of sampling", speed_table, machine, notes)
    for path in sorted(folder.glob("*/speed*.json"))[:1]:
        notes_there, there = benchmarks(path.parent)
        title = f"Speed of sampling, one {there['device']}, networks of {path.parent.name}"
        add(title, speed_table, there, notes_there)
    add("Other data", others_table, None, folder)
    add("Likelihood", likelihood_table, quality, quality)
    add("Claims", claims_table, quality, quality, notes)
    for path in sorted(folder.glob("**/samples.png")):
        parts.append(f"![samples]({path.relative_to(folder.parent)})")
    return "\n\n".join(parts) + "\n"


def plot(folder):
    """quality_speed.png of a folder of results: a point is the mean over training seeds."""
    quality, rate = read(folder / "quality.json"), rates(benchmarks(folder)[0])
    fds = {label: values(quality, label, "fd") for label in quality.get("rows", {})}
    means = {label: statistics.fmean(fd) for label, fd in fds.items() if fd}
    curve = [label for label in STEPS if label.startswith("diffusion") and "ddpm" not in label]
    curve = [label for label in curve if "guidance" not in label]
    pictures.quality_against_speed(folder / "quality_speed.png", means, rate, curve)


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
