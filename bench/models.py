"""The models by name: their scripts, their runs, their samples."""

import importlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import prior

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "vae": "vae", "flow": "flow", "gan": "gan", "diffusion": "diffusion",
    "vae-gan": "hybrids", "flow-gan": "hybrids", "diffusion-gan": "hybrids",
    "autoregressive": "bench.autoregressive",
}  # fmt: skip
EXACT = ("flow", "flow-gan")  # in fp32 whatever is allowed, or the inverse is none


def script(name):
    """The model's script, as a module."""
    return importlib.import_module(SCRIPTS[name])


def train(name, out, *flags):
    """Trains the model in a process of its own, from where its run in `out` stands."""
    model = ["--model", name] if SCRIPTS[name] == "hybrids" else []
    resume = ["--resume"] if Path(out, "checkpoint.pt").exists() else []
    call = [sys.executable, "-m", SCRIPTS[name], "--train", "--out", str(out), *model, *resume]
    with subprocess.Popen([*call, *flags], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it got the signal too, and writes its checkpoint
            process.wait()
            raise SystemExit(130) from None
    if code:
        raise SystemExit(code)


def build(name, shape, n_words, device, **options):
    """The model with fresh weights, as its script builds it to sample."""
    module = script(name)
    if SCRIPTS[name] == "hybrids":
        options = {"model": name, **options}
    model = module.build(module.Config(**options), shape, n_words)
    model.name, model.device = name, torch.device(device)
    return model.to(device, memory_format=torch.channels_last).requires_grad_(False)


def load(name, out, device="cpu"):
    """The model of a run, its averaged weights, and the run's checkpoint."""
    module = script(name)
    run = module.load(Path(out, "checkpoint.pt"))
    known = {f.name for f in module.fields(module.Config)} - {"model", "device"}
    options = {key: value for key, value in run["config"].items() if key in known}
    model = build(name, run["shape"], len(run["vocabulary"]), device, **options)
    model.load_state_dict(run["ema"])
    return model, run


def evaluations(model, **options):
    """How often `sample` calls the network for one image, a guided step's two counted as two;
    options, e.g. steps, change the model's Config."""
    cfg = replace(model.cfg, **options)
    if model.name == "diffusion":
        return cfg.steps * (1 + (cfg.sampler == "heun")) * (1 + (cfg.guidance != 1))
    if model.name == "diffusion-gan":
        return cfg.denoising_steps
    return math.prod(model.latent_shape) if model.name == "autoregressive" else 1


def samples(model, run, captions, seed, z=None, batch=100, **options):
    """Images for captions, uint8 (N, C, H, W), as --sample --seed draws them, or decoded from the
    codes z (N, ...); options, e.g. steps, change the model's Config."""
    module, images, before = script(model.name), [], model.cfg
    model.cfg = replace(before, **options)
    words = module.to_words(captions, run["vocabulary"]).to(model.device)
    for i in torch.arange(len(captions), device=model.device).split(batch):
        seeds = prior.fold_in(seed, i)
        code = prior.normal(seeds, model.latent_shape) if z is None else z[i.cpu()].to(model.device)
        images.append(module.draw(model, code, model.embed(words[i]), seeds))
    model.cfg = before
    return torch.cat(images)


def cycle(captions, n):
    """The first n of the captions, over and over."""
    return [captions[i % len(captions)] for i in range(n)]


def spread(values):
    """Mean and standard deviation, as plain numbers."""
    values = np.asarray(values, float)
    return {"mean": float(values.mean()), "std": float(values.std(ddof=len(values) > 1))}
