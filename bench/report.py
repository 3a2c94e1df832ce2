"""Tables and pictures of a folder's quality.json, speed*.json, gpu/: `python -m bench.report`."""

import re
import statistics

from scipy.stats import ttest_ind

from bench import pictures
from bench.files import number, percent, read, significant, table, where
from bench.models import MODELS, ROOT, script

RESULTS = ROOT / "bench/results"
PAGES = "README.md", "docs/README.zh.md"
REAL = "real, held out", "training images replayed"
CURVE = "diffusion, 1 step", "diffusion, 2 steps", "diffusion, 4 steps", "diffusion"
CURVE += "diffusion, 20 steps", "diffusion, 50 steps"
STEPS = [*CURVE, "diffusion, ddpm, 20 steps", "diffusion, guidance 1"]
STEPS += ["one-step", "one-step, 2 steps", "one-step, 4 steps"]
OTHERS = "bound", "stacked", "fashion-mnist/quality", "emoji/quality"
SHORT = "model", "evaluations", "images/s", "FD", "text obeyed", "bits/dim", "minutes"
LONG = "model", "evaluations", "FD", "recall", "text obeyed", "bits/dim", "minutes", "weights (M)"
CLAIMS = (  # statement, of which way to sample, against which, in what, and whether more is better
    ("a GAN is sharper than a VAE", "gan", "vae", "sharpness", 1),
    ("a critic makes a VAE sharper", "vae-gan", "vae", "sharpness", 1),
    ("a critic makes a flow better", "flow-gan", "flow", "fd", -1),
    ("a critic makes a flow more varied", "flow-gan", "flow", "recall", 1),
    ("a critic helps in four steps", "diffusion-gan", "diffusion, 4 steps", "fd", -1),
    ("a critic helps in four evaluations", "diffusion-gan", "diffusion, 2 steps", "fd", -1),
    ("ten steps beat one jump", "diffusion", "one-step", "fd", -1),
    ("one jump beats one plain step", "one-step", "diffusion, 1 step", "fd", -1),
    ("one jump is faster than ten steps", "one-step", "diffusion", "images/s", 1),
    ("value by value is slower than a GAN", "autoregressive", "gan", "images/s", -1),
    ("value by value is slower than ten steps", "autoregressive", "diffusion", "images/s", -1),
)


def seeds(quality, label):
    """The rows of a way to sample, one a training seed, of as many updates as the first."""
    rows = [*quality.get("rows", {}).get(label, {}).values()]
    return [row for row in rows if row.get("updates") == rows[0].get("updates")]


def values(quality, label, figure):
    """A figure for each training seed."""
    return [row.get(figure) for row in seeds(quality, label)]


def minutes(quality, label):
    """Of the first training seed's run, and of the diffusion model that one-step was before."""
    runs = (label, "diffusion") if label.startswith("one-step") else (label,)
    return sum(row.get("minutes", 0) for run in runs for row in seeds(quality, run)[:1])


def benchmarks(folder):
    """What was recorded beside each benchmark of a folder, and of the machine."""
    notes, machine = [], {}
    for path in sorted(folder.glob("speed*.json")):
        speed = read(path)
        machine = speed["machine_info"]
        notes += [benchmark["extra_info"] for benchmark in speed["benchmarks"]]
    return [note for note in notes if "images_per_s" in note], machine


def rates(notes):
    """Images per second of each way to sample, eager, at its best batch, by its label."""
    eager = [(note["images_per_s"], note["label"]) for note in notes if note["mode"] == "eager"]
    return {label: rate for rate, label in sorted(eager)}


def figures(quality, label, *names):
    """Cells with figures of a way to sample over its training seeds."""
    write = {"fd": lambda values: number(values, 1), "recall": number, "obeyed": percent}
    return [write[name](values(quality, label, name)) for name in names]


