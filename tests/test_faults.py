"""Faults of the machine and of the order of things: each ends in a clear message, or simply works."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import conftest
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from notebook_format import read

import figure
import study
from labutils import benchmark, training
from labutils.__main__ import main
from labutils.attention.kernels import tuned_table
from labutils.attention.tuning import compiled
from labutils.commands.arguments import INTERRUPTED
from labutils.commands.lab import environment_for_kernels
from labutils.exercises.grading import grades
from labutils.gpt2 import model_benchmark, models
from labutils.machine import files, memory
from labutils.training import ladder, parity

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def full_disk():
    """Files of at most 64 bytes, in this process: what Linux has that a full disk is like, for whoever it is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # Python ignores the signal that comes with the error
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- a full disk, and folders that cannot be written to ---------------------------------------------------------


def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path, full_disk):
    path = tmp_path / "a.csv"
    files.replace(path, "old ä")
    with pytest.raises(OSError, match=r"nothing was written.*a\.csv") as caught:
        files.replace(path, "new" * 100)
    assert caught.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"] and path.read_text(encoding="utf-8") == "old ä"
    files.replace(tmp_path / "made" / "b", b"\xff")
    assert (tmp_path / "made" / "b").read_bytes() == b"\xff"


def test_a_figure_that_cannot_be_written_leaves_the_one_before(tmp_path, full_disk, capsys):
    out = tmp_path / "overview.png"
    out.write_bytes(b"the figure before")
    assert figure.run(["--out", str(out)]) == 2
    assert "overview.png" in capsys.readouterr().err
    assert out.read_bytes() == b"the figure before" and len(list(tmp_path.iterdir())) == 1


def test_a_table_of_marks_that_cannot_be_written_leaves_the_one_before(tmp_path, full_disk):
    table = tmp_path / "grades.csv"
    table.write_text("rows before")
    mark = grades.Mark(*("x" * 20 for _ in grades.COLUMNS))
    with pytest.raises(OSError, match=r"rows written before are kept.*grades\.csv"):
        grades.save(table, [mark])
    assert table.read_text() == "rows before" and len(list(tmp_path.iterdir())) == 1


def test_results_and_launch_tables_that_cannot_be_written(tmp_path, full_disk, capsys, monkeypatch):
    stored = benchmark.reference_results(table="training")
    with pytest.raises(OSError, match=r"environment\.json"):
        benchmark.save_results(stored, tmp_path, {"gpu": "Some GPU" * 10}, table="training")
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder").mkdir()  # nobody can unlink a folder, or read it as a file
    monkeypatch.setenv(tuned_table.VARIABLE, str(tmp_path / "folder"))
    for option, status in (("--reset", 2), ("--show", 1)):  # what is not ours is not removed
        assert main(["tune", option]) == status
        assert "labutils tune: " in capsys.readouterr().err


def test_a_table_that_cannot_be_written_leaves_its_environment_too(tmp_path, request):
    stored = benchmark.reference_results(table="training")
    benchmark.save_results(stored[:1], tmp_path, {"gpu": "A", "date": "1"}, table="training")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    request.getfixturevalue("full_disk")  # the environment would fit, the table does not
    with pytest.raises(OSError, match=r"training\.csv"):
        benchmark.save_results(stored, tmp_path, {"gpu": "A", "date": "2"}, table="training")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_system_that_is_read_only_is_told_by_the_file_that_was_to_be_written(tmp_path, monkeypatch):
    """It refuses to write, and to remove, also what is not there."""

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match=r"Read-only.*nothing was written.*/a\.csv'$"):
        files.replace(tmp_path / "a.csv", "new")


