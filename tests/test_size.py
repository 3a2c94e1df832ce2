"""How long the files are, and how full their lines. Lines of code are those without docstrings,
comments and blank lines. Nobody raises a number."""

import ast
import io
import tokenize
from collections import Counter

import pytest
from conftest import ROOT

SCRIPTS = {  # lines of code, and lines in all
    "prior": (30, 60),
    "vae": (280, 400),
    "gan": (295, 420),
    "diffusion": (295, 415),
    "flow": (355, 505),
    "hybrids": (540, 775),
}
FOLDERS = {"bench": 2000, "tests": 2300}  # lines in all
NO_CODE = "COMMENT NL NEWLINE INDENT DEDENT ENCODING ENDMARKER".split()


def python_files():
    """Each .py file of the repository, as a path from its root; hidden folders and runs are not."""
    paths = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.py"))]
    return [str(path) for path in paths if not path.parts[0].startswith((".", "runs"))]


def tokens_of_lines(text):
    """How many tokens each line of code has. Docstrings and comments are no code."""
    docstrings, counts = set(), Counter()
    for node in ast.walk(ast.parse(text)):
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if alone and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        code = tokenize.tok_name[token.type] not in NO_CODE
        if code and token.start[0] not in docstrings:
            counts[token.start[0]] += 1
    return list(counts.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_lines_of_a_script(script):
    text = (ROOT / f"{script}.py").read_text()
    code, lines = SCRIPTS[script]
    assert len(tokens_of_lines(text)) <= code
    assert len(text.splitlines()) <= lines


@pytest.mark.parametrize("folder", FOLDERS)
def test_lines_of_a_folder(folder):
    paths = [path for path in python_files() if path.startswith(folder + "/")]
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in paths}
    assert sum(lengths.values()) <= FOLDERS[folder], lengths
    assert folder == "tests" or max(lengths.values()) <= 250, lengths


@pytest.mark.parametrize("path", python_files())
def test_lines_are_short_and_not_packed(path):
    text = (ROOT / path).read_text()
    assert [line for line in text.splitlines() if len(line) > 100] == []
    tokens = tokens_of_lines(text) or [0]
    assert round(sum(tokens) / len(tokens), 1) <= 13.5
    assert sum(n > 25 for n in tokens) <= len(tokens) / 15
