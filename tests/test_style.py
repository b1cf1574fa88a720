"""The code obeys the rules and has the types that pyproject.toml asks for, and the order of imports in CONTRIBUTING.md.

`ruff check --fix .` and `ruff format labutils tests tools` help with the rules, and `mypy` says where types do not fit.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command", [["check", "."], ["format", "--check", "labutils", "tests", "tools"]], ids=" ".join)
def test_ruff(command):
    pytest.importorskip("ruff", reason="ruff is not installed here")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_types():
    pytest.importorskip("mypy", reason="mypy is not installed here")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", f"--cache-dir={os.devnull}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def hooks():
    """The hooks of .pre-commit-config.yaml."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed here")
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    return local["hooks"]


def test_hooks_find_their_programs_and_files():
    files = [str(path.relative_to(ROOT)) for folder in ("", "labutils", "tests") for path in (ROOT / folder).iterdir()]
    for hook in hooks():
        python, *arguments = shlex.split(hook["entry"])
        assert python == "python" and hook["language"] == "system", "the ruff that the tests use is the one that runs"
        help_text = subprocess.run([sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert help_text.returncode == 0, f"{hook['id']}: {help_text.stderr}"
        assert any(re.search(hook.get("files", ""), name) for name in files), f"{hook['id']} finds no file"


def rows_of_modules():
    """The rows of CONTRIBUTING.md in which a module imports only from those above its own."""
    block = (ROOT / "CONTRIBUTING.md").read_text().split("```text\nmachine\n")[1].split("```")[0]
    return [line.split(", ") for line in f"machine\n{block}".strip().splitlines()]


def imports(path):
    """The full names that a file imports, whether at its top or later."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def imported_modules(path):
    """The modules and packages right below labutils that a file imports from, whether at its top or later."""
    return (name.split(".")[1] for name in imports(path) if name.startswith("labutils."))


def test_every_module_has_a_row():
    there = {
        path.stem for path in (ROOT / "labutils").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    listed = [name for row in rows_of_modules() for name in row]
    assert sorted(listed) == sorted(there - {"__init__", "__main__"})


def test_imports_point_one_way():
    row_of = {name: number for number, row in enumerate(rows_of_modules()) for name in row}
    wrong = []
    for path in sorted((ROOT / "labutils").rglob("*.py")):
        inside = path.relative_to(ROOT / "labutils")
        module = inside.with_suffix("").parts[0]
        if module not in row_of:
            continue  # __init__ and __main__ stand above all others
        wrong += [
            f"labutils/{inside} imports {name}"
            for name in sorted(set(imported_modules(path)))
            if name != module and row_of.get(name, -1) >= row_of[module]
        ]
    assert not wrong, f"CONTRIBUTING.md has the order of modules; against it: {'; '.join(wrong)}"


def test_labutils_imports_nothing_of_tools():
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert {"study", "without_features"} <= tools
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "labutils").rglob("*.py"))
        for name in imports(path)
        if name.split(".")[0] in tools | {"tools"}
    ]
    assert not wrong, f"the package is installed without tools: {'; '.join(wrong)}"
