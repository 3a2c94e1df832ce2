"""All models under one measure: trains what is missing, draws, measures, and makes the tables.

  python -m bench                    each script's default length, hours on a CPU
  python -m bench --quick            a twelfth of the updates and fewer samples: minutes
  python -m bench --data FILE.npz --models vae gan --times 2
  python -m bench --quick --width 32       other flags go to the training scripts
  python -m bench --seeds 0 1 2            each model from three training seeds

writes quality.json, a row a way to sample and training seed, samples.png and quality_speed.png into
--out. An interrupted call goes on where it stopped: a run is resumed, and a row is measured again
if its run has other weights by now. Speed is `pytest bench`, whose JSON belongs into the same
folder. All seeds of one-step start from the one run of diffusion beside them.
"""

import argparse
from itertools import product
from pathlib import Path

import torch

from bench import files, likelihood, models, pictures, report
from bench.quality import Judge


def train(name, run, steps, *flags):
    """Trains the model up to an update, unless its run has come that far."""
    stands = 0
    if (run / "checkpoint.pt").exists():
        stands = models.load(run)[1]["update"]
    if stands < steps:
        print(f"training {name} from update {stands} to {steps}", flush=True)
        models.train(name, run, *flags, "--train-steps", str(steps), "--images", "8")


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag, names = parser.add_argument, list(models.MODELS)
    flag("--quick", action="store_true", help="200 samples, likelihood of 50 images")
    flag("--out", type=Path, help="of the results [bench/results, or a folder beside the runs]")
    flag("--runs", type=Path, help="of the runs [runs, runs/DATA, runs/quick]")
    flag("--data", type=Path, help="an .npz of images and captions [built-in digits]")
    flag("--seeds", type=int, nargs="+", default=[0], help="of training [0]")
    flag("--models", nargs="*", choices=names, default=names)
    flag("--caption", action="append", help="a column of samples.png; may be repeated")
    flag("--times", type=float, default=1.0, help="updates, as a multiple of the scripts' default")
    flag("--device", default=models.HERE)
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
    pairs = list(product(args.seeds, args.models))
    run_of = {pair: runs / (f"{pair[1]}-{pair[0]}" if pair[0] else pair[1]) for pair in pairs}

    flags = [*training, "--device", args.device, *(("--data", data) if data else ())]
    for seed, name in pairs:
        steps = models.flags(name, *flags).train_steps
        steps = int(args.times * steps / (12 if args.quick else 1))
        train(name, run_of[seed, name], steps, *flags, "--seed", str(seed))

    print("a classifier of real images learns to read")
    judge = Judge(data)
    n = len(judge.x_test)  # as many as there are, if these are enough for a distance
    if not 500 <= n <= 1000:
        n = 1000
    if args.quick:
        n = 200
    places = models.evenly(n, len(judge.x))
    known = [judge.captions[i] for i in places]
    places = models.evenly(min(n, 500), len(judge.x_test))
    asked = [judge.captions_test[i] for i in places]

    def is_there(label, seed, stamp):
        row = results["rows"].get(label, {}).get(str(seed), {})
        return stamp.items() <= row.items()

    def add(label, seed, row, stamp):
        row = {"commit": here["commit"], **row, **stamp}
        results["rows"].setdefault(label, {})[str(seed)] = row
        files.write(path, results)

    stamp = {"images": len(judge.x), "asked": n}
    for label, images in judge.baselines(n).items():
        if not is_there(label, 0, stamp):
            add(label, 0, judge.measure(*images), stamp)
    places, strips = models.evenly(10, len(asked)), []
    texts = args.caption or [asked[i] for i in places]
    for seed, name in pairs:
        run = run_of[seed, name]
        model, checkpoint = models.load(run, args.device)
        weights = float(f"{torch.nn.utils.get_total_norm(model.parameters()):.6g}")
        stamp = {"updates": checkpoint["update"], "asked": n, "weights": weights}
        if seed == args.seeds[0]:
            strips.append((name, models.draw(model, texts, 0) / 127.5 - 1))
        for label, options in models.settings(name).items():
            if is_there(label, seed, stamp):
                continue
            print(f"measuring {label}, training seed {seed}", flush=True)
            row = judge.likeness(models.draw(model, known, 0, **options), known)
            row |= judge.obedience(models.draw(model, asked, 1, **options), asked)
            row |= {"width": model.args.get("width"), **models.cost(model, **options)}
            parameters = sum(p.numel() for p in model.parameters())
            row |= {"minutes": models.minutes(run), "parameters": parameters}
            if label == name and seed == args.seeds[0]:
                given = judge.x_test, judge.captions_test, (judge.x, judge.captions)
                some = 50 if args.quick else 200
                row["likelihood"] = likelihood.measure(model, *given, some)
            add(label, seed, row, stamp)

    seen = set(judge.captions)
    titles = [text if text in seen else f"{text} (not seen)" for text in texts]
    pictures.samples_picture(out / "samples.png", titles, strips)
    report.plot(out)
    print(report.models_table(out, report.LONG))
    if out == report.RESULTS:
        report.main()


if __name__ == "__main__":
    main()
