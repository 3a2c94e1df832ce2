"""Scripts run as by `python SCRIPT ...`, in child processes, which may be killed or watched.

A child is forked from a process that has the packages loaded already, but none of the scripts."""

import math
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

HERE = Path(__file__).parent
PACKAGES = "child torch._dynamo matplotlib.pyplot mlxtend.data torch.distributed einops tqdm pytest"
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(PACKAGES.split())


def start(script, argv, folder, env=None, hook=None):
    """Starts a script in a folder; hook names a function below, which is called first."""
    argv = [str(a) for a in argv]
    process = processes.Process(target=run, args=(script, argv, folder, env or {}, hook))
    process.start()
    return process


def finish(process):
    """The exit code of a child process, once it has ended."""
    process.join(300)
    process.kill()
    process.join()
    return process.exitcode


def succeed(script, argv, folder):
    """Runs a script in a folder, to a good end."""
    code = finish(start(script, argv, folder))
    assert code == 0, (folder / "output").read_text()


def run(script, argv, folder, env, hook):
    """What the child does. Its output goes to the file output in the folder."""
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    os.chdir(folder)
    ours = "", str(HERE), str(HERE.parent)
    sys.path = [str(script.parent), *(path for path in sys.path if path not in ours)]
    sys.argv = [str(script), *argv]
    torch.set_num_threads(1)
    if hook:
        globals()[hook]()
    runpy.run_path(str(script), run_name="__main__")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way_through_the_file():
    """Once there is a checkpoint, the next one is cut in the middle, and the process dies."""
    save = torch.save

    def half(value, path):
        save(value, path)
        if path.with_name("checkpoint.pt").exists():
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = half


def die_before_the_rename():
    """Once there is a checkpoint, the process dies with the next one written but not in place."""
    replace = os.replace
    os.replace = lambda old, new: die() if new.exists() else replace(old, new)


def record():
    """Writes the weights and gradients before each step to the file steps-RANK-of-RANKS.pt. Nothing
    is clipped, and no layer starts at zero, which would hide the gradients behind it."""
    clip, steps = torch.nn.utils.clip_grad_norm_, []
    rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]

    def keep(optimizer, *_):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in weights]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in weights]
        steps.append((before, gradients))
        torch.save(steps, f"steps-{rank}-of-{ranks}.pt")

    register_optimizer_step_pre_hook(keep)
    torch.nn.utils.clip_grad_norm_ = lambda weights, limit: clip(weights, math.inf)
    torch.nn.init.zeros_ = lambda tensor: torch.nn.init.normal_(tensor, std=0.1)
