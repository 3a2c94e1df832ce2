"""How fast the models sample: `pytest bench`, with pytest-benchmark's own options.

  pytest bench --benchmark-json bench/results/speed.json [-k "vae or flow"]

Weights are fresh ones: speed does not depend on them. Each way to sample is timed at batch 1 and in
a large batch, in at least five rounds, on CUDA also compiled and in bf16.
"""

import functools
import timeit

import pytest
import torch
import torch.nn.functional as F

import prior
from bench import models, reader

DEVICE = models.HERE
WORDS = sorted(["bold", "thin", "slanted", "upright", *reader.DIGITS])
BATCHES = (1, 4096) if DEVICE == "cuda" else (1, 64)
MODES = ("eager", "compiled") if DEVICE == "cuda" else ("eager",)
COMPILED = {"Encoder": "forward", "Decoder": "forward", "Coupling": "affine"}

WAYS = {}  # to sample: label -> the model's name, options of its sample
for name in models.MODELS:
    for label, options in models.settings(name).items():
        WAYS[label] = name, options


@functools.lru_cache(1)  # tests come model by model
def build(name, mode):
    """The model with fresh weights, its networks compiled if the mode says so."""
    torch.compiler.reset()
    model = models.fresh(name, (1, 28, 28), WORDS, DEVICE)
    for part in model.modules() if mode == "compiled" else ():
        method = COMPILED.get(type(part).__name__)
        if method:
            setattr(part, method, torch.compile(getattr(part, method)))
    return model


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
def test_sampling(benchmark, label, mode, batch):
    name, options = WAYS[label]
    if mode == "compiled" and (label != name or batch == 1 or name == "autoregressive"):
        pytest.skip("compiled at the default settings, in a large batch, where there are parts")
    cost = models.cost(models.fresh(name, (1, 28, 28), WORDS), **options)
    model = build(name, mode)
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
    once = min(timeit.repeat(call, number=1, repeat=2))  # the first call is the slower
    benchmark.pedantic(call, rounds=int(min(max(2 / once, 5), 100)))
    benchmark.extra_info.update(label=label, gflop_per_image=cost["gflop"], mode=mode, batch=batch)
    if not benchmark.stats:
        return
    times = benchmark.stats.stats
    rate = batch / times.median
    operations, moved = ceilings(torch.bfloat16 if half else torch.float32)
    bytes_of_images = 1e6 * cost["mb"] / (2 if half else 1)
    share = max(1e9 * rate * cost["gflop"] / operations, rate * bytes_of_images / moved)
    info = {"seconds": times.median, "rounds": times.data, "images_per_s": rate}
    if DEVICE == "cuda":
        info["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    benchmark.extra_info.update(info, share_of_ceiling=share)
