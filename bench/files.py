"""Result files: where figures are from, written whole, read where they are."""

import json
import os
import platform
import subprocess

import numpy as np
import torch

from bench.models import ROOT


def environment(device="cpu"):
    """Where figures are from."""

    def git(call):
        return subprocess.getoutput(f"git -C '{ROOT}' {call} 2>/dev/null")

    commit = os.environ.get("COMMIT") or git("rev-parse --short HEAD") or "unknown"
    if git("status --porcelain -- . ':!bench/results' ':!*.md'"):
        commit += "-dirty"
    cores = f"{os.cpu_count()} cores of {platform.machine()}"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cores,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def write(path, data):
    """Writes JSON whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(data, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def read(path):
    """A result file, or {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}