def test_a_ladder_goes_on_behind_a_full_disk(tmp_path, request):
    def find(size, rung, cap_gib, *, on_try, **_):
        return dict.fromkeys(benchmark.SCHEMAS["training"], 0) | {"rung": rung.name}

    how = {"rungs": ladder.RUNGS[:2], "folder": tmp_path, "progress": False, "find": find}
    ladder.ladder(("124M",), 16.0, **how | {"rungs": ladder.RUNGS[:1]})
    before = (tmp_path / "ladder.json").read_text()
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match=r"ladder\.json"):
        ladder.ladder(("124M",), 16.0, **how)
    assert (tmp_path / "ladder.json").read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_a_working_folder_and_a_home_that_are_read_only(tmp_path):
    """Nobody can write to /proc, not even root: it is the folder to work in, and the home."""
    home = "/proc/no-home" if Path("/proc/self").exists() else pytest.skip("no /proc, in which nobody can write")
    code = """
        from labutils import benchmark
        from labutils.exercises import check
        from labutils.exercises.solutions import notebook01
        assert len(benchmark.reference_results())
        check.safe_softmax(notebook01.safe_softmax)
    """
    gone = {"LABUTILS_STATE", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"}
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    environment = kept | {"HOME": home, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd="/proc", env=environment | {
        "TMPDIR": str(tmp_path), "LABUTILS_DEVICE": "cpu"}, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "safe_softmax: passed" in ended.stdout and "kept only for this session" in ended.stdout
    assert "Traceback" not in ended.stderr


def test_a_notebook_that_leaves_a_file_in_the_checkout_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "labutils" / "results").mkdir(parents=True)
    monkeypatch.setattr(conftest, "ROOT", tmp_path)
    monkeypatch.delenv("LABUTILS_SAVE_RESULTS", raising=False)

    def run():
        (tmp_path / "labutils" / "results" / "new.csv").touch()

    with pytest.raises(AssertionError, match="made labutils/results/new.csv"):
        conftest._run_as_shipped(run, "01-Setup_and_Comparison.ipynb", tmp_path / "none.json")


def test_the_figure_command_where_nothing_can_be_written(capsys):
    if not Path("/proc/self").exists():
        pytest.skip("no /proc, in which nobody can make a file")
    assert figure.run(["--out", "/proc/x.png"]) == 2
    assert "/proc/x.png" in capsys.readouterr().err


def test_a_compiler_whose_cache_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match="set TRITON_CACHE_DIR to a folder"):
        compiled.resources_of([compiled.Request("v1", 64, torch.float16, (8, 0), False)], binaries=True)


# --- a GPU with 8 GB --------------------------------------------------------------------------------------------


class CardOf8GB:
    """`training` on such a card: the plain step does not fit, whatever the cap, and the cap is what the card has."""

    @staticmethod
    def try_step(make, seqlen, *, cap_gib, steps):
        return {"status": "oom"}

    @staticmethod
    @contextlib.contextmanager
    def memory_cap(gib):
        yield memory._plan_cap(gib, total_bytes=8 * memory.GIB, context_bytes=memory.GIB // 2)


def test_notebook_03_takes_both_remedies_on_a_gpu_with_8_gb(capsys):
    """The cell that chooses the card, as it stands there; every later training cell takes its `remedies`."""
    cells = read(ROOT / "03-Long_Sequence_Training.ipynb")["cells"]
    (source,) = (cell["source"] for cell in cells if "remedies, card_gib = " in cell["source"])
    choice = types.SimpleNamespace(attention="labutils")
    there = {"CHOICE": choice, "ON_GPU": True, "training": CardOf8GB, "gpt2_124m": lambda *_: None}
    exec(source, there)
    assert there["remedies"] == {"checkpointing": True, "chunked_loss": 2048}
    printed = capsys.readouterr().out
    assert "8.00 GiB in all" in printed and "Remedies: checkpointing, chunked_loss" in printed


def test_what_the_readme_says_of_8_gb_and_of_16_gb_is_what_was_measured():
    rows = benchmark.reference_results(table="training")
    rows = rows[(rows["impl"] == "triton_v2") & (rows["seqlen"] == 8192) & rows["cap_gib"].notna()]
    taken = rows.set_index(["checkpointing", "chunked_loss"])["reserved_gib"]
    assert f"which took {taken[True, True]:.1f} GiB" in README and taken[True, True] < 7
    assert f"without remedies, which took {taken[False, False]:.1f} GiB" in README
    ladder_rows = benchmark.reference_results(table="ladder")
    longest = ladder_rows[ladder_rows["model"] == "124M"]["seqlen"].max()
    assert f"{longest:,} tokens with all of them" in README


# --- no network -------------------------------------------------------------------------------------------------


def test_a_download_that_breaks_off_gives_random_weights_and_says_so(monkeypatch):
    from transformers import GPT2LMHeadModel

    def from_pretrained(name, *, local_files_only=False, **_):
        raise OSError("not in the cache" if local_files_only else "[Errno 28] No space left on device")

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", from_pretrained)
    monkeypatch.setattr(models, "_why_no_hub", lambda name, seconds: None)
    model, says = models.gpt2_trained_or_not("124M", otherwise="nano")
    assert model.config.lab_size == "nano"
    assert "No space left on device" in says and "random weights" in says


# --- an interrupt, and cells out of order -----------------------------------------------------------------------


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_training_without_a_bar_that_was_interrupted_says_so(capsys):
    def batches():
        yield torch.zeros(1, 8, dtype=torch.int64)
        raise KeyboardInterrupt

    model = models.gpt2("nano", n_positions=8, vocab_size=16, attention="sdpa")
    assert training.train(model, batches(), steps=3, progress=False).interrupted
    assert capsys.readouterr().out == "Interrupted after 1 of 3 steps.\n"


def test_a_sweep_that_was_interrupted_says_so(capsys):
    table = benchmark.sweep({"impatient": interrupted}, [16, 32], heads=1, head_dim=16, seconds_per_point=0.01)
    assert set(table["status"]) == {"unsupported"} and len(table) == 2
    assert "Interrupted: 0 of 2 points were reached" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [False, True])
