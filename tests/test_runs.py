"""Runs of each model: killed and resumed, on two ranks, alone in a folder, and what is refused."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from child import finish, start, succeed
from conftest import HYBRIDS, MODELS, ROOT, checkpoint, close, module_of, path_of, refusal, tiny

import prior

every_model = pytest.mark.parametrize("model", MODELS)


def equal(a, b):
    """Whether two trees of tensors, dicts and lists are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def logged(run):
    """What log.jsonl says of each update. The last line of an update counts."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(row.pop("seconds") >= 0 for row in rows)
    return {row["update"]: row for row in rows}


@every_model
def test_a_script_and_prior_alone_are_killed_and_resumed_and_end_bit_equal(model, data, tmp_path):
    """It dies half-way through a checkpoint, before one is renamed, and at some random moment."""
    script = Path(shutil.copy(path_of(model), tmp_path))
    shutil.copy(ROOT / "prior.py", tmp_path)
    flags = [*tiny(model, data), "--train", "--train-steps", "8", "--checkpoint-every", "2"]
    began = time.time()
    succeed(script, [*flags, "--out", "whole"], tmp_path)
    seconds = time.time() - began

    whole, cut = tmp_path / "whole", tmp_path / "runs" / model
    for hook in ("die_half_way_through_the_file", "die_before_the_rename"):
        process = start(script, flags, tmp_path, hook=hook)
        assert finish(process) == -9
        assert checkpoint(cut)["update"] == 2
        flags += ["--resume"]
    process = start(script, flags, tmp_path)
    process.join(random.uniform(0, seconds))
    process.kill()
    process.join()
    succeed(script, flags, tmp_path)

    truth, resumed = checkpoint(whole), checkpoint(cut)
    assert truth["update"] == 8
    for key in truth:
        assert equal(truth[key], resumed[key]), key
    assert logged(whole) == logged(cut)
    (cut / "samples.png").unlink()
    which = ["--model", model] if model in HYBRIDS else []
    succeed(script, [*which, "--sample", "--device", "cpu", "--images", "1"], tmp_path)
    assert content(cut).keys() == {"checkpoint.pt", "log.jsonl", "samples.png"}


@every_model
def test_two_ranks_have_equal_weights_and_the_mean_of_their_gradients(model, data, tmp_path):
    """Each rank's own gradient is that of a process alone which draws what the rank draws."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    processes, runs = [], ("0-of-1", "1-of-1", "0-of-2", "1-of-2")
    for run in runs:
        rank, ranks = run[0], run[-1]
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        argv = [*tiny(model, data), "--train", "--train-steps", "2", "--out", run]
        argv += ["--batch-size", 4 * int(ranks)]
        processes.append(start(path_of(model), argv, tmp_path, env, "record"))
    assert [finish(process) for process in processes] == [0] * 4, (tmp_path / "output").read_text()

    first, second, one, two = (torch.load(tmp_path / f"steps-{run}.pt") for run in runs)
    assert equal([list(step) for step in one], [list(step) for step in two])
    weights, gradients = one[0]
    assert equal(weights, first[0][0])
    assert not equal(first[0][1], second[0][1])
    for a, b, mean in zip(first[0][1], second[0][1], gradients, strict=True):
        largest = mean.abs().max().item()
        assert close(mean, (a + b) / 2, 0, 1e-6 + 1e-4 * largest)
    assert sum(mean.any().item() for mean in one[-1][1]) > 0.9 * len(gradients)
    assert checkpoint(tmp_path / "0-of-2")["update"] == 2


def test_an_import_defines_and_does_nothing(tmp_path):
    code = "import torch; old = torch.get_rng_state(); import vae, gan, diffusion, flow, hybrids; "
    code += "assert torch.equal(torch.get_rng_state(), old)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def call(model, *flags):
    """Runs a model's script in this process."""
    which = ["--model", model] if model in HYBRIDS else []
    module_of(model).main([str(flag) for flag in [*which, *flags]])


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """finished(model) is the folder of a finished run, which was trained once."""
    folder = tmp_path_factory.mktemp("finished")

    def run(model):
        if not (folder / model).exists():
            flags = [*tiny(model, data), "--train", "--train-steps", "2"]
            call(model, *flags, "--out", folder / model)
        return folder / model

    return run


@pytest.fixture
def copied(finished, tmp_path):
    """copied(model) is a copy of that folder, which a test may change."""
    return lambda model: Path(shutil.copytree(finished(model), tmp_path / "copy"))


def content(run):
    return {file.name: file.read_bytes() for file in run.iterdir()}


