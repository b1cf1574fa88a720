"""`python -m labutils bench` as its user runs it: a process, and the files that it leaves."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pandas as pd
import pytest
import torch

from labutils import benchmark, runtime
from labutils.__main__ import main
from labutils.attention import backends
from labutils.benchmark import points
from labutils.commands import bench

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", ""),
}
SMALL = ["--heads", "2", "--batch", "1", "--head-dims", "16", "--seconds", "0.02", "--warm-up", "0"]
ON_CPU = pytest.mark.skipif(not runtime.interpreted, reason="about a machine without a GPU; this one has one")


def heed_interrupts():
    """A shell starts what runs in the background with interrupts ignored, and that would be inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments, **options):
    command = [sys.executable, "-m", "labutils", "bench", *map(str, arguments)]
    options = {"preexec_fn": heed_interrupts} | options
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run(*arguments):
    return finish(start(*arguments))


def when_rows(process, path, count):
    """Waits until the file holds that many rows, as somebody reads it who knows nothing of the process."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was interrupted"
        if path.exists() and len(rows := pd.read_csv(path)) >= count:
            return rows
        time.sleep(0.01)
    raise AssertionError(f"no {count} rows in two minutes")


def test_a_sweep_writes_tables_and_figures(tmp_path):
    out = tmp_path / "results"
    asked = ["--impls", "naive,sdpa_math,flash_attn,triton_v2", "--seqlens", "64,32", "--pass", "fwd,bwd"]
    status, printed, err = run(*asked, "--causal", "--full", "--dtype", "float32", *SMALL, "--out", out, "--rounds", 2)
    assert status == 0, err
    df = benchmark.read_results(out)
    assert list(df.columns) == list(benchmark.COLUMNS)
    assert len(df) == 4 * 2 * 2 * 2 and list(df["seqlen"][:8]) == [32] * 4 * 2
    assert list(df["causal"]) == [False] * 16 + [True] * 16
    ok = df[df["impl"].isin(["naive", "sdpa_math"])]
    assert (ok["status"] == "ok").all() and (ok[["ms", "tflops", "peak_mib"]] > 0).all(axis=None)
    assert (ok["max_error"] < 1e-4).all() and (ok["rounds_ms"].str.count(";") == 1).all()
    for table in (df, pd.DataFrame(json.loads((out / "attention.json").read_text())["rows"])):
        assert "+".join(table.columns).startswith("+".join(benchmark.SCHEMAS["attention"]))
        assert len(table) == 32
    made = json.loads((out / "environment.json").read_text())["attention"]
    assert made["torch"] and made["date"] and made == df.attrs["environment"]
    for what in ("time", "memory"):
        for which in ("fwd", "bwd"):
            for mask in ("full", "causal"):
                name = f"{what}_{which}_float32_d16_{mask}"
                assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
                assert "<svg" in (out / f"{name}.svg").read_text()
                assert f"{name}.png" in printed
    assert "bwd, float32, D = 16, causal" in printed and "peak MiB" in printed
    assert not list(out.glob(".*"))


@ON_CPU
def test_no_time_of_the_interpreter_is_printed_or_written(tmp_path):
    status, printed, err = run("--impls", "triton_v1,triton_v2", "--seqlens", "32", *SMALL, "--out", tmp_path / "out")
    assert status == 0, err
    df = benchmark.read_results(tmp_path / "out")
    assert (df["status"] == "unsupported").all() and (df["reason"].str.contains("interpreter")).all()
    assert df[["ms", "tflops", "spread_ms", "peak_mib"]].isna().all(axis=None) and (df["rounds_ms"] == "").all()
    assert (df["max_error"] < 1e-4).all()  # that was measured
    rows = [line.split() for line in printed.splitlines() if line.startswith("  triton")]
    assert [row[:5] for row in rows] == [[name, "32", "1", "2", "unsupported"] for name in ("triton_v1", "triton_v2")]
    assert "it runs in Triton's interpreter on this machine, where a time means nothing" in printed
    assert not list((tmp_path / "out").glob("*.png"))  # there is nothing to draw


@ON_CPU
def test_without_arguments_a_cpu_measures_naive_against_its_kernels():
    points = bench._plan(bench.parser().parse_args([]))
    assert {point.impl for point in points} == {"naive", "sdpa_math", "sdpa_flash"}
    assert {(point.batch, point.heads, point.which, point.causal) for point in points} == {(1, 4, "fwd", False)}


MANY = [
    "--impls",
    "naive,sdpa_math",
    "--seqlens",
    ",".join(str(n) for n in range(64, 320, 32)),
    *SMALL,
    "--rounds",
    "1",
    "--seconds",
    "0.1",
]


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_an_interrupted_sweep_is_readable_and_goes_on(tmp_path, signal_):
    out = tmp_path / "out"
    process = start(*MANY, "--write", "json", "--out", out)
    when_rows(process, out / "attention.csv", 3)
    process.send_signal(signal_)
    status, printed, err = finish(process)
    if signal_ == signal.SIGINT:
        assert status == 130, err
        assert "Traceback" not in err and "--resume measures the rest" in printed
    else:
        assert status == -signal.SIGKILL
    before = benchmark.read_results(out)
    assert 3 <= len(before) < 16
    assert (before["status"] == "ok").all() and before["ms"].notna().all()

    status, printed, err = run(*MANY, "--write", "json", "--out", out, "--resume")
    assert status == 0, err
    assert f"16 points, {len(before)} of them in" in printed
    after = benchmark.read_results(out)
    assert len(after) == 16 and not after.duplicated(list(points.KEY)).any()
    pd.testing.assert_frame_equal(after.head(len(before)), before, check_dtype=False)  # nothing was measured twice
    stamp = (out / "attention.csv").read_bytes()
    status, printed, _ = run(*MANY, "--write", "none", "--out", out, "--resume")
    assert status == 0 and "16 points, 16 of them in" in printed
    assert (out / "attention.csv").read_bytes() == stamp


@pytest.fixture
def bench_here(capsys):
    """Runs the command in this process, which spares its start: (status, stdout, stderr)."""

    def call(*arguments):
        status = main(["bench", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def test_another_environment_stops_it(tmp_path, bench_here):
    asked = ["--impls", "naive", "--seqlens", "32", *SMALL, "--write", "none", "--out", tmp_path]
    assert bench_here(*asked)[0] == 0
    path = tmp_path / "environment.json"
    stored = json.loads(path.read_text())
    stored["attention"]["torch"] = "1.0"
    path.write_text(json.dumps(stored))
    before = (tmp_path / "attention.csv").read_bytes()
    status, _, err = bench_here(*asked, "--resume")
    assert status == 2 and "torch: 1.0, now " in err and "--out" in err
    status, _, err = bench_here(*asked)
    assert status == 2 and "--resume" in err
    assert (tmp_path / "attention.csv").read_bytes() == before


def test_other_settings_stop_it(tmp_path, bench_here):
    asked = ["--impls", "naive", "--write", "none", "--out", tmp_path, *SMALL, "--rounds", 1, "--seqlens"]
    assert bench_here(*asked, 32)[0] == 0
    path = tmp_path / "environment.json"
    stored = json.loads(path.read_text())
    assert stored["attention"]["settings"] == {"seconds": 0.02, "rounds": 1, "warm_up": 0.0, "error_seconds": 2.0}
    before = (tmp_path / "attention.csv").read_bytes(), path.read_bytes()
    for option, was, value in [
        ("--seconds", "0.02", "0.01"), ("--rounds", "1", "2"), ("--warm-up", "0.0", "0.01"),
        ("--error-seconds", "2.0", "0.0"),
    ]:  # fmt: skip
        status, _, err = bench_here(*asked, "32,64", option, value, "--resume")
        assert status == 2 and f"other settings ({option} {was}, now {value})" in err
    assert ((tmp_path / "attention.csv").read_bytes(), path.read_bytes()) == before
    status, printed, err = bench_here(*asked, 64, "--resume")
    assert status == 0 and "is not known" not in printed, err

    del stored["attention"]["settings"]  # from before they were kept: the new rows are no reason to claim any
    path.write_text(json.dumps(stored))
    status, printed, err = bench_here(*asked, 96, "--seconds", 0, "--resume")
    assert status == 0 and "the rows in there were measured is not known" in printed, err
    assert "settings" not in json.loads(path.read_text())["attention"]


def test_reference_draws_the_stored_card(tmp_path, bench_here):
    asked = ["--impls", "naive,sdpa_math", "--seqlens", "256", "--heads", "1", "--batch", "1", "--seconds", "0.02"]
    asked += ["--rounds", 1, "--write", "svg", "--reference", "--out", tmp_path]
    status, printed, err = bench_here(*asked)
    assert status == 0, err
    (time_,) = tmp_path.glob("time_fwd_*_d64_full.svg")
    assert "naive, NVIDIA H200 (stored)" in time_.read_text()  # matplotlib leaves each text as a comment
    # Without stored rows at this shape it says so, and draws what it has.
    status, printed, err = bench_here(*asked, "--head-dims", 48, "--resume")
    assert status == 0, err
    assert "nvidia_h200 has no stored rows at D = 48" in printed
    (alone,) = tmp_path.glob("time_fwd_*_d48_full.svg")
    assert "(stored)" not in alone.read_text()


def test_against_an_earlier_sweep(tmp_path, bench_here, capsys):
    asked = ["--impls", "naive", "--seqlens", "64", *SMALL, "--write", "none"]
    assert bench_here(*asked, "--out", tmp_path / "a")[0] == 0
    asked += ["--rounds", 2]
    status, printed, err = bench_here(*asked, "--out", tmp_path / "b", "--against", tmp_path / "a")
    assert "not measured with the same settings: --rounds 3, now 2." in printed
    assert "1 points in common" in printed and status in (0, 1), err  # by what this machine's times are today

    df = benchmark.read_results(tmp_path / "a").assign(ms=2.0, spread_ms=0.01)
    assert bench._compare(df, df.assign(ms=2.05), tmp_path) == 1  # 2.4 %, and the spread does not cover it
    printed = capsys.readouterr().out
    assert "differ by up to 2.44%" in printed and "covers 0 of 1" in printed and "naive fwd" in printed
    assert "0 differ by more than 3 percent, and 1 by more than the reported spread" in printed
    assert bench._compare(df, df.assign(ms=2.05, spread_ms=0.06), tmp_path) == 0  # of either sweep, the larger one
    assert bench._compare(df, df.assign(ms=2.07, spread_ms=0.1), tmp_path) == 1  # covered, and more than 3 %
    assert "1 differ by more than 3 percent, and 0 by" in capsys.readouterr().out
    forty = pd.concat([df.assign(seqlen=64 * n) for n in range(1, 41)], ignore_index=True)
    forty.attrs = df.attrs
    for far, status in ((4, 0), (5, 1)):  # a spread is no bound: 90 % of the points are to lie within theirs
        assert bench._compare(forty, forty.assign(ms=[2.05] * far + [2.005] * (40 - far)), tmp_path) == status
        assert f"covers {40 - far} of 40" in capsys.readouterr().out
    assert bench._compare(df.assign(ms=0.05), df.assign(ms=0.09), tmp_path) == 0  # too short to be held to it
    assert "None is long enough" in capsys.readouterr().out


def test_another_environment_is_told_by_against(tmp_path, capsys):
    keys = pd.DataFrame([["naive", "fwd", "float16", 64, False, 1, 4, 16]], columns=list(points.KEY))
    first, second = (keys.assign(ms=2.0, spread_ms=0.01) for _ in range(2))
    first.attrs["environment"] = {"driver": "1", "date": "2026-01-01"}
    second.attrs["environment"] = {"driver": "1", "date": "2026-01-02"}
    bench._compare(first, second, tmp_path)
    assert "same environment" not in capsys.readouterr().out
    second.attrs["environment"]["driver"] = "2"
    bench._compare(first, second, tmp_path)
    assert "not measured in the same environment: driver: 1, now 2." in capsys.readouterr().out


@ON_CPU
def test_a_gpu_that_is_lost_stops_it_and_the_rows_so_far_are_kept(tmp_path, bench_here, monkeypatch):
    """An illegal access breaks a GPU that is simulated: the points take it for one, the tensors are the CPU's."""
    broken = []

    def wait():
        if broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def breaking(q, k, v, **_):
        if q.shape[1] == 64:
            broken.append(1)
        wait()
        return v

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    tiled = backends.BACKENDS["tiled_v2"]
    monkeypatch.setitem(backends.BACKENDS, "tiled_v2", dataclasses.replace(tiled, load=lambda: breaking))
    asked = ["--impls", "tiled_v2,naive", "--seqlens", "32,64", *SMALL, "--rounds", 1, "--write", "none"]
    asked += ["--out", tmp_path]
    with monkeypatch.context() as gpu:
        gpu.setattr(points, "runtime", types.SimpleNamespace(device=torch.device("cuda")))
        status, printed, err = bench_here(*asked)
    assert status == 1 and "the sweep stopped at tiled_v2 fwd N=64: " in err and "illegal memory access" in err
    df = benchmark.read_results(tmp_path)
    assert list(df["status"]) == ["ok", "ok", "unsupported"]
    status, printed, err = bench_here(*asked, "--resume")  # in another process, with a GPU that is well
    assert status == 0 and list(benchmark.read_results(tmp_path)["status"]) == ["ok", "ok", "unsupported", "ok"], err


