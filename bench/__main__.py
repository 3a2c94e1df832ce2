"""All models under one measure: trains what is missing, draws, measures, and makes the tables.

  python -m bench                    each script's default length, hours on a CPU
  python -m bench --quick            200 updates and 200 samples: minutes
  python -m bench --seeds 0 1 2      each model from three training seeds
  python -m bench --data FILE.npz --models vae gan

writes quality.json (a row for each way to sample and each training seed), samples.png and pictures
of FD into --out. --train-steps, --batch-size, --lr and --width go to the scripts. An interrupted
call goes on: runs are resumed, those without a checkpoint begin anew, a finished one draws its
samples.png anew, and a row is measured again if its run has other weights by now. With
--train-steps 1, runs are measured as they are, and so are copies of a run in its folders at-1000,
at-2000, ... With --data, the default way to sample is measured alone. Speed is `pytest bench`,
whose JSON belongs into the same folder.
"""

import argparse
from itertools import product
from pathlib import Path

import torch

from bench import files, likelihood, models, pictures, report
from bench.quality import Judge


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag, names = parser.add_argument, list(models.MODELS)
    flag("--quick", action="store_true", help="200 updates, 200 samples")
    flag("--out", type=Path, help="of the results [bench/results, or a folder beside the runs]")
    flag("--runs", type=Path, help="of the runs [runs, runs/DATA, runs/DATA/quick]")
    flag("--data", type=Path, help="an .npz of images and captions [built-in digits]")
    flag("--seeds", type=int, nargs="+", default=[0], help="of training [0]")
    flag("--models", nargs="*", choices=names, default=names)
    flag("--captions", type=Path, help="a text file with a column of samples.png a line")
    flag("--device", default=models.HERE)
    args, training = parser.parse_known_args(argv)
    data = str(args.data.resolve()) if args.data else None
    parts = ([args.data.stem] if data else []) + ["quick"] * args.quick
    runs = args.runs or models.ROOT.joinpath("runs", *parts)
    out = args.out or (runs / "results" if parts else report.RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    here = {**files.environment(args.device), "data": args.data.name if data else ""}
    path = out / "quality.json"
    results = files.read(path) or {**here, "rows": {}}
    for key in ("torch", "data"):
        if results.get(key) != here[key]:
            raise SystemExit(f"{path} has another {key}, {results.get(key)}: move it away")
    run_of = {}
    for seed, name in product(args.seeds, args.models):
        run_of[seed, name] = runs / (f"{name}-{seed}" if seed else name)

    flags = ["--device", args.device, *(("--data", data) if data else ())]
    flags += ["--train-steps", "200"] * args.quick + training
    for (seed, name), run in run_of.items():
        print(f"training {name}, seed {seed}", flush=True)
        models.train(name, run, *flags, "--seed", str(seed), "--images", "8")

    judge = Judge(data)
    n = len(judge.x_test)  # as many as there are, if these are enough for a distance
    n = 200 if args.quick else n if 500 <= n <= 1000 else 1000
    known = [judge.captions[i] for i in models.evenly(n, len(judge.x))]
    asked = [judge.captions_test[i] for i in models.evenly(min(n, 500), len(judge.x_test))]

    def is_there(label, seed, stamp):
        row = results["rows"].get(label, {}).get(str(seed), {})
        return stamp.items() <= row.items()

    def add(label, seed, row, stamp):
        row = {"device": here["device"], "commit": here["commit"], **row, **stamp}
        results["rows"].setdefault(label, {})[str(seed)] = row
        files.write(path, results)

    stamp = {"images": len(judge.x), "asked": n}
    for label, images in judge.baselines(n).items():
        if not is_there(label, 0, stamp):
            add(label, 0, judge.measure(*images), stamp)
    strips = []
    ten = [asked[i] for i in models.evenly(10, len(asked))]
    texts = args.captions.read_text().splitlines() if args.captions else ten
    for (seed, name), run in run_of.items():
        first = next(iter(results["rows"].get(name, [str(seed)])))  # whose likelihood is told
        stages = {run: {name: {}} if data else models.settings(name)}
        for file in run.glob("at-*/checkpoint.pt"):
            stages[file.parent] = {f"{name}, update {file.parent.name[3:]}": {}}
        for stage, ways in stages.items():
            model, checkpoint = models.load(stage, args.device)
            if stage == run and seed == args.seeds[0]:
                strips.append((name, models.draw(model, texts, 0) / 127.5 - 1))
            weights = float(f"{torch.nn.utils.get_total_norm(model.parameters()):.6g}")
            stamp = {"updates": checkpoint["update"], "asked": n, "weights": weights}
            for label, options in ways.items():
                if is_there(label, seed, stamp):
                    continue
                print(f"measuring {label}, training seed {seed}", flush=True)
                x = models.draw(model, known, 0, **options)
                row = judge.likeness(x) | {"obeyed_seen": judge.obedience(x, known)["obeyed"]}
                row |= judge.obedience(models.draw(model, asked, 1, **options), asked)
                row |= {"width": model.args.get("width"), **models.cost(model, **options)}
                parameters = sum(p.numel() for p in model.parameters())
                row |= {"minutes": models.minutes(stage), "parameters": parameters}
                if label == name and str(seed) == first:
                    given = judge.x_test, judge.captions_test, (judge.x, judge.captions)
                    row["likelihood"] = likelihood.measure(model, *given, 200)
                add(label, seed, row, stamp)

    titles = [text if text in judge.captions else f"{text} (not seen)" for text in texts]
    pictures.picture(out / "samples.png", strips, titles)
    report.plot(out)
    print(report.models_table(out, report.LONG))
    if out == report.RESULTS:
        report.main()


if __name__ == "__main__":
    main()
