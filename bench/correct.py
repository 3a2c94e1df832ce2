"""Do the fast ways draw the same images? Samples of a run in fp32, uncompiled and without TF32, are
held against the same in TF32, in bf16, compiled, and replayed from a CUDA graph; and, for a flow,
an image against the way there and back with TF32 on elsewhere.

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

LIMITS = {"compiled": 0.05, "graph": 0.05, "there and back": 0.05, "tf32": 2.0, "bf16": 2.0}


def allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@torch.no_grad()
def check(model, run, n=32):
    """name -> mean and largest difference of n images in grey levels, and whether it is right."""
    device, module = model.device, models.script(model.name)
    words = module.to_words(models.cycle(run["captions"], n), run["vocabulary"]).to(device)
    seeds = prior.fold_in(0, torch.arange(n, device=device))
    z, cuda = prior.normal(seeds, model.latent_shape), device.type == "cuda"

    def draw(model, dtype=torch.float32):
        half = dtype != torch.float32
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return 127.5 * model.sample(z, model.embed(words), seeds).float()

    allow_tf32(False)
    truth, pairs = draw(model), {}
    compiled = copy.deepcopy(model)
    module.compile_parts(compiled)
    pairs["compiled"] = truth, draw(compiled)
    pairs["bf16"] = truth, draw(model, torch.bfloat16)
    allow_tf32(cuda)  # as the scripts' find_device sets it
    if cuda:
        pairs["tf32"] = truth, draw(model)
        replay = throughput.sampler(model, n, captured=True)
        pairs["graph"] = throughput.sampler(model, n)() * 127.5, replay() * 127.5
    if model.name in ("flow", "flow-gan"):
        x, c = (truth + 127.5).round() / 127.5 - 1, model.embed(words)
        pairs["there and back"] = 127.5 * x, 127.5 * model.sample(model.encode(x, c), c)
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
