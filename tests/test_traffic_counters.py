"""ncu's text is read as it writes it; cases, kernels and units are told apart; tables hold what was found."""

import json
import os
import subprocess
import sys

import pytest

import ncu
import study
import traffic_tables
from labutils import analysis, benchmark, runtime
from labutils.analysis import counters
from labutils.benchmark import environment
from labutils.commands.arguments import INTERRUPTED

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def launch(number, kernel, **values):
    """The lines that ncu writes for one launch, thousands separated by commas."""
    units = {"dram": "byte", "lts_": "sector", "l1te": "byte"}
    lines = []
    for ours, value in values.items():
        metric = ncu.METRICS[ours]
        unit = "" if metric.endswith(".ratio") else units[metric[:4]]
        text = value if isinstance(value, str) else f"{value:,}"
        lines.append(
            f'"{number}","4711","python3.12","127.0.0.1","{kernel}","1","7","(128, 1, 1)","(64, 1, 1)","0","9.0",'
            f'"Command line profiler metrics","{metric}","{unit}","{text}"'
        )
    return "\n".join(lines)


def text_of(*launches):
    """What ncu writes: messages of its own, the header, launches."""
    return "\n".join(
        [
            "==PROF== Connected to process 4711 (/usr/bin/python3.12)",
            '==PROF== Profiling "_mark" - 0: 0%....50%....100% - 3 passes',
            HEADER,
            *launches,
            "==PROF== Disconnected from process 4711",
        ]
    )


TRAFFIC = text_of(
    launch(0, "_mark", dram_read_bytes=1_024, dram_write_bytes=0),
    launch(1, "void at::native::elementwise_kernel<128, 4>(int, T1)", dram_read_bytes=7_000, dram_write_bytes=1),
    launch(
        2,
        "_forward_kernel",
        dram_read_bytes=12_345_678,
        dram_write_bytes=2_097_152,
        l2_read_sectors=1_000,
        l2_write_sectors=10,
        l1_filled_bytes="n/a",
        load_sectors_per_request=15.5,
    ),
    launch(3, "_mark", dram_read_bytes=1_024, dram_write_bytes=0),
    launch(4, "_dq_kernel", dram_read_bytes=100, dram_write_bytes=10),
    launch(5, "_dkdv_kernel", dram_read_bytes=200, dram_write_bytes=20),
)


def test_ncus_text_becomes_a_row_for_each_launch():
    found = ncu.parse_ncu(TRAFFIC)
    assert list(found["launch"]) == list(range(6))
    assert list(found["kernel"])[:3] == ["_mark", "void at::native::elementwise_kernel<128, 4>", "_forward_kernel"]
    row = found.set_index("kernel").loc["_forward_kernel"]
    assert row["dram__bytes_read.sum"] == 12_345_678
    assert row["l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio"] == 15.5
    assert row.isna()["l1tex__m_xbar2l1tex_read_bytes.sum"]


def test_units_are_undone_and_unknown_ones_refused():
    line = launch(0, "k", dram_read_bytes="2.5").replace('"byte"', '"Mbyte"')
    assert ncu.parse_ncu(text_of(line))["dram__bytes_read.sum"].tolist() == [2.5e6]
    with pytest.raises(ValueError, match="'furlong'"):
        ncu.parse_ncu(text_of(line.replace("Mbyte", "furlong")))


def test_closed_counters_and_empty_output_are_told():
    with pytest.raises(RuntimeError, match="run as root"):
        ncu.parse_ncu("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters")
    with pytest.raises(RuntimeError, match="no kernel: ==WARNING== No kernels were profiled"):
        ncu.parse_ncu("==WARNING== No kernels were profiled.")


def test_cases_lie_between_marks_and_kernels_are_chosen_by_name():
    first, second = ncu.by_case(ncu.parse_ncu(TRAFFIC))
    assert list(second["kernel"]) == ["_dq_kernel", "_dkdv_kernel"]
    own = ncu.summed(first, "_forward_kernel")
    assert own["kernels"] == 1 and own["dram_read_bytes"] == 12_345_678
    assert own["l2_read_bytes"] == 32_000 and own["load_sectors_per_request"] == 15.5
    assert ncu.summed(first)["dram_read_bytes"] == 12_345_678 + 7_000
    with pytest.raises(RuntimeError, match=r"no _dq_kernel, but .*_forward_kernel"):
        ncu.summed(first, "_dq_kernel")
    with pytest.raises(RuntimeError, match="and no mark"):
        ncu.by_case(ncu.parse_ncu(text_of(launch(0, "other", dram_read_bytes=1))))


