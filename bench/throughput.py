"""How fast: images per second and batch-1 latency of each model's own `sample`, and of its `step`.

  python -m bench.throughput MODEL [--quick] [--out FILE.json]

Weights are fresh ones: speed does not depend on them. Each figure is the median of repeats after a
warm-up; before and after a row the machine's own ceiling is timed, and a row whose ceilings fell,
or whose repeats scatter, is timed again: a busy neighbour slows a row more than the ceiling. FLOPs
are counted by torch.utils.flop_counter, bytes as what each eager operation reads and writes. The
share of the ceiling is of the nearer one: arithmetic, or memory, whose share is above 100% where
caches hold what is passed on or, compiled, operations are fused. The profile is of one call at the
best batch, not compiled, of at most 50 evaluations.
"""

import argparse
import copy
import itertools
import json
import os
import resource
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import prior
from bench import models
from bench.report import environment, write

SHAPE, WORDS = (1, 28, 28), 14  # of the built-in data
BATCHES = {"cpu": (1, 4, 16, 64, 256), "cuda": (1, 64, 1024, 4096)}


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call, device, repeats, warm_up=1):
    """Seconds that each of `repeats` calls took, after a warm-up."""
    times = []
    for _ in range(warm_up + repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times[warm_up:]


def allow_tf32(device, allowed):
    """Whether fp32 may be multiplied as TF32 on CUDA: the scripts allow it, a flow does not."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


def ceilings(device, dtype=torch.float32):
    """What the machine can do: TFLOP/s of a matrix product and of a 3x3 convolution as the models
    have it, GB/s of a copy. The best of a few tries."""
    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    batch = 512 if device.type == "cuda" else 32
    x = torch.randn(batch, 128, 14, 14, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3, device=device, dtype=dtype)
    w = w.to(memory_format=torch.channels_last)
    with torch.no_grad():
        product = min(seconds(lambda: a @ a, device, 5))
        convolution = min(seconds(lambda: torch.conv2d(x, w, padding=1), device, 5))
        big = torch.empty(2**26 if device.type == "cuda" else 2**24, device=device)
        clone = min(seconds(lambda: big.clone(), device, 5))
    return {
        "matmul_tflops": 2 * n**3 / product / 1e12,
        "convolution_tflops": 2 * batch * 14 * 14 * 128 * 128 * 9 / convolution / 1e12,
        "copy_gb_per_s": 2 * 4 * big.numel() / clone / 1e9,
    }


def gflops(call):
    """Floating-point operations of a call in billions, attention counted as matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, views not counted."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [v for v in tree_leaves((args, kwargs, out)) if isinstance(v, torch.Tensor)]
            self.total += sum(v.nbytes for v in tensors)
        return out


def megabytes(call):
    """Bytes that the operations of a call read and write, in millions."""
    with Traffic() as traffic:
        call()
    return traffic.total / 1e6


def profile(call, device, took, top=6):
    """What a call that takes `took` seconds spends them on: the operations, on CUDA kernels, that
    take most of the time, each with its share, and the share of it in which none ran."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or it tells when it starts and stops
    cuda = device.type == "cuda"
    wanted = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=wanted) as profiler:
        call()
        synchronize(device)
    times = Counter()
    for event in profiler.key_averages():
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU):
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[event.key[:80]] += spent / 1e6
    busy = sum(times.values())
    shares = {name: time / busy for name, time in times.most_common(top) if busy}
    return {"shares": shares, "idle": max(0.0, 1 - busy / took)}


class Guard:
    """Times a row again while other load on the machine disturbs it."""

    def __init__(self, device):
        self.device, self.best = device, 0.0

    def ceiling(self):
        value = ceilings(self.device)["matmul_tflops"]
        self.best = max(self.best, value)
        return value

    def time(self, call, repeats, tries=4):
        """Median and quartile distance in seconds of a call, and whether it was disturbed in all
        tries; then the fastest try counts."""
        results = []
        for _ in range(tries):
            before = self.ceiling()
            times = sorted(seconds(call, self.device, repeats))
            after = self.ceiling()
            median = statistics.median(times)
            scatter = times[3 * len(times) // 4] - times[len(times) // 4]
            calm = min(before, after) > 0.8 * self.best and scatter < 0.25 * median
            results.append((median, scatter))
            if calm:
                return {"seconds": median, "scatter": scatter, "disturbed": False}
        median, scatter = min(results)
        return {"seconds": median, "scatter": scatter, "disturbed": True}


def settings(name, quick):
    """Samplers and numbers of steps to time, the cheap ones first: (label, Config's options)."""
    if name != "diffusion":
        return [(name, {})]
    rows = [("dpm", n) for n in ((1, 4, 20) if quick else (1, 4, 10, 20, 50))]
    rows += [("euler", 20), ("heun", 20), ("ddpm", 50)]
    rows += [] if quick else [("dpm", 250), ("ddpm", 1000)]
    options = [{"guidance": 1.0, "sampler": sampler, "steps": n} for sampler, n in rows]
    return [(f"diffusion {o['sampler']}, {o['steps']}", o) for o in options]


def sampler(model, batch, captured=False, dtype=None):
    """A call that draws a batch of images, x in [-1, 1], or replays a CUDA graph that does; in
    fp32 or bf16, as the script does where no dtype is given."""
    device, bf16 = model.device, torch.bfloat16
    half = (dtype or dtype_of(model.name, device)) == bf16
    seeds = prior.fold_in(0, torch.arange(batch, device=device))
    z = prior.normal(seeds, model.latent_shape)
    c = model.embed(torch.ones(batch, 3, dtype=torch.long, device=device))

    def call():
        with torch.no_grad(), torch.autocast(device.type, bf16, enabled=half):
            return model.sample(z, c, seeds)

    if not captured:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = call()

    def replay(inputs=(z, c, seeds)):  # which the graph reads, so they must live as long
        graph.replay()
        return x

    return replay


def sampling_row(name, label, options, mode, dtype, guard, quick, shape, budget):
    """The figures of a sampler in a mode, eager, compiled or graph, after about `budget` seconds a
    batch size; options are of the model's Config."""
    device = guard.device
    model = models.build(name, shape, WORDS, device, **options)
    row = {"name": label, "model": name, "mode": mode, "evaluations": models.evaluations(model)}
    row |= {"dtype": "bf16" if dtype == torch.bfloat16 else "fp32", "batches": {}}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    plain = model
    if mode == "compiled":
        plain = copy.deepcopy(model)
        models.script(name).compile_parts(model)
    best, at, limit = 0.0, 1, budget * (20 if device.type == "cuda" else 1)
    for batch in BATCHES[device.type]:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        call = sampler(model, batch, mode == "graph", dtype)
        once = seconds(call, device, 1)[0]
        peak = memory(device)
        repeats = int(min(max(budget / 4 / once, 1 if once > budget else 3), 20))
        timed = guard.time(call, repeats, tries=2 if quick else 3)
        rate = batch / timed["seconds"]
        row["batches"][batch] = {**timed, "images_per_s": rate, "peak_memory_mb": peak}
        slower = rate < 0.9 * best
        if rate > best:
            best, at = rate, batch
        if once > limit or (batch > 16 and slower):
            break
    row |= {"latency": row["batches"][1]["seconds"], "images_per_s": best}
    row["peak_memory_mb"] = row["batches"][at]["peak_memory_mb"]
    row["gflops_per_image"] = gflops(sampler(plain, 2)) / 2
    row["megabytes_per_image"] = megabytes(sampler(plain, at, dtype=dtype)) / at
    allow_tf32(device, name not in models.EXACT)
    top = ceilings(device, dtype)
    allow_tf32(device, True)
    flops = max(value for key, value in top.items() if key.endswith("tflops"))
    needed = {
        "arithmetic": row["gflops_per_image"] / 1e3 / flops,
        "memory": row["megabytes_per_image"] / 1e3 / top["copy_gb_per_s"],
    }  # seconds an image
    row["bound"] = max(needed, key=needed.get)
    row["share_of_ceiling"] = best * needed[row["bound"]]
    if mode != "compiled" and row["evaluations"] <= 50:
        row["profile"] = profile(sampler(model, at, mode == "graph", dtype), device, at / best)
    print(json.dumps({k: v for k, v in row.items() if k != "batches"}), flush=True)
    return row


def memory(device):
    """Peak memory in MB: of the device since its last reset, or of this process until now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def dtype_of(name, device):
    """What sampling multiplies in: a flow's inverse must be exact."""
    with models.script(name).autocast(device):
        bf16 = torch.is_autocast_enabled(device.type) and name not in models.EXACT
    return torch.bfloat16 if bf16 else torch.float32


def training_row(name, device, shape, repeats, options):
    """Images per second of the script's own step, at its own batch size or that of the options."""
    module = models.script(name)
    model = models.build(name, shape, WORDS, device, **options).requires_grad_(True)
    cfg, ema = model.cfg, module.copy.deepcopy(model).requires_grad_(False)
    optimizers = module.make_optimizers(model, cfg)
    for optimizer in optimizers:
        optimizer.found_inf = torch.zeros((), device=device)
    seeds = torch.arange(cfg.batch_size, device=device)
    x = (256 * prior.uniform(seeds, shape)).floor() / 127.5 - 1
    words = torch.ones(cfg.batch_size, 3, dtype=torch.long, device=device)
    updates = itertools.count()

    def call():
        module.step(model, ema, optimizers, x, words, seeds, next(updates), cfg)

    call()  # the first may set parameters from the data
    timed = Guard(device).time(call, repeats)
    rate = cfg.batch_size / timed["seconds"]
    needed = cfg.train_steps * timed["seconds"]
    row = {"model": name, "batch_size": cfg.batch_size, "images_per_s": rate, **timed}
    return row | {"train_steps": cfg.train_steps, "training_seconds": needed}


def measure(name, device, quick, compiled=False, shape=SHAPE, budget=None, **options):
    """All rows of one model, with the machine's ceilings: yields the result as it grows. On a CPU
    its peak memory must be none of training's, nor must compiling keep the rest waiting."""
    budget, guard = budget or (2.0 if quick else 4.0), Guard(device)
    allow_tf32(device, True)  # as the scripts' find_device
    result = {"ceilings": ceilings(device), "training": None, "sampling": []}
    given, dtype = (guard, quick, shape, budget), dtype_of(name, device)
    modes = [("eager", dtype)]
    if device.type == "cuda":
        modes += [("graph", d) for d in dict.fromkeys((dtype, torch.float32))]
    for label, setting in settings(name, quick):
        for mode in modes:
            row = sampling_row(name, label, {**options, **setting}, *mode, *given)
            result["sampling"].append(row)
            yield result
    result["training"] = training_row(name, device, shape, 5 if quick else 20, options)
    yield result
    for label, setting in settings(name, quick) if compiled else ():
        if setting.get("steps", 1) <= 50:  # beyond, it is the same network
            row = sampling_row(name, label, {**options, **setting}, "compiled", dtype, *given)
            result["sampling"].append(row)
            yield result


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=models.SCRIPTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer settings and repeats")
    compiled = parser.add_argument("--compiled", action=argparse.BooleanOptionalAction)
    compiled.default, compiled.help = torch.cuda.is_available(), "also compiled [on a GPU]"
    shape = parser.add_argument("--shape", type=int, nargs=3, default=SHAPE)
    shape.help, shape.metavar = "of the images, sides divisible by 4 [1 28 28]", ("C", "H", "W")
    parser.add_argument("--width", type=int, help="of the model [its script's]")
    parser.add_argument("--batch-size", type=int, help="in training [its script's]")
    parser.add_argument("--seconds", type=float, help="for each batch size [2 if quick, else 4]")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    parser.error = lambda text: parser.exit(2, f"bench.throughput: error: {text}\n")
    args = parser.parse_args(argv)
    if min(args.shape) < 1 or args.shape[1] % 4 or args.shape[1] != args.shape[2]:
        parser.error(f"--shape {args.shape}: take square images with sides divisible by 4")
    if args.width is not None and (args.width < 32 or args.width % 16):
        parser.error(f"--width {args.width}: take a multiple of 16, 32 or more")
    if args.batch_size is not None and args.batch_size < 1 or (args.seconds or 1) <= 0:
        parser.error("--batch-size and --seconds: take more than 0")
    device = torch.device(args.device)
    given = args.model, device, args.quick, args.compiled, tuple(args.shape), args.seconds
    options = {"width": args.width, "batch_size": args.batch_size}
    options = {key: value for key, value in options.items() if value}
    here = {**environment(device.type), **options}
    for result in measure(*given, **options):
        if args.out:
            write(args.out, {**here, **result})


if __name__ == "__main__":
    main()
