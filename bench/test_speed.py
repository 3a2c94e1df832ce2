"""How fast the scripts sample and train: `pytest bench`, with pytest-benchmark's own options.

  pytest bench --benchmark-json bench/results/speed.json     everything, in under 20 minutes
  pytest bench --quick -k "vae or flow"                      some of it

Weights are fresh ones: speed does not depend on them. Sampling is timed at batch 1 and at large
batches, on CUDA also in bf16, compiled, and as a captured graph; each call waits for the device.
"""

import functools
import gc
import itertools
import threading
import timeit
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import prior
import vae
from bench import models, runs
from vae import words_of

DEVICE, load_data = models.HERE, functools.cache(vae.load_data)
BATCHES = (1, 4096) if DEVICE == "cuda" else (1, 64)
STEPS = 1, 2, 4, 10, 50, 250, 1000
COMPILED = {"Encoder": "forward", "Decoder": "forward", "Coupling": "affine"}
MODES = ("eager", "eager bf16", "compiled", "graph") if DEVICE == "cuda" else ("eager",)

WAYS = {}  # to sample: label -> the model's name, options of its sample
for name in models.MODELS:
    steps = STEPS if "sampler" in models.options(name) else (2, 4)
    for label, options in models.settings(name, steps).items():
        WAYS[label] = name, options
    for sampler in ("ddim", "dpm") if "sampler" in models.options(name) else ():
        WAYS[f"{name}, {sampler}"] = name, {"sampler": sampler}


def build(name, data, width):
    """The model with fresh weights, for data and of a width, if any is given, else the digits and
    the script's, on a device that has forgotten what ran before."""
    torch.compiler.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    args, (x, captions) = {"width": width} if width else {}, load_data(data)
    vocabulary = sorted(set().union(*map(words_of, captions)))
    return models.fresh(name, tuple(x.shape[1:]), vocabulary, DEVICE, **args)


@functools.cache
def cost(label, data, width):
    """What the way to sample costs an image."""
    name, options = WAYS[label]
    return models.cost(build(name, data, width), **options)


def drawing(model, batch, mode, options):
    """A call that draws a batch of images with the model's own sample."""
    z = prior.sample(batch, *model.latent_shape, device=DEVICE)
    ids = torch.ones(batch, 3, dtype=torch.long, device=DEVICE)

    @torch.no_grad()
    def call():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=mode == "eager bf16"):
            model.sample(z, model.embed(ids), **options)

    return call


def captured(call):
    """What a call asks of a GPU as one graph, which the host starts at once."""
    with torch.cuda.stream(torch.cuda.Stream()):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def stepwise(module, *argv):
    """A call that does one more update of the script's training, at five places of progress in
    turn. Training runs in a thread, and its bar waits before each update until it is asked for."""
    asked, ready = threading.Semaphore(0), threading.Semaphore(0)

    class Bar(list):
        def __iter__(self):
            for share in itertools.cycle((0.1, 0.7, 0.3, 0.9, 0.5)):
                ready.release()
                asked.acquire()
                yield 1 + int(share * len(self))

        def set_postfix(self, log):
            pass

    def bar(updates, **_):
        return Bar(updates)

    def one_more():
        asked.release()
        assert ready.acquire(timeout=300)

    with mock.patch.object(module if hasattr(module, "tqdm") else runs, "tqdm", bar):
        threading.Thread(target=module.main, args=[["--train", *argv]], daemon=True).start()
        assert ready.acquire(timeout=300)
    return one_more


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


def measure(benchmark, call, batch, config, **notes):
    """Times a call that makes a batch of images, for four seconds; one on CUDA, or with --quick."""
    budget = 1 if config.option.quick or DEVICE == "cuda" else 4
    long = batch * notes.get("evaluations", 0) > (20_000 if DEVICE == "cpu" else 1_000_000)
    call = waiting(call)
    once = budget if long else timeit.timeit(call, number=1)  # long work is not rehearsed
    if once < budget or notes["mode"] == "compiled":  # the first call is slower than the others
        once = timeit.timeit(call, number=1)
    training = notes["task"] == "training"
    rounds = 5 * budget if training else int(min(max(budget / once, 1), 100))
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=5 * training)
    benchmark.group = notes["task"]
    benchmark.extra_info.update(notes, batch=batch)
    if benchmark.stats:
        typical = benchmark.stats.stats.mean if training else benchmark.stats.stats.median
        benchmark.extra_info.update(seconds=typical, images_per_s=batch / typical)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("label", WAYS)
@pytest.mark.parametrize("mode", MODES)  # one after the other
def test_sampling(benchmark, label, batch, mode, pytestconfig):
    name, options = WAYS[label]
    given = pytestconfig.option.data, pytestconfig.option.width
    model = build(name, *given)
    if options.get("steps", 1) > 50 and pytestconfig.option.quick:
        pytest.skip("over 50 steps, and --quick")
    if mode != "eager" and (label != name or batch == 1 and mode != "graph"):
        pytest.skip("modes are compared at the default settings")
    if hasattr(model, {"eager bf16": "inverse", "compiled": "window"}.get(mode, "")):
        pytest.skip("in bf16 an inverse is none; value by value there are no parts to compile")
    parts = [part for part in model.modules() if type(part).__name__ in COMPILED]
    for part in parts if mode == "compiled" else ():
        method = COMPILED[type(part).__name__]
        setattr(part, method, torch.compile(getattr(part, method)))
    call = drawing(model, batch, mode, options)
    evaluations, gflop, mb, mb_of_weights = cost(label, *given).values()
    notes = {"task": "sampling", "label": label, "mode": mode, "evaluations": evaluations}
    bytes_of_a_value = 2 if mode == "eager bf16" else 4
    mb_per_image = (mb + mb_of_weights / batch) * bytes_of_a_value / 4
    notes |= {"gflop_per_image": gflop, "mb_per_image": mb_per_image}
    measure(benchmark, captured(call) if mode == "graph" else call, batch, pytestconfig, **notes)
    if DEVICE == "cuda" and mode != "graph":  # which keeps memory of its own
        benchmark.extra_info["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    rate = benchmark.extra_info.get("images_per_s", 0)
    operations, moved = ceilings(torch.bfloat16 if mode == "eager bf16" else torch.float32)
    shares = 1e9 * rate * gflop / operations, 1e6 * rate * notes["mb_per_image"] / moved
    benchmark.extra_info["share_of_ceiling"] = max(shares)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode in ("eager", "compiled")])
@pytest.mark.parametrize("name", models.MODELS)
def test_training(benchmark, name, mode, pytestconfig, tmp_path):
    """The mean update of the script's own training."""
    flags, given = models.flags(name), (pytestconfig.option.data, pytestconfig.option.width)
    argv = ["--device", DEVICE, "--images", "1"]
    if mode == "compiled":
        argv.append("--compile")
    for flag, value in zip(("--data", "--width"), given):
        if value:
            argv += [flag, str(value)]
    if name == "one-step":  # starts from a run of diffusion
        first = ["--train", *argv, "--train-steps", "1", "--out", f"{tmp_path}/diffusion"]
        models.script("diffusion").main(first)
    argv += ["--out", str(tmp_path / name), *models.choice(name)]
    update = stepwise(models.script(name), *argv)
    notes = {"task": "training", "label": name, "mode": mode, "updates": flags.train_steps}
    notes["parameters"] = sum(p.numel() for p in build(name, *given).parameters())
    measure(benchmark, update, flags.batch_size, pytestconfig, **notes)
