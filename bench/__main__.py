"""One fair comparison of all models: what is fast, what is good, what is true.

  python -m bench --quick          in minutes on a CPU: trains each model for a short, equal time
  python -m bench                  on the runs in runs/, which it trains where there are none
  python -m bench --data FILE.npz  speed and quality on other images, e.g. of bench.pack
  python -m bench --seconds 60 --width 128 --batch-size 512     the same at another scale

writes throughput.json, quality.json, equal.json (after as many seconds of training for all),
claims.json, stacked.json, unseen.json (bench/datasets.py), quality_speed.png and samples.png into
--out, row by row: an interrupted call goes on where it stopped, rows that are there are not
measured again.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from bench import claims, datasets, models, pack, report
from bench.quality import Judge
from diffusion import grid, load_data

SEEDS = (0, 1, 2)
QUICK_SECONDS = 30  # of training, for each model
EQUAL_SECONDS = 60  # the same for a table of a full call
STACKED = ("gan", "vae-gan", "flow-gan", "diffusion-gan")  # whose modes are counted
UNSEEN = ("vae", "flow", "gan", "diffusion")  # which are asked for captions never seen together
HEADLINE = {"diffusion": {"guidance": 1.0}}  # what is not the scripts' default where models compare


class Rows:
    """The rows of a result file by name, written after each, with the commit that measured it."""

    def __init__(self, path, device, progress, data=""):
        here = {**report.environment(device.type), "data": data}
        self.path, self.progress, self.commit = path, progress, here["commit"]
        self.data = {"data": "", **report.read(path)} if path.exists() else {**here, "rows": {}}
        for key in ("device", "torch", "data"):
            if self.data[key] != here[key]:
                fail(f"{path} has {key} {self.data[key]}, here is {here[key]}: take another --out")

    def add(self, name, measure, again=False, **stamp):
        """Puts measure() under name, unless it is there with the same stamp, e.g. updates."""
        row = self.data["rows"].get(name)
        if again or row is None or any(row.get(k) != v for k, v in stamp.items()):
            self.progress(f"{self.path.stem}: {name}")
            self.data["rows"][name] = {"commit": self.commit, **measure(), **stamp}
            report.write(self.path, self.data)
        return self.data["rows"][name]


def fail(message):
    print(f"bench: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def time_alone(name, *flags):
    """bench.throughput in a process of its own, whose peak memory is the model's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        call = [sys.executable, "-m", "bench.throughput", name, "--out", str(path), *flags]
        code = subprocess.run(call, cwd=report.ROOT, stdout=subprocess.DEVNULL).returncode
        if code:  # it has said why
            raise SystemExit(code)
        return report.read(path)