def test_a_planned_table_takes_what_was_measured(monkeypatch, tmp_path):
    """From the plan to the file: only ncu itself is left out."""
    blocks = {"v2": (64, 64), "dq": (64, 64), "dkdv": (64, 64)}
    plan = traffic_tables.planned_traffic(
        ["triton_v2", "triton_v2_dq", "triton_v2_dkdv"], [256], heads=2, blocks=blocks
    )
    asked = []

    def run(program, keep):
        asked.append((program[2], *json.loads(program[3])))
        return ncu.by_case(ncu.parse_ncu(TRAFFIC))

    monkeypatch.setattr(ncu, "run_under_ncu", run)
    table, launches = traffic_tables.measure_traffic(plan)
    table = table.set_index("impl")
    [(function, cases)] = asked
    assert function == "attention" and [case["pass"] for case in cases] == ["fwd", "bwd"]
    assert {case["call"] for case in cases} == {"triton_v2"} and cases[0]["seqlen"] == 256
    assert table.loc["triton_v2", "measured_bytes"] == 12_345_678 + 2_097_152
    assert table.loc["triton_v2_dq", "measured_bytes"] == 110 and table.loc["triton_v2_dkdv", "measured_bytes"] == 220
    assert list(launches["kernel"]) == ["elementwise_kernel", "_forward_kernel", "_dq_kernel", "_dkdv_kernel"]
    assert list(launches["dram_read_bytes"]) == [7_000, 12_345_678, 100, 200]
    assert list(launches["pass"]) == ["fwd", "fwd", "bwd", "bwd"] and list(launches["launch"]) == [1, 2, 4, 5]
    assert tuple(launches.columns) == benchmark.SCHEMAS["launches"]
    path = benchmark.save_results(table.reset_index()[list(plan.columns)], tmp_path, {"gpu": "G"}, table="traffic")
    back = benchmark.read_results(tmp_path, "traffic")
    assert path.exists() and tuple(back.columns) == benchmark.SCHEMAS["traffic"]


def test_a_plan_takes_what_can_be_gone_through_once():
    planned = traffic_tables.planned_traffic(iter(["naive", "sdpa_flash"]), iter([256, 512]))
    assert list(planned["impl"]) == ["naive", "sdpa_flash"] * 2


def test_copies_that_ncu_did_not_mark_are_told(monkeypatch):
    monkeypatch.setattr(ncu, "run_under_ncu", lambda *_, **__: [])
    with pytest.raises(RuntimeError, match="2 copies ran under ncu, and it marked 0"):
        traffic_tables.measure_coalescing(counters.planned_coalescing([1, 2]))


@pytest.mark.skipif(not runtime.interpreted, reason="counting happens in the interpreter")
def test_counts_are_filled_in_and_equal_the_model():
    blocks = {"v1": (64, 64), "v2": (64, 64), "dq": (64, 32), "dkdv": (32, 64)}
    impls = [name for name in traffic_tables.CASES if name != "sdpa_flash"]
    plan = traffic_tables.planned_traffic(impls, [128, 256], heads=3, head_dim=16, blocks=blocks)
    counted = traffic_tables.with_counts(plan, up_to=128)
    ours = counted[(counted["impl"] != "naive") & (counted["seqlen"] == 128)]
    assert len(ours) == 4 and (ours["counted_bytes"] == ours["model_bytes"]).all()
    assert counted.drop(ours.index)["counted_bytes"].isna().all()
    with pytest.raises(ValueError, match="choose from naive"):
        traffic_tables.planned_traffic(["v3"], [128])


