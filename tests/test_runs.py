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
from PIL import Image

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
    """Model and width are those of the checkpoint."""
    run = copied(model)
    (run / "samples.png").unlink()
    before = content(run)
    flags = "--train", "--resume", "--data", data, "--out", run, "--train-steps", "2"
    module_of(model).main([str(flag) for flag in (*flags, "--device", "cpu", "--images", "2")])
    after = content(run)
    assert len(after.pop("samples.png")) > 1000
    assert after == before


@every_model
def test_a_model_in_bfloat16_samples(model, finished):
    network, _ = module_of(model).load(finished(model))
    network.bfloat16()
    c = network.embed(network.tokenize(["bright left", ""]))
    x = network.sample(prior.sample(2, *network.latent_shape), c)
    assert x.shape == (2, 1, 8, 8) and x.isfinite().all() and x.abs().max() <= 1


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
def test_wrong_flags_are_refused_before_any_work(
    model, copied, data, tmp_path, capsys, monkeypatch
):
    run, new = copied(model), tmp_path / "new"
    before = content(run)
    here = str(torch.accelerator.current_accelerator(check_available=True))
    absent = "mps" if here == "cuda" else "cuda"
    wrong = [("--device", absent), ("--images", "many"), ("--out", run)]
    wrong += [("--width", "12"), ("--width", "0"), ("--lr", "nan")]
    numbers = "--train-steps", "--batch-size", "--lr", "--checkpoint-every", "--images"
    wrong += [(flag, value) for flag in numbers for value in ("0", "-1")]
    (tmp_path / "mine.npz").write_bytes(b"mine")
    wrong += [("--npz", tmp_path / name) for name in ("mine.npz", "no/where.npz", "no_suffix")]
    for flag, value in wrong:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(model, *tiny(model, data), "--train", "--out", new, flag, value)
        usage, line = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert ("--resume" if flag == "--out" else flag) in line
    monkeypatch.setattr(module_of(model), "which", lambda name: None)
    with pytest.raises(SystemExit):
        call(model, *tiny(model, data), "--train", "--out", new, "--compile")
    assert "C++ compiler" in capsys.readouterr().err
    line = refusal(call, model, *tiny(model, data), "--train", "--out", new, "--caption", "lft")
    assert "nearest known: left" in line
    draw = "--sample", "--device", "cpu", "--out", run, "--images", "2"
    line = refusal(call, model, *draw, "--caption", "brigt left")
    assert "brigt" in line and "bright" in line
    with pytest.raises(SystemExit):
        call(model, *draw, *("--caption", "left", "--caption", "right", "--caption", "dark"))
    assert "--caption" in capsys.readouterr().err
    assert content(run) == before
    assert not new.exists() and (tmp_path / "mine.npz").read_bytes() == b"mine"


@every_model
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(model, copied, data):
    run = copied(model)
    before = content(run)
    flags = [*tiny(model, data), "--train", "--resume", "--out", run, "--lr", "1e30"]
    assert "lower --lr" in refusal(call, model, *flags, "--train-steps", "12")
    assert content(run) == before
    flags += ["--checkpoint-every", "3"]  # the loss is finite still, the weights are not
    assert "lower --lr" in refusal(call, model, *flags, "--train-steps", "12")
    assert content(run) == before


@every_model
def test_resume_with_other_data_sizes_or_model_is_refused(model, copied, data, tmp_path):
    run = copied(model)
    before, own = content(run), np.load(data)
    x, y = own["x"], own["y"]
    np.savez(tmp_path / "words.npz", x=x, y=np.char.add(y, " new"))
    np.savez(tmp_path / "colour.npz", x=np.stack([x] * 3, 3), y=y)
    flags = "--train", "--resume", "--out", run, "--device", "cpu", "--train-steps", "4"
    others = ["--data", tmp_path / "words.npz"], ["--data", tmp_path / "colour.npz"], []
    for other in (*others, ["--data", data, "--width", "16"]):
        assert "--data" in refusal(call, model, *flags, *other)
    if model in HYBRIDS:
        other = HYBRIDS[HYBRIDS.index(model) - 1]
        assert "--model" in refusal(call, other, *flags, "--data", data)
    assert content(run) == before


