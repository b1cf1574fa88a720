"""`python -m labutils train` as its user runs it: a process, what it prints and what it leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch

from labutils import runtime, training
from labutils.__main__ import main
from labutils.attention.backends import BACKENDS
from labutils.commands import train, train_options
from labutils.training.loop import HISTORY_COLUMNS

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
SMALL = [
    "--model.size=nano", "--model.seqlen=32", "--data.text=reference", "--data.vocab_size=300", "--data.batch_size=2",
    "--data.held_out=2",
]  # fmt: skip
ON_CPU = pytest.mark.skipif(runtime.device.type == "cuda", reason="about a machine without a GPU; this one has one")


def start(*arguments):
    command = [sys.executable, "-m", "labutils", "train", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture
def here(capsys):
    """Runs the command in this process, which spares its start: (status, stdout, stderr)."""

    def call(*arguments):
        try:
            status = main(["train", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def test_the_smoke_test_trains_says_what_ran_and_keeps_nothing(tmp_path):
    asked = ["--config", "gpt2-124m-8k", "--smoke-test", "--run.folder", tmp_path / "folder"]
    status, printed, err = finish(start(*asked))
    assert status == 0, err
    assert "Smoke test passed." in printed and "done after 20 steps" in printed
    assert any(f"({name}), 2 times" in printed for name in BACKENDS)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_an_interrupted_run_continues_to_the_same_losses(tmp_path, here, signal_):
    steps = ["--optimization.steps=400", "--run.save_every=3"]
    process = start(*SMALL, *steps, "--run.folder", tmp_path / "interrupted")
    path = tmp_path / "interrupted" / "history.csv"
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") > 8):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal_)
    status, printed, err = finish(process)
    if signal_ == signal.SIGINT:
        assert status == 130, err
        assert "The same command with --resume goes on." in printed and "Traceback" not in err
    else:
        assert status == -signal.SIGKILL
    done = torch.load(tmp_path / "interrupted" / "checkpoint.pt", weights_only=True)["steps"]
    assert 3 <= done < 400

    steps = [f"--optimization.steps={done + 4}", "--run.save_every=3"]
    status, printed, err = here(*SMALL, *steps, "--run.folder", tmp_path / "interrupted", "--resume")
    assert status == 0, err
    status, printed, err = here(*SMALL, *steps, "--run.folder", tmp_path / "whole")
    assert status == 0, err
    interrupted, whole = (pd.read_csv(tmp_path / name / "history.csv") for name in ("interrupted", "whole"))
    assert list(interrupted.columns) == list(HISTORY_COLUMNS)
    assert list(interrupted.step) == list(range(1, done + 5)) == list(whole.step)
    assert list(interrupted.loss) == list(whole.loss)  # to the last digit
    assert list(interrupted.grad_norm) == list(whole.grad_norm)


def test_what_a_run_leaves(tmp_path, here):
    folder = tmp_path / "run"
    status, printed, err = here(
        *SMALL, "--optimization.steps=2", "--optimization.implementation=sdpa", "--run.folder", folder
    )
    assert status == 0, err
    kept = json.loads((folder / "run.json").read_text())
    assert kept["status"] == "done" and kept["steps"] == 2 and sum(kept["attention"].values()) == 2
    assert kept["held_out_before"] > 0 and kept["held_out_after"] > 0 and kept["environment"]["torch"]
    # What is kept of the configuration is a configuration.
    again = train.parser().parse_args(["--config", str(folder / "config.yaml")])
    assert again.model.size == "nano" and again.optimization.steps == 2
    before = (folder / "checkpoint.pt").read_bytes()
    status, _, err = here(*SMALL, "--optimization.steps=2", "--run.folder", folder)
    assert status == 2 and "--resume" in err and (folder / "checkpoint.pt").read_bytes() == before
    status, _, err = here(*SMALL, "--optimization.lr=1", "--run.folder", folder, "--resume")
    assert status == 2 and "optimization.lr: 0.0006, now 1.0" in err


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The folder of a run of two steps, for copies of it to go on."""
    folder = tmp_path_factory.mktemp("train") / "run"
    assert main(["train", *SMALL, "--optimization.steps=2", "--run.folder", str(folder)]) == 0
    return folder


def test_a_run_goes_on_elsewhere_and_says_so(tmp_path, here, two_steps):
    folder = shutil.copytree(two_steps, tmp_path / "run")
    path = folder / "checkpoint.pt"
    stored = torch.load(path, weights_only=True)
    stored["environment"] |= {"gpu": "Some GPU", "torch": "1.0", "date": "2026-01-01"}
    torch.save(stored, path)
    status, printed, err = here(*SMALL, "--optimization.steps=3", "--run.folder", folder, "--resume")
    assert status == 0, err
    assert "another environment (gpu: Some GPU, now " in printed and f"torch: 1.0, now {torch.__version__})" in printed
    status, printed, err = here(*SMALL, "--optimization.steps=4", "--run.folder", folder, "--resume")
    assert status == 0 and "another environment" not in printed, err