def models_table(folder, columns):
    """As the scripts sample by default. FD, recall: samples for captions of training beside the
    training images; held-out images have what a perfect model has. Text obeyed: samples for
    held-out captions. ± is the deviation over training seeds, where there are several. Bits/dim and
    minutes, here of one core, are the first seed's; one-step's minutes have those of diffusion."""
    notes, _ = benchmarks(folder)
    quality, rate, body = read(folder / "quality.json"), rates(notes), []
    for name in (*REAL, *MODELS):
        for row in seeds(quality, name)[:1]:
            cells = {"model": name, "evaluations": row.get("evaluations", "-")}
            if name in MODELS:
                file = script(name).__name__.replace(".", "/") + ".py"
                cells["model"] = f"[{name}](/{file})"  # from the root, in any folder's page
            cells["images/s"] = significant(rate.get(name))
            found = figures(quality, name, "fd", "recall", "obeyed")
            cells |= dict(zip(("FD", "recall", "text obeyed"), found))
            bits = row.get("likelihood")
            cells["bits/dim"] = f"{bits['bits_per_dim']:.2f} ({bits['kind']})" if bits else "-"
            cells["minutes"] = significant(minutes(quality, name))
            cells["weights (M)"] = significant(row.get("parameters", 0) / 1e6)
            body.append([cells[column] for column in columns])
    return table(columns, body)


def page(text, folder):
    """A page with the rows of the models' table under the head that it has, in its language."""
    _, _, *rows = models_table(folder, SHORT).splitlines()
    block = re.compile(r"(<!-- table -->\n(?:.*\n){2})[^<]*(?=<!-- /table -->)")
    return block.sub(lambda found: found[1] + "".join(f"{row}\n" for row in rows), text)


def steps_table(quality, rate):
    """Diffusion's samplers, dpm where no other is named, and the model that has learned to jump."""
    body = []
    for label in STEPS:
        for row in seeds(quality, label)[:1]:
            cells = figures(quality, label, "fd", "recall", "obeyed")
            title = label + ", 10 steps" * (label == "diffusion")
            body.append([title, row["evaluations"], *cells, significant(rate.get(label))])
    return table(["sampler", "evaluations", "FD", "recall", "text obeyed", "images/s"], body)


def speed_table(notes):
    """Images per second in a batch of 64, on CUDA of 4,096: eager in fp32 (convolutions on CUDA in
    TF32), compiled in bf16; the share of the nearer ceiling, operations of a large product or
    convolution or bytes of a copy; milliseconds for a batch of one. Medians of the rounds."""
    body = []
    found = {(note["label"], note["mode"], note["batch"] > 1): note for note in notes}
    for label in dict.fromkeys(note["label"] for note in notes):
        one, eager, compiled = (
            found.get((label, mode, large), {})
            for mode, large in (("eager", False), ("eager", True), ("compiled", True))
        )
        cells = [label, f"{(eager or one)['gflop_per_image']:.3f}"]
        for note in (eager, compiled):
            share = number([note.get("share_of_ceiling")])
            cells += [significant(note.get("images_per_s")), share]
        cells += [significant(1000 * one.get("seconds", 0))]
        body.append([*cells, significant(eager.get("peak_memory_mb"))])
    head = "sampler", "GFLOP an image", "images/s", "of the ceiling", "compiled", "of the ceiling"
    return table([*head, "ms for one", "memory (MB)"], body)


def others_table(bound, stacked, fashion, emoji):
    """Bound: three digits in colours, with captions seen and unseen, all three as asked. Modes: how
    many of StackedMNIST's 1,000 are in 26,000 samples. These and Fashion-MNIST: older networks, of
    the first commits below. Emoji held out are people alone: their FD ranks nothing, FD of images
    replayed is what is possible; what these obey are captions of training."""
    body = []
    for name in (*REAL, *MODELS):
        row = bound.get("rows", {}).get(name, {})
        parts = [row.get(part, {}) for part in ("seen", "unseen")]
        cells = [percent([part.get("all three")]) for part in parts]
        row = stacked.get("rows", {}).get(name, {})
        cells.append(row.get("modes", "-"))
        for quality in (fashion, emoji):
            cells += figures(quality, name, "fd", "obeyed")
        if set(cells) != {"-"}:
            body.append([name, *cells])
    head = "model", "bound, seen", "bound, unseen", "modes", "Fashion-MNIST FD", "obeyed"
    return table([*head, "emoji FD", "obeyed"], body)


def likelihood_table(quality):
    """Negative log-likelihood of held-out images in bits per value. The truth is below a bound, so
    that a bound says how good a model is at least."""
    found = {name: row.get("likelihood") for name in MODELS for row in seeds(quality, name)[:1]}
    body = [
        [name, f"{row['bits_per_dim']:.3f}", f"{row['standard_error']:.3f}", row["kind"], row["n"]]
        for name, row in found.items()
        if row
    ]
    return table(["model", "bits/dim", "standard error", "kind", "images"], body)


