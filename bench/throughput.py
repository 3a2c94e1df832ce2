"""How fast: images per second and batch-1 latency of each model's own `sample`, and of its `step`.

  python -m bench.throughput MODEL [--quick] [--out FILE.json]

Weights are fresh ones: speed does not depend on them. Each figure is the median of
repeats after a warm-up; before and after a row the machine's own ceiling is timed, and a row whose
ceilings fell, or whose repeats scatter, is timed again: a busy neighbour slows a row more than the
ceiling. FLOPs are counted by torch.utils.flop_counter, bytes as what each eager operation reads and
writes. The share of the ceiling is of the nearer one: arithmetic, or memory, whose share is above
100% where caches hold what is passed on. What takes the time is profiled, one call a row.
"""

import argparse
import itertools
import json
import resource
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import prior
from bench import models
from bench.report import environment, write

SHAPE, WORDS = (1, 28, 28), 14  # of the built-in data


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
        copy = min(seconds(lambda: big.clone(), device, 5))
    return {
        "matmul_tflops": 2 * n**3 / product / 1e12,
        "convolution_tflops": 2 * batch * 14 * 14 * 128 * 128 * 9 / convolution / 1e12,
        "copy_gb_per_s": 2 * 4 * big.numel() / copy / 1e9,
    }


def gflops(call):
    """Floating-point operations of a call in billions, attention counted as matrix products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    torch.backends.mha.set_fastpath_enabled(fast)
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


def profile(call, device, top=6):
    """What a call spends its time on: the operations, on CUDA kernels, that take most of it, each
    with its share, and the share of the wall clock in which none ran."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    with torch.profiler.profile() as profiler:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        wall = 1e6 * (time.perf_counter() - start)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    times = {event.key[:80]: getattr(event, name) for event in events}
    busy = sum(times.values())
    shares = {key: times[key] / busy for key in sorted(times, key=times.get, reverse=True)[:top]}
    return {"shares": shares, "idle": max(0.0, 1 - busy / wall)}


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
    """Samplers and numbers of steps to time: (label, Config's options)."""
    if name != "diffusion":
        return [(name, {})]
    rows = [("dpm", n) for n in ((20, 4, 1) if quick else (250, 50, 20, 10, 4, 1))]
    rows += [("euler", 20), ("heun", 20), ("ddpm", 50), *([] if quick else [("ddpm", 1000)])]
    options = [{"guidance": 1.0, "sampler": sampler, "steps": n} for sampler, n in rows]
    return [(f"diffusion {o['sampler']}, {o['steps']}", o) for o in options]


def sampler(model, batch, captured=False):
    """A call that draws a batch of images, x in [-1, 1], or replays a CUDA graph that does."""
    device = model.device
    seeds = prior.fold_in(0, torch.arange(batch, device=device))
    z = prior.normal(seeds, model.latent_shape)
    c = model.embed(torch.ones(batch, 3, dtype=torch.long, device=device))
    module = models.script(model.name)

    def call():
        with torch.no_grad(), module.autocast(device):
            return model.sample(z, c, seeds)

    if not captured:
        return call
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = call()

    def replay():
        graph.replay()
        return x

    return replay


def memory(call, device):
    """Peak memory in MB: of the device during a call, or of this process until now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sampling_rows(name, device, quick, compiled, shape, budget):
    """Yields a dict for each setting and mode of the model, after about `budget` seconds each."""
    guard = Guard(device)
    modes = ["eager", *(["compiled"] if compiled else [])]
    modes += ["graph"] if device.type == "cuda" else []
    for label, options in settings(name, quick):
        for mode in modes:
            if mode == "compiled" and options.get("steps", 1) > 50:
                continue  # the same network as with fewer steps
            model = models.build(name, shape, WORDS, device)
            model.cfg = replace(model.cfg, **options)
            parameters = sum(p.numel() for p in model.parameters())
            if mode == "compiled":
                models.script(name).compile_parts(model)
            row = {"name": label, "model": name, "mode": mode}
            row["evaluations"] = models.evaluations(model)
            dtype = dtype_of(name, device)
            row |= {"dtype": "bf16" if dtype == torch.bfloat16 else "fp32"}
            row |= {"parameters": parameters, "batches": {}}
            if mode == "eager":
                work = gflops(sampler(model, 2)) / 2
            row["gflops_per_image"] = work
            batch, best, at = 1, 0.0, 1
            while batch <= (4096 if device.type == "cuda" else 256):
                call = sampler(model, batch, mode == "graph")
                once = seconds(call, device, 1)[0]
                repeats = int(min(max(budget / 4 / once, 1 if once > budget else 3), 20))
                timed = guard.time(call, repeats, tries=2 if quick else 3)
                rate = batch / timed["seconds"]
                row["batches"][batch] = {**timed, "images_per_s": rate}
                slower = rate < 0.9 * best
                if rate > best:
                    best, at = rate, batch
                if once > budget or (batch > 16 and slower):
                    break
                batch *= 4
            row["latency"], row["images_per_s"] = row["batches"][1]["seconds"], best
            best_call = sampler(model, at, mode == "graph")
            row["peak_memory_mb"] = memory(best_call, device)
            if mode == "eager":
                traffic = megabytes(best_call) / at
            row["megabytes_per_image"] = traffic
            top = ceilings(device, dtype)
            needed = {
                "arithmetic": work / 1e3 / max(v for k, v in top.items() if k.endswith("tflops")),
                "memory": traffic / 1e3 / top["copy_gb_per_s"],
            }  # seconds an image
            row["bound"] = max(needed, key=needed.get)
            row["share_of_ceiling"] = best * needed[row["bound"]]
            if row["evaluations"] <= 50 or name == "autoregressive":
                row["profile"] = profile(best_call, device)
            print(json.dumps({k: v for k, v in row.items() if k != "batches"}), flush=True)
            yield row


def dtype_of(name, device):
    """What sampling multiplies in: a flow's inverse must be exact."""
    with models.script(name).autocast(device):
        bf16 = torch.is_autocast_enabled(device.type) and name not in ("flow", "flow-gan")
    return torch.bfloat16 if bf16 else torch.float32


def training_row(name, device, shape, repeats):
    """Images per second of the script's own step, at its own batch size."""
    module = models.script(name)
    model = models.build(name, shape, WORDS, device).requires_grad_(True).train()
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


def measure(name, device, quick, compiled=False, shape=SHAPE, budget=None):
    """All rows of one model, with the machine's ceilings: yields the result as it grows."""
    budget = budget or (2.0 if quick else 4.0)
    if device.type == "cuda":  # as the scripts' find_device
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    result = {"ceilings": ceilings(device), "training": None, "sampling": []}
    # sampling first: on a CPU its peak memory must be none of training's
    for row in sampling_rows(name, device, quick, compiled, shape, budget):
        result["sampling"].append(row)
        yield result
    result["training"] = training_row(name, device, shape, 5 if quick else 20)
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
    parser.add_argument("--seconds", type=float, help="for each setting [2 if quick, else 4]")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    given = args.model, device, args.quick, args.compiled, tuple(args.shape), args.seconds
    here = environment(device.type)
    for result in measure(*given):
        if args.out:
            write(args.out, {**here, **result})


if __name__ == "__main__":
    main()
