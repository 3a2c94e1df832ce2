"""The scripts' copied blocks: `python tests/copies.py` rewrites them from diffusion.py."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWNER = "diffusion.py"
COPIES = [name for name in ("vae.py", "flow.py", "gan.py", "hybrids.py") if (ROOT / name).exists()]
BLOCK = re.compile(r"^ *# >>> copied (\w+).*?^ *# <<< copied \1$", re.M | re.S)


def blocks(text):
    """The copied blocks of a script's text: their names and what stands between the markers."""
    return {match[1]: match[0] for match in BLOCK.finditer(text)}


def main():
    owned = blocks((ROOT / OWNER).read_text())
    for name in COPIES:
        text = (ROOT / name).read_text()
        fresh = BLOCK.sub(lambda match: owned[match[1]], text)
        if fresh != text:
            (ROOT / name).write_text(fresh)
            print(f"{name}: rewritten from {OWNER}")


if __name__ == "__main__":
    main()