def test_a_folder_with_a_log_alone_is_taken_and_one_that_cannot_be_is_told(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").touch()
    flags = [*tiny("vae", data), "--train"]
    with pytest.raises(SystemExit):
        call("vae", *flags, "--out", tmp_path / "run")
    assert "holds a run" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/run"):
        assert "file" in refusal(call, "vae", *flags, "--out", out)


def test_ctrl_c_ends_in_a_line_that_says_how_to_go_on(data, tmp_path, monkeypatch):
    flags = [*tiny("vae", data), "--train", "--train-steps", "8", "--checkpoint-every", "2"]
    saved, save = [], torch.save

    def interrupted(value, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(value, path))

    monkeypatch.setattr(torch, "save", interrupted)
    line = refusal(call, "vae", *flags, "--out", tmp_path / "run")
    assert "--train --resume" in line
    assert checkpoint(tmp_path / "run")["update"] == 4
    assert torch.get_default_device() == torch.device("cpu")


def test_a_disk_that_is_full_is_told_and_leaves_no_half_file(data, tmp_path, monkeypatch):
    def full(value, path):
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")  # torch's words for it

    monkeypatch.setattr(torch, "save", full)
    run = tmp_path / "run"
    flags = [*tiny("vae", data), "--train", "--train-steps", "2", "--out", run]
    assert "is the disk full?" in refusal(call, "vae", *flags)
    assert content(run).keys() == {"log.jsonl"}


@every_model
def test_a_seed_decides_what_is_drawn_and_the_first_z_of_five_are_those_of_one(
    model, finished, tmp_path
):
    run, drawn = finished(model), {}
    for name, seed, images in (("a", 3, 5), ("b", 3, 2), ("c", -1, 5), ("d", -2, 5)):
        file = tmp_path / f"{name}.npz"
        flags = "--sample", "--device", "cpu", "--out", run, "--seed", seed, "--npz", file
        call(model, *flags, "--images", images)
        drawn[name] = np.load(file)["x"]
    assert not np.array_equal(drawn["a"], drawn["c"])
    assert not np.array_equal(drawn["c"], drawn["d"])
    if model not in ("diffusion", "diffusion-gan"):  # which draw more noise, of another shape
        assert np.array_equal(drawn["a"][:2], drawn["b"])


def test_seeds_of_training_differ_also_below_0_and_one_update_trains(data, tmp_path):
    for seed in (-1, -2):
        flags = [*tiny("vae", data), "--train", "--train-steps", "1", "--seed", seed]
        call("vae", *flags, "--out", tmp_path / str(seed))
    a, b = (logged(tmp_path / str(seed))[1] for seed in (-1, -2))
    assert a["loss"] != b["loss"]
    torch.manual_seed(-1)
    weights = checkpoint(tmp_path / "-1")
    untrained = type(module_of("vae").load(tmp_path / "-1")[0])(**weights["args"])
    assert not equal(dict(weights["model"]), dict(untrained.state_dict()))


def test_the_average_and_the_schedule_are_what_they_say(data, tmp_path, monkeypatch):
    """The learning rate rises over a twentieth of the updates and falls to 0; the average of the
    weights after each update is that of all before, w_n / (w_n + 9) of n."""
    rates, weights = [], []
    step = torch.optim.Adam.step

    def recorded(optimizer, *given):
        result = step(optimizer, *given)
        rates.append(optimizer.param_groups[0]["lr"])
        weights.append(optimizer.param_groups[0]["params"][0].detach().clone())
        return result

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    flags = [*tiny("vae", data), "--train", "--train-steps", "40", "--lr", "0.01"]
    call("vae", *flags, "--out", tmp_path / "run")
    progress = (np.arange(1, 41) - 0.5) / 40
    assert rates == pytest.approx(0.01 * np.minimum(20 * progress, 1 - progress))
    average = None
    for n, value in enumerate(weights, 1):
        first = average is None
        average = value * 9 / (9 + n) if first else average + (value - average) * 9 / (9 + n)
        if first:
            start = value - 0  # the average began at the untrained weights
    names = [name for name, _ in module_of("vae").load(tmp_path / "run")[0].named_parameters()]
    kept = checkpoint(tmp_path / "run")["ema"][names[0]]
    share_of_start = np.prod([1 - 9 / (9 + n) for n in range(1, 41)])
    assert close(kept, average, 0, 2 * share_of_start * start.abs().max().item() + 1e-5)


def test_titles_of_any_text_are_drawn_without_a_word_and_pictures_in_full_size(tmp_path, recwarn):
    texts = ["红色的狐狸", "$5 and $7", "word " * 2500, "a \ud800 half", "भाषा", "🦊", ""]
    x = np.random.default_rng(0).integers(0, 256, (7, 128, 128, 3), np.uint8)
    np.savez(tmp_path / "data.npz", x=x, y=texts)
    flags = [*tiny("vae", tmp_path / "data.npz"), "--train", "--train-steps", "1"]
    call("vae", *flags, "--images", "16", "--out", tmp_path / "run")
    width, height = Image.open(tmp_path / "run/samples.png").size
    assert 8 * 128 < width < 2 * 8 * 128 and 2 * 128 < height < 4 * 128
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_stale_ranks_of_the_environment_are_ignored(finished, tmp_path):
    run = shutil.copytree(finished("vae"), tmp_path / "run")
    (run / "samples.png").unlink()
    flags = "--sample", "--device", "cpu", "--out", run, "--images", "1"
    process = start(path_of("vae"), flags, tmp_path, {"RANK": "1", "WORLD_SIZE": "2"})
    assert finish(process) == 0 and (run / "samples.png").exists()


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