@ON_CPU
def test_a_run_does_not_go_on_where_auto_means_something_else(here, monkeypatch, two_steps):
    asked = [*SMALL, "--optimization.steps=3", "--run.folder", two_steps, "--resume"]
    before = (two_steps / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as other:
        other.setattr(runtime, "capability", (9, 0))
        status, _, err = here(*asked)
    assert status == 2 and "optimization.implementation: 'sdpa', now 'labutils'" in err
    with monkeypatch.context() as other:
        other.setattr(training, "resolved_autocast", lambda *_: torch.bfloat16)
        status, _, err = here(*asked)
    assert status == 2 and "optimization.precision: 'float32', now 'bfloat16'" in err
    assert (two_steps / "checkpoint.pt").read_bytes() == before


@ON_CPU
def test_what_auto_means_may_be_asked_for_by_name(tmp_path, here, two_steps):
    folder = shutil.copytree(two_steps, tmp_path / "run")
    asked = ["--optimization.implementation=sdpa", "--optimization.precision=float32", "--run.folder", folder]
    status, printed, err = here(*SMALL, *asked, "--optimization.steps=2", "--resume")
    assert status == 0 and "All 2 steps were done before: nothing is left to train." in printed, err


def test_fewer_steps_than_were_done_are_refused(here, two_steps):
    before = {path.name: path.read_bytes() for path in two_steps.iterdir()}
    status, _, err = here(*SMALL, "--optimization.steps=1", "--run.folder", two_steps, "--resume")
    assert status == 2 and "optimization.steps=1, but" in err and "written after 2 steps" in err
    assert {path.name: path.read_bytes() for path in two_steps.iterdir()} == before


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc"])
def test_a_folder_that_cannot_be_written_to_is_told_before_the_texts(folder, tmp_path, here, monkeypatch):
    if folder == "/proc" and not Path("/proc/self").exists():
        pytest.skip("no /proc, in which nobody can make a file")
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "_texts", lambda options: pytest.fail("the texts were read first"))
    status, _, err = here(*SMALL, "--run.folder", tmp_path / folder)
    assert status == 2 and f"run.folder={tmp_path / folder} cannot be written to (" in err


def test_standard_attention_is_told_from_flash(here):
    status, printed, err = here(*SMALL, "--optimization.steps=1", "--optimization.flash_attention=false")
    assert status == 0, err
    assert "standard attention, which stores the N x N matrix (naive), 2 times" in printed


@ON_CPU
def test_force_and_the_math_fallback(here):
    """PyTorch's flash kernel for the CPU has no dropout: without a word, SDPA then takes the math backend."""
    asked = [*SMALL, "--optimization.steps=1"]
    status, printed, err = here(*asked, "--optimization.flash_attention_force=true")
    assert status == 0 and "PyTorch SDPA, flash (sdpa_flash), 2 times" in printed, err
    status, printed, err = here(*asked, "--model.dropout=0.1")
    assert status == 0 and "(sdpa_math), 2 times" in printed, err
    for switch in ("flash_attention_force", "disable_math_fallback"):
        status, printed, err = here(*asked, "--model.dropout=0.1", f"--optimization.{switch}=true")
        assert status == 1
        assert f"optimization.{switch}=true, and no kernel that it allows can run this step" in err
        assert "no dropout on a CPU" in err and "labutils check" in err and "loss" not in printed


@ON_CPU
def test_force_raises_where_something_else_ran(here, monkeypatch):
    monkeypatch.setattr(training, "attention_used", lambda *arguments, **options: {"sdpa_efficient": 2})
    status, _, err = here(*SMALL, "--optimization.flash_attention_force=true")
    assert status == 1 and "but PyTorch SDPA, memory-efficient ran" in err
    monkeypatch.setattr(training, "attention_used", lambda *arguments, **options: {"naive": 2})
    status, _, err = here(*SMALL, "--optimization.disable_math_fallback=true")
    assert status == 1 and "but standard attention, which stores the N x N matrix, ran: `python -m labutils" in err


@pytest.mark.gpu
@pytest.mark.skipif((runtime.capability or (0, 0)) < (8, 0), reason="needs a GPU of compute capability 8.0")
@pytest.mark.parametrize(
    ("implementation", "ran"), [("labutils", "triton_v2"), ("sdpa", "sdpa_flash"), ("auto", "triton_v2")]
)
def test_gpu_force_runs_a_flash_kernel(here, implementation, ran):
    asked = [*SMALL, "--optimization.steps=2", "--optimization.flash_attention_force=true"]
    status, printed, err = here(*asked, f"--optimization.implementation={implementation}")
    assert status == 0, err
    assert f"({ran}), 2 times" in printed or (ran == "sdpa_flash" and "(sdpa_cudnn), 2 times" in printed)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["auto", "float16"])
