"""Every exercise accepts right answers however they are written, and tells each classic mistake by its own message."""

import importlib
import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import exercise_answers as answers
import pytest
import torch

from labutils import exercises
from labutils.exercises.core import EXERCISES, NOT_YET, PASSED, WRONG

NAMES = exercises.names()
CHEAP = [name for name in NAMES if name not in ("tiled_attention", "window_attention", "find_bug", "gpt2_attention")]


def own_solution(name):
    module = importlib.import_module(f"labutils.exercises.solutions.notebook{EXERCISES[name].notebook}")
    return getattr(module, name)


def test_each_notebook_has_at_least_five_exercises_from_minutes_to_half_an_hour():
    for notebook in ("01", "02", "03", "04"):
        minutes = [EXERCISES[name].minutes for name in exercises.names(notebook)]
        assert len(minutes) >= 5
        assert min(minutes) == 2 and max(minutes) >= 30
        assert all(2 <= len(EXERCISES[name].hints) <= 3 for name in exercises.names(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_the_labs_own_solution_passes(name):
    for seed in range(10 if name in CHEAP else 2):
        outcome = exercises.evaluate(name, own_solution(name), seed)
        assert outcome.status == PASSED, outcome


@pytest.mark.parametrize("name", NAMES)
def test_other_right_answers_pass(name):
    assert len(answers.RIGHT[name]) >= 2
    for function in answers.RIGHT[name]:
        for seed in range(5 if name in CHEAP else 1):
            outcome = exercises.evaluate(name, function, seed)
            assert outcome.status == PASSED, f"{function}: {outcome}"


@pytest.mark.parametrize(("name", "words"), [(name, words) for name in NAMES for words in answers.WRONG[name]])
def test_a_classic_mistake_is_told_by_its_own_message(name, words):
    outcome = exercises.evaluate(name, answers.WRONG[name][words])
    assert outcome.status == WRONG, outcome
    assert words in outcome.message
    others = [other for other in answers.WRONG[name] if other != words and other in outcome.message]
    assert not others, f"the message fits other mistakes, too: {others}\n{outcome}"
    whereabouts = ("First at", "expected", "Expected", "must ", "With N")
    assert any(word in outcome.message for word in whereabouts)


def test_three_mistakes_are_known_of_each_exercise():
    assert set(answers.WRONG) == set(NAMES) == set(answers.RIGHT)
    assert all(len(mistakes) >= 3 for mistakes in answers.WRONG.values())


@pytest.mark.parametrize("name", NAMES)
def test_solutions_can_be_shown_and_have_the_arguments_of_the_exercise(name, capsys):
    exercises.solution(name)
    shown = capsys.readouterr().out
    assert shown.rstrip("\n") == exercises.solution_source(name)
    assert f"def {name}(" in shown
    assert list(inspect.signature(own_solution(name)).parameters)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nothing", [None, Ellipsis])
def test_a_stub_is_not_yet(name, nothing):
    assert exercises.evaluate(name, lambda *a: nothing).status == NOT_YET


# -- what a student sees ----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nobody has solved anything, and asked for no hint."""
    from labutils.exercises import progress

    monkeypatch.setenv("LABUTILS_STATE", str(tmp_path / "state" / "progress.json"))
    monkeypatch.setattr(progress, "_session", {})
    monkeypatch.setattr(progress, "_warned", False)
    monkeypatch.setattr(exercises, "_hints_given", {})
    return tmp_path / "state" / "progress.json"


def stub(x):
    raise NotImplementedError


def fails_inside(x):
    rows = x.shape[0]
    return x.reshape(rows + 1, -1)


def test_a_stub_that_raises_is_not_yet_and_nothing_is_raised(fresh, capsys):
    assert exercises.check.safe_softmax(stub) is None
    said = capsys.readouterr().out
    assert said.startswith("safe_softmax: not yet.") and 'hint("safe_softmax")' in said


def test_an_exception_is_reported_with_its_line_and_not_raised(fresh, capsys):
    exercises.check.safe_softmax(fails_inside)
    said = capsys.readouterr().out
    assert "safe_softmax: error" in said and "RuntimeError" in said
    assert "return x.reshape(rows + 1, -1)" in said and "print the shapes" in said


@pytest.mark.parametrize(
    "error", [SystemExit(3), NotImplementedError("no such kernel"), RecursionError(), KeyError("k")]
)
def test_no_exception_of_a_function_escapes(fresh, error, capsys):
    def raises(x):
        raise error

    exercises.check.safe_softmax(raises)
    assert f"{type(error).__name__}" in capsys.readouterr().out


class Broken(Exception):
    def __str__(self):
        raise self


class Escaping(BaseException):
    """What `except Exception` does not catch."""


@pytest.mark.parametrize("error", [Broken(), Escaping("out"), GeneratorExit(), MemoryError()])
def test_exceptions_that_try_to_escape_do_not(fresh, error, capsys):
    def raises(*arguments):
        raise error

    exercises.check.safe_softmax(raises)
    exercises.check.kv_head(raises)
    assert capsys.readouterr().out.count(f"raised {type(error).__name__}") == 2


@pytest.mark.parametrize(
    "value",
    [
        True, "x", object(), {"a": 1}, (), (None,) * 3, math.nan, math.inf, 10**400, 1j, torch.zeros(0),
        torch.eye(3).to_sparse(), torch.empty(2, device="meta"), [[1.0, 2.0]] * 3, iter([1]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_whatever_is_returned_is_wrong_and_never_an_error_of_the_lab(value):
    for name in ("score_bytes", "safe_softmax", "online_update", "tile_kind", "kv_head", "read_oom", "choose_blocks"):
        outcome = exercises.evaluate(name, lambda *a: value)
        assert outcome.status == WRONG and outcome.message and len(outcome.message) < 600, outcome


def test_sparse_tensors_inside_a_function_are_allowed():
    def by_sparse(x):
        rows = x.reshape(-1, x.shape[-1])
        p = (rows - rows.amax(-1, keepdim=True)).exp()
        inverse = torch.diag(1 / p.sum(-1)).to_sparse()
        return torch.sparse.mm(inverse, p).reshape(x.shape)

    assert exercises.evaluate("safe_softmax", by_sparse).status == PASSED


def test_a_result_in_place_of_the_function_is_told(fresh, capsys):
    exercises.check.safe_softmax(torch.zeros(3))
    assert "wants the function itself; it got a tensor of shape (3,)" in capsys.readouterr().out


def test_an_interrupt_is_the_students_own(fresh):
    def interrupted(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exercises.check.safe_softmax(interrupted)


def test_wrong_number_of_arguments_is_reported(fresh, capsys):
    exercises.check.safe_softmax(lambda: 1)
    assert "TypeError" in capsys.readouterr().out


def test_hints_come_one_after_the_other(fresh, capsys):
    for step in (1, 2, 3):
        exercises.hint("safe_softmax")
        assert capsys.readouterr().out.startswith(f"Hint {step} of 3")
    exercises.hint("safe_softmax")
    assert 'solution("safe_softmax")' in capsys.readouterr().out
    exercises.hint("safe_softmax", 1)
    assert capsys.readouterr().out.startswith("Hint 1 of 3")
    with pytest.raises(ValueError, match="hints 1 to 3"):
        exercises.hint("safe_softmax", 4)


def test_a_name_that_does_not_exist_suggests_one(fresh):
    with pytest.raises(AttributeError, match="safe_softmax"):
        getattr(exercises.check, "safe_" + "softmx")
    with pytest.raises(ValueError, match="Did you mean 'safe_softmax'"):
        exercises.hint("safe_softmx")
    assert set(dir(exercises.check)) == set(NAMES)


def test_progress_is_kept_and_a_later_failure_takes_nothing_away(fresh, capsys):
    exercises.report()
    assert f"0 of {len(NAMES)} exercises solved" in capsys.readouterr().out
    exercises.check.safe_softmax(answers.softmax_by_torch)
    exercises.check.safe_softmax(stub)
    exercises.check.kv_head(lambda h, n, g: h)
    capsys.readouterr()
    exercises.report()
    said = capsys.readouterr().out
    assert f"1 of {len(NAMES)} exercises solved" in said
    assert "[x] safe_softmax" in said and "last try: wrong" in said
    assert fresh.is_file()


def test_progress_survives_a_new_process_and_a_damaged_file_begins_anew(fresh, monkeypatch, capsys):
    from labutils.exercises import progress

    exercises.check.safe_softmax(answers.softmax_by_torch)
    monkeypatch.setattr(progress, "_session", {})
    assert progress.load()[0]["safe_softmax"]["passed"]
    fresh.write_text('{"exercises": [1]}')
    exercises.report()
    assert "damaged" in capsys.readouterr().out
    exercises.check.safe_softmax(answers.softmax_by_torch)
    assert "damaged" in capsys.readouterr().out  # who never asks for a report is told as well
    assert progress.load()[0]["safe_softmax"]["passed"]
    exercises.check.safe_softmax(answers.softmax_by_torch)
    assert "damaged" not in capsys.readouterr().out


def test_progress_that_cannot_be_read_is_not_written_over(fresh, monkeypatch, capsys):
    from labutils.exercises import progress

    exercises.check.safe_softmax(answers.softmax_by_torch)
    before = fresh.read_bytes()
    monkeypatch.setattr(progress, "_session", {})
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "read_text", lambda *a, **k: os.stat("/dev/null/none")
        )  # who runs as root may read anything
        exercises.check.kv_head(lambda h, n, g: h)
        said = capsys.readouterr().out
        assert "only for this session" in said and "cannot be read" in said and "LABUTILS_STATE" in said
        exercises.check.kv_head(lambda h, n, g: h)
        assert "only for this session" not in capsys.readouterr().out
    assert fresh.read_bytes() == before


def test_a_home_that_cannot_be_written_is_said_once_and_breaks_nothing(monkeypatch, tmp_path, fresh, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LABUTILS_STATE", str(blocked / "progress.json"))  # below a file: nobody can write there
    exercises.check.safe_softmax(answers.softmax_by_torch)
    first = capsys.readouterr().out
    assert "passed" in first and "only for this session" in first and "LABUTILS_STATE" in first
    exercises.check.kv_head(lambda h, n, g: h)
    assert "only for this session" not in capsys.readouterr().out
    exercises.report()
    assert f"1 of {len(NAMES)}" in capsys.readouterr().out


def test_the_state_goes_where_the_platform_keeps_such_files(monkeypatch, tmp_path):
    from labutils.exercises import progress

    monkeypatch.delenv("LABUTILS_STATE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert progress.state_file() == tmp_path / "labutils" / "progress.json"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert progress.state_file() == tmp_path / ".local" / "state" / "labutils" / "progress.json"


# -- kernels of the solutions, for GPUs that need not be there --------------------------------------------------------

COMPILE = """
import importlib.util, json, sys, types
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# What an answer imports of the lab is not needed to compile its kernels, and would ask for the interpreter.
sys.modules["labutils.attention.interface"] = types.SimpleNamespace(flash_attn_func=None)
spec = importlib.util.spec_from_file_location("kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
results = []
for name, arch, dtype, constants in json.loads(sys.argv[2]):
    kernel = getattr(kernels, name)
    signature, attrs = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = dtype
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    results.append([name, arch, compiled.metadata.shared])
print(json.dumps(results))
"""
TILE = {"D": 32, "BLOCK_M": 32, "BLOCK_N": 32}
KERNELS = [
    ["row_lse_kernel", 80, "*fp32", {"BLOCK": 16}],
    ["window_kernel", 75, "*fp16", TILE],
    ["window_kernel", 80, "*bf16", TILE],
    ["window_kernel", 90, "*fp32", TILE],
]


def compiled(path, kernels, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(path), json.dumps(kernels)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernels_of_the_solutions_compile_for_real_gpus(tmp_path):
    results = compiled(Path(exercises.__file__).parent / "solutions" / "notebook02.py", KERNELS, tmp_path)
    assert len(results) == len(KERNELS)
    assert all(shared <= 64 * 1024 for *_, shared in results)
