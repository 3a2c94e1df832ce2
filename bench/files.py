"""Result files, where their figures are from, and how figures are written in tables."""

import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

import torch

from bench.models import ROOT


def cpu():
    """The name of the processor, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    return f"{(names or [platform.machine()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


def environment(device="cpu"):
    """Where figures are from."""

    def git(call):
        return subprocess.getoutput(f"git -C '{ROOT}' {call} 2>/dev/null")

    commit = os.environ.get("COMMIT") or git("rev-parse --short HEAD") or "unknown"
    if git("status --porcelain -- . ':!bench/results' ':!*.md'"):
        commit += "-dirty"
    cores = f"{os.cpu_count()} cores of {cpu()}"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cores,
        "commit": commit,
        "torch": torch.__version__,
    }


def write(path, data):
    """Writes JSON whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(data, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def read(path):
    """A result file, or {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def where(*results):
    """A line on where the figures of files are from: of all their rows, where these tell it."""
    parts = []
    for result in results:
        rows = [row for by_seed in result.get("rows", {}).values() for row in by_seed.values()]
        parts += [result | row for row in rows if isinstance(row, dict)] or [result]
    keys = "device", "torch", "commit"
    found = [dict.fromkeys(str(part.get(key)) for part in parts) for key in keys]
    devices, versions, commits = map(" and ".join, found)
    return f"Measured on {devices} with torch {versions}, commit {commits}."


def number(values, digits=2, scale=1):
    """The mean of values, with their deviation if there are several; a dash if there is none."""
    if not values or None in values:
        return "-"
    text = f"{scale * statistics.fmean(values):.{digits}f}"
    return f"{text} ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def percent(values):
    """The same for shares."""
    text = number(values, 0, 100)
    return text if text == "-" else f"{text}%"


def significant(value):
    """A figure of three digits, or a dash."""
    digits = ",.0f" if value and value >= 100 else ".3g"
    return f"{value:{digits}}" if value else "-"


def table(head, rows):
    """A Markdown table; nothing where there are no rows."""
    if not rows:
        return ""
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
