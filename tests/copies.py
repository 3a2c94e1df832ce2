"""The scripts' copied blocks: `python tests/copies.py` rewrites each from its owner."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWNERS = ("diffusion.py", "vae.py", "gan.py", "flow.py")  # the first that has a block owns it
SCRIPTS = (*OWNERS, "hybrids.py", "bench/autoregressive.py")
BLOCK = re.compile(r"^ *# >>> copied (\w+).*?^ *# <<< copied \1$", re.M | re.S)


def blocks(text):
    """The copied blocks of a script's text: their names and what stands between the markers."""
    return {match[1]: match[0] for match in BLOCK.finditer(text)}


def owned():
    """Each block as its owner has it."""
    found = {}
    for name in OWNERS:
        found = blocks((ROOT / name).read_text()) | found
    return found


def main():
    for name in SCRIPTS:
        text = (ROOT / name).read_text()
        fresh = BLOCK.sub(lambda match: owned()[match[1]], text)
        if fresh != text:
            (ROOT / name).write_text(fresh)
            print(f"{name}: rewritten from its owners")


if __name__ == "__main__":
    main()
