"""How fast the models sample: `pytest bench`, with pytest-benchmark's own options.

  pytest bench --benchmark-json bench/results/speed.json     everything
  pytest bench --quick -k "vae or flow"                      some of it, and at most 50 steps

Weights are fresh ones: speed does not depend on them. Each way to sample is timed at batch 1 and in
a large batch, in at least five rounds, on CUDA also compiled and in bf16; each call waits for the
device.
"""

import functools
import timeit

import pytest
import torch
import torch.nn.functional as F

import prior
import vae
from bench import models
from vae import words_of

DEVICE, load_data = models.HERE, functools.cache(vae.load_data)
BATCHES = (1, 4096) if DEVICE == "cuda" else (1, 64)
MODES = ("eager", "compiled") if DEVICE == "cuda" else ("eager",)
COMPILED = {"Encoder": "forward", "Decoder": "forward", "Coupling": "affine"}

WAYS = {}  # to sample: label -> the model's name, options of its sample
for name in models.MODELS:
    for label, options in models.settings(name).items():
        WAYS[label] = name, options
for steps in (250, 1000):
    WAYS[f"diffusion, {steps} steps"] = "diffusion", {"steps": steps}


@functools.lru_cache(1)  # tests come model by model
def build(name, data, width, mode):
    """The model with fresh weights, for data and of a width, if any is given, else the digits and
    the script's, with its networks compiled if the mode says so."""
    torch.compiler.reset()
    args, (x, captions) = {"width": width} if width else {}, load_data(data)
    vocabulary = sorted(set().union(*map(words_of, captions)))
    model = models.fresh(name, tuple(x.shape[1:]), vocabulary, DEVICE, **args)
    for part in model.modules() if mode == "compiled" else ():
        method = COMPILED.get(type(part).__name__)
        if method:
            setattr(part, method, torch.compile(getattr(part, method)))
    return model


@functools.cache
def cost(label, data, width):
    """What the way to sample costs an image."""
    name, options = WAYS[label]
    return models.cost(build(name, data, width, "eager"), **options)


def waiting(call):
    """The call, and the wait for what it asks of a device."""
    return (lambda: (call(), torch.cuda.synchronize())) if DEVICE == "cuda" else call


@functools.cache
def ceilings(dtype):
    """Operations a second, of a large product or convolution, and bytes a second of a copy."""
    on = {"device": DEVICE, "dtype": dtype}
    side, n = (8192, 1024) if DEVICE == "cuda" else (2048, 64)
    a, weight = torch.randn(side, side, **on), torch.randn(256, 256, 3, 3, **on)
    h = torch.randn(n, 256, 16, 16, **on).to(memory_format=torch.channels_last)
    b, c = torch.randn(2, 2**26, device=DEVICE)
    torch.backends.cuda.matmul.allow_tf32 = True  # as in convolutions, by PyTorch's default
    product, convolution, copy = (
        min(timeit.repeat(waiting(call), number=1))
        for call in (lambda: a @ a, lambda: F.conv2d(h, weight, padding=1), lambda: c.copy_(b))
    )
    torch.backends.cuda.matmul.allow_tf32 = False
    operations = max(2 * side**3 / product, 2 * h.numel() * weight[0].numel() / convolution)
    return operations, 2 * b.nbytes / copy


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("label", WAYS)
def test_sampling(benchmark, label, mode, batch, pytestconfig):
    name, options = WAYS[label]
    if options.get("steps", 1) > 50 and pytestconfig.option.quick:
        pytest.skip("over 50 steps, and --quick")
    if mode == "compiled" and (label != name or batch == 1 or name == "autoregressive"):
        pytest.skip("compiled at the default settings, in a large batch, where there are parts")
    given = pytestconfig.option.data, pytestconfig.option.width
    notes = cost(label, *given)
    model = build(name, *given, mode)
    z = prior.sample(batch, *model.latent_shape, device=DEVICE)
    ids = torch.ones(batch, 3, dtype=torch.long, device=DEVICE)
    half = mode == "compiled" and not hasattr(model, "stacks")  # in bf16 an inverse is none

    @waiting
    @torch.no_grad()
    def call():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            model.sample(z, model.embed(ids), **options)

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    once = timeit.timeit(call, number=1)
    if once < 10:  # the first call is slower than the others
        once = timeit.timeit(call, number=1)
    budget = 1 if pytestconfig.option.quick or DEVICE == "cuda" else 4
    benchmark.pedantic(call, rounds=int(min(max(budget / once, 5), 100)))
    benchmark.extra_info.update(task="sampling", label=label, mode=mode, batch=batch)
    benchmark.extra_info["gflop_per_image"] = notes["gflop"]
    if not benchmark.stats:
        return
    times = benchmark.stats.stats
    rate = batch / times.median
    operations, moved = ceilings(torch.bfloat16 if half else torch.float32)
    bytes_of_images = 1e6 * notes["mb"] / (2 if half else 1)
    share = max(1e9 * rate * notes["gflop"] / operations, rate * bytes_of_images / moved)
    info = {"seconds": times.median, "rounds": times.data, "images_per_s": rate}
    if DEVICE == "cuda":
        info["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    benchmark.extra_info.update(info, evaluations=notes["evaluations"], share_of_ceiling=share)
