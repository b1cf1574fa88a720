"""tools/targets.py: what is measured for the requirements, and how made-up and stored rows are judged."""

import ast
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import required_speed
import targets
import without_features
from labutils import benchmark, runtime
from labutils.attention import interface
from labutils.attention.kernels import flash_v2, flash_v2_backward
from labutils.attention.kernels.options import Options
from labutils.attention.tuning import compiled
from labutils.benchmark import environment, sweeping
from labutils.benchmark.points import Point
from labutils.benchmark.tables import as_table
from labutils.benchmark.timing import Timing
from labutils.commands.arguments import INTERRUPTED

ON_CPU = pytest.mark.skipif(not runtime.interpreted, reason="about a machine without a GPU; this one has one")
ENVIRONMENT = {"gpu": "Some GPU", "torch": "2.13.0", "triton": "3.7.1", "date": "2026-11-21"}


def base(point):
    """Times that meet every target: twice as fast as FA2."""
    work = point.batch * point.heads * point.seqlen**2 * point.head_dim * (2.5 if point.which == "bwd" else 1)
    return work * 1e-12 * (0.5 if point.causal else 1) * (2 if point.impl in required_speed.FA2 else 1)


def table(time=base, leave_out=lambda point: False):
    rows = {
        point: {"ms": time(point), "spread_ms": 0.01 * time(point), "status": "ok", "reason": ""}
        for point in required_speed.points()
        if not leave_out(point)
    }
    df = as_table(rows)
    df.attrs.update(environment=ENVIRONMENT, machine="Some GPU")
    return df


def features(ratio=1.01):
    return pd.DataFrame(
        [(which, d, causal, ratio, 1.0, 0.01) for d in (64, 128) for causal in (0, 1) for which in ("fwd", "bwd")],
        columns=required_speed.FEATURE_COLUMNS,
    )  # fmt: skip


def host(ratio=1.4):
    rows = [(d, causal, 10 * ratio, 10.0) for d in (64, 128) for causal in (False, True)]
    return pd.DataFrame(rows, columns=required_speed.HOST_COLUMNS)


def judged(**changes):
    found = required_speed.assess(**{"table": table(), "features": features(), "host": host()} | changes)
    return {finding.what: finding for finding in found}


# ------------------------------------------------------------------------------------------------------------
# What is measured
# ------------------------------------------------------------------------------------------------------------


def test_the_points_are_the_grid_of_the_targets():
    points = required_speed.points()
    assert len(points) == len(set(points)) == 24 * 3 + 24 + 8 + 12
    grid = {(p.head_dim, p.causal, p.seqlen) for p in points if p.impl == "sdpa_flash" and p.which == "bwd"}
    assert grid == {(d, mask, n) for d in (64, 128) for mask in (False, True) for n in (1024, 4096, 16384)}
    assert all(p.heads * p.head_dim == 2048 and p.batch == 16384 // p.seqlen for p in points)
    assert {p.which for p in points if p.impl == required_speed.GQA} == {"fwd"}
    places = [p.inputs() for p in points]
    assert all(places.index(place) + places.count(place) - 1 == len(places) - 1 - places[::-1].index(place)
               for place in set(places))  # the same inputs are made once  # fmt: skip


def test_shared_key_heads_are_what_it_says(monkeypatch):
    q, k, v = torch.randn(3, 1, 5, 16, 8).unbind()
    monkeypatch.setattr(interface, "flash_attn_func", lambda q, k, v, **options: (k, v, options))
    call = required_speed.implementations()[required_speed.GQA]
    ks, vs, options = call(q, k, v, causal=True)
    assert ks.shape == vs.shape == (1, 5, 2, 8) and ks.is_contiguous() and options["causal"] is True
    assert torch.equal(ks, k[:, :, ::8]) and torch.equal(vs, v[:, :, ::8])
    again = call(q, k, v)
    assert again[0] is ks and again[1] is vs  # no copy is timed
    assert torch.equal(call(q, v, k)[0], v[:, :, ::8])


def test_time_issuing_counts_calls():
    calls = []
    microseconds = benchmark.time_issuing(lambda: calls.append(1), calls=100)
    assert len(calls) == 110 and 0 < microseconds < 1e5


@pytest.mark.parametrize("causal", [False, True])
def test_plain_kernels_compute_the_same(causal):
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 40, 4, 16, generator=g).to(runtime.device) for _ in range(4))
    k, v = k[:, :, :2], v[:, :, :2]
    options = Options(0.25, window_right=0 if causal else None)

    def both():
        out, lse = flash_v2.forward(q, k, v, options)
        return out, lse, *flash_v2_backward.backward(dout, q, k, v, out, lse, options)

    expected = both()
    kernel = flash_v2._forward_kernel
    with without_features.plain_kernels():
        assert flash_v2._forward_kernel is not kernel
        for mine, theirs in zip(both(), expected):
            assert torch.equal(mine, theirs)
        with pytest.raises(ValueError, match="softcap, window_left: a kernel without features"):
            flash_v2.forward(q, k, v, Options(0.25, (3, None), softcap=2.0))
    assert flash_v2._forward_kernel is kernel


