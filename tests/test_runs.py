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
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
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


def test_torchrun_trains_and_draws_as_many_images_as_asked(data, tmp_path):
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    call += [ROOT / "diffusion.py", *tiny("diffusion", data), "--train", "--train-steps", "2"]
    call += ["--images", "8", "--npz", tmp_path / "a.npz", "--out", tmp_path / "run"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples = np.load(tmp_path / "a.npz")
    assert samples["x"].shape == (8, 8, 8, 1)
    assert len(set(samples["y"])) > 1  # captions of the data


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
    if model not in ("gan", "diffusion-gan"):
        assert network.encode(x, c).shape == z.shape
    loss, log = network.loss(x, c)
    assert loss.shape == () and log.keys() <= logged(finished(model))[2].keys()


@every_model
def test_resume_of_a_finished_run_draws_it_and_trains_nothing(model, copied, data):
    """The model is that of the checkpoint, whatever --model says."""
    run = copied(model)
    (run / "samples.png").unlink()
    before = content(run)
    other = HYBRIDS[HYBRIDS.index(model) - 1] if model in HYBRIDS else model
    call(other, *tiny(other, data), "--out", run, "--train-steps", "2", "--train", "--resume")
    after = content(run)
    assert len(after.pop("samples.png")) > 1000
    assert after == before


class Payload:
    """Unpickled, it would open a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@every_model
def test_what_is_no_run_of_the_script_is_refused_and_left_alone(model, finished, data, tmp_path):
    other = finished("gan" if model == "vae" else "vae") / "checkpoint.pt"
    good = (finished(model) / "checkpoint.pt").read_bytes()
    code = {**checkpoint(finished(model)), "captions": Payload(str(tmp_path / "ran"))}
    torch.save(code, tmp_path / "code")
    run = tmp_path / "run"
    flags = [*tiny(model, data), "--out", run, "--train-steps", "4"]
    for broken in (None, good[:-999], other.read_bytes(), (tmp_path / "code").read_bytes()):
        if broken:
            run.mkdir(exist_ok=True)
            (run / "checkpoint.pt").write_bytes(broken)
        for verbs in (["--sample"], ["--train", "--resume"]):
            assert str(run) in refusal(call, model, *flags, *verbs)
        assert run.exists() == bool(broken)
        assert not broken or content(run) == {"checkpoint.pt": broken}
    assert not (tmp_path / "ran").exists()


@every_model
def test_wrong_flags_are_refused_before_any_work(model, copied, data, tmp_path, capsys):
    run, new = copied(model), tmp_path / "new"
    before = content(run)
    here = str(torch.accelerator.current_accelerator(check_available=True))
    absent = "mps" if here == "cuda" else "cuda"
    wrong = {"--device": absent, "--width": "12", "--images": "many", "--out": run}
    for flag, value in wrong.items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(model, *tiny(model, data), "--train", "--out", new, flag, value)
        usage, line = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert ("--resume" if flag == "--out" else flag) in line
    flags = "--sample", "--device", "cpu", "--out", run, "--caption", "brigt left"
    line = refusal(call, model, *flags)
    assert "brigt" in line and "bright" in line
    assert content(run) == before
    assert not new.exists()


@every_model
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(model, copied, data):
    run = copied(model)
    before = content(run)
    flags = [*tiny(model, data), "--train", "--resume", "--out", run, "--lr", "1e30"]
    assert "not finite" in refusal(call, model, *flags, "--train-steps", "12")
    assert content(run) == before
