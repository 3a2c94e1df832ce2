"""How long the files are, and how full their lines: a reader's eye should rest.

Lines of code count, without docstrings, comments and blank lines: prose has room.
"""

import ast
import io
import tokenize
from collections import Counter

import pytest
from conftest import ROOT

CODE = {"prior": 30, "vae": 326, "gan": 343, "diffusion": 340, "flow": 445, "hybrids": 642}
FOLDERS = {"bench": 1810, "tests": 2191}
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


def length(path):
    return len(tokens_of_lines((ROOT / path).read_text()))


@pytest.mark.parametrize("script", CODE)
def test_code_lines_of_a_script(script):
    assert length(f"{script}.py") <= CODE[script]


@pytest.mark.parametrize("folder", FOLDERS)
def test_lines_of_a_folder(folder):
    lengths = {path: length(path) for path in python_files() if path.startswith(folder + "/")}
    assert sum(lengths.values()) <= FOLDERS[folder], lengths
    assert folder == "tests" or max(lengths.values()) <= 320, lengths


@pytest.mark.parametrize("path", python_files())
def test_lines_are_short_and_not_packed(path):
    text = (ROOT / path).read_text()
    assert [line for line in text.splitlines() if len(line) > 100] == []
    tokens = tokens_of_lines(text) or [0]
    assert round(sum(tokens) / len(tokens), 1) <= 13.5
    assert sum(n > 25 for n in tokens) <= len(tokens) / 15