def test_gpu_a_run_goes_on_to_the_same_losses(here, tmp_path, precision):
    asked = [*SMALL, "--model.size=tiny", f"--optimization.precision={precision}"]
    assert here(*asked, "--optimization.steps=6", "--run.folder", tmp_path / "whole")[0] == 0
    assert here(*asked, "--optimization.steps=3", "--run.folder", tmp_path / "parts")[0] == 0
    assert here(*asked, "--optimization.steps=6", "--run.folder", tmp_path / "parts", "--resume")[0] == 0
    whole, parts = (pd.read_csv(tmp_path / name / "history.csv") for name in ("whole", "parts"))
    assert list(parts.loss) == list(whole.loss) and len(whole) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimization.flash_atention=true"], "flash_atention"),
        (["--model.size=7B"], "model.size"),
        (["--optimization.steps=0"], "optimization.steps=0: it must be at least 1"),
        (["--run.save_every=0"], "run.save_every=0"),
        (["--model.dropout=1.5"], "at least 0 and below 1"),
        (
            ["--optimization.flash_attention=false", "--optimization.flash_attention_force=true"],
            "leave one of them out",
        ),
        (["--optimization.flash_attention=false", "--optimization.disable_math_fallback=true"], "leave one of them"),
        (["--resume"], "give --run.folder"),
        (["--smoke-test", "--resume"], "nothing for --resume"),
        (["--data.text=/no/such/folder"], "nor a folder with two .txt files"),
        (["--run.folder=/no/such/folder", "--resume", *SMALL], "start without --resume"),
        (["--config=no_such.yaml"], "no_such.yaml is neither a file nor a configuration of the lab: gpt2-124m-8k."),
        (["--config=gpt2-1.5b"], "gpt2-1.5b is neither a file nor a configuration of the lab: gpt2-124m-8k."),
        (["--config=no/such.yaml"], "no/such.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_are_told(arguments, message, here):
    status, _, err = here(*arguments)
    assert status == 2 and message in " ".join(err.split())


def test_an_unknown_key_in_the_file_is_refused(tmp_path, here):
    (tmp_path / "wrong.yaml").write_text("optimization:\n  learning_rate: 1\n")
    status, _, err = here("--config", tmp_path / "wrong.yaml")
    assert status == 2 and "learning_rate" in err


def test_a_shipped_configuration_is_valid_and_flags_win_over_it():
    options = train.parser().parse_args(["--config", "gpt2-124m-8k", "--optimization.steps=7"])
    assert options.model.size == "124M" and options.model.seqlen == 8192 and options.optimization.steps == 7
    assert options.run.folder == "runs/gpt2-124M"
    train_options.check(options)


@pytest.mark.parametrize("name", train_options.shipped_configs())
def test_shipped_configurations_are_found_by_path_and_by_name(name):
    by_name, by_path = (
        train.parser().parse_args(["--config", x]) for x in (name, str(train_options.shipped_configs()[name]))
    )
    assert train.parser().dump(by_name) == train.parser().dump(by_path)
    assert f"configuration of the lab: {name}" in " ".join(train.parser().format_help().split())
    train_options.check(by_name)


def test_a_file_wins_over_a_shipped_configuration_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gpt2-124m-8k").write_text("model:\n  size: nano\n")
    assert train.parser().parse_args(["--config", "gpt2-124m-8k"]).model.size == "nano"


def test_the_package_is_built_with_its_configurations():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["labutils"]
    shipped = {path for pattern in patterns for path in (ROOT / "labutils").glob(pattern)}
    assert train_options.shipped_configs() and set(train_options.shipped_configs().values()) <= shipped


def test_texts_of_ones_own(tmp_path, here):
    for i, text in enumerate(["one text about attention. ", "another one about softmax. "]):
        (tmp_path / f"{i}.txt").write_text(text * 40)
    status, printed, err = here(*SMALL, "--optimization.steps=1", f"--data.text={tmp_path}")
    assert status == 0 and "Text: 1 documents" in printed, err


@ON_CPU
def test_what_notebook_03_can_do_has_flags(here, tmp_path):
    flags = ["--model.rotary=true", "--model.one_gelu=true", "--data.documents_apart=true",
             "--optimization.checkpointing=offloaded", "--optimization.optimizer=offloaded",
             "--optimization.chunked_loss=16"]  # fmt: skip
    asked = [*SMALL, "--optimization.steps=2", "--run.folder", tmp_path / "run"]
    status, printed, err = here(*asked, *flags)
    assert status == 0, err
    # A mask keeps documents apart with sdpa: that another kernel runs then is said.
    assert "done after 2 steps" in printed and "Attention that ran" in printed
    lines = (tmp_path / "run" / "config.yaml").read_text()
    assert "rotary: true" in lines and "checkpointing: offloaded" in lines and "optimizer: offloaded" in lines
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert not any("wpe" in name for name in weights)  # no table of positions
    status, _, err = here(*asked, *flags[1:], "--resume", "--optimization.steps=3")
    assert status == 2 and "model.rotary" in err