def test_a_sweep_of_models_and_a_ladder_that_were_interrupted_say_so(kept, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model_benchmark, "_attempt", interrupted)
    folder = tmp_path / "rows" if kept else None
    table = model_benchmark.measure_models(
        ["nano"], ["eager"], [8], works=["step"], batch=1, vocab_size=64, folder=folder
    )
    assert list(table["reason"]) == ["not reached before the sweep was interrupted"]
    assert model_benchmark.side_by_side(table, "step").to_numpy().tolist() == [["–"]]
    assert f"Run this cell again {'to go on' if kept else 'for all of them'}." in capsys.readouterr().out
    ladder.ladder(("124M",), 16.0, rungs=ladder.RUNGS[:1], folder=folder, find=interrupted)
    said = "run this cell again to go on" if kept else "the table has only those"
    assert f"Interrupted after 0 of 1 rungs: {said}" in capsys.readouterr().out


def test_a_comparison_of_losses_that_was_interrupted_gives_no_half_of_it():
    def batches(seed):
        yield torch.zeros(1, 8, dtype=torch.int64)
        raise KeyboardInterrupt

    def make_model(attention, seed):
        return models.gpt2("nano", n_positions=8, vocab_size=16, attention=attention)

    with pytest.raises(KeyboardInterrupt):
        parity.loss_parity(make_model, batches, ("sdpa",), steps=3)


@pytest.mark.parametrize("part", study.PARTS)
def test_a_study_that_was_interrupted_says_so(part, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, f"_{part}", interrupted)
    monkeypatch.setattr(study, "_ask_for_a_gpu", lambda: None)
    assert study.run([part, "--out", str(tmp_path)]) == INTERRUPTED
    assert "Interrupted: the table that was being made was not written." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", [lambda: training.train(None, [], steps=1), lambda: training.evaluate(None, [])])
def test_a_model_whose_memory_was_freed_is_told(function):
    with pytest.raises(TypeError, match="run the cell again that makes it"):
        function()


INTERRUPT = """
from labutils.benchmark import sweeping

measure_rounds = sweeping.measure_rounds

def interrupted_after_the_first_point(*args, **kwargs):
    yield next(measure_rounds(*args, **kwargs))
    raise KeyboardInterrupt

sweeping.measure_rounds = interrupted_after_the_first_point
"""


def test_cells_below_an_interrupted_sweep_run_on(tmp_path):
    notebook = nbformat.read(ROOT / "01-Setup_and_Comparison.ipynb", as_version=4)
    first = next(number for number, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    last = next(number for number, cell in enumerate(notebook.cells) if cell.get("id") == "error-2")
    del notebook.cells[last + 1 :]
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(INTERRUPT))
    environment = environment_for_kernels() | {"LABUTILS_STATE": str(tmp_path / "progress.json")}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=environment)
    sweeps = [cell for cell in notebook.cells if "benchmark.sweep(" in cell.source]
    assert sweeps and all("Interrupted: 1 of" in str(cell.outputs) for cell in sweeps)
