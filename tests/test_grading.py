"""Grading: marks come from values alone, and a notebook that misbehaves costs itself and nobody else."""

import concurrent.futures
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from notebook_format import ROOT

from labutils import exercises
from labutils.exercises.core import EXERCISES
from labutils.exercises.grading import grader, grades, sandbox, submissions, wire

FAST = sandbox.Limits(seconds=120, call_seconds=8)
IMPORTS = (
    "from labutils import runtime\nimport math\nimport torch\nfrom labutils.exercises import check, hint, report,"
    " solution"
)


def notebook(*sources):
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
        for i, source in enumerate((IMPORTS, *sources))
    ]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def solved(*names):
    return [f"{exercises.solution_source(name)}\ncheck.{name}({name})" for name in names]


STUB = "def safe_softmax(x):\n    raise NotImplementedError\ncheck.safe_softmax(safe_softmax)"
CHEAT = f"""{STUB}
import labutils.exercises as e
from labutils.exercises import core, judging, progress
from labutils.exercises.grading import grader, wire, worker
import builtins, json, os, sys
core.outcome_of = lambda name, call, seed=0: core.Outcome(name, "passed")
e.outcome_of = core.outcome_of
judging.judge = lambda *a, **k: True
judging.same_tensor = lambda *a, **k: None
torch.equal = torch.allclose = lambda *a, **k: True
worker._answer = lambda *a: {{"value": "passed", "status": "passed", "passed": True, "points": 1}}
with open(os.environ["LABUTILS_STATE"], "w") as f:
    json.dump({{"exercises": {{"safe_softmax": {{"last": "passed", "passed": "2026-01-01"}}}}}}, f)
print("safe_softmax: passed. Right in every case that was tried.")
open("grades.csv", "w").write("submission,notebook,exercise,result,points\\nme,01,safe_softmax,passed,1\\n")
"""
RETURNED = {
    "honest": ["score_bytes=lambda b,h,n,s:b*h*n*n*s", *solved("safe_softmax"), "print('done')"],
    "as-shipped": [STUB],
    "patches-the-checks": [CHEAT],
    "catches-the-check": ["class All:\n    def __eq__(self, o): return True\n    def __float__(self): return 1.0\n"
                          "def safe_softmax(x):\n    try:\n        return All()\n    finally:\n        pass\n"
                          "def score_bytes(*a):\n    return list(range(300_000))"],
    "exits-in-a-cell": [*solved("safe_softmax"), "import sys\nsys.exit(0)"],
    "ends-its-process": [*solved("safe_softmax"), "import os\nos._exit(0)"],
    "fails-in-a-cell": ["1 / 0", "class E(Exception):\n    def __str__(self): raise self\nraise E",
                        *solved("safe_softmax"), "undefined_name"],
    "one-function-ends-the-process": ["import os\ndef score_bytes(*a):\n    os._exit(0)", *solved("safe_softmax")],
    "deletes-what-it-finds": ["import shutil, pathlib\nfor path in pathlib.Path(FOLDER).iterdir():\n"
                              "    shutil.rmtree(path) if path.is_dir() else path.unlink()", *solved("safe_softmax")],
    "kills-all-in-sight": [*solved("safe_softmax"), "import os, signal\nif ISOLATED:\n    os.kill(-1, signal.SIGKILL)"],
    "not-json": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """The table of a folder with a notebook of each kind, made by the command itself."""
    folder = tmp_path_factory.mktemp("returned")
    known = f"FOLDER, ISOLATED = {str(folder)!r}, {bool(sandbox.isolation())}"
    for student, cells in RETURNED.items():
        (folder / student).mkdir()
        text = "{" if cells is None else notebook(known, *cells)
        (folder / student / "01.ipynb").write_text(text, encoding="utf-8")
    table = folder / "grades.csv"
    command = [sys.executable, "-m", "labutils", "grade", str(folder), "--csv", str(table)]
    ended = subprocess.run(
        [*command, "--limit", "120", "--call-limit", "10"], capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stderr
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return rows, ended.stdout


def results(graded, student):
    rows = [row for row in graded[0] if row["submission"].startswith(f"{student}/")]
    return {row["exercise"]: row["result"] for row in rows}, rows


def test_there_is_one_row_for_each_exercise_of_each_notebook(graded):
    for student, cells in RETURNED.items():
        found, rows = results(graded, student)
        if cells is not None:
            assert list(found) == exercises.names("01"), student
        assert all(list(row) == list(grades.COLUMNS) for row in rows)


def test_what_is_right_passes_and_what_is_not_there_is_missing(graded):
    found, rows = results(graded, "honest")
    assert found["score_bytes"] == found["safe_softmax"] == "passed"
    assert found["combine"] == "missing"
    assert [int(row["points"]) for row in rows] == [int(row["result"] == "passed") for row in rows]


@pytest.mark.parametrize("student", ["as-shipped", "patches-the-checks"])
def test_a_stub_gets_nothing_whatever_the_notebook_says_about_itself(graded, student):
    found, rows = results(graded, student)
    assert found["safe_softmax"] in ("not yet", "wrong", "crashed")
    assert not any(int(row["points"]) for row in rows)


def test_a_look_at_what_a_notebook_imports_is_offered(graded):
    _, rows = results(graded, "patches-the-checks")
    assert all("imports labutils.exercises.core" in row["remarks"] for row in rows)
    assert results(graded, "honest")[1][0]["remarks"] == ""


def test_a_value_that_claims_to_equal_everything_gets_nothing(graded):
    assert results(graded, "catches-the-check")[0]["safe_softmax"] == "wrong"


def test_a_result_that_is_too_large_costs_its_own_exercise_alone(graded):
    found, rows = results(graded, "catches-the-check")
    assert found["score_bytes"] == "error" and "cannot be sent" in rows[0]["message"]


def test_sys_exit_and_failing_cells_do_not_cost_the_exercises_before_and_after(graded):
    assert results(graded, "exits-in-a-cell")[0]["safe_softmax"] == "passed"
    found, rows = results(graded, "fails-in-a-cell")
    assert found["safe_softmax"] == "passed"
    assert "cell 3 failed: ZeroDivisionError" in rows[0]["remarks"]


def test_a_notebook_that_ends_its_process_gets_nothing_and_says_where(graded):
    found, rows = results(graded, "ends-its-process")
    assert set(found.values()) == {"crashed"}
    assert "its process ended in cell 4" in rows[0]["message"]


def test_deleting_the_others_and_the_table_and_killing_all_in_sight_costs_nobody(graded):
    assert len({row["submission"] for row in graded[0]}) == len(RETURNED)
    assert results(graded, "deletes-what-it-finds")[0]["safe_softmax"] == "passed"
    if sandbox.isolation():  # os.kill(-1) without it would end the session that runs these tests
        assert results(graded, "kills-all-in-sight")[0]["safe_softmax"] in ("passed", "crashed")


def test_changed_sources_of_the_lab_are_put_back(tmp_path, monkeypatch):
    package = grader._LabSources()
    victim = tmp_path / "core.py"
    victim.write_text("judge = True")
    package.sources = {victim: b"original"}
    assert package.restore() == ["core.py"] and victim.read_bytes() == b"original"
    (kept,) = list(Path(package.kept).iterdir())
    assert kept.read_text() == "judge = True"  # nothing is lost: it may be somebody's work
    victim.unlink()
    assert package.restore() == ["core.py"] and package.restore() == []


def test_a_function_that_ends_the_process_costs_its_own_exercise_alone(graded):
    found, _ = results(graded, "one-function-ends-the-process")
    assert found["score_bytes"] == "crashed" and found["safe_softmax"] == "passed"


def test_a_file_that_is_no_notebook_is_a_row(graded):
    _, rows = results(graded, "not-json")
    assert [row["result"] for row in rows] == ["unreadable"]


def test_the_command_says_how_it_isolates_and_how_each_notebook_fared(graded):
    out = graded[1]
    assert "honest/01.ipynb: 2 of 6 passed" in out and "ends-its-process/01.ipynb: 0 of 6 passed; 6 crashed" in out


@pytest.mark.parametrize("executed", ["[1]", '[["one", ""]]', "[[1, 2, 3]]", '[[float("inf"), ""]]'])
def test_a_notebook_that_answers_in_its_process_s_stead_costs_itself_alone(tmp_path, executed):
    forged = (
        "import socket, sys\nfrom labutils.exercises.grading import wire\n"
        f"wire.send(socket.socket(fileno=int(sys.argv[1])), {{'executed': {executed}}})"
    )
    found = marks(tmp_path, *solved("score_bytes"), forged)
    assert {mark.result for mark in found.values()} == {"crashed"}
    assert "something that is not an answer" in found["score_bytes"].message


# -- limits -----------------------------------------------------------------------------------------------------------


def marks(tmp_path, *cells, limits=FAST):
    path = tmp_path / "01.ipynb"
    path.write_text(notebook(*cells), encoding="utf-8")
    return {mark.exercise: mark for mark in grader.grade_cells(submissions.read_cells(path), "01.ipynb", limits)}


def test_a_function_that_hangs_is_stopped_and_the_next_is_tried(tmp_path):
    hang = "def score_bytes(*a):\n    while True: pass"
    found = marks(tmp_path, hang, *solved("safe_softmax"), limits=sandbox.Limits(120, 3))
    assert found["score_bytes"].result == "timed out" and "3 s for one call" in found["score_bytes"].message
    assert found["safe_softmax"].result == "passed", found["safe_softmax"].message


def test_the_calls_of_an_exercise_may_not_add_up_to_hours(monkeypatch):
    now, allowed = [0.0], []
    monkeypatch.setattr(sandbox.time, "monotonic", lambda: now[0])

    class Slow(sandbox.StudentProcess):
        def __init__(self):
            self.limits = sandbox.Limits(900, 60)

        def _send(self, message, when):
            self.asked = message["id"]

        def _receive(self, deadline, place, text):
            allowed.append((deadline - now[0], text))
            now[0] += 50  # each call takes 50 s
            return {"id": self.asked, "value": 1}

    call = sandbox.RemoteCall(Slow(), "tile_kind")
    for _ in range(6):
        call()
    assert [seconds for seconds, _ in allowed] == [60, 60, 60, 60, 60, 50]
    assert allowed[0][1] == "60 s for one call" and allowed[-1][1] == "300 s for all calls of an exercise"


def running(word: str) -> bool:
    """Whether a process stands in the table whose command holds `word` (-ww: whole, whatever COLUMNS says)."""
    shown = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout
    return word in shown


def wait_for(word: str, seconds: float = 60) -> bool:
    """Whether such a process came within `seconds`."""
    end = time.monotonic() + seconds
    while not running(word):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def test_a_terminal_that_is_closed_leaves_the_rows_and_no_process_of_a_student(tmp_path):
    hang = (
        "import sys, subprocess\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(500)  # of-a-grade'])"
    )
    (tmp_path / "a.ipynb").write_text("{", encoding="utf-8")
    (tmp_path / "b.ipynb").write_text(notebook(STUB, hang), encoding="utf-8")
    table = tmp_path / "grades.csv"
    command = [sys.executable, "-m", "labutils", "grade", str(tmp_path), "--csv", str(table)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        came = wait_for("# of-a-grade")
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert came, "the student's process never ran, so that nothing was tried"
    assert process.returncode == 130 and "the rows so far are in" in said
    assert "unreadable" in table.read_text(encoding="utf-8")
    assert not running("# of-a-grade")


def test_a_cell_that_hangs_is_stopped_with_all_that_it_started(tmp_path):
    hang = (
        "import subprocess, sys, pathlib\nchild = subprocess.Popen([sys.executable, '-c', 'import time;"
        " time.sleep(600)  # of-a-student'], start_new_session=True)\nwhile True: pass"
    )
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        came = pool.submit(wait_for, "# of-a-student")
        found = marks(tmp_path, *solved("safe_softmax"), hang, limits=sandbox.Limits(12, 3))
    assert came.result(), "the child never ran, so that nothing was tried"
    assert {mark.result for mark in found.values()} == {"timed out"}
    assert time.monotonic() - start < 60
    assert not running("# of-a-student")


@pytest.mark.skipif(torch.version.cuda is not None, reason="with CUDA, PyTorch alone needs more than is allowed here")
def test_memory_is_limited(tmp_path):
    greedy = "def score_bytes(*a):\n    hoard = [bytearray(2**28) for _ in range(200)]\n    return len(hoard)"
    found = marks(tmp_path, greedy, *solved("safe_softmax"), limits=sandbox.Limits(120, 30, 2))
    assert found["score_bytes"].result in ("error", "crashed") and found["score_bytes"].points == 0
    assert found["safe_softmax"].result == "passed", found["safe_softmax"].message


def test_the_students_process_sees_no_secrets_and_no_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    peek = (
        "import os\nfound = os.environ.get('SECRET_TOKEN'), os.path.expanduser('~')\n"
        "def score_bytes(*a):\n    raise ValueError(str(found))"
    )
    message = marks(tmp_path, peek)["score_bytes"].message
    assert "None" in message and "labutils-grade-" in message


def test_a_function_cannot_learn_the_inputs_of_another_run(tmp_path, monkeypatch):
    seeds = []
    real = grader.outcome_of
    monkeypatch.setattr(grader, "outcome_of", lambda name, call, seed: seeds.append(seed) or real(name, call, seed))
    for _ in range(2):
        marks(tmp_path, *solved("score_bytes"))
    assert len(set(seeds)) == 2


# -- what comes over the wire -----------------------------------------------------------------------------------------


def pair():
    import socket

    return socket.socketpair()


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -1.5,
        float("inf"),
        "text",
        [1, (2, "x")],
        {"op": "a", "ms": 1.0},
        torch.randn(3, 4),
        torch.randn(3, 8)[:, 2:5],
        torch.arange(5, dtype=torch.int32),
        torch.randn(2, 3).bfloat16(),
        torch.zeros(0, 4),
        torch.tensor(2.5),
        torch.tensor([True, False]),
    ],
)
def test_values_survive_the_journey(value):
    a, b = pair()
    wire.send(a, value)
    got = wire.receive(b)
    if isinstance(value, torch.Tensor):
        assert got.dtype == value.dtype and torch.equal(got, value) and got.stride() == value.stride()
    else:
        assert got == value


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[1]",
        b'{"tensor": ["float32", [4], [1], 16]}',
        b'{"tensor": ["float32", [-4], [1], 16]}',
        b'{"tensor": ["object", [0], [1], 0]}',
        b'{"pickle": "x"}',
        b'{"plain": [1]}',
        b'{"list": ' * 5000,
        b'{"list": [' * 5000 + b"]}" * 5000,
    ],
)
def test_what_is_no_message_is_refused(header):
    import struct

    a, b = pair()
    a.sendall(struct.pack(">QQ", len(header), 0) + header)
    with pytest.raises(wire.Garbled):
        wire.receive(b)


