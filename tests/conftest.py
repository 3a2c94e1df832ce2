"""What the tests share: the scripts, tiny data and the smallest flags of each model."""

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
HYBRID = ["--width", "32", "--embedding", "16", "--latent", "4", "--couplings", "3"]
FLAGS = {
    "diffusion": ["--width", "8", "--embedding", "16", "--steps", "2"],
    "vae": ["--width", "8", "--embedding", "16", "--latent", "4"],
    "gan": ["--width", "8", "--embedding", "16", "--latent", "4"],
    "flow": ["--width", "16", "--embedding", "16", "--couplings", "3"],
    "vae-gan": ["--model", "vae-gan", *HYBRID],
    "flow-gan": ["--model", "flow-gan", *HYBRID],
    "diffusion-gan": ["--model", "diffusion-gan", *HYBRID],
}
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # tiny models are faster so


def script_of(model):
    """The name of the script that has the model."""
    return "hybrids" if "-" in model else model


@pytest.fixture(params=FLAGS)
def model(request):
    """Each model's name in turn."""
    return request.param


@pytest.fixture
def script(model):
    """The model's script, as a module."""
    return importlib.import_module(script_of(model))


@pytest.fixture
def data(tmp_path):
    """40 images of 8x8, bright or dark, in halves, and captions that say which."""
    x = np.random.default_rng(0).integers(0, 60, (40, 8, 8), np.uint8)
    y = []
    for i in range(40):
        half, light = ("left", "right")[i % 2], ("bright", "dark")[i // 2 % 2]
        x[i, :, 4 * (i % 2) : 4 * (i % 2) + 4] += np.uint8(180 if light == "bright" else 80)
        y.append(f"{light} {half}")
    np.savez(tmp_path / "data.npz", x=x, y=np.array(y))
    return tmp_path / "data.npz"


@pytest.fixture
def run(model, script, data, tmp_path):
    """run("--train", ...) calls the script's main with tiny flags, in tmp_path / "run"."""

    def call(*argv):
        tiny = [*FLAGS[model], "--data", data, "--batch-size", "8"]
        options = ["--out", tmp_path / "run", "--device", "cpu", *tiny]
        # what the test gives comes last and wins
        return script.main([str(a) for a in [*options, *argv]])

    call.out = tmp_path / "run"
    return call


@pytest.fixture
def refused(run, capsys):
    """refused(...) is the one line with which the script refuses the call, exit code 2."""

    def call(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*argv)
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert stop.value.code == 2
        assert len(lines) == 1
        return lines[0]

    return call