def claims_table(quality, notes):
    """p is of Welch's t-test over three or more training seeds of both, of speed over the rounds of
    each in one run. A claim or its reverse holds if p < 0.05."""
    body, rounds = [], {}
    for note in notes:
        if note["mode"] == "eager" and note["batch"] > 1:
            rounds[note["label"]] = [note["batch"] / seconds for seconds in note.get("rounds", ())]
    for statement, first, second, figure, sign in CLAIMS:
        a, b = rounds.get(first), rounds.get(second)
        if figure != "images/s":
            a, b = (values(quality, label, figure) for label in (first, second))
        if a and b and None not in a + b:
            told = "one seed"
            if min(len(a), len(b)) >= 3:
                t, p = ttest_ind(a, b, equal_var=False)
                holds = "holds" if sign * t > 0 else "the reverse holds"
                told = f"{p:.2g}; {holds if p < 0.05 else 'does not hold'}"
            middle = statistics.median if figure == "images/s" else statistics.fmean
            cells = [significant(middle(each)) for each in (a, b)]
            named = f"{first}: {cells[0]}", f"{second}: {cells[1]}"
            body.append([statement, figure, *named, told])
    return table(["claim", "figure", "first", "second", "p"], body)


def results(folder):
    """All tables of a folder of results as one page."""
    quality, (notes, machine) = read(folder / "quality.json"), benchmarks(folder)
    there, card = benchmarks(folder / "gpu")
    older = f", one {card.get('device')}, older networks ({card.get('commit')})"
    parts = ["# Results", "Written by `python -m bench.report`; bench/quality.py defines figures."]
    others = [read(folder / f"{name}.json") for name in OTHERS]
    rest = [note for note in notes if note["label"] in MODELS or note["label"] not in STEPS]
    for title, function, sources, *given in (
        ("Models", models_table, [quality], folder, LONG),
        ("Steps", steps_table, [quality, machine], quality, rates(notes)),
        ("Speed of sampling", speed_table, [machine], rest),
        (f"Speed of sampling{older}", speed_table, [card], there),
        ("Other data", others_table, others, *others),
        ("Likelihood", likelihood_table, [quality], quality),
        ("Claims", claims_table, [quality, machine], quality, notes),
    ):
        made = function(*given)
        if made:
            text = function.__doc__.replace("\n    ", " ")
            parts += [f"## {title}", text, made, where(*sources)]
    for path in sorted([*folder.glob("*.png"), *folder.glob("*/*.png")]):
        parts.append(f"![{path.stem}]({path.relative_to(folder.parent)})")
    return "\n\n".join(parts) + "\n"


def plot(folder):
    """FD against speed, a mean over training seeds each, and against minutes of training."""
    quality, rate = read(folder / "quality.json"), rates(benchmarks(folder)[0])
    ways = quality.get("rows", {})
    mean = {label: statistics.fmean(values(quality, label, "fd")) for label in ways}
    floors = {label: mean[label] for label in REAL if label in ways}
    speed, time = {}, {}
    for name in MODELS:
        curve = [label for label in (CURVE if name == "diffusion" else [name]) if label in ways]
        speed[name] = [(rate[label], mean[label]) for label in curve if label in rate]
        stages = [label for label in ways if label == name or label.startswith(f"{name}, update")]
        own = {row.get("device") for row in seeds(quality, name)[:1]}
        title = ", on ".join([name, *(own - {None, quality.get("device")})])
        time[title] = sorted((minutes(quality, label), mean[label]) for label in stages)
    for file, what, lines in ("speed", "images / s", speed), ("minutes", "minutes", time):
        lines = {name: points for name, points in lines.items() if points}
        if lines:
            pictures.quality_picture(folder / f"quality_{file}.png", lines, floors, what)


def main():
    plot(RESULTS)
    for path in [ROOT / name for name in PAGES if (ROOT / name).exists()]:
        path.write_text(page(path.read_text(), RESULTS))
    (ROOT / "bench/RESULTS.md").write_text(results(RESULTS))


if __name__ == "__main__":
    main()
