"""Writes the README's table from bench/results: `python -m bench.report`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- quality -->\n).*?(<!-- end -->)", re.S)
COLUMNS = ["images", "n", "digit", "weight", "slant", "coverage", "density", "nearest"]


def quality_table(results):
    """A Markdown table of the rows that bench.quality wrote, and where they were measured."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in results["rows"]:
        shares = [f"{100 * row[name]:.1f}%" for name in ("digit", "weight", "slant")]
        others = [f"{row[name]:.2f}" for name in ("coverage", "density", "nearest")]
        lines.append("| " + " | ".join([row["images"], str(row["n"]), *shares, *others]) + " |")
    return "\n".join([*lines, "", f"Measured on {results['where']}, one training seed.", ""])


def readme():
    """The README as its result files want it."""
    results = json.loads((ROOT / "bench/results/quality.json").read_text())
    text = (ROOT / "README.md").read_text()
    return TABLE.sub(lambda match: match[1] + quality_table(results) + match[2], text)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme())
