"""All models under one measure: trains what is missing, draws, measures, and makes the tables.

  python -m bench                    each script's default length, hours on a CPU
  python -m bench --quick            a twelfth of the updates and fewer samples: minutes
  python -m bench --data FILE.npz --models vae gan --times 2
  python -m bench --quick --width 32       other flags go to the training scripts
  python -m bench --seeds                  also trains each model from two more seeds

writes quality.json, a row a way to sample, samples.png and quality_speed.png into --out. An
interrupted call goes on where it stopped: a run is resumed, and a row that is there for the same
number of updates and samples is not measured again. Speed is `pytest bench`, whose speed.json
belongs into the same folder, or for a GPU into gpu/ below it. All seeds of one-step start from the
one run of diffusion beside them.
"""

import argparse
from itertools import product
from pathlib import Path

from bench import files, likelihood, models, pictures, report
from bench.quality import Judge

SEEDS = 0, 1, 2


def train(name, run, steps, *flags):
    """Trains the model up to an update, unless its run has come that far."""
    stands = 0
    if (run / "checkpoint.pt").exists():
        stands = models.load(run)[1]["update"]
    if stands < steps:
        print(f"training {name} from update {stands} to {steps}", flush=True)
        models.train(name, run, *flags, "--train-steps", str(steps), "--images", "8")


def summary(measured):
    """Mean and spread of each figure of several measurements."""
    if any(each is None for each in measured):
        return None
    if not isinstance(measured[0], dict):
        return report.spread(measured)
    return {figure: summary([each[figure] for each in measured]) for figure in measured[0]}


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag, names = parser.add_argument, list(models.MODELS)
    flag("--quick", action="store_true", help="200 samples, likelihood of 50 images")
    flag("--out", type=Path, help="of the results [bench/results, or a folder beside the runs]")
    flag("--runs", type=Path, help="of the runs [runs, runs/DATA, runs/quick]")
    flag("--data", type=Path, help="an .npz of images and captions [built-in digits]")
    flag("--seeds", action="store_true", help="each model from two more training seeds, too")
    flag("--models", nargs="*", choices=names, default=names)
    flag("--caption", action="append", help="a column of samples.png; may be repeated")
    flag("--times", type=float, default=1.0, help="updates, as a multiple of the scripts' default")
    flag("--device", default=models.HERE, choices=sorted({models.HERE, "cpu"}))
    args, training = parser.parse_known_args(argv)
    data = str(args.data.resolve()) if args.data else None
    parts = ("runs", args.data.stem if args.data else "", "quick" if args.quick else "")
    runs = args.runs or models.ROOT.joinpath(*parts)
    out = args.out or (runs / "results" if args.quick or data else report.RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    here = {**files.environment(args.device), "data": args.data.name if data else ""}
    path = out / "quality.json"
    results = files.read(path) or {**here, "rows": {}}
    for key in ("device", "torch", "data"):
        if results.get(key) != here[key]:
            raise SystemExit(f"{path} has another {key}, {results.get(key)}: move it away")
    rows, n = results["rows"], 200 if args.quick else 500
    seeds = SEEDS if args.seeds else SEEDS[:1]

    def run_of(name, seed):
        return runs / (f"{name}-{seed}" if seed else name)

    flags = [*training, "--device", args.device]
    if data:
        flags += ["--data", data]
    for name, seed in product(args.models, seeds):
        steps = models.flags(name, *flags).train_steps
        steps = int(args.times * steps / (12 if args.quick else 1))
        train(name, run_of(name, seed), steps, *flags, *(("--seed", str(seed)) if seed else ()))

    print("a classifier of real images learns to read")
    judge = Judge(data)
    captions = [judge.captions_test[i] for i in models.evenly(n, len(judge.x_test))]

    def add(rows, label, row, **stamp):
        rows[label] = {"commit": here["commit"], **row, **stamp}
        files.write(path, results)

    for label, images in judge.baselines(n).items():
        if label not in rows:
            add(rows, label, summary([judge.measure(*images)]))
    texts, strips = args.caption or [captions[i] for i in models.evenly(10, n)], []
    for seed, name in product(seeds, args.models):
        model, checkpoint = models.load(run_of(name, seed), args.device)
        stamp = {"updates": checkpoint["update"], "n": n, "width": model.args.get("width")}
        draws = SEEDS[:1] if seed else SEEDS
        if seed:
            rows = results.setdefault("other_seeds", {}).setdefault(str(seed), {})
        else:
            strips.append((name, models.draw(model, texts, 0) / 127.5 - 1))
        for label, options in models.settings(name).items():
            if stamp.items() <= rows.get(label, {}).items():
                continue
            print(f"measuring {label}, training seed {seed}", flush=True)
            drawn = [models.draw(model, captions, draw, **options) for draw in draws]
            row = summary([judge.measure(x, captions) for x in drawn])
            row |= {"seeds": draws, "evaluations": models.cost(model, **options)["evaluations"]}
            if label == name and not seed:
                some = 50 if args.quick else 500
                given = judge.x_test, judge.captions_test
                row["bits_per_dim"] = likelihood.measure(model, *given, some)
            add(rows, label, row, **stamp)

    if strips:
        seen = set(judge.captions)
        titles = [text if text in seen else f"{text} (not seen)" for text in texts]
        pictures.samples_picture(out / "samples.png", titles, strips)
    report.plot(out)
    print(report.quality_table({"quality": results, "speed": files.read(out / "speed.json")}))
    print(report.main_table(out))
    if out == report.RESULTS:
        report.main()


if __name__ == "__main__":
    main()