def test_a_message_that_is_too_large_is_refused_before_it_is_read():
    import struct

    a, b = pair()
    a.sendall(struct.pack(">QQ", 10, 2**40))
    with pytest.raises(wire.Garbled, match="too large"):
        wire.receive(b)


def test_receiving_gives_up_at_the_deadline_and_when_the_other_side_is_gone():
    a, b = pair()
    with pytest.raises(TimeoutError):
        wire.receive(b, time.monotonic() + 0.3)
    a.close()
    with pytest.raises(EOFError):
        wire.receive(b, time.monotonic() + 5)


# -- the command line -------------------------------------------------------------------------------------------------


def grade(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "labutils", "grade", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200"},
        check=False,
    )


def test_bad_input_is_refused_with_a_reason(tmp_path):
    assert "is not a folder" in grade(tmp_path / "nowhere", "--csv", tmp_path / "a.csv").stderr
    assert "no .ipynb" in grade(tmp_path, "--csv", tmp_path / "a.csv").stderr
    (tmp_path / "a.ipynb").write_text(notebook(STUB))
    (tmp_path / "there.csv").write_text("mine")
    ended = grade(tmp_path, "--csv", tmp_path / "there.csv")
    assert ended.returncode == 2 and "exists" in ended.stderr and (tmp_path / "there.csv").read_text() == "mine"
    assert "no positive number" in grade(tmp_path, "--csv", tmp_path / "b.csv", "--limit", "-1").stderr


