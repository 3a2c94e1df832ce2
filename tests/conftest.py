"""What the tests share: the seven models, tiny images with captions, and ways to run a script."""

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
SCRIPTS = ("vae", "gan", "diffusion", "flow", "hybrids")
HYBRIDS = ("vae-gan", "flow-gan", "diffusion-gan")
MODELS = (*SCRIPTS[:4], *HYBRIDS)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # tiny networks are faster so


def path_of(model):
    """The script that has the model."""
    return ROOT / ("hybrids.py" if model in HYBRIDS else f"{model}.py")


def module_of(model):
    return importlib.import_module(path_of(model).stem)


def tiny(model, data):
    """The flags of a run that takes a second."""
    flags = f"--data {data} --device cpu --images 2 --width 8 --batch-size 8".split()
    if model == "diffusion":
        flags += ["--steps", "2"]
    if model in HYBRIDS:
        flags += ["--model", model]
    return flags


def refusal(call, *argv):
    """The one line with which a call ends the program."""
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    line = str(stop.value.code)
    assert not line.isdigit() and len(line.splitlines()) == 1
    return line


def close(a, b, rtol=1e-5, atol=1e-8):
    """Whether two numbers or tensors are equal to within a tolerance."""
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (a, b))
    return torch.allclose(a, b, rtol, atol)


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def fill_zeros(model):
    """Layers that start at zero hide what is behind them: they get random weights."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def halves(path, n):
    """A file of n images of 8 x 8, light in one half, and captions that say which and how much."""
    x = np.random.default_rng(0).integers(0, 40, (n, 8, 8), np.uint8)
    y = ["dark left", "bright left", "dark right", "bright right"] * (n // 4)
    for image, caption in zip(x, y):
        half = image[:, 4:] if caption.endswith(" right") else image[:, :4]
        half += np.uint8(200 if "bright" in caption else 90)
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return halves(tmp_path_factory.mktemp("data") / "data.npz", 40)


@pytest.fixture(autouse=True)
def same_start():
    """Each test begins with the same random numbers, and leaves torch as it was."""
    torch.manual_seed(0)
    yield
    plt.close("all")
    torch.set_default_dtype(torch.float32)