@pytest.mark.parametrize("program", [("attention", []), ("copies", [], 1024)])
def test_the_file_is_the_program_that_is_measured(program):
    """With no case, which needs no GPU: the script finds its modules and its function, and takes JSON."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(traffic_tables._program(*program), env=environment, check=True, timeout=300)
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(traffic_tables._program("naps"), env=environment, check=True, timeout=300, capture_output=True)


def test_the_command_line_names_what_is_measured(tmp_path):
    command = ncu.ncu_command("ncu", ncu.METRICS.values(), tmp_path / "log", ["python3", "-c", "pass"])
    assert command[0] == "ncu" and command[-3:] == ["python3", "-c", "pass"]
    assert command[command.index("--metrics") + 1].split(",") == list(ncu.METRICS.values())
    assert command[command.index("--profile-from-start") + 1] == "off"


def test_metrics_that_the_gpu_lacks_are_left_out(monkeypatch, capsys):
    """`--query-metrics` lists names without their endings."""
    listed = "\n".join(f"{name.split('.')[0]}   Counter   byte   what it is" for name in ncu.METRICS.values())

    def query(text):
        monkeypatch.setattr(ncu.subprocess, "run", lambda *a, **k: ncu.subprocess.CompletedProcess(a, 0, text, ""))
        return ncu._known_metrics("ncu")

    assert query("Device NVIDIA H200 (GH100)\n-----\n" + listed) == ncu.METRICS
    fewer = query(listed.replace("l1tex__m_xbar2l1tex_read_bytes", "other__name"))
    assert set(ncu.METRICS) - set(fewer) == {"l1_filled_bytes"} and "l1_filled_bytes" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no counter for dram_read_bytes"):
        query(listed.replace("dram__bytes_read", "other__name"))


def test_gaps_cost_whole_sectors():
    assert [counters.sectors_touched(s, 64) for s in (1, 2, 8, 16)] == [8, 16, 64, 64]
    plan = counters.planned_coalescing((1, 8), 2**12)
    assert (plan["model_bytes"] / plan["useful_bytes"]).tolist() == [1, 8]


def test_without_a_gpu_it_says_so(monkeypatch):
    if runtime.device.type == "cuda":
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="hardware counters are a GPU's"):
        traffic_tables.measure_coalescing(counters.planned_coalescing((1,), 2**12))


OURS = ["triton_v1", "triton_v2", "triton_v2_dq", "triton_v2_dkdv"]


@pytest.fixture(scope="module")
def stored():
    return benchmark.reference_results(table="traffic", dtype=None)


def test_the_stored_traffic_has_every_kernel_and_length_modelled_counted_and_measured(stored):
    wanted = {(impl, n) for impl in traffic_tables.CASES for n in traffic_tables.LENGTHS}
    assert set(zip(stored["impl"], stored["seqlen"], strict=True)) == wanted and len(stored) == len(wanted)
    measured = [name for name in stored.columns if name.startswith(("dram_", "l2_", "l1_"))]
    assert len(measured) == 5 and stored[measured].notna().all(axis=None)
    ours = stored[stored["impl"].isin(OURS)]
    assert len(ours) == 4 * len(OURS) and (ours["counted_bytes"] == ours["model_bytes"]).all()
    for row in ours.itertuples():
        model = analysis.io_bytes(
            traffic_tables.CASES[row.impl][1], batch=row.batch, heads=row.heads, seqlen=row.seqlen,
            head_dim=row.head_dim, block_m=int(row.block_m), block_n=int(row.block_n), causal=row.causal,
            per_tensor=False,
        )  # fmt: skip
        assert row.model_bytes == pytest.approx(model, rel=1e-5)  # stored with six digits


def test_the_sms_of_an_h200_moved_what_the_model_says(stored):
    """The model, by a third witness: neither by the loops nor in the interpreter, but by the GPU's counters."""
    found = counters.explained(stored).set_index("impl").loc[OURS]
    assert len(found) == 16 and found["SM / model"].to_numpy() == pytest.approx(1, rel=1e-4)
    assert (found["L2 / SM"] < 1.001).all()