def test_plain_kernels_leave_no_files(tmp_path):
    program = "import without_features\nwith without_features.plain_kernels():\n    pass"
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)
    assert list(tmp_path.iterdir()) == []


def test_plain_sources_have_no_feature_left():
    for module in ("flash_v2", "flash_v2_backward"):
        names = {
            node.id for node in ast.walk(ast.parse(without_features.sources()[module])) if isinstance(node, ast.Name)
        }
        assert {"softmax_scale", "window_right"} <= names and not without_features.FEATURES & names


def test_features_switched_off_leave_next_to_nothing_in_the_machine_code():
    ours = compiled.Request("forward", 64, torch.float16, (9, 0))  # causal: without a mask the two are the same
    [[one]], [[twin]] = compiled.resources_of([ours], binaries=True), without_features.plain_resources([ours])
    assert 100 < twin.instructions <= one.instructions <= 1.02 * twin.instructions
    assert one.registers == pytest.approx(twin.registers, abs=8)
    assert (one.spilled_bytes, one.shared_bytes) == (twin.spilled_bytes, twin.shared_bytes)
    with pytest.raises(ValueError, match="plain kernels have no features"):
        without_features.plain_resources([replace(ours, program="decode")])


@ON_CPU
def test_nothing_is_timed_without_a_gpu(capsys, tmp_path):
    for measure in (required_speed.host_times, lambda: next(required_speed.feature_costs())):
        with pytest.raises(benchmark.Unsupported):
            measure()
    assert targets.run(["--out", str(tmp_path / "out")]) == 1
    assert "there is no GPU to time kernels on" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------
# What is required
# ------------------------------------------------------------------------------------------------------------


def test_rows_that_meet_everything():
    findings = judged()
    assert len(findings) == 15 and all(finding.met for finding in findings.values())
    assert required_speed.passed(findings.values())
    assert findings["forward over sdpa_flash, geometric mean"].measured == "2.000 x"


def ours(p, which):
    return p.impl == "triton_v2" and p.which == which


MISSED = [
    ("forward over sdpa_flash, geometric mean", 1.34, lambda p: ours(p, "fwd"), "1.493 x"),
    (
        "backward over flash_attn, every point",
        2.5,
        lambda p: ours(p, "bwd") and (p.head_dim, p.causal, p.seqlen, p.dtype) == (64, True, 4096, "float16"),
        "0.800 x at D 64, causal, N 4,096",
    ),
    (
        "backward in bf16 beside fp16",
        1.06,
        lambda p: ours(p, "bwd") and p.dtype == "bfloat16" and p.seqlen == 1024,
        "1.060 x at D 64, full",
    ),
    (
        "forward with 8 query heads a key head, beside one",
        1.03,
        lambda p: p.impl == required_speed.GQA and p.head_dim == 128,
        "1.030 x at D 128, full, N 1,024 (spread 0.02",
    ),
    (
        "forward at N = 4,095, beside 4,096",
        1.11,
        lambda p: p.seqlen == 4095 and p.causal,
        "1.110 x at D 64, causal, N 4,095",
    ),
]


@pytest.mark.parametrize("what, factor, where, measured", MISSED, ids=[case[0] for case in MISSED])
def test_each_target_can_be_missed(what, factor, where, measured):
    findings = judged(table=table(lambda point: base(point) * (factor if where(point) else 1)))
    assert findings[what].met is False and measured in findings[what].measured
    assert not required_speed.passed(findings.values())


