"""Do the fast ways draw the same images? Samples of a run in fp32, uncompiled and without TF32, are
held against the same in TF32, in bf16, compiled, and replayed from a CUDA graph; and, for a flow,
which is always in fp32, an image against the way there and back with TF32 on elsewhere.

  python -m bench.correct MODEL RUN [--out FILE.json]

Figures are differences in grey levels of 255, mean and largest, and whether the mean is under the
limit: 0.05 for what should be equal but for rounding, 2 for TF32 and bf16. A graph is held against
what it captures. Not for the autoregressive model: once a rounding moves one value over the edge of
its bin, all that follow are another image.
"""

import argparse
import copy
import json
from pathlib import Path

import torch

import prior
from bench import models, throughput
from bench.report import environment, write

LIMITS = {"compiled": 0.05, "graph": 0.05, "there and back": 0.05}
LIMITS |= {"tf32": 2.0, "bf16": 2.0, "compiled bf16": 2.0}


@torch.no_grad()
def check(model, run, n=32):
    """name -> mean and largest difference of n images in grey levels, and whether it is right."""
    device, module = model.device, models.script(model.name)
    words = module.to_words(models.cycle(run["captions"], n), run["vocabulary"]).to(device)
    seeds = prior.fold_in(0, torch.arange(n, device=device))
    z, c, bf16 = prior.normal(seeds, model.latent_shape), model.embed(words), torch.bfloat16

    def draw(model, dtype=torch.float32):
        with torch.autocast(device.type, bf16, enabled=dtype == bf16):
            return 127.5 * model.sample(z, c, seeds).float()

    throughput.allow_tf32(device, False)
    truth, pairs = draw(model), {}
    compiled = copy.deepcopy(model)
    module.compile_parts(compiled)
    pairs["compiled"] = truth, draw(compiled)
    throughput.allow_tf32(device, True)  # as the scripts' find_device
    if model.name in models.EXACT:
        x = (truth + 127.5).round() / 127.5 - 1
        pairs["there and back"] = 127.5 * x, 127.5 * model.sample(model.encode(x, c), c)
    else:
        pairs["bf16"] = truth, draw(model, bf16)
        pairs["compiled bf16"] = truth, draw(compiled, bf16)
    if device.type == "cuda":
        pairs["tf32"] = truth, draw(model)
        eager, replay = (throughput.sampler(model, n, captured) for captured in (False, True))
        pairs["graph"] = 127.5 * eager().float(), 127.5 * replay().float()
    rows = {}
    for name, (a, b) in pairs.items():
        difference = (a - b).abs()
        figures = {"mean": difference.mean().item(), "largest": difference.max().item()}
        rows[name] = {**figures, "right": figures["mean"] < LIMITS[name]}
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name in models.SCRIPTS if name != "autoregressive"]
    parser.add_argument("model", choices=names)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args(argv)
    model, run = models.load(args.model, args.run, args.device)
    rows = check(model, run)
    print(json.dumps(rows))
    if args.out:
        here = environment(model.device.type)
        write(args.out, {**here, "model": args.model, "updates": run["k"], "rows": rows})


if __name__ == "__main__":
    main()
