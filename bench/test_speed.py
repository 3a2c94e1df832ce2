"""How fast the scripts sample and train: `pytest bench`, with pytest-benchmark's own options.

  pytest bench --benchmark-json bench/results/speed.json     everything, in under 20 minutes
  pytest bench --quick -k "vae or flow"                      some of it

Weights are fresh ones: speed does not depend on them. Sampling is timed at batch 1 and at the best
batch; on CUDA also in bf16 and compiled, and each call waits for the device. Each benchmark's
extra_info has images_per_s, evaluations of the network and GFLOP an image, and on CUDA the peak
memory.
"""

import functools
import inspect
import time

import pytest
import torch

import prior
from bench import models

DEVICE = models.HERE
SHAPE = 1, 28, 28
WORDS = "bold thin slanted upright zero one two three four five six seven eight nine".split()
BATCHES = (256, 1024, 4096) if DEVICE == "cuda" else (16, 64)
STEPS = 1, 2, 4, 10, 50, 250, 1000
MODES = ("eager", "eager bf16", "compiled") if DEVICE == "cuda" else ("eager",)


WAYS = {}  # to sample: label -> the model's name, options of its sample
for name in models.MODELS:
    steps = STEPS if "sampler" in models.options(name) else (2, 4)
    for label, options in models.settings(name, steps).items():
        WAYS[label] = name, options
    for sampler in ("ddim", "dpm") if "sampler" in models.options(name) else ():
        WAYS[f"{name}, {sampler}"] = name, {"sampler": sampler}


def build(name, width):
    """The model with fresh weights, of its script's width unless another is given."""
    args = {"width": width} if width else {}
    return models.fresh(name, SHAPE, WORDS, DEVICE, **args)


def drawing(model, batch, mode, options):
    """A call that draws a batch of images with the model's own sample."""
    z = prior.sample(batch, *model.latent_shape, device=DEVICE)
    ids = torch.ones(batch, 3, dtype=torch.long, device=DEVICE)

    @torch.no_grad()
    def call():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=mode == "eager bf16"):
            model.sample(z, model.embed(ids), **options)

    return call


def seconds(call):
    """Seconds that a call takes, until the device has done what it asks for."""
    start = time.perf_counter()
    waiting(call)()
    return time.perf_counter() - start


def waiting(call):
    """The call, and the wait for what it asks of a device."""
    return (lambda: (call(), torch.cuda.synchronize())) if DEVICE == "cuda" else call


@functools.cache
def best_batch(name, width):
    """The batch size that gives most images a second, one step each where steps are an option."""
    model = build(name, width)
    options = {"steps": 1} if "steps" in models.options(name) else {}
    rates = {}
    for batch in BATCHES:
        call = drawing(model, batch, "eager", options)
        call()
        rates[batch] = batch / min(seconds(call) for _ in range(3))
    return max(rates, key=rates.get)


def measure(benchmark, call, batch, config, **notes):
    """Times a call that makes a batch of images, for about four seconds, or one with --quick."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    budget = 1 if config.option.quick else 4
    once = seconds(call)
    if once < budget:  # the first call is slower than the others
        once = seconds(call)
    benchmark.pedantic(waiting(call), rounds=int(min(max(budget / once, 1), 100)))
    benchmark.group = notes["task"]
    benchmark.extra_info.update(notes, batch=batch)
    if benchmark.stats:
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(seconds=median, images_per_s=batch / median)
    if DEVICE == "cuda":
        benchmark.extra_info["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", ["one", "best"])
@pytest.mark.parametrize("label", WAYS)
def test_sampling(benchmark, label, size, mode, pytestconfig):
    name, options = WAYS[label]
    width = pytestconfig.option.width
    model = build(name, width)
    if options.get("steps", 1) > 50 and pytestconfig.option.quick:
        pytest.skip("over 50 steps, and --quick")
    if mode != "eager" and (label != name or size == "one"):
        pytest.skip("modes are compared at the default settings")
    if mode == "eager bf16" and hasattr(model, "inverse"):
        pytest.skip("in bf16 an inverse is none")
    evaluations, gflop = models.cost(model, **options)
    for part in model.modules() if mode == "compiled" else ():
        if type(part).__name__ in ("Encoder", "Decoder"):
            part.compile()
        if type(part).__name__ == "Coupling":  # torch.nn's own Sequential would not be compiled
            part.affine = torch.compile(part.affine)
    batch = 1 if size == "one" else best_batch(name, width)
    notes = {"task": "sampling", "label": label, "mode": mode}
    notes |= {"evaluations": evaluations, "gflop_per_image": gflop}
    measure(benchmark, drawing(model, batch, mode, options), batch, pytestconfig, **notes)


@pytest.mark.parametrize("name", models.MODELS)
def test_training(benchmark, name, pytestconfig):
    """One update: the script's loss, its gradient, the optimizer's step and the average."""
    flags, width = models.flags(name), pytestconfig.option.width
    model, average = build(name, width).train(), build(name, width).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randint(256, (flags.batch_size, *SHAPE), device=DEVICE) / 127.5 - 1
    ids = torch.ones(len(x), 3, dtype=torch.long, device=DEVICE)
    # as the script does it
    half = DEVICE == "cuda" and "autocast" in inspect.getsource(models.script(name).train)

    def update():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            loss, _ = model.loss(x, model.embed(ids))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p.detach(), 0.005)

    notes = {"task": "training", "label": name, "mode": "eager", "updates": flags.train_steps}
    notes["parameters"] = sum(p.numel() for p in model.parameters())
    measure(benchmark, update, len(x), pytestconfig, **notes)