def test_dram_reads_every_tensor_once_but_where_the_cache_is_too_small(stored):
    """What notebook 04 says of the differences between DRAM and the model."""
    found = counters.explained(stored)
    once = found["comes back (MiB)"].where(found["impl"] != "naive", 0) < 20
    assert found[once]["DRAM reads / once"].between(0.99, 1.02).all() and once.sum() > 15
    assert found[found["impl"] != "triton_v1"]["DRAM reads / once"].between(0.99, 1.02).all()
    v1 = found[found["impl"] == "triton_v1"].set_index("seqlen")
    assert v1.loc[4096, "DRAM reads / once"] < 1.2 and v1.loc[8192, "DRAM reads / once"] > 20
    assert (found[found["impl"] != "triton_v1"]["DRAM writes / once"] < 1.01).all()  # some stays in L2


def test_the_stored_launches_are_those_of_the_stored_traffic(stored):
    launches = benchmark.reference_results(table="launches", dtype=None)
    assert launches.attrs["environment"] == stored.attrs["environment"]
    for row in stored.itertuples():
        which, _, kernel = traffic_tables.CASES[row.impl]
        own = launches[
            (launches["impl"] == row.impl.removesuffix("_dq").removesuffix("_dkdv"))
            & (launches["pass"] == which) & (launches["seqlen"] == row.seqlen)
        ]  # fmt: skip
        own = own if kernel is None else own[own["kernel"] == kernel]
        assert len(own) == row.kernels
        for name in ("dram_read_bytes", "dram_write_bytes", "l2_read_bytes", "l2_write_bytes", "l1_filled_bytes"):
            assert own[name].sum() == pytest.approx(getattr(row, name), rel=2e-5, abs=10)


def test_the_stored_copies_with_gaps_moved_the_sectors_of_the_model():
    found = benchmark.reference_results(table="coalescing", dtype=None)
    assert list(found["stride"]) == list(counters.STRIDES)
    l2 = found["l2_read_bytes"] + found["l2_write_bytes"]
    assert l2.to_numpy() == pytest.approx(found["model_bytes"].to_numpy(), rel=1e-4)


# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.skipif(runtime.device.type == "cuda", reason="this machine has a GPU")
@pytest.mark.parametrize("part", ["traffic", "shapes", "blocks", "decoding"])
def test_the_command_says_that_it_needs_a_gpu(part, tmp_path, capsys):
    assert study.run([part, "--out", str(tmp_path), "--work", str(tmp_path / "work")]) == 2
    printed, message = capsys.readouterr()
    assert message.startswith(f"study {part}: there is no GPU") and not printed
    assert environment.why_no_gpu()[1] in message
    assert not list(tmp_path.glob("*.csv"))


def test_an_interrupt_while_counting_says_what_is_kept(tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    plan = traffic_tables.planned_traffic(["triton_v2"], [64], heads=2, head_dim=16, blocks={"v2": (32, 32)})
    benchmark.save_results(plan.assign(measured_bytes=1.0), tmp_path, {"gpu": "G"}, table="traffic")
    monkeypatch.setattr(traffic_tables, "with_counts", stop)
    assert study.run(["traffic", "--out", str(tmp_path), "--counts-only"]) == INTERRUPTED
    assert f"what was measured is in {tmp_path}" in capsys.readouterr().err
    assert benchmark.read_results(tmp_path, "traffic")["measured_bytes"].iloc[0] == 1.0


@pytest.mark.skipif(not runtime.interpreted, reason="counting happens in the interpreter")
def test_counts_can_be_added_later_without_a_gpu(tmp_path, capsys):
    plan = traffic_tables.planned_traffic(["triton_v2"], [64, 128], heads=2, head_dim=16, blocks={"v2": (32, 32)})
    benchmark.save_results(plan.assign(measured_bytes=1.0), tmp_path, {"gpu": "G"}, table="traffic")
    assert study.run(["traffic", "--out", str(tmp_path), "--counts-only", "--count-up-to", "64"]) == 0
    back = benchmark.read_results(tmp_path, "traffic")
    assert back["counted_bytes"].iloc[0] == back["model_bytes"].iloc[0] and back["counted_bytes"].isna().iloc[1]
    assert back.attrs["machine"] == "G" and "Written" in capsys.readouterr().out
    assert study.run(["traffic", "--out", str(tmp_path / "none"), "--counts-only"]) == 2