def test_a_full_disk_ends_it_without_a_traceback(tmp_path):
    asked = ["--impls", "naive", "--seqlens", "32,64", *SMALL, "--rounds", 1, "--out", tmp_path]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))  # noqa: E731
    status, _, err = finish(start(*asked, "--write", "json", preexec_fn=limit))
    assert status == 1 and "Traceback" not in err and "File too large" in err and "--resume" in err
    assert len(benchmark.read_results(tmp_path)) == 2 and not list(tmp_path.glob(".*"))


def test_an_error_that_was_not_measured_is_explained():
    stored = benchmark.reference_results()
    for error, told in ((float("nan"), True), (1e-3, False)):
        table = stored.assign(max_error=error)
        table.attrs.update(stored.attrs)
        assert ("- no error: the float64 result" in bench.describe(table)) is told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impls", "flash"], "flash is not known. Choose from naive"),
        (["--seqlens", "0"], "must be 1 or more"),
        (["--seqlens", "a"], "a: it must be 1 or more, a whole number"),
        (["--seqlens", " ,"], "give at least one value"),
        (["--dtype", "int8"], "int8 is not known"),
        (["--pass", "forward"], "forward is not known"),
        (["--batch", "1", "--tokens", "64"], "not allowed with"),
        (["--hidden", "100"], "H would not be whole"),
        (["--reference", "no_such_gpu"], "no stored table no_such_gpu"),
        (["--against", "/no/such/folder"], "has no attention.csv"),
        (["--against", str(benchmark.RESULTS / "nvidia_h200"), "--heads", "3"], "none of the points that were asked"),
        (["--seconds", "abc"], "abc: it must be a number of seconds"),
        (["--rounds", "1.5"], "must be 1 or more, a whole number"),
        (["--write", "pdf"], "pdf is not known"),
        (["--write", "none,json"], "none,json: 'none' stands alone"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_measured(arguments, message, tmp_path, capsys):
    try:
        status = main(["bench", *arguments, "--out", str(tmp_path / "out")])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
