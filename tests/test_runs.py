"""Runs: training learns, resumes to the bit, survives signals, shares its batch among ranks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import FLAGS, ROOT, script_of

import prior

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TRAIN = ["--train", "--train-steps", "7", "--checkpoint-every", "2", "--log-every", "3"]

# dies by SIGKILL at a moment: in an update, half-way through the second checkpoint's file,
# before its rename, or after it
DRIVER = """
import io, os, signal, sys, torch
import {name} as script
moment, calls = sys.argv[1], {{"save": 0, "replace": 0}}
real_save, real_replace, real_step = torch.save, os.replace, script.step

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def save(value, file):
    calls["save"] += 1
    if moment == "half" and calls["save"] == 2:
        buffer = io.BytesIO()
        real_save(value, buffer)
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        file.flush()
        die()
    real_save(value, file)

def replace(a, b):
    calls["replace"] += 1
    if moment == "before" and calls["replace"] == 2:
        die()
    real_replace(a, b)
    if moment == "after" and calls["replace"] == 2:
        die()

def step(model, ema, optimizers, x, words, seeds, k, cfg):
    if moment == "update" and k == 5:
        die()
    return real_step(model, ema, optimizers, x, words, seeds, k, cfg)

torch.save, os.replace, script.step = save, replace, step
script.main(sys.argv[2:])
"""


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def equal(a, b):
    """Are two trees of tensors, dicts and lists equal to the bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(folder, other):
    a, b = checkpoint(folder), checkpoint(other)
    for key in ("k", "model", "ema", "optimizers", "captions", "vocabulary", "metrics_length"):
        assert equal(a[key], b[key]), key
    assert (folder / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def test_resume_after_sigkill_is_bit_equal(model, script, run, data, tmp_path):
    run(*TRAIN, "--out", tmp_path / "whole")
    tiny = [*FLAGS[model], "--data", str(data), "--batch-size", "8", "--device", "cpu"]
    killed = {}
    for moment in ("update", "half", "before", "after"):
        argv = [moment, *tiny, *TRAIN, "--out", str(tmp_path / moment)]
        code = DRIVER.format(name=script.NAME)
        killed[moment] = subprocess.Popen(
            [sys.executable, "-c", code, *argv], cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL
        )
    for moment, process in killed.items():
        assert process.wait() == -signal.SIGKILL
        assert checkpoint(tmp_path / moment)["k"] == (4 if moment in ("after", "update") else 2)
        run(*TRAIN, "--out", tmp_path / moment, "--resume")
        assert_same_run(tmp_path / moment, tmp_path / "whole")


def test_sigterm_leaves_a_checkpoint_that_resumes_to_the_same_end(model, run, data, tmp_path):
    flags = ["--train", "--train-steps", "200", "--log-every", "5", "--checkpoint-every", "1000"]
    tiny = [*FLAGS[model], "--data", str(data), "--batch-size", "8", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, f"{script_of(model)}.py", *tiny, *flags, "--out", str(tmp_path / "cut")],
        cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    # a first line can only be there once the loop runs: it is written with the checkpoint
    log = tmp_path / "cut" / "metrics.jsonl"
    while process.poll() is None and not log.exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in out
    cut = checkpoint(tmp_path / "cut")
    assert 0 < cut["k"] < 200
    run(*flags, "--out", tmp_path / "whole")
    run(*flags, "--out", tmp_path / "cut", "--resume")
    whole, cut = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    for key in ("model", "ema", "optimizers"):
        assert equal(whole[key], cut[key])


RANKS = """
import sys, torch
import {name} as script
real, models = script.build, []

def build(*args):
    models.append(real(*args))
    with torch.no_grad():  # layers that start at zero would hide the gradients behind them
        for p in models[-1].parameters():
            p += 0.02 * torch.randn_like(p)
    return models[-1]

script.build = build
script.main(sys.argv[2:])
if script.RANK == 0:
    torch.save([p.grad for p in models[0].parameters()], sys.argv[1])
"""


def test_two_ranks_give_one_process_gradients(model, data, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(RANKS.format(name=script_of(model)))
    tiny = [*FLAGS[model], "--data", str(data), "--batch-size", "8", "--device", "cpu"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    grads, runs = {}, {}
    for ranks, launch in ((1, []), (2, launcher)):
        # at a rate of zero: Adam without momentum would amplify what rounding has left
        train = ["--train", "--train-steps", "2", "--lr", "0", "--out", str(tmp_path / str(ranks))]
        argv = [str(tmp_path / f"{ranks}.pt"), *tiny, *train]
        quiet = {"env": ENV, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        runs[ranks] = subprocess.Popen([sys.executable, *launch, str(driver), *argv], **quiet)
    for ranks, process in runs.items():
        assert process.wait() == 0
        grads[ranks] = torch.load(tmp_path / f"{ranks}.pt")
    assert all(g.abs().max() > 0 for g in grads[1] if g is not None and g.ndim > 1)
    for one, two in zip(grads[1], grads[2]):
        assert (one - two).abs().max() < 1e-6 + 1e-3 * one.abs().max()
    assert checkpoint(tmp_path / "1")["k"] == checkpoint(tmp_path / "2")["k"] == 2


def test_training_overfits_one_batch_and_the_caption_matters(model, script, data):
    module = script
    x, captions, _, _ = module.load_data(str(data))
    x, words = x[:4] / 127.5 - 1, module.to_words(captions[:4], ["bright", "dark", "left", "right"])
    argv = dict(zip(FLAGS[model][::2], FLAGS[model][1::2]))
    options = {key[2:]: int(value) if value.isdigit() else value for key, value in argv.items()}
    cfg = module.Config(**options, train_steps=300, dropout=0.0, lr=1e-2)
    torch.manual_seed(0)
    network = module.build(cfg, x.shape[1:], 4)
    optimizers = module.make_optimizers(network, cfg)
    for optimizer in optimizers:
        optimizer.found_inf = torch.zeros(())
    ema = module.copy.deepcopy(network).requires_grad_(False)
    losses = []
    for k in range(cfg.train_steps):
        seeds = prior.fold_in(prior.fold_in(0, k), torch.arange(4))
        losses.append(module.step(network, ema, optimizers, x, words, seeds, k, cfg)["loss"].item())
    if model == "diffusion-gan":
        pytest.skip("300 updates are too few for its four steps to obey a caption")
    if "gan" not in model:  # its loss is a game: it need not fall
        assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    z = prior.normal(torch.tensor([7]), network.latent_shape)
    seeds = torch.tensor([7])
    with torch.no_grad():
        left, right = (
            ema.sample(
                z, ema.embed(module.to_words([text], ["bright", "dark", "left", "right"])), seeds
            )
            for text in ("bright left", "bright right")
        )
    assert left[..., :4].mean() > left[..., 4:].mean()
    assert right[..., :4].mean() < right[..., 4:].mean()


def test_training_runs_in_bf16(model, script, run, monkeypatch):
    """As on CUDA: what must not be in bf16 turns it off, and gets no number that is."""
    monkeypatch.setattr(script, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    run("--train", "--train-steps", "2")
    assert checkpoint(run.out)["k"] == 2


@pytest.mark.parametrize("model", ["gan", "flow", "vae-gan", "flow-gan"], indirect=True)
def test_compiled_parts_train_and_sample(model, run, monkeypatch):
    """Gradient penalties are second derivatives, which compiled functions have none of; a flow is
    called both ways."""
    compiled, compile = [], torch.nn.Module.compile

    def light(self):
        compiled.append(self)
        compile(self, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", light)
    run("--train", "--train-steps", "2", "--compile")
    assert checkpoint(run.out)["k"] == 2
    assert not any(isinstance(part, torch.nn.ModuleList) for part in compiled)
    if "flow" in model:
        assert sum(type(part).__name__ in ("Local", "Dense") for part in compiled) == 6


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights(
    script, run, refused, monkeypatch
):
    real, models = script.step, []

    def step(model, ema, optimizers, x, words, seeds, k, cfg):
        models.append(model)
        x = x * float("nan") if k == 4 else x
        return real(model, ema, optimizers, x, words, seeds, k, cfg)

    monkeypatch.setattr(script, "step", step)
    line = refused("--train", "--train-steps", "9", "--checkpoint-every", "4", "--log-every", "100")
    assert "nan at update 5" in line
    kept = checkpoint(run.out)
    assert kept["k"] == 4
    # updates 5 to 8 were no-ops on the device; nothing was read in between
    assert equal(kept["model"], models[0].state_dict())
    lines = (run.out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4]


def test_the_run_folder(script, run, capsys):
    run("--train", "--train-steps", "5", "--log-every", "2", "--checkpoint-every", "3")
    files = {path.name for path in run.out.iterdir()}
    assert files == {"config.json", "metrics.jsonl", "checkpoint.pt", "samples.png", "loss.png"}
    assert json.loads((run.out / "config.json").read_text())["train_steps"] == 5
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 5] and "loss" in rows[0]
    before = checkpoint(run.out)
    (run.out / "samples.png").unlink()
    run("--train", "--resume")  # a finished run: redrawn, not trained
    assert (run.out / "samples.png").exists() and equal(
        before["model"], checkpoint(run.out)["model"]
    )
    run("--train", "--resume", "--train-steps", "6")
    assert checkpoint(run.out)["k"] == 6


def test_update_is_a_no_op_from_the_first_infinity_on(script):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], 0.1, fused=True)
    optimizer.found_inf = torch.zeros(())
    script.update(optimizer, p.sum(), 0.1)
    moved = p.detach().clone()
    assert not torch.equal(moved, torch.ones(3))
    for loss in ((p - p.detach()).sum() + float("inf"), p.sum() * float("nan"), p.sum()):
        script.update(optimizer, loss, 0.1)
        assert torch.equal(p.detach(), moved)


def test_update_is_a_clipped_adamw_step(script):
    p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    ours, theirs = (torch.optim.AdamW([w], 0.5, fused=True) for w in (p, q))
    ours.found_inf = torch.zeros(())
    for _ in range(3):
        norm = script.update(ours, 5 * p.square().sum(), 0.1)
        theirs.param_groups[0]["lr"] = 0.1
        gradient = 10 * q.detach()
        assert norm.item() == pytest.approx(gradient.norm().item(), rel=1e-5)
        q.grad = gradient / max(1.0, gradient.norm().item())
        theirs.step()
        assert torch.allclose(p, q, atol=1e-6)