@every_model
def test_a_checkpoint_rebuilds_its_model(model, finished):
    network, kept = module_of(model).load(finished(model))
    assert kept["script"] == path_of(model).stem
    assert len(kept["captions"]) == 36
    assert equal(dict(network.state_dict()), dict(kept["ema"]))
    assert not equal(dict(kept["model"]), dict(kept["ema"]))
    assert kept["args"].items() <= network.args.items()
    assert type(network)(**network.args).args == network.args
    c = network.embed(network.tokenize(["bright left", "", "dark right"]))
    z = prior.sample(3, *network.latent_shape)
    x = network.sample(z, c)
    assert x.shape == (3, 1, 8, 8) and x.abs().max() <= 1
    if model not in ("gan", "flow-gan", "diffusion-gan"):
        assert network.encode(x, c).shape == z.shape
    loss, log = network.loss(x, c)
    assert loss.shape == () and log.keys() <= logged(finished(model))[2].keys()


@every_model
def test_resume_of_a_finished_run_draws_it_and_trains_nothing(model, copied, data):
    """The width is that of the checkpoint."""
    run = copied(model)
    (run / "samples.png").unlink()
    before = content(run)
    flags = "--train", "--resume", "--data", data, "--out", run, "--train-steps", "2"
    call(model, *flags, "--device", "cpu", "--images", "2")
    after = content(run)
    assert len(after.pop("samples.png")) > 1000
    assert after == before


@every_model
def test_what_loses_work_ends_before_training(model, copied, data, tmp_path, capsys):
    run, new = copied(model), tmp_path / "new"
    before = content(run)
    flags = [*tiny(model, data), "--train", "--train-steps", "4"]

    def error(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            call(model, *argv)
        return capsys.readouterr().err

    assert "--resume" in error(*flags, "--out", run)
    new.mkdir()
    (new / "log.jsonl").touch()  # of a run that has no checkpoint yet
    assert "--resume" in error(*flags, "--out", new)
    (new / "log.jsonl").unlink()
    assert "bench.pack" in error(*flags, "--out", new, "--data", tmp_path)
    assert "nearest known: left" in refusal(call, model, *flags, "--out", new, "--caption", "lft")
    draw = "--sample", "--device", "cpu", "--out"
    assert "checkpoint.pt" in refusal(call, model, *draw, new)
    assert "bright" in refusal(call, model, *draw, run, "--caption", "brigt")
    assert content(run) == before and content(new) == {}
    call(model)  # without a verb it prints the help
    assert "--train-steps" in capsys.readouterr().out


@every_model
def test_training_that_is_not_finite_is_not_saved(model, copied, data, monkeypatch):
    run = copied(model)
    before = content(run)
    flags = [*tiny(model, data), "--train", "--resume", "--out", run, "--train-steps", "12"]
    assert "lower --lr" in refusal(call, model, *flags, "--lr", "1e30")
    assert content(run) == before
    # the loss is finite still, its gradient is not, and a checkpoint is due
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    assert "lower --lr" in refusal(call, model, *flags, "--checkpoint-every", "3")
    assert content(run) == before


@every_model
def test_a_seed_decides_what_is_drawn_and_the_first_z_of_five_are_those_of_one(
    model, finished, tmp_path
):
    run, drawn = finished(model), {}
    for name, seed, images in (("a", 3, 5), ("b", 3, 2), ("c", 4, 5)):
        file = tmp_path / f"{name}.npz"
        flags = "--sample", "--device", "cpu", "--out", run, "--seed", seed, "--npz", file
        call(model, *flags, "--images", images)
        drawn[name] = np.load(file)["x"]
    assert not np.array_equal(drawn["a"], drawn["c"])
    if model != "diffusion-gan":  # which draws more noise, of another shape
        assert np.array_equal(drawn["a"][:2], drawn["b"])


def test_the_average_and_the_schedule_are_what_they_say(data, tmp_path, monkeypatch):
    """The learning rate rises over a twentieth of the updates and falls to 0; after update n the
    average of the weights goes on by 9 / (9 + n) of its way to them."""
    rates, weights, step = [], [], torch.optim.Adam.step

    def recorded(optimizer, *given):
        group = optimizer.param_groups[0]
        weights.append(group["params"][0].detach().clone())
        rates.append(group["lr"])
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    flags = [*tiny("vae", data), "--train", "--train-steps", "40", "--lr", "0.01"]
    call("vae", *flags, "--out", tmp_path / "run")
    progress = (np.arange(1, 41) - 0.5) / 40
    assert rates == pytest.approx(0.01 * np.minimum(20 * progress, 1 - progress))
    name = next(module_of("vae").load(tmp_path / "run")[0].named_parameters())[0]
    kept = checkpoint(tmp_path / "run")
    average, *after = *weights, kept["model"][name]
    for n, value in enumerate(after, 1):
        average = average + (value - average) * 9 / (9 + n)
    assert close(kept["ema"][name], average, 1e-4, 1e-6)


def test_compiled_parts_train_and_their_checkpoints_load_as_others(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda *given: function(*given))
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part: compiled.append(part))
    for model in MODELS:
        flags = [*tiny(model, data), "--train", "--compile", "--train-steps", "1"]
        call(model, *flags, "--out", tmp_path / model)
        module_of(model).load(tmp_path / model)
        names = checkpoint(tmp_path / model)["model"]
        assert not any("_orig_mod" in name for name in names)
    assert compiled