def test_what_is_within_the_limits_is_met():
    within = {
        "bfloat16": lambda p: 1.049 if p.dtype == "bfloat16" else 1,
        "shared": lambda p: 1.015 if p.impl == required_speed.GQA else 1,  # the spread of both is 0.02
        "odd": lambda p: 1.099 if p.seqlen == 4095 else 1,
    }
    for slower in within.values():
        assert all(f.met for f in judged(table=table(lambda point, s=slower: base(point) * s(point))).values())


def test_features_and_host_time():
    what = "features switched off, beside kernels without them"
    assert judged(features=features(1.019))[what].met
    assert not judged(features=features(1.021))[what].met
    what = "host time of a forward call, beside PyTorch's attention"
    assert judged(host=host(1.5))[what].met and not judged(host=host(1.51))[what].met
    assert "1.51 x: 15.1 and 10.0 us" in judged(host=host(1.51))[what].measured


def test_what_was_not_measured_is_not_met_and_says_so():
    findings = judged(features=None, host=host().iloc[:3])
    assert findings["features switched off, beside kernels without them"].measured == "not measured: 0 of 8 rows"
    assert findings["host time of a forward call, beside PyTorch's attention"].measured == "not measured: 3 of 4 rows"
    assert not required_speed.passed(findings.values())
    one = judged(table=table(leave_out=lambda p: p.impl == required_speed.GQA and p.seqlen == 1024))
    assert one["forward with 8 query heads a key head, beside one"].measured == (
        "not measured: 8 of 12 pairs of points are there"
    )
    # flash-attn has to be built: its absence is said, and is no failure.
    without = judged(table=table(leave_out=lambda p: p.impl == "flash_attn"))
    missing = [finding for finding in without.values() if finding.met is None]
    assert len(missing) == 4 and all(finding.optional for finding in missing)
    assert required_speed.passed(without.values())
    failed = table()
    failed.loc[failed["impl"] == "sdpa_flash", ["ms", "status"]] = [math.nan, "oom"]
    assert judged(table=failed)["forward over sdpa_flash, every point"].met is None


def test_rows_beside_the_grid_are_left_out_and_doubles_refused():
    more = pd.concat([table(), table(lambda point: 1e-9).assign(batch=3), table(lambda point: 1e-9).assign(seqlen=512)])
    assert required_speed.assess(more, features(), host()) == required_speed.assess(table(), features(), host())
    with pytest.raises(ValueError, match="triton_v2, fwd: a point is there twice"):
        required_speed.assess(pd.concat([table(), table()]))


def test_a_row_of_features():
    ours, theirs = [Timing(1.02, 0.0), Timing(1.04, 0.0)], [Timing(1.0, 0.01), Timing(1.0, 0.0)]
    row = required_speed.feature_row("fwd", 64, True, ours, theirs)
    assert (row["with_ms"], row["without_ms"]) == (pytest.approx(1.03), 1.0) and row["spread"] == pytest.approx(0.03)