def train_all(names, folder, speed, seconds, progress, *flags):
    """Trains what has not been trained: to the end or, as its speed was measured, for seconds."""
    for name in names:
        row, out = speed[name]["training"], folder / name
        steps = row["train_steps"]
        if seconds:
            steps = min(steps, max(20, int(seconds / row["seconds"]) // 10 * 10))
        path = out / "checkpoint.pt"
        if path.exists():
            before = models.script(name).load(path)
            planned = before["config"]["train_steps"]
            if seconds and abs(planned - steps) < 0.25 * steps:
                steps = planned  # timed again, a step never takes quite as long
            if planned != steps:
                fail(f"{out} was trained for other than {steps} updates: take another --runs")
            if before["k"] == steps:
                continue
        progress(f"training: {name}, {steps} updates")
        models.train(name, out, "--train-steps", str(steps), "--n", "4", *flags)
        if models.script(name).load(path)["k"] < steps:
            fail("stopped; the same call goes on from here")


def score(measure):
    """Mean and spread over the sampling seeds of the figures that measure(seed) gives."""
    results = [measure(seed) for seed in SEEDS]
    row = {"n": results[0]["n"], "seeds": list(SEEDS)}
    for key, value in results[0].items():
        if isinstance(value, dict):
            row[key] = {k: models.spread([r[key][k] for r in results]) for k in value}
        elif key != "n":
            row[key] = models.spread([r[key] for r in results])
    return row


def bits_per_dim(model, run, judge, n):
    """What bits_per_dim says of held-out images, and what kind of statement that is."""
    kinds = {"vae": "IWAE bound", "flow": "dequantized bound", "flow-gan": "dequantized bound"}
    kinds |= {"diffusion": "ODE estimate", "autoregressive": "exact"}
    if model.name not in kinds:
        return None
    kind = kinds[model.name]
    n = min(n, len(judge.x_test))
    words = models.script(model.name).to_words(judge.captions_test[:n], run["vocabulary"])
    values = []
    for i in torch.arange(n).split(50):
        x = judge.x_test[i].to(model.device) / 127.5 - 1
        c, seeds = model.embed(words[i].to(model.device)), i.to(model.device)
        values += model.bits_per_dim(x, c, seeds).tolist()
    spread = models.spread(values)
    error = spread["std"] / n**0.5
    return {"bits_per_dim": spread["mean"], "standard_error": error, "n": n, "kind": kind}


def score_model(judge, model, run, captions, n_bits, options):
    """A row of quality.json; options, e.g. steps, change the model's Config."""

    def measure(seed):
        return judge.measure(models.samples(model, run, captions, seed, **options), captions)

    row = {**score(measure), "evaluations": models.evaluations(model, **options)}
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "bits_per_dim": None}
    if n_bits:
        row["bits_per_dim"] = bits_per_dim(model, run, judge, n_bits)
    return row


def quality(rows, judge, loaded, quick):
    """All rows of quality.json."""
    n = 200 if quick else 500
    baselines = {**judge.baselines(n), "independent pixels": claims.independent_pixels(judge, n)}
    for name, images in baselines.items():
        rows.add(name, partial(score, lambda seed, images=images: judge.measure(*images)))
    captions = models.cycle(judge.captions_test, n)
    for name, (model, run) in loaded.items():
        texts = captions[:40] if name == "autoregressive" and quick else captions
        settings = {name: {}}
        if name == "diffusion":
            counts = (20, 4) if quick else (50, 20, 10, 4, 1)
            settings = {f"diffusion dpm, {n}": {"steps": n, "guidance": 1.0} for n in counts}
            guided = f"diffusion dpm, 20, guidance {model.cfg.guidance:g}"
            settings[guided] = {"steps": 20}
        for label, options in settings.items():
            n_bits = 50 if quick else 500
            if name == "diffusion" and label != "diffusion dpm, 20":
                n_bits = 0  # one likelihood, of guidance 1
            measure = partial(score_model, judge, model, run, texts, n_bits, options)
            rows.add(label, measure, updates=run["k"])


def equal_seconds(rows, judge, names, folder, device):
    """All rows of equal.json: runs that were trained for EQUAL_SECONDS each."""
    captions = models.cycle(judge.captions_test, 500)
    for name in names:
        model, run = models.load(name, folder / name, device)
        measure = partial(score_model, judge, model, run, captions, 100, HEADLINE.get(name, {}))
        rows.add(name, measure, updates=run["k"])


def stacked(rows, judge, loaded):
    """All rows of stacked.json: how many of 1,000 modes 26,000 samples find."""
    texts = [""] * 26_000

    def real(seed):
        return torch.from_numpy(datasets.stacked(len(texts))["x"]).permute(0, 3, 1, 2)

    def score_modes(draw):
        return score(lambda seed: datasets.modes(judge, draw(seed)))

    rows.add("training images", partial(score_modes, real))
    for name, (model, run) in loaded.items():
        draw = partial(models.samples, model, run, texts)
        rows.add(name, partial(score_modes, draw), updates=run["k"])


def unseen(rows, judge, left_out, loaded):
    """All rows of unseen.json: three captions, left out of training and, beside it, not."""
    captions = models.cycle(list(datasets.UNSEEN), 300)
    for name in left_out:
        for label, (model, run) in (("left out", left_out[name]), ("trained on", loaded[name])):
            given = model, run, captions, 0, HEADLINE.get(name, {})
            measure = partial(score_model, judge, *given)
            rows.add(f"{name}, {label}", measure, updates=run["k"])


def picture(judge, loaded, out):
    """samples.png: a row of samples a model, under the same captions, at guidance 1."""
    captions = judge.captions_test[:10]
    columns = [(caption, []) for caption in captions]
    for name, (model, run) in loaded.items():
        drawn = models.samples(model, run, captions, 0, **HEADLINE.get(name, {}))
        for (_, images), x in zip(columns, drawn):
            images.append(x)
    columns = [(caption, torch.stack(images)) for caption, images in columns]
    grid(out / "samples.png", columns, list(loaded))


def all_claims(rows, judge, quality, rates, loaded, folder):
    """All rows of claims.json that the models at hand allow."""
    tables = [
        ("independent pixels", claims.pixels_are_dependent, quality),
        ("many right images", claims.many_right_images, quality),
    ]
    if {"autoregressive", "vae", "flow", "gan"} <= rates.keys():
        tables.append(("autoregression", claims.autoregression_is_slow, rates))
    if {"vae", "flow", "gan"} <= quality.keys():
        tables.append(("blurry", claims.vae_is_blurry, quality))
    if "gan" in quality and "gan" in rates:
        tables.append(("one shot", claims.gan_is_one_shot_and_sharp, quality, rates))
    if {"vae", "diffusion dpm, 20"} <= quality.keys():
        tables.append(("diffusion", claims.diffusion_is_best_and_slow, quality, rates))
    if claims.hybrid_pairs(quality):
        tables.append(("hybrids", claims.hybrids_combine, quality))
    for name, function, *given in tables:  # of other rows, which may be new
        rows.add(name, partial(function, *given), again=True)
    of_models = [
        ("exact", claims.flow_is_exact, "flow"),
        ("likelihood", claims.likelihood_is_exact, "flow"),
        *((f"code, {name}", claims.code_is_normal, name) for name in ("vae", "flow", "diffusion")),
        *((f"smooth, {name}", claims.paths_are_smooth, name) for name in ("vae", "gan")),
    ]
    for label, function, name in of_models:
        if name in loaded:
            model, run = loaded[name]
            rows.add(label, partial(function, model, run, judge), updates=run["k"])
    if "gan" in loaded:
        updates = loaded["gan"][1]["k"]
        rows.add("critic", partial(claims.critic_ends_at_a_half, folder / "gan"), updates=updates)
    for function in (
        claims.analytic_kl,
        claims.gradient_variance,
        claims.normal_against_uniform,
        claims.normal_sums,
    ):
        rows.add(function.__name__, function)


def stability(judge, folder, device):
    """Coverage of short GAN runs, with and without penalties, by training seed."""
    coverage, captions = {}, models.cycle(judge.captions_test, 500)
    for label, gamma in (("with penalties", 1), ("without", 0)):
        coverage[label] = []
        for seed in SEEDS:
            out = folder / f"gan-gamma-{gamma}-seed-{seed}"
            flags = {"--train-steps": 300, "--gamma": gamma, "--seed": seed, "--n": 4,
                     "--device": device.type}  # fmt: skip
            models.train("gan", out, *(str(v) for flag in flags.items() for v in flag))
            model, run = models.load("gan", out, device)
            x = models.samples(model, run, captions, 0)
            coverage[label].append(judge.measure(x, captions)["coverage"])
    return claims.gan_is_unstable(coverage)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="minutes; says what it skips")
    parser.add_argument("--data", default="", help="an .npz of images and captions [digits]")
    parser.add_argument("--seconds", type=float, help="of training, each [to the end; 30 if quick]")
    parser.add_argument("--width", help="of all models [their scripts']")
    parser.add_argument("--batch-size", help="in training [their scripts']")
    parser.add_argument("--out", type=Path, help="[results, in the folder of the runs]")
    parser.add_argument("--runs", type=Path, help="of the runs [runs, runs/quick, runs/DATA]")
    parser.add_argument("--models", nargs="+", choices=models.SCRIPTS, default=list(models.SCRIPTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.seconds is not None and args.seconds <= 0:
        fail(f"--seconds {args.seconds}: take more than 0")
    parts = ("runs", Path(args.data).stem, "quick" if args.quick else "")
    folder = (args.runs or Path(*parts)).resolve()
    data, out = str(Path(args.data).resolve()) if args.data else "", args.out or folder / "results"
    shape = tuple(load_data(data)[0].shape[1:])
    out.mkdir(parents=True, exist_ok=True)
    start, names = time.time(), args.models

    def progress(text):
        print(f"[{time.time() - start:4.0f} s] {text}", file=sys.stderr, flush=True)

    def rows_of(file):
        return Rows(out / file, device, progress, Path(data).name)

    def trained_on(what, make, wanted):
        """Those of the models that are wanted, trained on a data file that make() gives."""
        some, file = [name for name in names if name in wanted], folder / f"{what}.npz"
        if not file.exists():
            pack.save(file, make())
        train_all(some, folder / what, rates, None, progress, *flags, "--data", str(file))
        return {name: models.load(name, folder / what / name, device) for name in some}

    device, seconds = torch.device(args.device), args.seconds
    if args.quick:
        seconds = seconds or QUICK_SECONDS
    scale = {"width": args.width, "batch_size": args.batch_size}
    flags = [("--width", args.width), ("--batch-size", args.batch_size), ("--device", device.type)]
    flags = [text for flag in flags if flag[1] for text in flag]
    whole = not (seconds or data or args.width or args.batch_size)
    if args.quick:
        progress("reduced: 200 samples a seed, 40 of the autoregressive model")
    if seconds:
        progress("skipped: training to the end, samplers of more than 50 steps, compiled ones")
    if not whole:
        progress("skipped: the table at equal seconds of training, StackedMNIST, captions never")
        progress("         seen together, the claim on the stability of GANs")
    if data:
        progress("skipped: all claims, which are on the built-in digits")
    speed, hurry = rows_of("throughput.json"), ["--quick", "--no-compiled"] if seconds else []
    for name in names:
        timed = partial(time_alone, name, "--shape", *map(str, shape), *flags, *hurry)
        speed.add(name, timed, **scale)
    rates, given = speed.data["rows"], [*flags, *(["--data", data] if data else [])]
    train_all(names, folder, rates, seconds, progress, *given)
    progress("judge: a classifier of real images")
    judge = Judge(data)
    loaded = {name: models.load(name, folder / name, device) for name in names}
    rows = rows_of("quality.json")
    quality(rows, judge, loaded, args.quick)
    picture(judge, loaded, out)
    report.plot_quality_against_speed(out)
    if not data:
        truth = rows_of("claims.json")
        all_claims(truth, judge, rows.data["rows"], report.eager_rates(out), loaded, folder)
    if whole:
        train_all(names, folder / "equal", rates, EQUAL_SECONDS, progress, *flags)
        equal_seconds(rows_of("equal.json"), judge, names, folder / "equal", device)
        if "gan" in names:
            truth.add("stability", partial(stability, judge, folder, device))
        stacked(rows_of("stacked.json"), judge, trained_on("stacked", datasets.stacked, STACKED))
        left_out = trained_on("unseen", datasets.unseen, UNSEEN)
        unseen(rows_of("unseen.json"), judge, left_out, loaded)
    for name, (make, file) in report.TABLES.items():
        if (out / file).exists() and not file.startswith("fashion"):
            print(f"\n{name}\n\n{make(out)}")
    progress(f"done: {out}")


if __name__ == "__main__":
    main()