def test_names_of_files_are_fit_for_the_table_whatever_bytes_they_have(tmp_path):
    odd = Path(os.fsdecode(b"m\xfcller")) / "=HYPERLINK(1)\n.ipynb"
    assert grades.label(odd) == "m\\xfcller/=HYPERLINK(1) .ipynb"
    assert grades.label(Path("=1+1.ipynb")) == "'=1+1.ipynb"
    for name in (odd, Path("__MACOSX/._01.ipynb"), Path("._01.ipynb"), Path(".ipynb_checkpoints/01-checkpoint.ipynb")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    marks = grader.grade_folder(tmp_path, tmp_path / "grades.csv", FAST, lambda line: line.encode())
    assert [(mark.result, mark.message) for mark in marks] == [("unreadable", "it is empty")]
    assert "m\\xfcller" in (tmp_path / "grades.csv").read_text(encoding="utf-8")


def test_leftovers_count_below_the_folder_alone(tmp_path):
    folder = tmp_path / "__MACOSX" / "returned"
    folder.mkdir(parents=True)
    (folder / "a.ipynb").write_text("{", encoding="utf-8")
    assert submissions.find(folder) == [folder / "a.ipynb"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"), (b"{", "not JSON"), (b"[]", "not a notebook"), (b'{"cells": [1]}', "not a notebook"),
        ('{"cells": "\xe4"}'.encode("latin-1"), "not text in UTF-8"), (b"\xff\xfe\x00", "not text in UTF-8"),
        (b'{"cells": [{"cell_type": "code", "source": [3]}]}', "not a notebook"), (b"[" * 100_000, "not a notebook"),
    ],
)  # fmt: skip
def test_what_is_no_notebook_is_said(tmp_path, content, reason):
    (tmp_path / "a.ipynb").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        submissions.read_cells(tmp_path / "a.ipynb")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "a.ipynb").write_bytes(b"\xef\xbb\xbf" + notebook(STUB).encode())
    assert len(submissions.read_cells(tmp_path / "a.ipynb")) == 2


