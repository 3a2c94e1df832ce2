"""The models by name: how they are built, trained, loaded and sampled; and the images left out."""

import importlib
import inspect
import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import prior
from vae import captioned_digits, load_data, words_of

ROOT = Path(__file__).parent.parent
HERE = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
LAYERS = nn.Linear, nn.Conv2d, nn.ConvTranspose2d
MODELS = {
    "vae": "vae.VAE",
    "gan": "gan.GAN",
    "diffusion": "diffusion.Diffusion",
    "flow": "flow.Flow",
    "vae-gan": "hybrids.VAEGAN",
    "flow-gan": "hybrids.FlowGAN",
    "diffusion-gan": "hybrids.DiffusionGAN",
    "autoregressive": "bench.autoregressive.Autoregressive",
    "one-step": "bench.one_step.OneStep",
}


def script(name):
    """The script of the model, as a module."""
    return importlib.import_module(MODELS[name].rpartition(".")[0])


def network(name):
    """The class of the model."""
    return getattr(script(name), MODELS[name].rpartition(".")[2])


def fresh(name, shape, vocabulary, device="cpu", **args):
    """The model with new weights, laid out in memory as its script does it."""
    model = network(name)(shape, vocabulary, **args)
    return model.to(device, memory_format=torch.channels_last).eval()


def choice(name):
    """The flag that chooses the model, where its script has several."""
    return ["--model", name] if script(name).__name__ == "hybrids" else []


def train(name, run, *argv):
    """Trains the model in a process of its own, from where its run stands."""
    call = [sys.executable, "-m", script(name).__name__, "--train", *choice(name)]
    if Path(run, "checkpoint.pt").exists():
        call.append("--resume")
    else:  # a run that ended before its first checkpoint begins anew
        Path(run, "log.jsonl").unlink(missing_ok=True)
    call += ["--out", str(Path(run).resolve()), *argv]
    code = subprocess.run(call, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    if code:
        raise SystemExit(f"training of {name} ended with exit code {code}")


def load(run, device="cpu"):
    """The model of a run, ready to sample, and its checkpoint, which gets a "name" in any case."""
    checkpoint = torch.load(Path(run, "checkpoint.pt"), "cpu", weights_only=True, mmap=True)
    name = checkpoint.get("name", checkpoint["script"])
    model, checkpoint = script(name).load(run, device)
    return model.requires_grad_(False).eval(), {**checkpoint, "name": name}


def minutes(run):
    """What a run's training took, by its log.jsonl: in each tenth the median time of an update, so
    that other work on the machine, and waiting for a resume, do not count."""
    rows = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    rates = []
    for a, b in pairwise(rows):
        if b["update"] > a["update"] and b["seconds"] > a["seconds"]:
            rates.append((b["seconds"] - a["seconds"]) / (b["update"] - a["update"]))
    tenths = [part for part in np.array_split(rates, 10) if len(part)]
    seconds = np.mean([np.median(part) for part in tenths]) if tenths else 0
    return float(rows[-1]["update"] * seconds / 60)


def options(name):
    """What the model's sample takes beside z and c: name -> default."""
    parameters = inspect.signature(network(name).sample).parameters.values()
    return {option.name: option.default for option in list(parameters)[3:]}


def plain(name):
    """The options with which the model samples from what it was trained to be, and no other."""
    return {option: 1.0 for option in ("guidance", "temperature") if option in options(name)}


def settings(name):
    """The ways to sample that are compared, the default first: label -> options of sample."""
    ways = {name: {}}
    if options(name) != options(name) | plain(name):
        ways[f"{name}, {next(iter(plain(name)))} 1"] = plain(name)
    if name == "diffusion":
        ways[f"{name}, ddpm, 20 steps"] = {"steps": 20, "sampler": "ddpm"}
    few = {"diffusion": (1, 2, 4, 20, 50), "one-step": (2, 4)}
    for n in few.get(name, ()):
        ways[f"{name}, {n} step{'s' * (n > 1)}"] = {"steps": n}
    return ways


@torch.no_grad()
def draw(model, captions, seed, batch=100, **options):
    """Images for captions, uint8 (N, C, H, W), as --sample --seed draws them."""
    device, images = next(model.parameters()).device, []
    torch.manual_seed(seed)
    for ids in model.tokenize(captions).split(batch):
        z = prior.sample(batch, *model.latent_shape, device=device)[: len(ids)]
        x = model.sample(z, model.embed(ids), **options)
        images.append((127.5 * (x + 1)).round().byte().cpu())
    return torch.cat(images)


def cost(model, **options):
    """What sample takes for one image: gflop; evaluations, where a guided step's two count as two;
    and mb that layers, the text's left out, read and write, without their weights."""
    calls, moved = Counter(), Counter()

    def count(layer, given, y):
        calls[layer] += 1
        moved["mb"] += (given[0].nbytes + y.nbytes) / 1e6

    layers = {part for part in model.modules() if isinstance(part, LAYERS)}
    layers -= set(model.embed.modules())
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with FlopCounterMode(display=False) as counter:
        draw(model, [""], 0, **options)
    for hook in hooks:
        hook.remove()
    return {"evaluations": max(calls.values()), "gflop": counter.get_total_flops() / 1e9, **moved}


def held_out(path=None):
    """The images that load_data leaves out, uint8 (N, C, S, S), and the words of their captions,
    without those that no training caption has."""
    x, captions = load_data(path)
    data = np.load(path) if path else captioned_digits()
    if "x_test" in data:
        x_test, y_test = data["x_test"], data["y_test"]
    else:
        n = len(data["x"])
        left_out = np.sort(np.random.default_rng(0).permutation(n)[: n // 10])
        x_test, y_test = data["x"][left_out], data["y"][left_out]
    x_test = torch.from_numpy(rearrange(x_test, "n h w ... -> n (...) h w"))
    same = x_test.dtype == torch.uint8 and x_test.shape[1:] == x.shape[1:]
    if not same or len(x_test) != len(y_test) or len(x_test) < 2:
        raise ValueError(f"{path}: take two or more held-out images like x, and as many texts")
    texts = y_test.reshape(len(x_test)).astype(str).tolist()
    known = set().union(*map(words_of, captions))
    return x_test, [" ".join(word for word in words_of(text) if word in known) for text in texts]


def evenly(n, length):
    """n of the places 0 to length - 1, evenly spread; some come again where n is larger."""
    return [i * length // n for i in range(n)]
