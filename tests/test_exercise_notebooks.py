"""The exercises as they stand in the notebooks: in their form, as stubs that stop nothing, and solved from top to end.

That the notebooks run as shipped, and that each check then says "not yet", is seen to in conftest.py, where nbmake
executes them.
"""

import ast
import json
import os
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from notebook_format import NOTEBOOKS, ROOT
from solve_notebooks import main, solved

from labutils import exercises
from labutils.commands.lab import environment_for_kernels
from labutils.exercises.core import NOT_YET


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


def stubs(notebook):
    return [(i, cell) for i, cell in enumerate(notebook.cells) if "exercise" in cell.metadata]


def arguments(source, name):
    (function,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name]
    return [argument.arg for argument in function.args.args], ast.get_docstring(function)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_exercise_is_a_task_a_stub_and_a_check(name):
    notebook = read(name)
    found = stubs(notebook)
    assert [cell.metadata["exercise"] for _, cell in found] == exercises.names(name[:2])
    for i, cell in found:
        exercise = exercises.EXERCISES[cell.metadata["exercise"]]
        task, check = notebook.cells[i - 1], notebook.cells[i + 1]
        assert "exercise" in cell.metadata["tags"]
        assert task.cell_type == "markdown" and task.source.startswith("### Exercise: ")
        assert f"({exercise.minutes} minutes)" in task.source.splitlines()[0]
        assert check.source == f"check.{exercise.name}({exercise.name})"
        wanted, _ = arguments(exercises.solution_source(exercise.name), exercise.name)
        given, text = arguments(cell.source, exercise.name)
        assert given == wanted and text
        assert len(cell.source.splitlines()) <= 30


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stubs_are_not_yet(name):
    import torch
    import triton
    import triton.language as tl

    for _, cell in stubs(read(name)):
        exercise = cell.metadata["exercise"]
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("@triton.jit"))
        namespace = {"torch": torch, "triton": triton, "tl": tl}
        exec(compile(source, exercise, "exec"), namespace)  # noqa: S102  the lab's own stub
        outcome = exercises.evaluate(exercise, namespace[exercise])
        assert outcome.status == NOT_YET, outcome


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_cell_takes_the_name_of_a_function_of_the_exercises(name):
    for cell in read(name).cells:
        if cell.cell_type == "code":
            nodes = list(ast.walk(ast.parse(cell.source)))
            bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
            assert not bound & {"check", "hint", "report", "solution"}, cell.id


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_cell_but_its_check_needs_an_exercise(name):
    names = set(exercises.names())
    for cell in read(name).cells:
        if cell.cell_type != "code" or "exercise" in cell.metadata or "exercise-check" in cell.metadata.get("tags", []):
            continue
        used = {node.id for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)}
        assert not used & names, f"{name}, {cell.id} uses {used & names}: it would fail where the stub is unsolved"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_solved_notebook_runs_to_its_end_and_every_check_passes(name, tmp_path):
    notebook, filled = solved(read(name))
    assert filled == exercises.names(name[:2])
    state = tmp_path / "progress.json"
    environment = environment_for_kernels() | {"LABUTILS_STATE": str(state), "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=environment)
    recorded = json.loads(state.read_text(encoding="utf-8"))["exercises"]
    assert {exercise: entry["last"] for exercise, entry in recorded.items()} == dict.fromkeys(filled, "passed")
    said = {
        cell.source: "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if "exercise-check" in cell.metadata.get("tags", [])
    }
    assert len(said) == len(filled)
    for exercise in filled:
        assert f"{exercise}: passed." in said[f"check.{exercise}({exercise})"]


def test_the_tool_writes_solved_copies_and_never_over_the_notebooks(tmp_path, capsys):
    assert main([str(tmp_path)]) == 0
    assert "exercises solved" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.ipynb")) == sorted(NOTEBOOKS)
    source = "".join(cell.source for cell in nbformat.read(tmp_path / NOTEBOOKS[0], as_version=4).cells)
    assert "raise NotImplementedError" not in source
    with pytest.raises(SystemExit):
        main([str(ROOT)])


def test_nbmake_runs_a_notebook_in_our_environment(monkeypatch):
    """With all of it but the interpreter's switch: an empty one would go to the network, and read the user's table."""
    import conftest

    monkeypatch.setenv("ONLY_HERE", "yes")
    before = dict(os.environ)
    item = SimpleNamespace(nbmake=True, runtest=lambda: None, filename=NOTEBOOKS[0])
    run = conftest.pytest_runtest_protocol(item)
    next(run)
    inside = dict(os.environ)
    with pytest.raises(StopIteration):
        run.send(None)
    assert os.environ == before
    assert inside.pop("LABUTILS_STATE") != before.get("LABUTILS_STATE")
    assert inside["ONLY_HERE"] == "yes" and inside["HF_HUB_OFFLINE"] == "1"
    switch = set() if torch.cuda.is_available() else {"TRITON_INTERPRET"}
    assert set(before) - set(inside) <= switch | {"LABUTILS_STATE"}


def test_a_passed_exercise_is_seen_by_the_proof_that_nothing_is_solved(tmp_path):
    """The look at a shipped notebook fails where a check passed, and where one did not run."""
    import conftest

    state = tmp_path / "progress.json"
    stated = {name: {"last": "not yet", "passed": None} for name in exercises.names("01")}

    def run():
        state.write_text(json.dumps({"exercises": stated}))

    conftest._run_as_shipped(run, NOTEBOOKS[0], state)
    stated["combine"]["last"] = "passed"
    with pytest.raises(AssertionError, match="combine"):
        conftest._run_as_shipped(run, NOTEBOOKS[0], state)
    del stated["combine"]
    with pytest.raises(AssertionError, match="did not run"):
        conftest._run_as_shipped(run, NOTEBOOKS[0], state)