def test_the_stored_rows_of_the_h200():
    stored = benchmark.reference_results(dtype=None)
    findings = {finding.what: finding for finding in required_speed.assess(stored)}
    for which, name in (("fwd", "forward"), ("bwd", "backward")):
        ratios = []
        for d in (64, 128):
            for causal in (False, True):
                for n in (1024, 4096, 16384):
                    at = (stored["pass"] == which) & (stored["dtype"] == "float16") & (stored["head_dim"] == d)
                    at &= (stored["causal"] == causal) & (stored["seqlen"] == n)
                    ms = stored[at].set_index("impl")["ms"]
                    ratios.append(ms["sdpa_flash"] / ms["triton_v2"])
        mean = np.exp(np.mean(np.log(ratios)))
        finding = findings[f"{name} over sdpa_flash, geometric mean"]
        assert finding.measured == f"{mean:.3f} x" and finding.met == (mean >= 1.5)
        finding = findings[f"{name} over sdpa_flash, every point"]
        assert finding.measured.startswith(f"{min(ratios):.3f} x at ") and finding.met == (min(ratios) >= 1)
    assert findings[f"forward at N = {required_speed.ODD:,}, beside {required_speed.EVEN:,}"].met is None


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose times are made up; `interrupt_at` interrupts before that many points."""
    state = {"interrupt_at": None, "measured": []}

    def measure(points, implementations, rows, *, rounds, **_):
        assert set(implementations) >= {point.impl for point in points}
        for point in points:
            if point in rows:
                continue
            if len(state["measured"]) == state["interrupt_at"]:
                raise KeyboardInterrupt
            state["measured"].append(point)
            rows[point] = {"ms": base(point), "spread_ms": 0.01 * base(point), "status": "ok", "reason": "",
                           "rounds_ms": ";".join([str(base(point))] * rounds)}  # fmt: skip
            yield rounds

    monkeypatch.setattr(runtime, "device", torch.device("cuda"))
    monkeypatch.setattr(environment, "environment", lambda: dict(ENVIRONMENT))
    monkeypatch.setattr(sweeping, "measure_rounds", measure)
    monkeypatch.setattr(required_speed, "host_times", lambda: host().to_dict("records"))
    monkeypatch.setattr(required_speed, "feature_costs", lambda **_: iter(features().to_dict("records")))
    return state


def test_the_command_measures_judges_and_writes(gpu, tmp_path, capsys):
    out = tmp_path / "out"
    assert targets.run(["--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "All targets are met." in printed and printed.count("\nmet ") == 15
    stored = json.loads((out / "targets.json").read_text())
    assert stored["passed"] is True and stored["environment"]["gpu"] == "Some GPU" and len(stored["targets"]) == 15
    assert len(stored["host"]) == 4 and len(stored["features"]) == 8
    before = (out / "targets.json").read_text()
    assert targets.run(["--of", str(out)]) == 0 and (out / "targets.json").read_text() == before
    assert targets.run(["--out", str(out)]) == 2  # it holds rows already
    assert "--resume" in capsys.readouterr().err
    host(1.6).to_csv(out / "host.csv", index=False)
    assert targets.run(["--of", str(out)]) == 1
    assert "NOT MET      host time of a forward call" in capsys.readouterr().out


def test_the_command_goes_on_after_an_interrupt(gpu, tmp_path, capsys):
    out = tmp_path / "out"
    gpu["interrupt_at"] = 10
    assert targets.run(["--out", str(out)]) == INTERRUPTED
    assert "--resume measures the rest" in capsys.readouterr().out
    assert len(benchmark.read_results(out)) == 10
    gpu["interrupt_at"] = None
    assert targets.run(["--out", str(out), "--resume"]) == 0
    assert len(gpu["measured"]) == len(required_speed.points())


def test_stored_rows_are_judged_without_a_gpu(capsys, tmp_path):
    assert targets.run(["--of", str(benchmark.RESULTS / "nvidia_h200")]) == 1
    printed = capsys.readouterr().out
    assert "NVIDIA H200" in printed and "not measured forward at N = 4,095" in printed
    assert all(f"NOT MET      {name} over sdpa_flash, geo" in printed for name in ("forward", "backward"))  # see README
    assert targets.run(["--of", str(tmp_path)]) == 2 and "has no attention.csv" in capsys.readouterr().err
    assert targets.run(["--of", str(tmp_path), "--resume"]) == 2


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n"])
def test_damaged_tables_are_told_by_their_name(gpu, content, tmp_path, capsys):
    assert targets.run(["--out", str(tmp_path)]) in (0, 1)
    (tmp_path / "host.csv").write_text(content)
    for asked in (["--of", str(tmp_path)], ["--out", str(tmp_path), "--resume"]):
        assert targets.run(asked) == 2
        assert "host.csv" in (said := capsys.readouterr().err) and "--resume measures it again" in said


@pytest.mark.gpu
def test_what_the_sweep_does_not_measure_on_this_gpu(monkeypatch):
    monkeypatch.setattr(required_speed, "HEAD_DIMS", (64,))
    rows = list(required_speed.feature_costs(rounds=1, seconds=0.01))
    assert len(rows) == 4 and all(row["with_ms"] > 0 and row["without_ms"] > 0 for row in rows)
    rows = required_speed.host_times(calls=100)
    assert len(rows) == 2 and all(0 < row["ours_us"] < 1e4 and 0 < row["sdpa_us"] < 1e4 for row in rows)
    point = next(p for p in required_speed.points() if p.impl == required_speed.GQA)
    assert isinstance(point, Point)