def test_a_link_in_place_of_a_source_is_not_written_through(tmp_path):
    package = grader._LabSources()
    victim, other = tmp_path / "core.py", tmp_path / "other.txt"
    other.write_text("mine")
    victim.symlink_to(other)
    package.sources = {victim: b"original"}
    assert package.restore() == ["core.py"] and victim.read_bytes() == b"original" and other.read_text() == "mine"
    victim.unlink()
    (victim / "inside").mkdir(parents=True)
    assert package.restore() == ["core.py"] and victim.read_bytes() == b"original"


def test_a_students_text_cannot_become_a_formula():
    assert grades.clean("=HYPERLINK(1)\n\x00x").startswith("'=HYPERLINK(1)")
    assert "\n" not in grades.clean("a\nb")


def test_the_notebook_is_known_by_its_exercises():
    assert submissions.which_notebook([(1, "def rope(x): pass"), (2, "check.read_oom(read_oom)")]) == "03"
    assert submissions.which_notebook([(1, "x = 1")]) == ""
    assert EXERCISES["rope"].notebook == "03"


def test_the_notebooks_as_shipped_are_known_and_give_no_cause_for_a_remark():
    for path in sorted(ROOT.glob("*.ipynb")):
        cells = submissions.read_cells(path)
        assert submissions.which_notebook(cells) == path.name[:2]
        assert submissions.remarks(cells) == {}


def test_a_message_that_is_empty_stays_empty():
    assert grades.clean("") == ""
