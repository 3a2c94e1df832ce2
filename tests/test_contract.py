"""The house's rules: what a script may import, the order of its parts, its size, and its copies."""

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS
from copies import COPIES, OWNER, blocks

from bench import report

PARTS = "Config build make_optimizers step Text load_data train sample main".split()
# what a reader reads first is short; the copied rest is long, as data files, runs that survive
# kill -9, ranks, five verbs and a clear line for each mistake do not fit in less
LINES_OWN, LINES_COPIED, LINES_PRIOR = 250, 525, 90


def source(script):
    return (ROOT / f"{script.NAME}.py").read_text()


def test_line_budgets(script):
    copied = sum(len(block.splitlines()) for block in blocks(source(script)).values())
    assert copied <= LINES_COPIED
    own = len(source(script).splitlines()) - copied
    assert own <= (370 if script.NAME == "hybrids" else LINES_OWN)
    assert len((ROOT / "prior.py").read_text().splitlines()) <= LINES_PRIOR


def test_copies_are_equal_to_their_owner():
    owned = blocks((ROOT / OWNER).read_text())
    for name in COPIES:
        copied = blocks((ROOT / name).read_text())
        assert {"head", "config", "rest"} <= copied.keys()
        assert copied.items() <= owned.items()


def test_the_readme_tells_what_the_result_files_tell():
    assert (ROOT / "README.md").read_text() == report.readme()


def test_imports_are_packages_and_prior_alone(script):
    names = set()
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    names -= sys.stdlib_module_names
    assert names <= {"torch", "numpy", "einops", "matplotlib", "mlxtend", "tqdm", "prior"}


def test_parts_stand_in_reading_order(script):
    text = source(script)
    places = [
        min(
            text.find(f"\n{kind} {part}{end}") % len(text)
            for kind, end in (("def", "("), ("class", ""), ("", " ="))
        )
        if part != "build"
        else text.index("\nbuild = ")
        for part in PARTS
    ]
    assert places == sorted(places)


def test_importing_defines_and_does_nothing_else(script):
    for node in ast.parse(source(script)).body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'"
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant)
        else:
            assert isinstance(
                node, (ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef)
            )
    heavy = "matplotlib, mlxtend, pandas, sklearn, scipy".split(", ")
    code = f"import sys, {script.NAME}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_and_prior_alone_train_resume_and_sample(name, data, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (f"{name}.py", "prior.py"):
        shutil.copy(ROOT / file, alone)
    call = [sys.executable, f"{name}.py", *SCRIPTS[name], "--data", str(data), "--batch-size", "8"]
    for flags in (
        ["--train", "--train-steps", "2"],
        ["--train", "--resume", "--train-steps", "3", "--sample"],
    ):
        subprocess.run([*call, *flags], cwd=alone, check=True, capture_output=True)
    assert (alone / "runs" / name / "samples.png").exists()
