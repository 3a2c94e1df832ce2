"""The house's rules: what a script may import, the order of its parts, its size, and its copies."""

import ast
import importlib
import shutil
import subprocess
import sys

import pytest
from conftest import FLAGS, ROOT, script_of
from copies import SCRIPTS, blocks, owned

from bench import report

PARTS = "Config build make_optimizers step Text load_data train sample main".split()
# what a reader reads first is short; the copied rest is long, as data files, runs that survive
# kill -9, ranks, five verbs and a clear line for each mistake do not fit in less
LINES_OWN, LINES_COPIED, LINES_PRIOR = 250, 535, 90


SHARED = ("head", "config", "block", "rest")  # the other copies are networks, in hybrids.py alone


@pytest.fixture(params=[name for name in SCRIPTS if "/" not in name])
def script(request):
    """Each of the five scripts in turn, as a module."""
    return importlib.import_module(request.param.removesuffix(".py"))


def source(script):
    return (ROOT / f"{script.NAME}.py").read_text()


def test_line_budgets(script):
    copied = {name: len(block.splitlines()) for name, block in blocks(source(script)).items()}
    assert sum(copied.get(name, 0) for name in SHARED) <= LINES_COPIED
    hybrids = script.NAME == "hybrids"
    taken = copied if hybrids else [name for name in copied if name in SHARED]
    own = len(source(script).splitlines()) - sum(copied[name] for name in taken)
    assert own <= {"hybrids": 370, "flow": 280}.get(script.NAME, LINES_OWN)  # a flow runs both ways
    assert len((ROOT / "prior.py").read_text().splitlines()) <= LINES_PRIOR


def test_copies_are_equal_to_their_owner():
    for name in SCRIPTS:
        copied = blocks((ROOT / name).read_text())
        assert {"head", "config", "rest"} <= copied.keys()
        assert copied.items() <= owned().items()


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
        if part != "build" or script.NAME == "hybrids"
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


@pytest.mark.parametrize("model", FLAGS)
def test_a_script_and_prior_alone_train_resume_and_sample(model, data, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    script = f"{script_of(model)}.py"
    for file in (script, "prior.py"):
        shutil.copy(ROOT / file, alone)
    call = [sys.executable, script, *FLAGS[model], "--data", str(data), "--batch-size", "8"]
    for flags in (
        ["--train", "--train-steps", "2"],
        ["--train", "--resume", "--train-steps", "3", "--sample"],
    ):
        subprocess.run([*call, *flags], cwd=alone, check=True, capture_output=True)
    assert (alone / "runs" / model / "samples.png").exists()
